"""Products with packed 4-bit weights: one token, a few, or many.

One token (`_vector`): a program holds R rows of W and walks along them; eight weights are one 32-bit word, two masks
and a shift make of it two words of four bytes, and `dp4a` multiplies and adds four bytes at once. What it moves is the
packed weights, once: it is bound by memory, which is kept busy while the token is still being made: the first weights
are loaded before the wait for it, and all others one step ahead.

A few tokens (`_few`): the same walk with the matrix units, which need 16 columns: W (R rows, from registers) times X^T,
even and odd channels apart, as the nibbles lie and as the site wrote them. A weight stays the upper nibble of its byte,
where flipping its top bit is all that a sign takes: four bytes at once in one or two instructions, and sums are 16
times too large. Integers are int8, sums int32: exact. Where there are fewer rows than keep the memory busy, several
programs share them, each with a part of the channels, and the last to be done adds up.

Many tokens: `_expand` writes the weights as float8 into a buffer that all layers share - one that the next layer
overwrites while it is still in the cache costs little traffic to memory - and the float8 matrix units, which hold
-8..7 exactly, do the rest at twice the rate of bfloat16. GPUs that have none take int8 instead, even channels before
odd ones; scales follow in a kernel of their own (`_scaled`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flatquant.ops.triton import early, on_device, wait

_SLOTS = 264  # programs of `_few` that an H100 runs at once: two a multiprocessor
Scratch = tuple[Tensor, Tensor]  # int32: sums of programs that share rows; how many are done, 0 before and after


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
    x_ptr, xs_ptr, w_ptr, ws_ptr, bias_ptr, residual_ptr, y_ptr, sums_ptr, done_ptr, T, O, N,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, EMULATE: tl.constexpr, R: tl.constexpr, TP: tl.constexpr,
    K: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    block, part = tl.program_id(0), tl.program_id(1)
    r = block * R + tl.arange(0, R)
    t = tl.arange(0, TP)
    rows, tokens = r < O, t < T
    half = N // 2
    size = tl.cdiv(tl.cdiv(half, K), PARTS) * K
    acc = tl.zeros((R, TP), tl.int32)
    for start in range(part * size, tl.minimum(part * size + size, half), K):
        k = start + tl.arange(0, K)
        some = k < half
        w = tl.load(w_ptr + r[:, None].to(tl.int64) * half + k[None, :], mask=rows[:, None] & some[None, :], other=0)
        at = x_ptr + t[None, :] * N + k[:, None]  # X^T: (K, TP)
        mask = some[:, None] & tokens[None, :]
        even = tl.load(at, mask=mask, other=0)
        odd = tl.load(at + half, mask=mask, other=0)
        acc = tl.dot(_lower(w, EMULATE), even, acc, out_dtype=tl.int32)
        acc = tl.dot(_upper(w, EMULATE), odd, acc, out_dtype=tl.int32)
    if PARTS > 1:
        at = sums_ptr + (tl.arange(0, R) * TP)[:, None] + t[None, :]
        tl.store(at + (block * PARTS + part) * (R * TP), acc)
        tl.debug_barrier()  # all threads' sums are there before it is said that they are
        last = tl.atomic_add(done_ptr + block, 1, mask=block * R < O) == PARTS - 1
        rows = r < tl.where(last, O, 0)
        acc = tl.zeros_like(acc)
        for i in range(PARTS):
            acc += tl.load(at + (block * PARTS + i) * (R * TP), mask=rows[:, None], other=0, cache_modifier=".cg")
        tl.store(done_ptr + block, 0, mask=last)  # as the next product wants it
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
def _expand(w_ptr, y_ptr, bytes, half, PLANES: tl.constexpr, B: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    w = tl.load(w_ptr + i, mask=i < bytes, other=0)
    if PLANES:
        at = i + i // half * half  # a row of n bytes for one of n / 2
        tl.store(y_ptr + at, (w & 0xF).to(tl.int8) - 8, mask=i < bytes)
        tl.store(y_ptr + at + half, (w >> 4).to(tl.int8) - 8, mask=i < bytes)
    else:
        pair = tl.join((w & 0xF).to(tl.float32) - 8.0, (w >> 4).to(tl.float32) - 8.0)  # (B, 2)
        j = 2 * i[:, None] + tl.arange(0, 2)[None, :]
        tl.store(y_ptr + j, pair.to(tl.float8e4nv), mask=j < 2 * bytes)


@triton.jit
def _scaled(
    sums_ptr, xs_ptr, ws_ptr, bias_ptr, residual_ptr, y_ptr, O, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    B: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    o = tl.program_id(1) * B + tl.arange(0, B)
    inside = o < O
    at = token * O + o
    y = tl.load(sums_ptr + at, mask=inside, other=0).to(tl.float32) * tl.load(ws_ptr + o, mask=inside, other=0.0)
    y *= tl.load(xs_ptr + token)
    if BIAS:
        y += tl.load(bias_ptr + o, mask=inside, other=0.0)
    if RESIDUAL:
        y += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


def supports(o: int, n: int) -> str | None:
    """Why the kernels cannot do a weight matrix of (o, n), or None if they can."""
    if n % 32 or o % 16:
        return f"a weight of {o} x {n} (multiples of 16 x 32 are needed)"
    return None


@on_device
def vector(
    x: Tensor, x_scale: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, residual: Tensor | None,
    dtype: torch.dtype, *, rows: int = 4, words: int = 512, warps: int = 4,
) -> Tensor:  # fmt: skip
    """`reference.int4_linear` of one token.  # x: int8, (1, n)"""
    o, size = packed.shape[0], packed.shape[1] // 4
    y = torch.empty((1, o), dtype=dtype, device=x.device)
    _vector[(triton.cdiv(o, rows),)](
        x.view(torch.int32), x_scale, packed.view(torch.int32), scale, bias, residual, y, o, size,
        BIAS=bias is not None, RESIDUAL=residual is not None, EMULATE=not x.is_cuda, EARLY=early(x, 1),
        launch_pdl=early(x, 1), R=rows, K=min(words, triton.next_power_of_2(size)), num_warps=warps,
    )  # fmt: skip
    return y


@on_device
def few(
    x: Tensor, x_scale: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, residual: Tensor | None,
    dtype: torch.dtype, scratch: Scratch, *, rows: int = 64, bytes: int | None = None, warps: int = 4,
    stages: int | None = None, parts: int | None = None,
) -> Tensor:  # fmt: skip
    """`reference.int4_linear` of at most `FEW` tokens, `bytes` of a row at a time.  # x: int8, (T, n)

    Args:
        scratch: sums, (blocks * parts * rows * T rounded up,), and counters, (blocks,), of blocks of `rows` rows; as
            large as `int4_linear.scratch_bytes` says where nothing else is chosen.
        parts: programs that share the rows of one.
    """
    (o, half), tokens = packed.shape, x.shape[0]
    y = torch.empty((tokens, o), dtype=dtype, device=x.device)
    bytes = min(bytes or (256 if tokens <= 16 else 128), max(32, triton.next_power_of_2(half)))
    blocks, padded = triton.cdiv(o, rows), max(16, triton.next_power_of_2(tokens))
    parts = parts or max(1, min(_SLOTS // blocks, half // (4 * bytes)))  # each long enough to be worth its start
    sums, done = scratch if parts > 1 else (None, None)
    _few[(blocks, parts)](
        x, x_scale, packed, scale, bias, residual, y, sums, done, tokens, o, 2 * half,
        BIAS=bias is not None, RESIDUAL=residual is not None, EMULATE=not x.is_cuda, R=rows, TP=padded, K=bytes,
        PARTS=parts, num_warps=warps, num_stages=stages or (4 if tokens > 16 and blocks * parts <= _SLOTS else 3),
    )  # fmt: skip
    return y


@on_device
def expand(packed: Tensor, out: Tensor, *, block: int = 4096, warps: int = 8) -> Tensor:
    """`reference.expand` into `out`, float8 or int8.  # (o, n)"""
    size = packed.numel()
    planes = out.dtype == torch.int8
    _expand[(triton.cdiv(size, block),)](packed, out, size, packed.shape[1], PLANES=planes, B=block, num_warps=warps)
    return out


@on_device
def scaled(
    sums: Tensor, x_scale: Tensor, scale: Tensor, bias: Tensor | None, residual: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """What sums of integers stand for, with bias and residual; see `reference.int4_linear`.  # int32, (T, o)"""
    tokens, o = sums.shape
    y = torch.empty((tokens, o), dtype=dtype, device=sums.device)
    block = min(2048, triton.next_power_of_2(o))
    _scaled[(tokens, triton.cdiv(o, block))](
        sums, x_scale, scale, bias, residual, y, o, BIAS=bias is not None, RESIDUAL=residual is not None, B=block,
    )  # fmt: skip
    return y
