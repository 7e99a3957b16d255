"""Products with weights of 8 bits: one token, or a few. Both move the weights once and are bound by that.

A stored byte is 128 too large; flipping its top bit makes an int8 of it. One token (`_vector`): a program holds R rows
and walks along them, in float32. A few tokens (`_few`): the same walk with the matrix units, which need 16 columns, in
the dtype of the tokens, where integers up to 128 are exact; sums are float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flatquant.ops.triton import on_device


@triton.jit
def _vector(
    x_ptr, w_ptr, ws_ptr, bias_ptr, y_ptr, O, N, BIAS: tl.constexpr, R: tl.constexpr, K: tl.constexpr
):  # fmt: skip
    r = tl.program_id(0) * R + tl.arange(0, R)
    inside = r < O
    acc = tl.zeros((R, K), tl.float32)
    for start in range(0, N, K):
        k = start + tl.arange(0, K)[None, :]
        w = tl.load(w_ptr + r[:, None].to(tl.int64) * N + k, mask=inside[:, None] & (k < N), other=0)
        x = tl.load(x_ptr + k, mask=k < N, other=0.0).to(tl.float32)  # (1, K)
        acc += (w ^ 0x80).to(tl.int8, bitcast=True).to(tl.float32) * x
    y = tl.sum(acc, axis=1) * tl.load(ws_ptr + r, mask=inside, other=0.0)
    if BIAS:
        y += tl.load(bias_ptr + r, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + r, y.to(y_ptr.dtype.element_ty), mask=inside)


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
def vector(
    x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, *, rows: int = 8, columns: int = 512, warps: int = 4
) -> Tensor:  # fmt: skip
    """`reference.int8_linear` of one token.  # (1, n)"""
    x, (o, n) = x.contiguous(), packed.shape
    y = torch.empty((1, o), dtype=x.dtype, device=x.device)
    _vector[(triton.cdiv(o, rows),)](
        x, packed, scale, bias, y, o, n, BIAS=bias is not None, R=rows,
        K=min(columns, triton.next_power_of_2(n)), num_warps=warps,
    )  # fmt: skip
    return y


@on_device
def few(
    x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, *, rows: int = 64, columns: int = 128, warps: int = 4
) -> Tensor:  # fmt: skip
    """`reference.int8_linear` of at most `FEW` tokens.  # (T, n)"""
    x, (o, n) = x.contiguous(), packed.shape  # the last tokens of several texts lie apart
    tokens = x.shape[0]
    y = torch.empty((tokens, o), dtype=x.dtype, device=x.device)
    _few[(triton.cdiv(o, rows),)](
        x, packed, scale, bias, y, tokens, o, n, BIAS=bias is not None, R=rows,
        TP=max(16, triton.next_power_of_2(tokens)), K=min(columns, max(16, triton.next_power_of_2(n))),
        num_warps=warps,
    )  # fmt: skip
    return y
