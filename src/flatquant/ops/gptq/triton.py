"""`round_columns` in one kernel: a program keeps R rows in registers and walks the columns.

Written with tensor operations, every column costs a dozen launches; here a block of 128 columns costs one. Layout: w
(o, b) rows of any stride; tile (R, B), B = b rounded up to a power of two, columns past b hold 0 and are never rounded.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flatquant.ops.triton import on_device, round_half_even

_ROWS = 16


@triton.jit
def _kernel(
    w_ptr, u_ptr, scale_ptr, zero_ptr, q_ptr, e_ptr, rows, b, w_stride, u_stride,
    QMIN: tl.constexpr, QMAX: tl.constexpr, ZERO: tl.constexpr, R: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0) * R + tl.arange(0, R)
    c = tl.arange(0, B)
    live = r < rows
    w = tl.load(w_ptr + r[:, None].to(tl.int64) * w_stride + c[None, :],
                mask=live[:, None] & (c < b)[None, :], other=0.0)  # fmt: skip  # (R, B)
    for i in range(b):
        column = tl.sum(tl.where((c == i)[None, :], w, 0.0), axis=1)  # (R,)
        at = r.to(tl.int64) * b + i
        s = tl.load(scale_ptr + at, mask=live, other=1.0)
        ratio = tl.div_rn(column, s)
        q = round_half_even(tl.minimum(tl.maximum(ratio, -65536.0), 65536.0))
        if ZERO:
            z = tl.load(zero_ptr + at, mask=live, other=0.0)
            q = tl.minimum(tl.maximum(q + z, QMIN), QMAX)
            rounded = s * (q - z)
        else:
            q = tl.minimum(tl.maximum(q, QMIN), QMAX)
            rounded = s * q
        pivot = tl.load(u_ptr + i * u_stride + i)
        error = tl.div_rn(column - rounded, tl.broadcast_to(pivot, column.shape))
        row = tl.load(u_ptr + i * u_stride + c, mask=(c > i) & (c < b), other=0.0)  # (B,)
        w -= error[:, None] * row[None, :]
        tl.store(q_ptr + at, q, mask=live)
        tl.store(e_ptr + at, error, mask=live)


@on_device
def round_columns(
    w: Tensor, u: Tensor, scale: Tensor, zero: Tensor | None, low: int, high: int
) -> tuple[Tensor, Tensor]:
    """See `reference.round_columns`; float32, b at most 1,024."""
    rows, b = w.shape
    w, u = (t if t.stride(1) == 1 else t.contiguous() for t in (w, u))
    q, errors = (torch.empty(rows, b, dtype=w.dtype, device=w.device) for _ in range(2))
    scale = scale.contiguous()
    zero = None if zero is None else zero.contiguous()
    _kernel[(triton.cdiv(rows, _ROWS),)](
        w, u, scale, scale if zero is None else zero, q, errors, rows, b, w.stride(0), u.stride(0),
        QMIN=low, QMAX=high, ZERO=zero is not None, R=_ROWS, B=triton.next_power_of_2(b), num_warps=4,
    )  # fmt: skip
    return q, errors
