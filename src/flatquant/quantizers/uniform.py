"""Uniform grids: dynamic ones for activations, keys and values; fixed ones, found once, for weights."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from flatquant.ops.gptq import round_columns
from flatquant.ops.quantize import fake_quantize_clamped, fake_quantize_rows
from flatquant.ops.quantize.reference import (
    clamp_rows,
    covering_grid,
    fake_quantize,
    quantize,
    row_grid,
    signed_grid,
)
from flatquant.qtensor import QTensor, as_qtensor
from flatquant.quantizers.clip import FixedClip, LearnedClip, NoClip, Range
from flatquant.spec import QuantSpec


class Dynamic(nn.Module):
    """One grid per row of the last dimension, found from the row itself: per token, or per token and head.

    FlatQuant, section 3.1: the row's range, with 0 inside, cut by the clip. Scales are float32 whatever x is.
    """

    def __init__(self, spec: QuantSpec, clip: Range | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.clip = clip or _dynamic_clip(spec)

    def _ratios(self, x: Tensor) -> tuple[Tensor, Tensor]:
        ratios = self.clip.ratios()
        if ratios is None:
            one = torch.ones(1, device=x.device)
            return one, one
        return ratios

    def grid(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point (None if symmetric).  # (.., 1)"""
        return row_grid(x, *self._ratios(x), self.spec.low, self.spec.high)

    def forward(self, x: Tensor) -> Tensor:
        """Round to the grid and back, differentiable.  # x's shape and dtype"""
        return fake_quantize_rows(x, *self._ratios(x), self.spec.low, self.spec.high)

    def quantize(self, x: Tensor, ends: Tensor | None = None) -> QTensor:
        """Integers with their grid; one scale per row.

        Args:
            ends: of rows that x has a part of: numbers whose smallest and largest are the row's, (.., m).
        """
        scale, zero = self.grid(x if ends is None else ends)
        q = quantize(x.to(scale.dtype), scale, zero, self.spec.low, self.spec.high)
        dtype = torch.int8 if self.spec.symmetric else torch.uint8
        return QTensor(values=q.to(dtype), scale=scale, zero=zero, spec=self.spec)

    def rounded(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """What the integers of x stand for, in `dtype`; where x has a gradient, differentiable as `forward` is."""
        return self(x).to(dtype) if x.requires_grad else self.quantize(x).dequantize(dtype)


def _dynamic_clip(spec: QuantSpec) -> Range:
    match spec.clip:
        case "learned":
            return LearnedClip(start=spec.clip_start)
        case "fixed":
            return FixedClip(torch.full((2,), spec.clip_ratio))
        case _:
            return NoClip()


class WeightGrid(nn.Module):
    """One grid per row, or per group of a row, of a matrix, or one for all of it.

    A learned clip cuts the weights themselves; a searched one shrinks the grid, and rounding to it cuts them. The
    search is the solver's: in a fit, eighty trials a step cost more than they are worth.
    """

    def __init__(self, spec: QuantSpec, clip: Range | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.clip = clip or NoClip()

    @classmethod
    def for_weight(cls, spec: QuantSpec, shape: tuple[int, int]) -> WeightGrid:
        """A grid, with one learned clip per scale if the spec asks for it, for weights of `shape`."""
        if spec.clip != "learned":
            return cls(spec)
        groups = shape[1] // (spec.group_size or shape[1])
        return cls(spec, LearnedClip((shape[0], groups), spec.clip_start))

    def grouped(self, w: Tensor) -> Tensor:
        """Rows cut into groups.  # (o, g, group)"""
        return w.unflatten(-1, (-1, self.spec.group_size or w.shape[-1]))

    def _ratios(self, w: Tensor) -> tuple[Tensor, Tensor]:
        ratios = self.clip.ratios()
        if ratios is None:
            one = torch.ones(1, 1, 1, device=w.device)
            return one, one
        return ratios[0][..., None], ratios[1][..., None]  # (o, g, 1)

    def clamp(self, w: Tensor) -> Tensor:
        """Cut every group to its clipped range; the identity without a clip.  # (o, n)"""
        if self.clip.ratios() is None:
            return w
        return clamp_rows(self.grouped(w), *self._ratios(w)).flatten(-2)

    def clamp_and_round(self, w: Tensor) -> Tensor:
        """`clamp`, then `forward`, in one kernel where there is one.  # (o, n)"""
        if self.spec.scope == "tensor" or self.spec.signed_scale:
            return self(self.clamp(w))
        return fake_quantize_clamped(self.grouped(w), *self._ratios(w), self.spec.low, self.spec.high).flatten(-2)

    def nearest(self, w: Tensor) -> QTensor:
        """Each weight to its nearest grid point.  # (o, n)"""
        scale, zero = self.stored_grid(w)
        group = w.shape[-1] // scale.shape[-1]
        each = None if zero is None else zero.repeat_interleave(group, -1)
        q = quantize(w, scale.repeat_interleave(group, -1), each, self.spec.low, self.spec.high)
        return as_qtensor(q, scale, zero, self.spec)

    def columns(self, w: Tensor, *, updated: bool = False) -> _Columns:
        """w, (o, n), on its way to integers, some columns at a time."""
        assert not updated, "integers have scales that stay"
        return _Columns(self, w)

    def grid(self, w: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point (None if symmetric) for the groups of w: what a solver rounds to.  # (o, g)"""
        groups = self.grouped(w)
        scale, zero = self._covering(groups)
        if self.spec.clip == "search":
            # The zero point counts steps, so it stays where it is when both ends shrink alike.
            scale = scale * searched_ratio(groups, scale, zero, self.spec.low, self.spec.high)
        return scale[..., 0], None if zero is None else zero[..., 0]

    def stored_grid(self, w: Tensor) -> tuple[Tensor, Tensor | None]:
        """`grid`, in w's dtype, with scales as they will be stored: what is rounded must meet those.  # (o, g)"""
        scale, zero = self.grid(w)
        return scale.float().to(w.dtype), zero

    def _covering(self, groups: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point that cover (o, g, group).  # (o, g, 1)"""
        if self.spec.signed_scale:
            ends = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
            return signed_grid(*ends, self.spec.bits), None
        if self.spec.scope == "row":
            return covering_grid(groups, self.spec.low, self.spec.high)
        scale, zero = covering_grid(groups.reshape(1, 1, -1), self.spec.low, self.spec.high)
        shape = (*groups.shape[:-1], 1)
        return scale.expand(shape), None if zero is None else zero.expand(shape)

    def forward(self, w: Tensor) -> Tensor:
        """Round to the grid and back, differentiable. Takes clamped weights.  # (o, n)"""
        groups = self.grouped(w)
        scale, zero = self._covering(groups)
        return fake_quantize(groups, scale, zero, self.spec.low, self.spec.high).flatten(-2)


class _Columns:
    """A matrix on its way to integers; scales are those of the matrix as it was given (static groups)."""

    block = 1

    def __init__(self, grid: WeightGrid, w: Tensor) -> None:
        self.spec = grid.spec
        self.scale, self.zero = grid.stored_grid(w)
        self.values = torch.empty_like(w)

    def fix(self, columns: Tensor, block: Tensor, u: Tensor) -> Tensor:
        """See `ops.gptq.reference.round_columns`; `columns` says where they are, int64, (b,)."""
        groups = columns // (self.values.shape[-1] // self.scale.shape[-1])
        s, z = self.scale[:, groups], None if self.zero is None else self.zero[:, groups]
        self.values[:, columns], errors = round_columns(block, u, s, z, self.spec.low, self.spec.high)
        return errors

    def result(self) -> QTensor:
        return as_qtensor(self.values, self.scale, self.zero, self.spec)


@torch.no_grad()
def searched_ratio(
    x: Float[Tensor, "*rows n"],
    scale: Float[Tensor, "*rows 1"],
    zero: Float[Tensor, "*rows 1"] | None,
    low: int,
    high: int,
) -> Float[Tensor, "*rows 1"]:
    """How far to shrink every grid: of 1, 0.99 .. 0.21, the share with the least sum of |x - Q(x)|^2.4.

    The search of GPTQ's code, which QuaRot and SpinQuant use for weights.

    Args:
        x: (.., n).
        scale, zero: of the grid that covers it, (.., 1).

    Returns:
        (.., 1).
    """
    best, least = torch.ones_like(scale), torch.full_like(scale, torch.inf)
    for step in range(80):
        ratio = 1 - step / 100
        q = quantize(x, scale * ratio, zero, low, high)
        rounded = (q if zero is None else q - zero) * (scale * ratio)
        # e^2.4 as exp(2.4 log e), which is vectorised where pow is not
        error = rounded.sub_(x).abs_().log_().mul_(2.4).exp_().sum(-1, keepdim=True)
        best = torch.where(error < least, ratio, best)
        least = torch.minimum(error, least)
    return best
