"""Uniform grids: dynamic ones for activations, keys and values; fixed ones, found once, for weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flatquant.ops.quantize import fake_quantize_clamped, fake_quantize_rows
from flatquant.ops.quantize.reference import clamp_rows, covering_grid, fake_quantize, quantize, row_grid
from flatquant.qtensor import QTensor
from flatquant.quantizers.clip import LearnedClip, NoClip, Range
from flatquant.spec import QuantSpec


class Dynamic(nn.Module):
    """One grid per row of the last dimension, found from the row itself: per token, or per token and head.

    FlatQuant, section 3.1: the row's range, with 0 inside, cut by the clip. Scales are float32 whatever x is.
    """

    def __init__(self, spec: QuantSpec, clip: Range | None = None) -> None:
        super().__init__()
        self.spec = spec
        if clip is None:
            clip = LearnedClip(start=spec.clip_start) if spec.clip == "learned" else NoClip()
        self.clip = clip

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

    def quantize(self, x: Tensor) -> QTensor:
        """Integers with their grid; one scale per row."""
        scale, zero = self.grid(x)
        q = quantize(x.to(scale.dtype), scale, zero, self.spec.low, self.spec.high)
        dtype = torch.int8 if self.spec.symmetric else torch.uint8
        return QTensor(values=q.to(dtype), scale=scale, zero=zero, spec=self.spec)


class WeightGrid(nn.Module):
    """One grid per row, or per group of a row, of a matrix; the clip cuts the weights themselves."""

    def __init__(self, spec: QuantSpec, clip: Range | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.clip = clip or NoClip()

    @classmethod
    def for_weight(cls, spec: QuantSpec, shape: tuple[int, int]) -> WeightGrid:
        """A grid, with one learned clip per scale if the spec asks for it, for weights of `shape`."""
        if spec.clip == "none":
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
        return fake_quantize_clamped(self.grouped(w), *self._ratios(w), self.spec.low, self.spec.high).flatten(-2)

    def grid(self, w: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point (None if symmetric) that cover the groups of w.  # (o, g)"""
        scale, zero = covering_grid(self.grouped(w), self.spec.low, self.spec.high)
        return scale[..., 0], None if zero is None else zero[..., 0]

    def forward(self, w: Tensor) -> Tensor:
        """Round to the grid and back, differentiable. Takes clamped weights.  # (o, n)"""
        groups = self.grouped(w)
        scale, zero = covering_grid(groups, self.spec.low, self.spec.high)
        return fake_quantize(groups, scale, zero, self.spec.low, self.spec.high).flatten(-2)
