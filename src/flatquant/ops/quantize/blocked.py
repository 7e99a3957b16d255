"""`fake_quantize_clamped` on a CPU, a few rows at a time: what one pass over them leaves in the cache, the next finds.

Written with tensors and their gradients it takes some thirty passes over the weights of a model, every one through
memory, which is most of what a small fit does on a CPU. Here are fifteen, through the cache; the backward pass starts
from the input again and saves nothing else. The grid covers what it rounds, so that no integer is ever cut off.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from flatquant.ops.quantize.reference import EPS

_BLOCK = 1 << 17  # elements: half a megabyte


def _blocks(x: Tensor) -> Iterator[slice]:
    rows = max(1, _BLOCK // x.shape[-1])
    return (slice(i, i + rows) for i in range(0, len(x), rows))


def _part(ratio: Tensor, rows: slice) -> Tensor:
    return ratio.reshape(-1, 1) if ratio.numel() == 1 else ratio.reshape(-1, 1)[rows]


def _grid(x: Tensor, low_ratio: Tensor, high_ratio: Tensor, top: int) -> tuple[Tensor, ...]:
    """Extremes of rows, the ends that they are cut to, the larger half-range, and the scale.  # (R, 1)"""
    x_min, x_max = torch.aminmax(x, dim=-1, keepdim=True)
    high = x_max * high_ratio
    low = torch.minimum(x_min * low_ratio, high)  # a narrow range away from 0 may cross: its upper end counts
    half = torch.maximum(high, -low)
    return x_min, x_max, low, high, half, half.clamp(min=EPS) / torch.full_like(half, top)


class _FakeQuantizeClamped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, low_ratio: Tensor, high_ratio: Tensor, top: int) -> Tensor:
        ctx.save_for_backward(x, low_ratio, high_ratio)
        ctx.top, shape = top, x.shape
        x = x.reshape(-1, x.shape[-1])  # (rows, n)
        y = torch.empty(x.shape)
        for rows in _blocks(x):
            _, _, low, high, _, scale = _grid(x[rows], _part(low_ratio, rows), _part(high_ratio, rows), top)
            torch.clamp(x[rows], low, high, out=y[rows]).div_(scale).round_().mul_(scale)
        return y.view(shape)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        whole, low_ratio, high_ratio = ctx.saved_tensors
        x, grad = (t.reshape(-1, t.shape[-1]) for t in (whole, grad))
        gx = grad.clone(memory_format=torch.contiguous_format)
        low_grad, high_grad = (x.new_empty(len(x), 1) for _ in range(2))
        for rows in _blocks(x):
            part, g, out = x[rows], grad[rows], gx[rows]
            ratios = _part(low_ratio, rows), _part(high_ratio, rows)
            x_min, x_max, low, high, half, scale = _grid(part, *ratios, ctx.top)
            exact = part.clamp(low, high).div_(scale)
            # dy/dscale = q - x / scale; the scale follows the larger end, unless it is at its floor
            g_half = exact.round().sub_(exact).mul_(g).sum(-1, keepdim=True) / ctx.top
            g_half = torch.where(half > EPS, g_half, 0.0)
            upper = high >= -low
            g_high, g_low = torch.where(upper, g_half, 0.0), torch.where(upper, 0.0, -g_half)
            above, below = part > high, part < low
            crossed = x_min * ratios[0] > high
            if crossed.any():
                above, below = above | crossed, below & ~crossed
            for cut, end in ((above, g_high), (below, g_low)):  # what is cut follows the end it is cut to
                row, column = cut.nonzero(as_tuple=True)
                end[:, 0].index_add_(0, row, g[row, column])
                out[row, column] = 0
            low_grad[rows], high_grad[rows] = g_low * x_min, g_high * x_max
            # an end is an element of the row: its gradient is shared by all that attain it
            for extreme, end in ((x_min, g_low * ratios[0]), (x_max, g_high * ratios[1])):
                row, column = (part == extreme).nonzero(as_tuple=True)
                out[row, column] += (end[:, 0] / row.bincount(minlength=len(part)))[row]
        ratio_grads = [
            (g.sum() if ratio.numel() == 1 else g).view_as(ratio)
            for g, ratio in ((low_grad, low_ratio), (high_grad, high_ratio))
        ]
        return gx.view_as(whole), *ratio_grads, None


def fake_quantize_clamped(x: Tensor, low_ratio: Tensor, high_ratio: Tensor, low: int, high: int) -> Tensor:
    """See `reference.fake_quantize_clamped`, of symmetric grids; ratios have one element or one a row.

    Args:
        x: float32, (.., n).
    """
    assert low < 0
    return _FakeQuantizeClamped.apply(x, low_ratio, high_ratio, high)  # type: ignore[return-value]
