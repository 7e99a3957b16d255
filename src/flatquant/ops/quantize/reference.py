"""Uniform grids: where they lie, rounding to them, and the gradient of doing so.

Rounding is half-to-even. The straight-through estimator (Bengio et al., arXiv 1308.3432) passes gradients through the
rounding, masks them where the clamp is active, and keeps the scale inside the graph (as in LSQ, arXiv 1902.08153):
FlatQuant's transforms learn through the row and token maxima that set the scales.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import FunctionCtx

EPS = 1e-5


def round_ste(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Round half to even with the identity as gradient."""
    return x + (x.round() - x).detach() if x.requires_grad else x.round()


def symmetric_grid(
    low: Float[Tensor, "*shape"], high: Float[Tensor, "*shape"], bits: int, eps: float = 0.0
) -> Float[Tensor, "*shape"]:
    """Scale of the symmetric grid that covers [low, high]; 1 where the range is empty.

    Args:
        low, high: same shape; low <= high.
        bits: the grid has integers -2^(b-1) .. 2^(b-1)-1.
        eps: floor of the half-range (weights use 1e-5, as the paper's code does).
    """
    half_range = torch.maximum(high, -low)
    if eps:
        half_range = half_range.clamp(min=eps)
    scale = _divided(half_range, 2 ** (bits - 1) - 1)
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def signed_grid(low: Float[Tensor, "*shape"], high: Float[Tensor, "*shape"], bits: int) -> Float[Tensor, "*shape"]:
    """Scale, of either sign, of the grid that has the end of largest magnitude at -2^(b-1); 1 where the range is empty.

    Args:
        low, high: same shape; low <= high.
    """
    scale = -_divided(torch.where(high > -low, high, low), 2 ** (bits - 1))
    return torch.where(scale != 0, scale, torch.ones_like(scale))


def asymmetric_grid(
    low: Float[Tensor, "*shape"], high: Float[Tensor, "*shape"], bits: int
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    """Scale and integer zero point of the grid 0 .. 2^b-1 that covers [min(low, 0), max(high, 0)].

    An empty range becomes [-1, 1]. The zero point has a straight-through gradient.
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    empty = low == high
    low, high = torch.where(empty, torch.full_like(low, -1), low), torch.where(empty, torch.ones_like(high), high)
    scale = _divided(high - low, 2**bits - 1)
    return scale, round_ste(-low / scale)


def _divided(x: Tensor, levels: int) -> Tensor:
    """x / levels, correctly rounded on every device: CUDA multiplies by the reciprocal of a Python number instead."""
    return x / torch.full_like(x, levels)


def quantize(
    x: Float[Tensor, "..."], scale: Float[Tensor, "..."], zero: Float[Tensor, "..."] | None, low: int, high: int
) -> Float[Tensor, "..."]:
    """Integers (as x's dtype) `clamp(round(x / scale) + zero, low, high)`; scale and zero broadcast against x."""
    q = torch.round(x / scale)
    return (q if zero is None else q + zero).clamp_(low, high)


class _FakeQuantize(torch.autograd.Function):
    """y = scale * (clamp(round(x / scale) + zero, low, high) - zero), one pass forward and one backward."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, scale: Tensor, zero: Tensor | None, low: int, high: int) -> Tensor:
        ratio = x / scale
        q = torch.round(ratio)
        if zero is None:
            q.clamp_(low, high)
        else:
            q.add_(zero).clamp_(low, high).sub_(zero)
        ctx.save_for_backward(x, scale, zero)  # type: ignore[arg-type]
        ctx.low, ctx.high = low, high  # type: ignore[attr-defined]
        return q.mul_(scale).to(x.dtype)  # arithmetic in the wider of the two dtypes

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        x, scale, zero = ctx.saved_tensors
        ratio = x / scale
        shifted = torch.round(ratio)
        if zero is not None:
            shifted += zero
        q = shifted.clamp(ctx.low, ctx.high)
        inside = q == shifted
        # dy/dscale = (q - zero) - ratio where rounded, q - zero where clamped
        if zero is not None:
            q = q - zero
        per_value = grad * torch.where(inside, q - ratio, q)
        grad_scale = _sum_to(per_value, scale)
        grad_zero = None
        if zero is not None and ctx.needs_input_grad[2]:
            # dy/dzero = 0 where rounded (zero cancels), -scale where clamped
            grad_zero = _sum_to(torch.where(inside, 0.0, -grad * scale), zero)
        return torch.where(inside, grad, 0.0), grad_scale, grad_zero, None, None


def _sum_to(value: Tensor, like: Tensor) -> Tensor:
    """Sum the dimensions along which `like` was broadcast."""
    extra = value.dim() - like.dim()
    if extra:
        value = value.sum(dim=tuple(range(extra)))
    dims = tuple(i for i, size in enumerate(like.shape) if size == 1 and value.shape[i] != 1)
    return value.sum(dim=dims, keepdim=True) if dims else value


def fake_quantize(
    x: Float[Tensor, "*shape"], scale: Float[Tensor, "..."], zero: Float[Tensor, "..."] | None, low: int, high: int
) -> Float[Tensor, "*shape"]:
    """Round to the grid and back, differentiable in x, scale and zero (straight-through).

    Args:
        x: any shape.
        scale, zero: broadcast against x; zero None for a symmetric grid.
        low, high: integer range of the grid.
    """
    return _FakeQuantize.apply(x, scale, zero, low, high)  # type: ignore[return-value]


def fake_quantize_rows(
    x: Float[Tensor, "*batch n"], low_ratio: Float[Tensor, "..."], high_ratio: Float[Tensor, "..."], low: int, high: int
) -> Float[Tensor, "*batch n"]:
    """Round every row to a grid found from the row, and back, differentiable in x and the ratios.

    The row's range, with 0 inside, is multiplied by the ratios end by end; the grid covers that range (FlatQuant,
    section 3.1). Scales are computed in float32 (float64 for float64 inputs).

    Args:
        x: (.., n).
        low_ratio, high_ratio: share of the lower and upper end to keep, one element each.
        low, high: integer range of the grid; symmetric if low < 0.
    """
    scale, zero = row_grid(x, low_ratio, high_ratio, low, high)
    return fake_quantize(x, scale, zero, low, high)


def row_grid(
    x: Float[Tensor, "*batch n"], low_ratio: Float[Tensor, "..."], high_ratio: Float[Tensor, "..."], low: int, high: int
) -> tuple[Float[Tensor, "*batch 1"], Float[Tensor, "*batch 1"] | None]:
    """Scale and zero point (None if symmetric) of every row; see `fake_quantize_rows`.  # (.., 1)"""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    bits = high.bit_length() + (low < 0)
    bottom = x.amin(-1, keepdim=True).to(wide) * low_ratio
    top = x.amax(-1, keepdim=True).to(wide) * high_ratio
    if low < 0:
        return symmetric_grid(bottom, top, bits), None  # of a range on one side of 0, the other end is never the larger
    return asymmetric_grid(bottom, top, bits)


def clamp_rows(
    x: Float[Tensor, "*batch n"], low_ratio: Float[Tensor, "..."], high_ratio: Float[Tensor, "..."]
) -> Float[Tensor, "*batch n"]:
    """Cut every row to its own range times the ratios, end by end.

    Args:
        x: (.., n).
        low_ratio, high_ratio: in (0, 1], broadcast against (.., 1).
    """
    return x.clamp(x.amin(-1, keepdim=True) * low_ratio, x.amax(-1, keepdim=True) * high_ratio)


def fake_quantize_clamped(
    x: Float[Tensor, "*batch n"], low_ratio: Float[Tensor, "..."], high_ratio: Float[Tensor, "..."], low: int, high: int
) -> Float[Tensor, "*batch n"]:
    """Cut every row as `clamp_rows` does, then round it to the grid that covers what is left, and back; differentiable.

    This is learned weight clipping (OmniQuant's LWC, in FlatQuant's form): other than for activations, 0 need not lie
    in the range, the half-range of a symmetric grid is at least 1e-5, and the values themselves are cut.

    Args:
        x: (.., n).
        low_ratio, high_ratio: in (0, 1], broadcast against (.., 1).
        low, high: integer range of the grid; symmetric if low < 0.
    """
    x = clamp_rows(x, low_ratio, high_ratio)
    scale, zero = covering_grid(x, low, high)
    return fake_quantize(x, scale, zero, low, high)


def covering_grid(
    x: Float[Tensor, "*batch n"], low: int, high: int
) -> tuple[Float[Tensor, "*batch 1"], Float[Tensor, "*batch 1"] | None]:
    """Scale and zero point (None if symmetric) of the grid that covers every row; see `fake_quantize_clamped`.

    Args:
        x: (.., n).
        low, high: integer range of the grid; symmetric if low < 0.

    Returns:
        (.., 1).
    """
    bits = high.bit_length() + (low < 0)
    bottom, top = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    if low < 0:
        return symmetric_grid(bottom, top, bits, EPS), None
    return asymmetric_grid(bottom, top, bits)
