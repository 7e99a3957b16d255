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
from flatquant.calibrate.samples import Windows, cut, scored
from flatquant.modules import widened
from flatquant.quantizers import ActivationLevels, Dynamic, FrozenBlocks, SplitGrid
from flatquant.runtime.build import SITES_SLOT
from flatquant.runtime.keyvalue import FrozenKeyValue
from flatquant.runtime.linear import FrozenSite, SiteLinear
from flatquant.spec import BlockPlan
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
        windows: int64, (N, T), or samples with images.
        ids: that predictions of them are compared with, where they can be.  # int64, (N, T)
        first: hidden states before block 0, in the original basis.  # (N, T, h)
        calls: how the model calls its blocks with these windows, once they are quantised.
        original, quantised: hidden states after the last block that was seen.  # (N, T, h)
        errors: of every quantised block's outputs, relative to the original's: |difference| / |original|, mean over
            tokens. It holds what the blocks before have caused.
        alone: by block, and by name of a part, what rounding this part alone changes in the block's output, relative
            to it, on the original's inputs. None for a block that an earlier run rounded and did not look at.
        ends: final norm and output embedding of the original model.
        embedding_error: of the embedded windows, relative to the original's; None where the embedding is not rounded.
        rounded_ends: those of the quantised model where its output layer is rounded, else None.
    """

    embedding_error: float | None = None
    rounded_ends: Ends | None = None

    def __init__(self, windows: Windows) -> None:
        self.windows = windows
        self.errors: list[float] = []
        self.alone: list[dict[str, float] | None] = []

    def begin(
        self, model: PreTrainedModel, arch: Arch, device: torch.device, dtype: torch.dtype, tokens: int = 0
    ) -> None:
        """Embed the windows, and note the original head. Blocks need not have their tensors yet.

        Args:
            tokens: that a block is given at a time; one window where it is longer.
        """
        self.together = max(1, tokens // self.windows.shape[1])
        self.ids = scored(self.windows, model.config)
        hidden, calls = capture(model, arch, self.windows)
        assert isinstance(hidden, Tensor)
        self.device, self.dtype = device, dtype
        self.first = self.original = self.quantised = hidden.to(device, dtype)
        self.calls = [call.to(device) for call in calls]
        few = cut(self.windows, 1, _SAMPLE)
        self._sample_tokens = few.shape[1]
        _, calls = capture(model, arch, few)
        self._sample_calls = [call.to(device) for call in calls]
        self._samples = [self._sampled(self.first)]  # before every block, and after the last
        self._arch = arch
        self._exact: Tensor | None = None
        self._changes = torch.empty(0)
        self.ends = Ends(model, arch)

    def see_embedding(self, model: PreTrainedModel) -> None:
        """From now on, the quantised model's windows are embedded by a rounded embedding."""
        hidden, _ = capture(model, self._arch, self.windows)
        assert isinstance(hidden, Tensor)
        self.quantised = hidden.to(self.device, self.dtype)
        self.embedding_error = float(relative(self.quantised, self.first).mean())

    def see_original(self, index: int, block: nn.Module) -> None:
        """Send the windows through an original block, which is on the device."""
        call, hidden = self.calls[index], self.original
        out = through(block, call, hidden, together=self.together)
        if out.dtype == torch.float16 and not bool(torch.isfinite(out).all()):
            # Models made in bfloat16 may leave float16's range. What counts is the model, not the format it is run in.
            with torch.autocast(self.device.type, enabled=False):
                out = through(copy.deepcopy(block), call, hidden.float(), together=self.together)
        self.original = out
        self._samples.append(self._sampled(out))

    def rotate(self, index: int, basis: Factor | None) -> None:
        """From now on, block `index` works in a rotated residual stream."""
        self.calls[index] = replace(self.calls[index], basis=basis)
        self._sample_calls[index] = replace(self._sample_calls[index], basis=basis)

    def see_unrounded(self, index: int, block: nn.Module, plan: BlockPlan) -> None:
        """Look at a folded block whose weights will be rounded next: what does each of its other grids change?"""
        self._exact, *alone = self._each_alone(index, block, plan).split(1)
        self._changes = relative(torch.cat(alone), self._exact) if alone else self._exact.new_empty(0)

    def see_rounded(self, index: int, block: nn.Module, plan: BlockPlan) -> dict[str, float]:
        """Look at the block of `see_unrounded` again once its weights are rounded; its entry in `alone`."""
        assert self._exact is not None
        parts, out = rounded_parts(plan, index), self._exact
        if any(site.weights for site in plan.sites.values()):
            out = self._sample(index, block, dict.fromkeys(parts))
        changes = torch.cat([self._changes, relative(out, self._exact)]).tolist()
        self._exact = None
        return dict(zip([*(part.name for part in parts), "weights"], map(_or_infinite, changes), strict=True))

    def see_quantised(self, index: int, block: nn.Module, alone: dict[str, float] | None) -> None:
        """Send the windows through a rounded block, and compare.

        Args:
            alone: what `see_rounded` returned where and when the block was rounded.
        """
        self.quantised = through(block, self.calls[index], self.quantised, together=self.together)
        got, want = (self.calls[index].states(x) for x in (self._sampled(self.quantised), self._samples[index + 1]))
        self.errors.append(_or_infinite(float(relative(got, want))))
        self.alone.append(alone)

    def see_head(self, model: PreTrainedModel, basis: Factor | None) -> None:
        """Look at a model whose output layer is rounded.

        Args:
            basis: that its residual stream is in.
        """
        self.rounded_ends = Ends(model, self._arch, basis)

    @property
    def heads(self) -> tuple[Head, Head]:
        """The original's head and the quantised model's, on hidden states in the original basis."""
        original = self.ends.head(self.device, self.dtype)
        return original, original if self.rounded_ends is None else self.rounded_ends.head(self.device, self.dtype)

    def _each_alone(self, index: int, block: nn.Module, plan: BlockPlan) -> Tensor:
        """What a block makes of the original's inputs without any grid, and with each of its grids alone.

        It is given one window for each of these. Experts mix the tokens of windows: there it is run once for each.

        Returns:
            (1 + parts, tokens, h).
        """
        parts = rounded_parts(plan, index)
        if any(len(site.groups) > 1 for site in plan.sites.values()):
            others = [[part for part in parts if part != rounded] for rounded in (None, *parts)]
            return torch.cat([self._sample(index, block, dict.fromkeys(without)) for without in others])
        windows = 1 + len(parts)
        grids = {
            part: _OneWindow(grid_at(block, self._arch.attention or "", part), window, windows)
            for window, part in enumerate(parts, 1)
        }
        return self._sample(index, block, grids, windows)

    def _sample(self, index: int, block: nn.Module, grids: Mapping[Part, nn.Module | None], windows: int = 1) -> Tensor:
        """What a block with other grids makes of the original's inputs, given so many times.  # (windows, tokens, h)"""
        inputs = self._samples[index].expand(windows, -1, -1)
        with put(block, self._arch.attention or "", grids):
            call = self._sample_calls[index]
            return call.states(through(block, call, inputs, together=windows))

    def _sampled(self, x: Tensor) -> Tensor:
        return x[:1, : self._sample_tokens]


@contextmanager
def put(block: nn.Module, attention: str, grids: Mapping[Part, nn.Module | None]) -> Iterator[None]:
    """Put other grids in the place of some of a frozen block's for a while, None for 16 bits.

    Args:
        attention: path of the attention module inside the block.
    """
    before: list[tuple[nn.Module, str, Any]] = []
    try:
        for part, grid in grids.items():
            owner = _owner(block, attention, part)
            before.append((owner, part.kind, getattr(owner, part.kind)))
            setattr(owner, part.kind, grid)
        yield
    finally:
        for owner, name, grid in reversed(before):
            setattr(owner, name, grid)


def grid_at(block: nn.Module, attention: str, part: Part) -> Any:
    """The grid of a part of a frozen block; None where it has none."""
    return getattr(_owner(block, attention, part), part.kind)


def _owner(block: nn.Module, attention: str, part: Part) -> FrozenSite | FrozenKeyValue:
    if part.kind == "activations":
        site = block.get_submodule(f"{SITES_SLOT}.{part.site}")
        assert isinstance(site, FrozenSite)
        return site
    kv = seams.attached(block.get_submodule(attention))
    assert isinstance(kv, FrozenKeyValue)
    return kv


class _OneWindow(nn.Module):
    """A grid that rounds one window of a batch, and leaves the others in 16 bits."""

    def __init__(self, grid: Dynamic | SplitGrid | ActivationLevels | FrozenBlocks, window: int, windows: int) -> None:
        super().__init__()
        self.grid: Dynamic | SplitGrid | ActivationLevels | FrozenBlocks = grid
        self.window, self.windows = window, windows

    def forward(self, x: Tensor) -> Tensor:
        """As numbers, in x's dtype.  # (B, .., n), or tokens of all windows in a row, (B T, n)"""
        return self.rounded(x, x.dtype)

    def rounded(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """As numbers in `dtype`."""
        out = x.to(dtype, copy=True)
        one = x.unflatten(0, (self.windows, -1))[self.window]
        grid = self.grid
        integers = isinstance(grid, Dynamic | SplitGrid)
        numbers = grid.quantize(one).dequantize(dtype) if integers else grid(one)
        out.unflatten(0, (self.windows, -1))[self.window].copy_(numbers)
        return out


def relative(got: Tensor, want: Tensor) -> Tensor:
    """|got - want| / |want|, mean over the tokens of a window.  # of (N, T, h): float32, (N,)"""
    want, got = want.float(), got.float()
    error = (got - want).norm(dim=-1) / want.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    return error.mean(-1)


def _or_infinite(value: float) -> float:
    """Infinity for NaN."""
    return value if value == value else float("inf")


def through(block: nn.Module, call: BlockCall, hidden: Tensor, *, together: int = 1) -> Tensor:
    """All windows, so many at a time, in the wider dtype of the two; kept in that of `hidden`.  # (N, T, h)"""
    run = call.in_order(block)
    with widened(block, hidden.dtype) as work:
        return torch.cat([run(windows.to(work)) for windows in hidden.split(together)]).to(hidden.dtype)


class Ends:
    """Final norm and output embedding of a model, as they are now."""

    def __init__(self, model: PreTrainedModel, arch: Arch, basis: Factor | None = None) -> None:
        """
        Args:
            basis: of the model's residual stream, where hidden states are given in the original one.
        """
        output = model.get_output_embeddings()
        assert isinstance(output, nn.Linear | SiteLinear)
        self.config, self.basis = model.config, basis
        self.norm = copy.deepcopy(submodule(model, arch.final_norm))
        self.rounded = output if isinstance(output, SiteLinear) else None
        # As they are now: a rotation of the residual stream puts others into the module.
        self.weight, self.bias = (None, None) if isinstance(output, SiteLinear) else (output.weight, output.bias)

    def head(self, device: torch.device, dtype: torch.dtype) -> Head:
        """(.., h) -> (.., V), float32, with products in `dtype`."""
        norm = copy.deepcopy(self.norm).to(device).float()
        turn = None if self.basis is None else self.basis.matrix().to(device)
        output, width = self._output(device, dtype), self.config.get_text_config().hidden_size

        def head(x: Tensor) -> Tensor:
            x = x[..., :width]  # behind it, what blocks lend
            x = x if turn is None else x @ turn.to(x.dtype)
            return logits(self.config, output(norm(x).to(dtype))).float()

        return head

    def _output(self, device: torch.device, dtype: torch.dtype) -> Head:
        """The output layer.  # (.., h) -> (.., V)"""
        if self.rounded is not None:
            return copy.deepcopy(self.rounded).to(device)
        assert self.weight is not None
        weight = self.weight.to(device, dtype)  # (V, h)
        bias = None if self.bias is None else self.bias.to(device, dtype)
        return lambda y: F.linear(y, weight, bias)
