"""Rounding that can be learned: an offset for every weight and a factor for every scale (AutoRound, arXiv 2309.05516).

W = s (clamp(round(W / s + V) + z) - z), section 3: V in [-1/2, 1/2], and s covers the ends of the range times factors.
V = 0 and factors of 1 are the rounding that training starts from: a weight that the solver rounded to its nearest
integer starts as it is, one that error compensation put elsewhere starts at the near edge of what rounds to that
integer. Factors are relative to the solver's grid, which may have been searched: they can grow as well as shrink,
where the paper's, relative to the whole range, only shrink. A symmetric grid has one factor for both ends.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flatquant.modules import Bounded, Trainable
from flatquant.ops.quantize.reference import fake_quantize, quantize, round_ste
from flatquant.qtensor import QTensor, as_qtensor

OFFSET = 0.5  # of a weight, in steps of its grid
FACTOR = 0.5  # how far from 1
_INSIDE = 0.499  # of the half step around an integer


class LearnedRounding(Trainable, Bounded):
    """A weight matrix whose rounding trains; the weights themselves stay."""

    group = "rounding"
    weight: Tensor  # (o, g, n / g)
    scale: Tensor  # (o, g, 1)
    zero: Tensor | None  # holding integers, (o, g, 1)

    def __init__(self, w: Tensor, start: QTensor) -> None:
        """Start from a solver's rounding of w.

        Args:
            w: float32 or float64, (o, n).
            start: of the same shape.
        """
        super().__init__()
        self.spec = start.spec
        self.register_buffer("scale", start.scale.to(w.dtype)[..., None])
        self.register_buffer("zero", None if start.zero is None else start.zero.to(w.dtype)[..., None])
        values, groups = (x.to(w.dtype).unflatten(-1, (-1, start.group)) for x in (start.values, w.detach()))
        self.register_buffer("weight", self._rounding_to(values, groups))
        self.offset = nn.Parameter(torch.zeros_like(self.weight))
        self.top = nn.Parameter(torch.ones_like(self.scale))
        self.bottom = None if self.zero is None else nn.Parameter(torch.ones_like(self.scale))

    def _rounding_to(self, values: Tensor, w: Tensor) -> Tensor:
        """The weights nearest to w that round to these integers.  # (o, g, n / g)"""
        middle = self.scale * (values if self.zero is None else values - self.zero)
        inside = w.clamp(middle - _INSIDE * self.scale.abs(), middle + _INSIDE * self.scale.abs())
        return torch.where(quantize(w, self.scale, self.zero, self.spec.low, self.spec.high) == values, w, inside)

    def grid(self) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point, differentiable.  # (o, g, 1)"""
        if self.zero is None or self.bottom is None:
            return self.scale * self.top, None
        below = self.zero * self.bottom  # of the new range, in old steps
        ratio = (below + (self.spec.high - self.zero) * self.top) / self.spec.high
        return self.scale * ratio, round_ste(below / ratio)

    def forward(self) -> Tensor:
        """The rounded weight, differentiable.  # (o, n)"""
        scale, zero = self.grid()
        moved = self.weight + scale * self.offset
        return fake_quantize(moved, scale, zero, self.spec.low, self.spec.high).flatten(-2)

    @torch.no_grad()
    def settle(self) -> None:
        """After a step: offsets and factors back within their bounds."""
        self.offset.clamp_(-OFFSET, OFFSET)
        for factor in (self.top, self.bottom):
            if factor is not None:
                factor.clamp_(1 - FACTOR, 1 + FACTOR)

    @torch.no_grad()
    def frozen(self) -> QTensor:
        """The integers, and their grid."""
        scale, zero = self.grid()
        values = quantize(self.weight + scale * self.offset, scale, zero, self.spec.low, self.spec.high)
        return as_qtensor(values.flatten(-2), scale[..., 0], None if zero is None else zero[..., 0], self.spec)
