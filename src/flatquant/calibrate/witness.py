"""A few windows that pass through the model beside calibration, and decide nothing: what the result is measured on.

A block is on the device twice during a run: before it is wrapped, and after it is rounded. Both times the witness sends
its windows through, so that both models' outputs exist at the end of the run without another walk over the model, also
where one block is in memory at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from flatquant import seams
from flatquant.calibrate.capture import BlockCall, capture
from flatquant.quantizers import Dynamic
from flatquant.runtime.build import SITES_SLOT
from flatquant.runtime.keyvalue import FrozenKeyValue
from flatquant.runtime.linear import FrozenSite
from flatquant.spec import BlockPlan, QuantSpec
from flatquant.transforms import Factor
from flatquant.wiring.arch import Arch, logits, submodule

_SAMPLE = 128  # tokens of the first window whose hidden states are kept after every block

Head = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Part:
    """What is rounded in a block: the activations of one site, its keys, its values, or all its weights."""

    kind: str
    block: int
    site: str | None = None

    @property
    def name(self) -> str:
        """`keys`, or `activations.mlp_in`."""
        return self.kind if self.site is None else f"{self.kind}.{self.site}"


def rounded_parts(plan: BlockPlan, index: int) -> list[Part]:
    """The parts of a block whose grids can be taken away: all but the weights."""
    found = [Part(kind="activations", block=index, site=name) for name, site in plan.sites.items() if site.activations]
    found += [Part(kind="keys", block=index)] if plan.keys else []
    return found + ([Part(kind="values", block=index)] if plan.values else [])


class Witness:
    """The hidden states of a few windows in the original and in the quantised model, block after block.

    Attributes:
        windows: int64, (N, T).
        first: hidden states before block 0, in the original basis.  # (N, T, h)
        calls: how the model calls its blocks with these windows, once they are quantised.
        original, quantised: hidden states after the last block that was seen.  # (N, T, h)
        errors: of every quantised block's outputs, relative to the original's: |difference| / |original|, mean over
            tokens. It holds what the blocks before have caused.
        alone: by block, and by name of a part, what rounding this part alone changes in the block's output, relative
            to it, on the original's inputs. None for a block that an earlier run rounded and did not look at.
        ends: final norm and output embedding of the original model.
    """

    def __init__(self, windows: Tensor) -> None:
        self.windows = windows
        self.errors: list[float] = []
        self.alone: list[dict[str, float] | None] = []

    def begin(self, model: PreTrainedModel, arch: Arch, device: torch.device, dtype: torch.dtype) -> None:
        """Embed the windows, and note the original head. Blocks need not have their tensors yet."""
        hidden, calls = capture(model, arch, self.windows)
        assert isinstance(hidden, Tensor)
        self.device, self.dtype = device, dtype
        self.first = self.original = self.quantised = hidden.to(device, dtype)
        self.calls = [call.to(device) for call in calls]
        _, calls = capture(model, arch, self._sampled(self.windows))
        self._sample_calls = [call.to(device) for call in calls]
        self._samples = [self._sampled(self.first)]  # before every block, and after the last
        self._arch = arch
        self._exact: Tensor | None = None
        self._changes: dict[str, float] = {}
        self.ends = Ends(model, arch)

    def see_original(self, index: int, block: nn.Module) -> None:
        """Send the windows through an original block, which is on the device."""
        call, hidden = self.calls[index], self.original
        out = through(block, call, hidden)
        if not bool(torch.isfinite(out).all()) and out.dtype == torch.float16:
            # Models made in bfloat16 may leave float16's range. What counts is the model, not the format it is run in.
            with torch.autocast(self.device.type, enabled=False):
                out = through(copy.deepcopy(block), call, hidden.float())
        self.original = out
        self._samples.append(self._sampled(out))

    def rotate(self, index: int, basis: Factor | None) -> None:
        """From now on, block `index` works in a rotated residual stream."""
        self.calls[index] = replace(self.calls[index], basis=basis)
        self._sample_calls[index] = replace(self._sample_calls[index], basis=basis)

    def see_unrounded(self, index: int, block: nn.Module, plan: BlockPlan) -> None:
        """Look at a folded block whose weights will be rounded next: what does each of its other grids change?"""
        parts = rounded_parts(plan, index)
        self._exact = self._sample(index, block, parts)
        self._changes = {
            part.name: relative(self._sample(index, block, [p for p in parts if p != part]), self._exact)
            for part in parts
        }

    def see_quantised(
        self, index: int, block: nn.Module, plan: BlockPlan, alone: dict[str, float] | None = None
    ) -> dict[str, float] | None:
        """Send the windows through a rounded block, and compare.

        Args:
            alone: what this returned when an earlier run rounded the block.

        Returns:
            The block's entry in `alone`.
        """
        self.quantised = through(block, self.calls[index], self.quantised)
        self.errors.append(relative(self._sampled(self.quantised), self._samples[index + 1]))
        if self._exact is not None:
            out = self._sample(index, block, rounded_parts(plan, index))
            alone = {**self._changes, "weights": relative(out, self._exact)}
            self._exact = None
        self.alone.append(alone)
        return alone

    def _sample(self, index: int, block: nn.Module, without: list[Part]) -> Tensor:
        """What a block makes of the original's inputs, without the grids of some parts.  # (1, tokens, h)"""
        with put(block, self._arch.attention, dict.fromkeys(without)):
            return through(block, self._sample_calls[index], self._samples[index])

    @staticmethod
    def _sampled(x: Tensor) -> Tensor:
        return x[:1, :_SAMPLE]


@contextmanager
def put(block: nn.Module, attention: str, parts: Mapping[Part, int | None]) -> Iterator[None]:
    """Put grids of a frozen block to other bits for a while, None for 16.

    Args:
        attention: path of the attention module inside the block.
    """
    before: list[tuple[nn.Module, str, Any]] = []
    try:
        for part, bits in parts.items():
            if part.kind == "activations":
                owner: Any = block.get_submodule(f"{SITES_SLOT}.{part.site}")
                assert isinstance(owner, FrozenSite)
            else:
                owner = seams.attached(block.get_submodule(attention))
                assert isinstance(owner, FrozenKeyValue)
            before.append((owner, part.kind, getattr(owner, part.kind)))
            symmetric = part.kind == "activations"
            grid = None if bits is None else Dynamic(QuantSpec(bits=bits, symmetric=symmetric))
            setattr(owner, part.kind, grid)
        yield
    finally:
        for owner, name, grid in reversed(before):
            setattr(owner, name, grid)


def relative(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want|, mean over tokens; infinity where something is not finite.  # of (.., h)"""
    want, got = want.float(), got.float()
    error = (got - want).norm(dim=-1) / want.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    value = float(error.mean())
    return value if value == value else float("inf")


def through(block: nn.Module, call: BlockCall, hidden: Tensor) -> Tensor:
    """All windows, one at a time, in the wider dtype of the two; kept in that of `hidden`.  # (N, T, h)

    A norm, or an expert's router, takes no inputs of another dtype than its own. Grids and transforms keep theirs.
    """
    stored = next((p.dtype for p in block.parameters()), hidden.dtype)
    work = torch.promote_types(stored, hidden.dtype)
    if stored != work:
        block.to(work)
    try:
        return torch.cat([call(block, window.to(work)) for window in hidden.split(1)]).to(hidden.dtype)
    finally:
        if stored != work:
            block.to(stored)


class Ends:
    """Final norm and output embedding of a model, as they are now."""

    def __init__(self, model: PreTrainedModel, arch: Arch) -> None:
        output = model.get_output_embeddings()
        assert isinstance(output, nn.Linear)
        self.config = model.config
        self.norm = copy.deepcopy(submodule(model, arch.final_norm))
        self.weight, self.bias = output.weight, output.bias  # a rotation of the residual stream puts others there

    def head(self, device: torch.device, dtype: torch.dtype) -> Head:
        """(.., h) -> (.., V), float32, with products in `dtype`."""
        norm = copy.deepcopy(self.norm).to(device).float()
        weight = self.weight.to(device, dtype)  # (V, h)
        bias = None if self.bias is None else self.bias.to(device, dtype)
        return lambda x: logits(self.config, F.linear(norm(x).to(dtype), weight, bias)).float()
