"""Writing to a packed cache, and attention of one token over it (Flash-Decoding: the cache is cut into parts).

Even and odd channels lie in one byte's low and high nibble, and are never woven together: a score is the sum of two
products, and an output is written with a stride of two. Scales and zero points stay out of the products: with
k = (u - z) s, q k = s (q u - z sum q); and with p' = p s, sum p v = sum p' u - sum p' z. What u and z are both too
large by falls out.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from flatquant.ops.kv_cache.reference import Appended, Heads, Shortage, Store
from flatquant.ops.triton import MAGIC, covering, early, on_device, ratio, round_half_even, wait

_PROGRAMS = 528  # of prompts that an H100 does in two turns


@triton.jit
def _grid(x, low_ratio, high_ratio):
    """Scale, zero point and integers of rows, 0 to 15.  # x: (R, C)"""
    low = tl.minimum(tl.min(x, axis=1), 0.0) * low_ratio
    high = tl.maximum(tl.max(x, axis=1), 0.0) * high_ratio
    low, high, scale = covering(low, high, 15.0)
    zero = round_half_even(tl.div_rn(-low, scale))
    q = round_half_even(ratio(x, scale)) + zero[:, None]
    return scale, zero, tl.minimum(tl.maximum(q, 0.0), 15.0)


@triton.jit
def _put(
    x, ratio_ptr, packed_ptr, scale_ptr, zero_ptr, dense_ptr, place, row, inside,
    D: tl.constexpr, DP: tl.constexpr, DENSE: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Quantise rows x (R, DP) into their places; where `DENSE`, what they then stand for goes to `row` of a tensor."""
    scale, zero, q = _grid(x, tl.load(ratio_ptr), tl.load(ratio_ptr + 1))
    tl.store(scale_ptr + place, scale, mask=inside)
    tl.store(zero_ptr + place, zero.to(tl.uint8), mask=inside)
    even, odd = tl.split(tl.reshape(q, (R, DP // 2, 2)))
    j = tl.arange(0, DP // 2)[None, :]
    mask = inside[:, None] & (j < D // 2)
    byte = (even + odd * 16 + MAGIC).to(tl.int32, bitcast=True).to(tl.uint8)
    tl.store(packed_ptr + place[:, None] * (D // 2) + j, byte, mask=mask)
    if DENSE:
        c = tl.arange(0, DP)[None, :]
        value = (q - zero[:, None]) * scale[:, None]
        tl.store(dense_ptr + row[:, None] * D + c, value.to(dense_ptr.dtype.element_ty), mask=inside[:, None] & (c < D))


@triton.jit
def _append(
    qkv_ptr, cos_ptr, sin_ptr, matrix_ptr, offset_ptr, norm_ptr, eps, ratio_ptr, at_ptr, kp_ptr, ks_ptr, kz_ptr,
    vp_ptr, vs_ptr, vz_ptr, q_ptr, k_ptr, v_ptr, short_ptr, rows, T, S, shared,
    HQ: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, MATRIX: tl.constexpr, DENSE: tl.constexpr,
    OFFSET: tl.constexpr, NORM: tl.constexpr, R: tl.constexpr, GROUP: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """`R` tokens, of whatever sequences, and `GROUP` heads of one kind: a matrix is loaded once."""
    dtype = qkv_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)  # b T + t
    group = tl.program_id(1) * GROUP
    inside = row < rows
    b, t = row // T, row % T
    c = tl.arange(0, DP)
    mask = inside[:, None] & (c < D)[None, :]
    m = 0.0
    if MATRIX:
        k = tl.arange(0, DP)[:, None]
        m_ptr = matrix_ptr + (group >= HQ).to(tl.int32) * (D * D)
        some = (k < tl.where(group < HQ + HK, D, 0)) & (c < D)[None, :]  # none for values
        m = tl.load(m_ptr + k * D + c[None, :], mask=some, other=0.0).to(dtype)
    wait(EARLY)
    place = b * (HK * S) + tl.load(at_ptr) + t  # of the first head
    x_ptr = qkv_ptr + row[:, None] * ((HQ + 2 * HK) * D)
    angle = tl.where(shared != 0, t, row)[:, None] * D + c[None, :]
    cos_ptr += angle
    sin_ptr += angle
    if group < HQ:
        for head in range(group, group + GROUP):
            at = (row * HQ + head)[:, None] * D + c[None, :]
            x, other = _turned(x_ptr + head * D, cos_ptr, sin_ptr, c, mask, D, None, norm_ptr if NORM else None, eps)
            if OFFSET and not DENSE:
                own, across = _pair(offset_ptr + head // (HQ // HK) * D, c, D)
                short = tl.where((c < D // 2)[None, :], x * own + other * across, x * across - other * own)
                tl.store(short_ptr + at, short, mask=mask)
            x = tl.dot(x.to(dtype), m, input_precision="ieee") if MATRIX else x
            tl.store(q_ptr + at, x.to(dtype), mask=mask)
    elif group < HQ + HK:
        for head in range(group, group + GROUP):
            h = head - HQ
            x, _ = _turned(
                x_ptr + head * D, cos_ptr, sin_ptr, c, mask, D, offset_ptr + h * D if OFFSET else None,
                norm_ptr + D if NORM else None, eps,
            )  # fmt: skip
            x = tl.dot(x.to(dtype), m, input_precision="ieee") if MATRIX else x
            _put(x, ratio_ptr, kp_ptr, ks_ptr, kz_ptr, k_ptr, place + h * S, row * HK + h, inside, D, DP, DENSE, R)
    else:
        for head in range(group, group + GROUP):
            x = tl.load(x_ptr + head * D + c[None, :], mask=mask, other=0.0).to(tl.float32)  # (R, DP)
            h = head - HQ - HK
            _put(x, ratio_ptr + 2, vp_ptr, vs_ptr, vz_ptr, v_ptr, place + h * S, row * HK + h, inside, D, DP, DENSE, R)


@triton.jit
def _turned(x_ptr, cos_ptr, sin_ptr, c, mask, D: tl.constexpr, offset_ptr=None, norm_ptr=None, eps=0.0):
    """A head's rows, normalised, less its offset, turned by their positions; and with channels of each pair swapped.

    (R, DP), twice
    """
    first = (c < D // 2)[None, :]
    # Angles come from the cache for every head: kept, they would take half of a thread's registers.
    cos = tl.load(cos_ptr, mask=mask, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + c[None, :], mask=mask, other=0.0).to(tl.float32)
    other = tl.load(x_ptr + _partner(c, D), mask=mask, other=0.0).to(tl.float32)
    if norm_ptr is not None:
        unit = tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
        gain, gain_across = _pair(norm_ptr, c, D)
        x = x * unit * gain
        other = other * unit * gain_across
    if offset_ptr is not None:
        own, across = _pair(offset_ptr, c, D)
        x -= own
        other -= across
    return x * cos + other * tl.where(first, -sin, sin), other * cos + x * tl.where(first, sin, -sin)


@triton.jit
def _partner(c, D: tl.constexpr):
    """The channels that channels c are turned with.  # (1, DP)"""
    return tl.where(c < D // 2, c + D // 2, c - D // 2)[None, :]


@triton.jit
def _pair(m_ptr, c, D: tl.constexpr):
    """A constant of each channel, and of its partner.  # (1, DP), twice"""
    some = (c < D)[None, :]
    own = tl.load(m_ptr + c[None, :], mask=some, other=0.0)
    return own, tl.load(m_ptr + _partner(c, D), mask=some, other=0.0)


@triton.jit
def _nibble(u, I: tl.constexpr, dtype: tl.constexpr, EMULATE: tl.constexpr):
    """Nibble I of words of 16 bits as floats, 128 (bfloat16) or 1024 (float16) too large; float32: as it is.

    In 16 bit it is the low bits of a number of which they are the units: a conversion takes eight times as long as what
    else happens to a cached byte. Two words at a time.
    """
    if dtype == tl.float32:
        return ((u >> 4 * I) & 0xF).to(tl.float32)
    elif EMULATE:  # Triton's interpreter runs no assembly
        bits = ((u >> 4 * I) & 0xF).to(tl.uint16) | (0x4300 if dtype == tl.bfloat16 else 0x6400)
        return bits.to(dtype, bitcast=True)
    else:
        SHIFT: tl.constexpr = ("0", "4", "8", "12")[I]
        HIGH: tl.constexpr = "0x43004300" if dtype == tl.bfloat16 else "0x64006400"
        ASM: tl.constexpr = (
            "{ .reg .b32 t; shr.u32 t, $1, " + SHIFT + "; lop3.b32 $0, t, 0x000F000F, " + HIGH + ", 0xEA; }"
        )
        bits = tl.inline_asm_elementwise(ASM, "=r,r", [u], dtype=tl.uint16, is_pure=True, pack=2)
        return bits.to(dtype, bitcast=True)


@triton.jit
def _cells(s, some, base, table_ptr, D: tl.constexpr, PAGE: tl.constexpr, RUN: tl.constexpr, APART: tl.constexpr):
    """Where places s lie: offsets of their words of four integers, of their scales, of their zero points.

    In one piece, `base` is a head's first place. In pages of `PAGE` places, `APART` bytes from one to the next and each
    of `RUN` bytes for a head, it is the head, and a table has a sequence's pages.
    """
    if PAGE == 0:
        at = base + s
        return at * (D // 4), at, at
    else:
        page = tl.load(table_ptr + s // PAGE, mask=some, other=0).to(tl.int64)
        run = page * APART + base * RUN
        place = s % PAGE
        return run // 2 + place * (D // 4), run // 4 + place, run + place


@triton.jit
def _attend(
    q_ptr, kp_ptr, ks_ptr, kz_ptr, vp_ptr, vs_ptr, vz_ptr, amount_ptr, angle_ptr, step_ptr, gap_ptr, out_ptr, lse_ptr,
    last_ptr, start_ptr, table_ptr, window, scaling, S, PARTS, most, least, HK: tl.constexpr, G: tl.constexpr,
    GP: tl.constexpr, D: tl.constexpr, W: tl.constexpr, H: tl.constexpr, B: tl.constexpr, SHORT: tl.constexpr,
    PAGE: tl.constexpr, RUN: tl.constexpr, APART: tl.constexpr, EARLY: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """In pages, S is how many a row of the table has, places are positions, and all sequences share their angles."""
    wait(EARLY)
    bh = tl.program_id(0)
    part = tl.program_id(1)
    if PAGE == 0:
        length = tl.load(last_ptr).to(tl.int32) + 1
        first = tl.maximum(tl.load(start_ptr + bh // HK).to(tl.int32), length - window)
    else:
        length = tl.load(last_ptr + bh // HK).to(tl.int32) + 1
        first = tl.maximum(length - window, 0)
    size = tl.maximum(tl.cdiv(tl.cdiv(length - first, most), B) * B, least)  # of the tokens alone, not of the room
    begin = first + part * size
    end = tl.minimum(begin + size, length)
    g, j = tl.arange(0, GP), tl.arange(0, W)
    rows = (g < G)[:, None] & (j < D // 4)[None, :]
    at = (bh * G + g)[:, None] * D + 4 * j[None, :]
    qs = ()
    q_sum = tl.zeros((GP,), tl.float32)
    for i in tl.static_range(4):
        q = tl.load(q_ptr + at + i, mask=rows, other=0.0)  # (GP, W)
        q_sum += tl.sum(q.to(tl.float32), axis=1)
        qs = qs + (q,)
    LOG2_E: tl.constexpr = 1.4426950408889634
    scaling *= LOG2_E
    base = bh.to(tl.int64) * S
    if PAGE > 0:
        table_ptr += (bh // HK).to(tl.int64) * S
        base = (bh % HK).to(tl.int64)
    if SHORT:
        short = _shortage(amount_ptr + bh * G * D, g, scaling, G, D, H)
        apart = 1
        if PAGE == 0:
            angle_ptr += (bh // HK).to(tl.int64) * S * D
            apart = tl.load(gap_ptr + bh // HK)
        if apart == 0:
            top, total, zero, sums = _over(
                kp_ptr, ks_ptr, kz_ptr, vp_ptr, vs_ptr, vz_ptr, base, table_ptr, qs, q_sum, begin, end, scaling, short,
                angle_ptr, step_ptr, GP, D, W, H, B, "steps", PAGE, RUN, APART, EMULATE,
            )  # fmt: skip
        else:
            top, total, zero, sums = _over(
                kp_ptr, ks_ptr, kz_ptr, vp_ptr, vs_ptr, vz_ptr, base, table_ptr, qs, q_sum, begin, end, scaling, short,
                angle_ptr, step_ptr, GP, D, W, H, B, "places", PAGE, RUN, APART, EMULATE,
            )  # fmt: skip
    else:
        top, total, zero, sums = _over(
            kp_ptr, ks_ptr, kz_ptr, vp_ptr, vs_ptr, vz_ptr, base, table_ptr, qs, q_sum, begin, end, scaling, (),
            angle_ptr, step_ptr, GP, D, W, H, B, "", PAGE, RUN, APART, EMULATE,
        )  # fmt: skip
    some = total > 0
    total = tl.where(some, total, 1.0)
    cell = ((bh * G + g) * PARTS + part).to(tl.int64)
    at = cell[:, None] * D + 4 * j[None, :]
    for i in tl.static_range(4):
        tl.store(out_ptr + at + i, (sums[i] - zero[:, None]) / total[:, None], mask=rows)
    tl.store(lse_ptr + cell, tl.where(some, (top + tl.log2(total)) / LOG2_E, float("-inf")), mask=g < G)


@triton.jit
def _over(
    kp_ptr, ks_ptr, kz_ptr, vp_ptr, vs_ptr, vz_ptr, base, table_ptr, qs, q_sum, begin, end, scaling, short, angle_ptr,
    step_ptr, GP: tl.constexpr, D: tl.constexpr, W: tl.constexpr, H: tl.constexpr, B: tl.constexpr,
    ANGLES: tl.constexpr, PAGE: tl.constexpr, RUN: tl.constexpr, APART: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Attention over places begin to end: largest score, sums of weights, of weights times zero points, and of values.

    `ANGLES` says where those of keys less an offset come from: `places`, each place's own; or `steps`, where places are
    one position apart: a block's first place turns the query's part, and a table of B steps, the same for all blocks,
    does the rest.

    (GP,), (GP,), (GP,), four of (GP, W)
    """
    dtype: tl.constexpr = qs[0].dtype
    OFFSET: tl.constexpr = 128.0 if dtype == tl.bfloat16 else 1024.0 if dtype == tl.float16 else 0.0
    j, f = tl.arange(0, W), tl.arange(0, H)
    if ANGLES == "steps":
        at = tl.arange(0, B)[None, :] * D + f[:, None]
        turns = (
            tl.load(step_ptr + at, mask=(f < D // 2)[:, None], other=0.0),  # (H, B)
            tl.load(step_ptr + at + D // 2, mask=(f < D // 2)[:, None], other=0.0),
        )
    sums = ()
    for _ in tl.static_range(4):
        sums = sums + (tl.zeros((GP, W), tl.float32),)
    top = tl.full((GP,), -1e30, tl.float32)
    totals, zeros = tl.zeros((GP, B), tl.float32), tl.zeros((GP, B), tl.float32)  # summed over B in the end
    # Zero points are bytes, which Triton does not load ahead of time by itself.
    s = begin + tl.arange(0, B)
    _, _, byte = _cells(s, s < end, base, table_ptr, D, PAGE, RUN, APART)
    k_next = tl.load(kz_ptr + byte, mask=s < end, other=0)
    v_next = tl.load(vz_ptr + byte, mask=s < end, other=0)
    for s0 in range(begin, end, B):
        s = s0 + tl.arange(0, B)
        some = s < end
        k_zero, v_zero = k_next.to(tl.float32) + OFFSET, v_next.to(tl.float32) + OFFSET
        _, _, byte = _cells(s + B, s + B < end, base, table_ptr, D, PAGE, RUN, APART)
        k_next = tl.load(kz_ptr + byte, mask=s + B < end, other=0)
        v_next = tl.load(vz_ptr + byte, mask=s + B < end, other=0)
        word, at_scale, _ = _cells(s, some, base, table_ptr, D, PAGE, RUN, APART)
        cell = word[:, None] + j[None, :]
        mask = some[:, None] & (j < D // 4)[None, :]
        k = tl.load(kp_ptr + cell, mask=mask, other=0)  # (B, W)
        v = tl.load(vp_ptr + cell, mask=mask, other=0)
        k_scale = tl.load(ks_ptr + at_scale, mask=some, other=0.0)
        v_scale = tl.load(vs_ptr + at_scale, mask=some, other=0.0)
        score = tl.dot(qs[0], tl.trans(_nibble(k, 0, dtype, EMULATE)), input_precision="ieee")
        for i in tl.static_range(1, 4):
            score = tl.dot(qs[i], tl.trans(_nibble(k, i, dtype, EMULATE)), score, input_precision="ieee")  # (GP, B)
        score = (score - q_sum[:, None] * k_zero[None, :]) * (k_scale[None, :] * scaling)
        if ANGLES == "steps":
            cos = tl.load(angle_ptr + s0 * D + f, mask=f < D // 2, other=0.0)[None, :]
            sin = tl.load(angle_ptr + s0 * D + D // 2 + f, mask=f < D // 2, other=0.0)[None, :]
            x, y, unit = short
            lack = _twice(x * cos + y * sin, turns[0], tl.zeros((GP, B), tl.float32))
            score += _twice(y * cos - x * sin, turns[1], lack) * unit[:, None]
        elif ANGLES == "places":
            at = s[None, :] * D + f[:, None]
            mask = (f < D // 2)[:, None] & some[None, :]
            cos = tl.load(angle_ptr + at, mask=mask, other=0.0).to(step_ptr.dtype.element_ty)  # (H, B)
            sin = tl.load(angle_ptr + at + D // 2, mask=mask, other=0.0).to(step_ptr.dtype.element_ty)
            x, y, unit = short
            score += _twice(y, sin, _twice(x, cos, tl.zeros((GP, B), tl.float32))) * unit[:, None]
        score = tl.where(some[None, :], score, float("-inf"))
        new = tl.maximum(top, tl.max(score, axis=1))
        shrink = tl.exp2(top - new)
        p = tl.exp2(score - new[:, None])
        totals = totals * shrink[:, None] + p
        p = (p * v_scale[None, :]).to(dtype)  # rounded before both sums, of which the difference counts
        zeros = zeros * shrink[:, None] + p.to(tl.float32) * v_zero[None, :]
        more = ()
        for i in tl.static_range(4):
            z = tl.dot(p, _nibble(v, i, dtype, EMULATE), sums[i] * shrink[:, None], input_precision="ieee")  # (GP, W)
            more = more + (z,)
        sums = more
        top = new
    return top, tl.sum(totals, axis=1), tl.sum(zeros, axis=1), sums


@triton.jit
def _shortage(amount_ptr, g, scaling, G: tl.constexpr, D: tl.constexpr, H: tl.constexpr):
    """What scores are short of, per cosine and per sine, as numbers of at most 1; and what to multiply them by.

    (GP, H), (GP, H), (GP,)
    """
    f = tl.arange(0, H)
    at = g[:, None] * D + f[None, :]
    mask = (g < G)[:, None] & (f < D // 2)[None, :]
    x = tl.load(amount_ptr + at, mask=mask, other=0.0)
    y = tl.load(amount_ptr + at + D // 2, mask=mask, other=0.0)
    unit = tl.sqrt(tl.max(x * x + y * y, axis=1))
    unit = tl.where(unit > 0, unit, 1.0)
    return x / unit[:, None], y / unit[:, None], unit * scaling


@triton.jit
def _twice(x, y, total):
    """x y + total, with what rounding x to 16 bits would take from a number as large as an offset."""
    near = x.to(y.dtype)
    total = tl.dot(near, y, total, input_precision="ieee")
    if y.dtype != tl.float32:
        total = tl.dot((x - near.to(tl.float32)).to(y.dtype), y, total, input_precision="ieee")
    return total


@on_device
def append(
    qkv: Tensor, cos: Tensor, sin: Tensor, heads: Heads, keys: Store, values: Store, at: Tensor, *, dense: bool = True,
    rows: int | None = None, group: int | None = None, warps: int | None = None,
) -> Appended:  # fmt: skip
    """See `reference.append`; with `dense` nothing is said of what is short, without it keys and values are empty.

    What is returned lies as attention wants it: heads of a token side by side. Matrices are taken in qkv's dtype.

    Args:
        rows, group: tokens, and heads of one kind, that a program takes; the group divides the heads of each kind.
    """
    b, t, _ = qkv.shape
    h, d = heads, heads.head_dim
    q = torch.empty((b, t, h.queries, d), dtype=qkv.dtype, device=qkv.device)
    size = (b, t if dense else 0, h.keys, d)
    k, v = (torch.empty(size, dtype=qkv.dtype, device=qkv.device) for _ in range(2))
    short = None
    if h.offset is not None and not dense:
        short = torch.empty(q.shape, dtype=torch.float32, device=qkv.device)
    rows = rows or (16 if b * t <= 16 else 64)
    blocks = triton.cdiv(b * t, rows)
    if group is None:  # of many tokens, as many heads as leave programs for all multiprocessors twice over
        most = 1 if b * t <= 1024 else 4 if blocks * (h.queries + 2 * h.keys) > 4 * _PROGRAMS else 2
        group = math.gcd(h.queries, h.keys, most)
    _append[(blocks, (h.queries + 2 * h.keys) // group)](
        qkv, cos, sin, h.matrices, h.offset, h.norms, h.eps, h.ratios, at, *keys, *values, q, k, v, short,
        b * t, t, keys.scale.shape[2], int(cos.shape[0] == 1), HQ=h.queries, HK=h.keys, D=d,
        DP=max(16, triton.next_power_of_2(d)), MATRIX=h.matrices is not None, DENSE=dense,
        OFFSET=h.offset is not None, NORM=h.norms is not None, R=rows,
        GROUP=group, EARLY=early(qkv, b * t), launch_pdl=early(qkv, b * t),
        num_warps=warps or (4 if rows == 16 and h.offset is None else 8), num_stages=1, maxnreg=128,
        enable_fp_fusion=False,  # the reference's bits: the same integers whoever writes them
    )  # fmt: skip
    return Appended(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None if short is None else short.transpose(1, 2)
    )


@on_device
def attend(
    q: Tensor,
    keys: Store,
    values: Store,
    last: Tensor,
    start: Tensor,
    window: int | None,
    scaling: float,
    short: Shortage | None = None,
    *,
    parts: int,
    least: int = 128,
    block: int = 64,
    warps: int = 2,
    stages: int = 3,
) -> tuple[Tensor, Tensor]:
    """See `reference.attend`; in at most `parts` parts.

    Where parts begin and end depends on the tokens that count alone: sums, and so their last bits, do not depend on how
    many places the cache has. Of as many parts as all places could need, the last ones may be empty.

    Args:
        least: places of a part, a multiple of `block`.
        block: places at a time, at most as many as there are steps.
    """
    assert short is None or block <= len(short.steps)
    b, hq, d = q.shape
    hk, s = keys.scale.shape[1:]
    most, parts = parts, max(1, min(parts, triton.cdiv(s, least)))
    out = torch.empty((b, hq, parts, d), dtype=torch.float32, device=q.device)
    lse = torch.empty((b, hq, parts), dtype=torch.float32, device=q.device)
    group = hq // hk
    _attend[(b * hk, parts)](
        q, *_words(keys), *_words(values), *(short or (None,) * 4), out, lse, last, start, None,
        s if window is None else window, scaling, s, parts, most, least, **sizes(group, hk, d),
        B=block, SHORT=short is not None, PAGE=0, RUN=0, APART=0, EARLY=early(q, b), EMULATE=not q.is_cuda,
        launch_pdl=early(q, b), num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out, lse


def sizes(group: int, heads: int, d: int) -> dict[str, int]:
    """Of heads, and of the tiles that hold them, for `_attend`."""
    padded = {"GP": group, "W": d // 4, "H": d // 2}
    return {"HK": heads, "G": group, "D": d} | {k: max(16, triton.next_power_of_2(n)) for k, n in padded.items()}


def _words(store: Store) -> Store:
    """Integers four at a time.  # int16, (B, H, S, head_dim / 4)"""
    return store._replace(packed=store.packed.view(torch.int16))
