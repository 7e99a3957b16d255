"""Products with packed 4-bit weights: one token, a few, or many.

One token (`_vector`): a program holds R rows of W and walks along them; eight weights are one 32-bit word, two masks
and a shift make of it two words of four bytes, and `dp4a` multiplies and adds four bytes at once. What it moves is the
packed weights, once: it is bound by memory, which is kept busy while the token is still being made: the first weights
are loaded before the wait for it, and all others one step ahead.

A few tokens (`_few`): the same walk with the matrix units, which need 16 columns: W (R rows, from registers) times X^T,
even and odd channels apart, as the nibbles lie and as the site wrote them. A weight stays the upper nibble of its byte,
where flipping its top bit is all that a sign takes: four bytes at once in one or two instructions, and sums are 16
times too large. Integers are int8, sums int32: exact.

Many tokens: `_expand` writes the weights as float8 into a buffer that all layers share - one that the next layer
overwrites while it is still in the cache costs little traffic to memory - and the float8 matrix units, which hold
-8..7 exactly, do the rest at twice the rate of bfloat16.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flatquant.ops.triton import early, wait


@triton.jit
def _dot4(w, x, acc, EMULATE: tl.constexpr):
    """acc + the product of four unsigned bytes of w and four signed ones of x."""
    if EMULATE:  # Triton's interpreter runs no assembly
        for i in tl.static_range(4):
            acc += ((w >> (8 * i)) & 0xFF) * ((x << (24 - 8 * i)) >> 24)
        return acc
    else:
        return tl.inline_asm_elementwise(
            "dp4a.u32.s32 $0, $1, $2, $3;", "=r,r,r,r", [w, x, acc], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def _vector(
    x_ptr, xs_ptr, w_ptr, ws_ptr, bias_ptr, residual_ptr, y_ptr, O, words,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, EMULATE: tl.constexpr, EARLY: tl.constexpr, R: tl.constexpr,
    K: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0) * R + tl.arange(0, R)
    inside = r < O
    k = tl.arange(0, K)[None, :]
    w_ptr += r[:, None].to(tl.int64) * words + k
    after = tl.load(w_ptr, mask=inside[:, None] & (k < words), other=0)
    wait(EARLY)
    acc = tl.zeros((R, K), tl.int32)
    total = tl.zeros((1, K), tl.int32)  # of x, since weights are stored 8 too large
    for start in range(0, words, K):
        k = start + tl.arange(0, K)[None, :]
        some = k < words
        w = after  # (R, K)
        after = tl.load(w_ptr + (start + K), mask=inside[:, None] & (k + K < words), other=0)
        even = tl.load(x_ptr + k, mask=some, other=0)  # channels 8k, 8k+2, 8k+4, 8k+6, (1, K)
        odd = tl.load(x_ptr + words + k, mask=some, other=0)
        acc = _dot4(w & 0x0F0F0F0F, tl.broadcast_to(even, (R, K)), acc, EMULATE)
        acc = _dot4((w >> 4) & 0x0F0F0F0F, tl.broadcast_to(odd, (R, K)), acc, EMULATE)
        ones = tl.full((1, K), 0x01010101, tl.int32)
        total = _dot4(ones, even, _dot4(ones, odd, total, EMULATE), EMULATE)
    whole = tl.sum(acc, axis=1) - 8 * tl.sum(total)
    y = whole.to(tl.float32) * tl.load(xs_ptr) * tl.load(ws_ptr + r, mask=inside, other=0.0)
    if BIAS:
        y += tl.load(bias_ptr + r, mask=inside, other=0.0)
    if RESIDUAL:
        y += tl.load(residual_ptr + r, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + r, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _upper(w, EMULATE: tl.constexpr):
    """16 times the weights of a byte's upper nibbles, as int8: those stored are 8 too large."""
    if EMULATE:
        return ((w & 0xF0) ^ 0x80).to(tl.int8, bitcast=True)
    else:
        return tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, 0xF0F0F0F0, 0x80808080, 0x6A;", "=r,r", [w], dtype=tl.int8, is_pure=True, pack=4
        )


@triton.jit
def _lower(w, EMULATE: tl.constexpr):
    """The same of the lower nibbles."""
    if EMULATE:
        return ((w << 4) ^ 0x80).to(tl.int8, bitcast=True)
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t; shl.b32 t, $1, 4; lop3.b32 $0, t, 0xF0F0F0F0, 0x80808080, 0x6A; }",
            "=r,r", [w], dtype=tl.int8, is_pure=True, pack=4,
        )  # fmt: skip


@triton.jit
def _few(
    x_ptr, xs_ptr, w_ptr, ws_ptr, bias_ptr, residual_ptr, y_ptr, T, O, N,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, EMULATE: tl.constexpr, EARLY: tl.constexpr, R: tl.constexpr,
    TP: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    wait(EARLY)
    r = tl.program_id(0) * R + tl.arange(0, R)
    t = tl.arange(0, TP)
    rows, tokens = r < O, t < T
    half = N // 2
    acc = tl.zeros((R, TP), tl.int32)
    for start in range(0, half, K):
        k = start + tl.arange(0, K)
        some = k < half
        w = tl.load(w_ptr + r[:, None].to(tl.int64) * half + k[None, :], mask=rows[:, None] & some[None, :], other=0)
        at = x_ptr + t[None, :] * N + k[:, None]  # X^T: (K, TP)
        mask = some[:, None] & tokens[None, :]
        even = tl.load(at, mask=mask, other=0)
        odd = tl.load(at + half, mask=mask, other=0)
        acc = tl.dot(_lower(w, EMULATE), even, acc, out_dtype=tl.int32)
        acc = tl.dot(_upper(w, EMULATE), odd, acc, out_dtype=tl.int32)
    y = (acc >> 4).to(tl.float32) * tl.load(ws_ptr + r, mask=rows, other=0.0)[:, None]
    y *= tl.load(xs_ptr + t, mask=tokens, other=0.0)[None, :]
    if BIAS:
        y += tl.load(bias_ptr + r, mask=rows, other=0.0)[:, None]
    at = t[None, :].to(tl.int64) * O + r[:, None]
    mask = rows[:, None] & tokens[None, :]
    if RESIDUAL:
        y += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _expand(w_ptr, y_ptr, bytes, EARLY: tl.constexpr, B: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    w = tl.load(w_ptr + i, mask=i < bytes, other=0)
    wait(EARLY)
    pair = tl.join((w & 0xF).to(tl.float32) - 8.0, (w >> 4).to(tl.float32) - 8.0)  # (B, 2)
    j = 2 * i[:, None] + tl.arange(0, 2)[None, :]
    tl.store(y_ptr + j, pair.to(tl.float8e4nv), mask=j < 2 * bytes)


def supports(o: int, n: int) -> str | None:
    """Why the kernels cannot do a weight matrix of (o, n), or None if they can."""
    if n % 32 or o % 16:
        return f"a weight of {o} x {n} (multiples of 16 x 32 are needed)"
    return None


def vector(
    x: Tensor, x_scale: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, residual: Tensor | None,
    dtype: torch.dtype, *, rows: int = 4, words: int = 512, warps: int = 4,
) -> Tensor:  # fmt: skip
    """`reference.int4_linear` of one token.  # x: int8, (1, n)"""
    o, size = packed.shape[0], packed.shape[1] // 4
    y = torch.empty((1, o), dtype=dtype, device=x.device)
    _vector[(triton.cdiv(o, rows),)](
        x.view(torch.int32), x_scale, packed.view(torch.int32), scale, bias, residual, y, o, size,
        BIAS=bias is not None, RESIDUAL=residual is not None, EMULATE=not x.is_cuda, EARLY=early(x),
        launch_pdl=early(x), R=rows, K=min(words, triton.next_power_of_2(size)), num_warps=warps,
    )  # fmt: skip
    return y


def few(
    x: Tensor, x_scale: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, residual: Tensor | None,
    dtype: torch.dtype, *, rows: int | None = None, bytes: int | None = None, warps: int = 4, stages: int = 4,
) -> Tensor:  # fmt: skip
    """`reference.int4_linear` of at most `FEW` tokens, `bytes` of a row at a time.  # x: int8, (T, n)"""
    (o, half), tokens = packed.shape, x.shape[0]
    # Every program reads all tokens: where they are many, fewer programs, if those still fill the GPU.
    rows = rows or (64 if tokens > 16 and o >= 8192 else 32)
    y = torch.empty((tokens, o), dtype=dtype, device=x.device)
    bytes = bytes or (256 if tokens <= 16 else 128)
    _few[(triton.cdiv(o, rows),)](
        x, x_scale, packed, scale, bias, residual, y, tokens, o, 2 * half,
        BIAS=bias is not None, RESIDUAL=residual is not None, EMULATE=not x.is_cuda, EARLY=early(x),
        launch_pdl=early(x), R=rows, TP=max(16, triton.next_power_of_2(tokens)),
        K=min(bytes, max(32, triton.next_power_of_2(half))), num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return y


def expand(packed: Tensor, out: Tensor, *, block: int = 4096, warps: int = 8) -> Tensor:
    """`reference.expand` into `out`, float8.  # (o, n)"""
    size = packed.numel()
    _expand[(triton.cdiv(size, block),)](
        packed, out, size, EARLY=early(packed), launch_pdl=early(packed), B=block, num_warps=warps
    )
    return out
