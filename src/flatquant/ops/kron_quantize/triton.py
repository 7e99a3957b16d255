"""(norm | gate | merge) -> P1^T X P2 -> clip -> scale -> integers, in one pass over memory.

A program holds whole tokens: X as (TB * N1P, N2P), rows of several tokens stacked, N1P and N2P the factors' sizes
rounded up to powers of two, padded with 0. X P2 is one product of the matrix units; for P1^T tokens move side by side.

Everything that scales a whole token only moves its scale: of a norm, the gain is applied to the tile, the rms to the
scale; and a token is divided by its largest magnitude before it becomes float16, so that nothing overflows whatever
the range of activations, and all of float16's eleven bits are used. Factors are float16: 2^-12 of an entry is far below
the 4-bit grid that follows.

P2 stays on the chip while a program walks over tokens, if it fits (`HOLD`); a larger one is read in strips of K rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flatquant.ops.kron_quantize.reference import Form
from flatquant.ops.triton import round_half_even

# What the input is, and how integers leave.
_PLAIN, _NORM, _GATE, _MERGE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
_PLANES, _FLOAT8, _PACKED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_SOURCES = {"plain": 0, "norm": 1, "gate": 2, "merge": 3}
_FORMS = {"planes": 0, "float8": 1, "packed": 2}
_HELD = 128  # the largest P2 that stays on the chip
_STRIP = 32


@triton.jit
def _load(x_ptr, other_ptr, stride, token, r, c, mask, N2: tl.constexpr, SOURCE: tl.constexpr):
    """Values of a tile, and what a norm takes the mean square of."""
    at = token.to(tl.int64) * stride + r * N2 + c
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    y = x
    if SOURCE == _NORM:
        y = x * tl.load(other_ptr + r * N2 + c, mask=mask, other=0.0).to(tl.float32)
    if SOURCE == _GATE:
        g = tl.load(other_ptr + at, mask=mask, other=0.0).to(tl.float32)
        y = x * g / (1.0 + tl.exp(-g))
    return y, x


@triton.jit
def _merge(parts_ptr, lse_ptr, token, r, c, mask, PARTS, N1: tl.constexpr, N2: tl.constexpr):
    """Attention over all tokens, from parts (T, N1, PARTS, N2).  # r (R, 1), c (1, C)"""
    row = (token.to(tl.int64) * N1 + r) * PARTS  # (R, 1)
    inside = r < N1
    top = tl.load(lse_ptr + row, mask=inside, other=0.0)
    for part in range(1, PARTS):
        top = tl.maximum(top, tl.load(lse_ptr + row + part, mask=inside, other=0.0))
    total = tl.zeros_like(top)
    y = tl.zeros_like(c + top)
    for part in range(PARTS):
        weight = tl.exp(tl.load(lse_ptr + row + part, mask=inside, other=0.0) - top)
        total += weight
        y += weight * tl.load(parts_ptr + (row + part) * N2 + c, mask=mask, other=0.0)
    return y / total


@triton.jit
def _kernel(
    x_ptr, other_ptr, left_ptr, right_ptr, ratio_ptr, out_ptr, scale_ptr, tokens, stride, eps, PARTS,
    SOURCE: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, HOLD: tl.constexpr, FORM: tl.constexpr,
    QMAX: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, N1P: tl.constexpr, N2P: tl.constexpr,
    TB: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    N: tl.constexpr = N1 * N2
    i = tl.arange(0, TB * N1P)
    r, c = (i % N1P)[:, None], tl.arange(0, N2P)[None, :]  # X: (TB * N1P, N2P)
    if RIGHT and HOLD:
        k = tl.arange(0, N2P)[:, None]
        right = tl.load(right_ptr + k * N2 + c, mask=(k < N2) & (c < N2), other=0.0)  # (N2P, N2P)
    if LEFT:
        a = tl.arange(0, N1P)
        left_t = tl.load(  # P1^T, (N1P, N1P)
            left_ptr + a[None, :] * N1 + a[:, None], mask=(a[:, None] < N1) & (a[None, :] < N1), other=0.0
        )
    low_ratio, high_ratio = tl.load(ratio_ptr), tl.load(ratio_ptr + 1)
    for block in range(tl.program_id(0), tl.cdiv(tokens, TB), tl.num_programs(0)):
        token = (block * TB + i // N1P)[:, None]
        rows = (r < N1) & (token < tokens)
        mask = rows & (c < N2)
        if SOURCE == _MERGE:
            x = _merge(x_ptr, other_ptr, token, r, c, mask, PARTS, N1, N2)
            x = tl.where(mask, x, 0.0)
            raw = x
        else:
            x, raw = _load(x_ptr, other_ptr, stride, token, r, c, mask, N2, SOURCE)
        top = tl.max(tl.reshape(tl.abs(x), (TB, N1P * N2P)), axis=1)  # (TB,)
        top = tl.where(top > 0, top, 1.0)
        unit = top
        if SOURCE == _NORM:
            unit = top * tl.rsqrt(tl.sum(tl.reshape(raw * raw, (TB, N1P * N2P)), axis=1) / N + eps)
        shrink = tl.reshape(tl.broadcast_to((1.0 / top)[:, None], (TB, N1P)), (TB * N1P, 1))
        y = x * shrink
        if RIGHT:
            if HOLD:
                y = tl.dot(y.to(tl.float16), right)
            else:
                y = tl.zeros((TB * N1P, N2P), tl.float32)
                for start in range(0, N2, K):
                    k = start + tl.arange(0, K)
                    within = rows & (k < N2)[None, :]
                    strip, _ = _load(x_ptr, other_ptr, stride, token, r, k[None, :], within, N2, SOURCE)
                    p = tl.load(right_ptr + k[:, None] * N2 + c, mask=(k < N2)[:, None] & (c < N2), other=0.0)
                    y = tl.dot((strip * shrink).to(tl.float16), p, y)
        y = tl.reshape(y, (TB, N1P, N2P))
        if LEFT:  # tokens side by side: (N1P, TB * N2P)
            wide = tl.reshape(tl.permute(y, (1, 0, 2)), (N1P, TB * N2P)).to(tl.float16)
            y = tl.permute(tl.reshape(tl.dot(left_t, wide), (N1P, TB, N2P)), (1, 0, 2))
        flat = tl.reshape(y, (TB, N1P * N2P))
        low = tl.minimum(tl.min(flat, axis=1), 0.0) * low_ratio
        high = tl.maximum(tl.max(flat, axis=1), 0.0) * high_ratio
        step = tl.maximum(high, -low) / QMAX  # (TB,)
        some = step > 0
        step = tl.where(some, step, 1.0)
        q = round_half_even(y * (1.0 / step)[:, None, None])
        q = tl.minimum(tl.maximum(q, -QMAX - 1.0), QMAX)
        mine = block * TB + tl.arange(0, TB)
        tl.store(scale_ptr + mine, tl.where(some, step * unit, 1.0), mask=mine < tokens)
        t3, r3 = mine[:, None, None], tl.arange(0, N1P)[None, :, None]
        inside = (t3 < tokens) & (r3 < N1)
        if FORM == _PACKED:
            even, odd = tl.split(tl.reshape(q, (TB, N1P, N2P // 2, 2)))
            byte = (even + (QMAX + 1.0)).to(tl.uint8) | ((odd + (QMAX + 1.0)).to(tl.uint8) << 4)
            c3 = tl.arange(0, N2P // 2)[None, None, :]
            at = t3.to(tl.int64) * (N // 2) + r3 * (N2 // 2) + c3
            tl.store(out_ptr + at, byte, mask=inside & (c3 < N2 // 2))
        else:
            c3 = tl.arange(0, N2P)[None, None, :]
            first = t3.to(tl.int64) * N
            if FORM == _PLANES:
                at = first + (c3 % 2) * (N // 2) + (r3 * N2 + c3) // 2
                tl.store(out_ptr + at, q.to(tl.int8), mask=inside & (c3 < N2))
            else:
                tl.store(out_ptr + first + r3 * N2 + c3, q.to(tl.float8e4nv), mask=inside & (c3 < N2))


def supports(shape: tuple[int, int], left: bool, right: bool, bits: int) -> str | None:
    """Why the kernel cannot do a site, or None if it can."""
    n1, n2 = shape
    if n2 % 2:
        return f"rows of {n2} do not pack into bytes"
    if right and not left:
        return "a full matrix"
    if max(n1, n2) > 256 and (left or right):
        return f"factors of {n1} and {n2}"
    if bits != 4:
        return f"{bits}-bit activations"
    return None


def launch(
    x: Tensor,
    other: Tensor | None,
    source: str,
    shape: tuple[int, int],
    left: Tensor | None,
    right: Tensor | None,
    ratios: Tensor,
    bits: int,
    form: Form,
    eps: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Run the kernel; see `reference`.

    Args:
        x: rows may lie apart (as the halves of a fused projection do), channels not.
        other: a gain, a gate as far apart as x, or log-sum-exps.
        left, right: float16.
    """
    if source == "gate" and (other is None or other.stride() != x.stride()):
        x, other = x.contiguous(), None if other is None else other.contiguous()
    n1, n2 = shape
    n = n1 * n2
    tokens = x.shape[0]
    size, dtype = {
        "planes": (n, torch.int8),
        "float8": (n, torch.float8_e4m3fn),
        "packed": (n // 2, torch.uint8),
    }[form]
    out = torch.empty((tokens, size), dtype=dtype, device=x.device)
    scale = torch.empty((tokens, 1), dtype=torch.float32, device=x.device)
    n1p = triton.next_power_of_2(n1)
    n2p = triton.next_power_of_2(n2)
    if left is not None:
        n1p, n2p = max(16, n1p), max(16, n2p)
    most = _sms(x) if tokens > 1 else 1
    tb = 1
    while tb * n1p * n2p < 8192 and tokens > tb * most:
        tb *= 2
    tile = tb * n1p * n2p
    blocks = triton.cdiv(tokens, tb)
    hold = n2p <= _HELD or source == "merge"  # what is merged cannot be read in strips
    per_sm = max(1, 16384 // tile)
    _kernel[(min(blocks, most * per_sm),)](
        x, x if other is None else other, left, right, ratios, out, scale, tokens, x.stride(0), eps,
        x.shape[2] if source == "merge" else 1,
        SOURCE=_SOURCES[source], LEFT=left is not None, RIGHT=right is not None, HOLD=hold, FORM=_FORMS[form],
        QMAX=(1 << bits - 1) - 1, N1=n1, N2=n2, N1P=n1p, N2P=n2p, TB=tb, K=_STRIP,
        num_warps=8 if tile >= 8192 else 4,
    )  # fmt: skip
    return out, scale


def _sms(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 4
