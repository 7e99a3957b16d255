"""A few windows that pass through the model beside calibration, and decide nothing: what the result is measured on.

A block is on the device twice during a run: before it is wrapped, and after it is rounded. Both times the witness sends
its windows through, so that both models' outputs exist at the end of the run without another walk over the model, also
where one block is in memory at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from flatquant.calibrate.capture import BlockCall, capture
from flatquant.transforms import Factor
from flatquant.wiring.arch import Arch, logits, submodule

_MARKS = 256  # tokens whose hidden states are kept for every block

Head = Callable[[Tensor], Tensor]


class Witness:
    """The hidden states of a few windows in the original and in the quantised model, block after block.

    Attributes:
        windows: int64, (N, T).
        first: hidden states before block 0, in the original basis.  # (N, T, h)
        calls: how the model calls its blocks with these windows, once they are quantised.
        original, quantised: hidden states after the last block that was seen.  # (N, T, h)
        errors: of every quantised block's outputs, relative to the original's: |difference| / |original|, mean over
            tokens. It holds what the blocks before have caused.
        rounding: of every block's outputs, likewise, what rounding its weights alone has changed.
        ends: final norm and output embedding of the original model.
    """

    def __init__(self, windows: Tensor) -> None:
        self.windows = windows
        self.errors: list[float] = []
        self.rounding: list[float | None] = []

    def begin(self, model: PreTrainedModel, arch: Arch, device: torch.device, dtype: torch.dtype) -> None:
        """Embed the windows, and note the original head. Blocks need not have their tensors yet."""
        hidden, calls = capture(model, arch, self.windows)
        assert isinstance(hidden, Tensor)
        self.device, self.dtype = device, dtype
        self.first = self.original = self.quantised = hidden.to(device, dtype)
        self.calls = [call.to(device) for call in calls]
        tokens = self.windows.numel()
        self._places = torch.linspace(0, tokens - 1, min(tokens, _MARKS), device=device).round().long()
        self._marks: list[Tensor] = []
        self._unrounded: Tensor | None = None
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
        self._marks.append(self._marked(out))

    def rotate(self, index: int, basis: Factor | None) -> None:
        """From now on, block `index` works in a rotated residual stream."""
        self.calls[index] = replace(self.calls[index], basis=basis)

    def see_unrounded(self, index: int, block: nn.Module) -> None:
        """Send the windows through a folded block whose weights will be rounded next."""
        self._unrounded = self._marked(through(block, self.calls[index], self.quantised))

    def see_quantised(self, index: int, block: nn.Module, rounding: float | None = None) -> float | None:
        """Send the windows through a rounded block, and compare.

        Args:
            rounding: what this returned when an earlier run rounded the block.

        Returns:
            The block's entry in `rounding`.
        """
        self.quantised = through(block, self.calls[index], self.quantised)
        out = self._marked(self.quantised)
        self.errors.append(relative(out, self._marks[index]))
        if self._unrounded is not None:
            rounding, self._unrounded = relative(out, self._unrounded), None
        self.rounding.append(rounding)
        return rounding

    def _marked(self, hidden: Tensor) -> Tensor:
        return hidden.flatten(0, 1)[self._places]  # (tokens, h)


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
