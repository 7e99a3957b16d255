"""Of a plan's grid of activations, keys or values, the module: while a fit changes it, and before it is loaded."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from flatquant.quantizers.blocks import FrozenBlocks, LiveBlocks
from flatquant.quantizers.clip import FixedClip, NoClip
from flatquant.quantizers.levels import ActivationLevels
from flatquant.quantizers.split import SplitGrid
from flatquant.quantizers.uniform import Dynamic
from flatquant.spec import QuantSpec


def live(spec: QuantSpec, rows: Float[Tensor, "rows n"] | None = None) -> Dynamic | ActivationLevels | LiveBlocks:
    """The grid while a fit changes what it rounds.

    Args:
        rows: of some tokens, (tokens, n), where `spec.needs_rows`.
    """
    if spec.needs_rows:
        assert rows is not None, f"{spec.kind} of activations need some of them"
        return ActivationLevels.found(spec, rows)
    return Dynamic(spec) if spec.format is None else LiveBlocks(spec)


def empty(spec: QuantSpec, n: int) -> Dynamic | SplitGrid | ActivationLevels | FrozenBlocks:
    """The grid of rows of n numbers as it serves, before its tensors are loaded."""

    def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    if spec.scope == "tensor":
        return SplitGrid(spec, tensor(1), tensor(n, dtype=torch.uint8))
    if spec.needs_rows:
        return ActivationLevels(spec, tensor(spec.bits - 1))
    if spec.format is not None:
        return FrozenBlocks.empty(spec)
    return Dynamic(spec, FixedClip(tensor(2)) if spec.has_ratios else NoClip())
