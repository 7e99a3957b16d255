"""One static grid for a whole tensor, with large channels split into pieces (FlattenQuant, arXiv 2402.17985).

Channel j, whose values reach m_j, is cut into k_j = ceil(m_j / T) pieces sign(x) clamp(|x| - i T, 0, T), and its weight
column is repeated k_j times: the product is the same, every piece fits the grid of step T / (2^(b-1) - 1), and all
activations share one scale. Saturated and empty pieces lie on the grid, so a channel has one rounding error.

All copies of a column carry the same integers, so that x' W'^T over pieces equals, integer for integer, the product of
the pieces' sum with W. That sum is what is kept here: k_j times as many steps for channel j, no wider matrix. A kernel
for b-bit units would expand it, by `copies`; the cost of doing so is their sum over the number of channels.
"""

from __future__ import annotations

import dataclasses

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from flatquant.modules import ExactBuffers
from flatquant.ops.quantize.reference import fake_quantize
from flatquant.qtensor import QTensor
from flatquant.spec import QuantSpec

# Of one channel: attention sinks reach a thousand times the rest, and would take all there is.
_MOST = 16


class SplitGrid(ExactBuffers):
    """x_j to integers of at most `copies`_j (2^(b-1) - 1) in magnitude, times one `step`; what lies beyond is cut."""

    step: Tensor  # float32, (1,)
    copies: Tensor  # uint8, (n,)

    def __init__(self, spec: QuantSpec, step: Tensor, copies: Tensor) -> None:
        super().__init__()
        self.spec = spec
        self.register_buffer("step", step)
        self.register_buffer("copies", copies)

    @classmethod
    def covering(cls, spec: QuantSpec, absmax: Tensor) -> SplitGrid:
        """The grid for channels that reach `absmax`, (n,)."""
        most = min(_MOST, 127 // spec.high)  # the sum of all pieces is kept in 8 bits
        threshold, copies = thresholds(absmax, spec.width, most)
        step = torch.tensor([threshold / spec.high or 1.0], device=absmax.device)
        return cls(spec, step, copies.to(absmax.device, torch.uint8))

    def grid(self, x: Tensor) -> tuple[Tensor, None]:
        """The scale, the same for every token.  # (.., 1)"""
        return self.step.expand(*x.shape[:-1], 1), None

    def forward(self, x: Tensor) -> Tensor:
        """Round to the grid and back, differentiable.  # x's shape and dtype"""
        reach = self.copies.to(self.step) * self.spec.high * self.step
        return fake_quantize(torch.clamp(x, -reach, reach).to(x.dtype), self.step, None, -128, 127)

    def quantize(self, x: Tensor) -> QTensor:
        """Sums of pieces, int8."""
        reach = self.copies.to(self.step) * self.spec.high
        q = torch.clamp(torch.round(x.to(self.step.dtype) / self.step), -reach, reach)
        scale, _ = self.grid(x)
        return QTensor(values=q.to(torch.int8), scale=scale, zero=None, spec=dataclasses.replace(self.spec, bits=8))


def thresholds(absmax: Float[Tensor, " n"], width: float, most: int) -> tuple[float, Int64[Tensor, " n"]]:
    """The least T whose copies fit into `width` times the channels, and those copies.

    Args:
        absmax: largest magnitude of every channel, (n,).
        most: copies of one channel.

    Returns:
        T, and int64 copies in 1 .. most, (n,). Room that is left goes to the largest channels, against values beyond
        those seen.
    """
    m = absmax.double().cpu()
    budget = int(width * len(m))

    def copies(t: float) -> Tensor:
        return torch.ceil(m / t).clamp(1, most).long()

    high = float(m.max())
    if high == 0:
        return 0.0, torch.ones(len(m), dtype=torch.int64)
    low = high / (most + 1)
    for _ in range(60):
        middle = (low + high) / 2
        fits = int(copies(middle).sum()) <= budget and float(m.max()) <= most * middle
        low, high = (low, middle) if fits else (middle, high)
    k = copies(high)
    room = (m.argsort(descending=True))[: budget - int(k.sum())]
    k[room] = (k[room] + 1).clamp(max=most)
    return high, k
