"""`fake_quantize_rows` and `fake_quantize_clamped` in one kernel forward and one backward.

Written with tensors and torch operations, a fake quantiser costs a fit ten passes over its input forward and twenty
backward. Here a program holds R whole rows, finds their range, rounds, and writes; the backward pass recomputes all of
that from the input and saves nothing else. Layout: x (rows, n) contiguous; tile (R, N), N = n rounded up to a power of
two, padded with 0, which every range includes anyway.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flatquant.ops.quantize.reference import EPS
from flatquant.ops.triton import covering, on_device, round_half_even

_TILE = 2048  # elements a program holds, where rows are short


@triton.jit
def _round(r):
    return round_half_even(tl.minimum(tl.maximum(r, -65536.0), 65536.0))


@triton.jit
def _grid(x, columns, low_ratio, high_ratio, EPS: tl.constexpr, LEVELS: tl.constexpr, SYMMETRIC: tl.constexpr,
          CLAMP: tl.constexpr):  # fmt: skip
    """Row extremes (R,), clipped range, scale, zero point; LEVELS is the grid's largest integer."""
    if CLAMP:
        x_min = tl.min(tl.where(columns, x, float("inf")), axis=1)  # (R,)
        x_max = tl.max(tl.where(columns, x, float("-inf")), axis=1)
    else:
        x_min = tl.minimum(tl.min(x, axis=1), 0.0)
        x_max = tl.maximum(tl.max(x, axis=1), 0.0)
    low = x_min * low_ratio
    high = x_max * high_ratio
    if CLAMP:  # a narrow range away from 0 may cross over: everything is cut to its upper end then, as torch.clamp does
        low = tl.minimum(low, high)
    if SYMMETRIC:
        half = tl.maximum(tl.maximum(high, -low), EPS)
        scale = tl.div_rn(half, tl.full(half.shape, LEVELS, tl.float32))
        scale = tl.where(scale > 0, scale, 1.0)
        zero = tl.zeros(scale.shape, tl.float32)
    else:
        low, high, scale = covering(low, high, LEVELS)
        zero = _round(tl.div_rn(-low, scale))
    return x_min, x_max, low, high, scale, zero


@triton.jit
def _forward(
    x_ptr, y_ptr, low_ptr, high_ptr, rows, n, ratio_stride, EPS: tl.constexpr,
    QMIN: tl.constexpr, QMAX: tl.constexpr, SYMMETRIC: tl.constexpr, CLAMP: tl.constexpr,
    R: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0) * R + tl.arange(0, R)
    c = tl.arange(0, N)
    mask = (r < rows)[:, None] & (c < n)[None, :]
    offsets = r[:, None].to(tl.int64) * n + c[None, :]
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)  # (R, N)
    low_ratio = tl.load(low_ptr + r * ratio_stride, mask=r < rows, other=1.0)
    high_ratio = tl.load(high_ptr + r * ratio_stride, mask=r < rows, other=1.0)
    _, _, low, high, scale, zero = _grid(x, (c < n)[None, :], low_ratio, high_ratio, EPS, QMAX, SYMMETRIC, CLAMP)
    if CLAMP:
        x = tl.minimum(tl.maximum(x, low[:, None]), high[:, None])
    q = _round(tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape))) + zero[:, None]
    q = tl.minimum(tl.maximum(q, QMIN), QMAX) - zero[:, None]
    tl.store(y_ptr + offsets, (q * scale[:, None]).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward(
    x_ptr, g_ptr, gx_ptr, ratio_grad_ptr, low_ptr, high_ptr, rows, n, ratio_stride, EPS: tl.constexpr,
    QMIN: tl.constexpr, QMAX: tl.constexpr, SYMMETRIC: tl.constexpr, CLAMP: tl.constexpr,
    R: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0) * R + tl.arange(0, R)
    c = tl.arange(0, N)
    mask = (r < rows)[:, None] & (c < n)[None, :]
    offsets = r[:, None].to(tl.int64) * n + c[None, :]
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)  # (R, N)
    g = tl.load(g_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    low_ratio = tl.load(low_ptr + r * ratio_stride, mask=r < rows, other=1.0)
    high_ratio = tl.load(high_ptr + r * ratio_stride, mask=r < rows, other=1.0)
    x_min, x_max, low, high, scale, zero = _grid(
        x, (c < n)[None, :], low_ratio, high_ratio, EPS, QMAX, SYMMETRIC, CLAMP
    )
    c_x = x
    if CLAMP:
        c_x = tl.minimum(tl.maximum(x, low[:, None]), high[:, None])
    ratio = tl.div_rn(c_x, tl.broadcast_to(scale[:, None], x.shape))
    shifted = _round(ratio) + zero[:, None]
    q = tl.minimum(tl.maximum(shifted, QMIN), QMAX)
    inside = q == shifted
    q = q - zero[:, None]
    # dy/dscale = (q - zero) - x/scale where rounded, q - zero where clamped
    g_scale = tl.sum(g * tl.where(inside, q - ratio, q), axis=1)  # (R,)
    gx = tl.where(inside, g, 0.0)
    if SYMMETRIC:
        upper = high >= -low
        alive = tl.maximum(high, -low) > EPS
        g_half = tl.where(alive, g_scale / QMAX, 0.0)
        g_high = tl.where(upper, g_half, 0.0)
        g_low = tl.where(upper, 0.0, -g_half)
    else:
        alive = x_min < x_max
        # zero = round(-low / scale), straight through; dy/dzero = -scale where clamped
        g_zero = tl.sum(tl.where(inside, 0.0, -g * scale[:, None]), axis=1)
        g_scale += g_zero * low / (scale * scale)
        g_low = tl.where(alive, -g_zero / scale - g_scale / QMAX, 0.0)
        g_high = tl.where(alive, g_scale / QMAX, 0.0)
    if CLAMP:  # what is cut follows the end it was cut to
        crossed = (x_min * low_ratio > high)[:, None]
        above = ((x > high[:, None]) | crossed) & mask
        below = (x < low[:, None]) & mask & (crossed == 0)
        g_high += tl.sum(tl.where(above, gx, 0.0), axis=1)
        g_low += tl.sum(tl.where(below, gx, 0.0), axis=1)
        g_high += tl.where(x_min * low_ratio > high, g_low, 0.0)
        g_low = tl.where(x_min * low_ratio > high, 0.0, g_low)
        gx = tl.where(above | below, 0.0, gx)
    # the range's ends are elements of the row: their gradient is shared by all that attain them
    at_min = (x == x_min[:, None]) & mask & ((x_min < 0) | CLAMP)[:, None]
    at_max = (x == x_max[:, None]) & mask & ((x_max > 0) | CLAMP)[:, None]
    count_min = tl.maximum(tl.sum(at_min.to(tl.float32), axis=1), 1.0)
    count_max = tl.maximum(tl.sum(at_max.to(tl.float32), axis=1), 1.0)
    gx += tl.where(at_min, (g_low * low_ratio / count_min)[:, None], 0.0)
    gx += tl.where(at_max, (g_high * high_ratio / count_max)[:, None], 0.0)
    tl.store(gx_ptr + offsets, gx.to(gx_ptr.dtype.element_ty), mask=mask)
    tl.store(ratio_grad_ptr + r, g_low * x_min, mask=r < rows)
    tl.store(ratio_grad_ptr + rows + r, g_high * x_max, mask=r < rows)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x: Tensor, low_ratio: Tensor, high_ratio: Tensor, low: int, high: int, clamp: bool, eps: float
    ) -> Tensor:
        x, low_ratio, high_ratio = x.contiguous(), low_ratio.contiguous(), high_ratio.contiguous()
        y = torch.empty_like(x)
        ctx.settings = (low, high, clamp, eps)
        _launch(_forward, x, (x, y, low_ratio, high_ratio), low_ratio, *ctx.settings)
        ctx.save_for_backward(x, low_ratio, high_ratio)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        x, low_ratio, high_ratio = ctx.saved_tensors
        gx = torch.empty_like(x)
        rows = x.numel() // x.shape[-1]
        ratio_grads = torch.empty(2, rows, dtype=torch.float32, device=x.device)
        tensors = (x, grad.contiguous(), gx, ratio_grads, low_ratio, high_ratio)
        _launch(_backward, x, tensors, low_ratio, *ctx.settings)
        if low_ratio.numel() == 1:
            ratio_grads = ratio_grads.sum(1)
        g_low, g_high = ratio_grads.unbind()
        return gx, g_low.view_as(low_ratio), g_high.view_as(high_ratio), None, None, None, None


# A product and a sum rounded once would give other bits than the reference, and now and then another integer.
@on_device
def _launch(
    kernel, x: Tensor, tensors: tuple[Tensor, ...], ratio: Tensor, low: int, high: int, clamp: bool, eps: float
) -> None:
    n = x.shape[-1]
    rows = x.numel() // n
    width = triton.next_power_of_2(n)
    height = max(1, _TILE // width)
    warps = min(16, max(4, width // 512))
    kernel[(triton.cdiv(rows, height),)](
        *tensors, rows, n, 0 if ratio.numel() == 1 else 1, EPS=eps,
        QMIN=low, QMAX=high, SYMMETRIC=low < 0, CLAMP=clamp, R=height, N=width, num_warps=warps, enable_fp_fusion=False,
    )  # fmt: skip


def fake_quantize_rows(x: Tensor, low_ratio: Tensor, high_ratio: Tensor, low: int, high: int) -> Tensor:
    """See `reference.fake_quantize_rows`; ratios are float32 tensors with one element."""
    return _FakeQuantize.apply(x, low_ratio, high_ratio, low, high, False, 0.0)  # type: ignore[return-value]


def fake_quantize_clamped(x: Tensor, low_ratio: Tensor, high_ratio: Tensor, low: int, high: int) -> Tensor:
    """See `reference.fake_quantize_clamped`; ratios are float32, one element or one a row."""
    return _FakeQuantize.apply(x, low_ratio, high_ratio, low, high, True, EPS)  # type: ignore[return-value]
