"""Products of at most a few tokens with weights of 8 bits, which move the weights once and are bound by that.

A program holds R rows and walks along them with the matrix units, which need 16 columns: one token is as fast as 16. A
stored byte is 128 too large; flipping its top bit makes an int8 of it. Products are in the dtype of the tokens, where
integers up to 128 are exact; sums are float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flatquant.ops.triton import on_device


@triton.jit
def _few(
    x_ptr, w_ptr, ws_ptr, bias_ptr, y_ptr, T, O, N, BIAS: tl.constexpr, R: tl.constexpr, TP: tl.constexpr,
    K: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0) * R + tl.arange(0, R)
    t = tl.arange(0, TP)
    rows, tokens = r < O, t < T
    acc = tl.zeros((R, TP), tl.float32)
    for start in range(0, N, K):
        k = start + tl.arange(0, K)
        some = k < N
        w = tl.load(w_ptr + r[:, None].to(tl.int64) * N + k[None, :], mask=rows[:, None] & some[None, :], other=0)
        x = tl.load(x_ptr + t[None, :] * N + k[:, None], mask=some[:, None] & tokens[None, :], other=0.0)  # (K, TP)
        acc = tl.dot((w ^ 0x80).to(tl.int8, bitcast=True).to(x.dtype), x, acc, input_precision="ieee")
    y = acc * tl.load(ws_ptr + r, mask=rows, other=0.0)[:, None]
    if BIAS:
        y += tl.load(bias_ptr + r, mask=rows, other=0.0).to(tl.float32)[:, None]
    at = t[None, :].to(tl.int64) * O + r[:, None]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=rows[:, None] & tokens[None, :])


@on_device
def few(
    x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, *,
    rows: int | None = None, columns: int | None = None, warps: int = 4, stages: int = 3,
) -> Tensor:  # fmt: skip
    """`reference.int8_linear` of at most `FEW` tokens.  # (T, n)"""
    x, (o, n) = x.contiguous(), packed.shape  # the last tokens of several texts lie apart
    tokens = x.shape[0]
    y = torch.empty((tokens, o), dtype=x.dtype, device=x.device)
    rows, columns = rows or (32 if tokens <= 16 else 64), columns or (256 if tokens <= 16 else 128)
    _few[(triton.cdiv(o, rows),)](
        x, packed, scale, bias, y, tokens, o, n, BIAS=bias is not None, R=rows,
        TP=max(16, triton.next_power_of_2(tokens)), K=min(columns, max(16, triton.next_power_of_2(n))),
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return y
