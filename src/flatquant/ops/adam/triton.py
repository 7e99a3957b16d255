"""`adam_step` in one pass: 12 bytes a weight are read and written with a gradient in bfloat16, none are made besides.

Unfused, a step of 7 billion weights is some forty passes over float32 and int64. Layout: a program has ROWS blocks of
256 weights, (ROWS, 256), so that the scales of blocks are maxima of its own rows.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from flatquant.ops.adam.reference import (
    BETA1,
    BETA2,
    BLOCK,
    FIRST_GAP,
    FIRST_LEVELS,
    SECOND_GAP,
    SECOND_LEVELS,
)
from flatquant.ops.triton import on_device

_ROWS = 8
_LOG_BETA1, _LOG_BETA2 = math.log2(BETA1), math.log2(BETA2)


@triton.jit
def _mixed(h):
    h = (h ^ (h >> 16)) * 0x85EBCA6B
    h = (h ^ (h >> 13)) * 0xC2B2AE35
    return h ^ (h >> 16)


@triton.jit
def _levels(r, share, GAP: tl.constexpr, LEAST: tl.constexpr, ZERO: tl.constexpr):
    """The level of r in [0, 1], counted down from 0, or the one above; with ZERO, the one below LEAST is 0."""
    e = tl.maximum(tl.minimum(tl.floor(tl.log2(tl.maximum(r, 1e-30)) / GAP), 0.0), LEAST - ZERO)
    low = tl.exp2(e * GAP)
    if ZERO:
        low = tl.where(e < LEAST, 0.0, low)
    up = (share * (tl.exp2((e + 1) * GAP) - low) < r - low) & (e < 0)
    return e + tl.where(up, 1.0, 0.0)


@triton.jit(do_not_specialize=["key"])
def _step(
    p_ptr, g_ptr, rest_ptr, m_ptr, v_ptr, m_scale_ptr, v_scale_ptr, step_ptr, lr_ptr, hold_ptr, n, eps, key,
    B1: tl.constexpr, B2: tl.constexpr, LOG_B1: tl.constexpr, LOG_B2: tl.constexpr,
    GAP1: tl.constexpr, LEVELS1: tl.constexpr, GAP2: tl.constexpr, LEVELS2: tl.constexpr,
    ROWS: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    if tl.load(hold_ptr) == 0:
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        i = row[:, None] * N + tl.arange(0, N)[None, :]
        mask, rows = i < n, row * N < n
        t = tl.load(step_ptr)
        start = _mixed(t.to(tl.uint32) * 0x9E3779B1 + key.to(tl.uint32))
        a = _mixed(_mixed(i.to(tl.uint32) + start) ^ start)
        b = _mixed(a + 0x9E3779B9)

        g = tl.load(g_ptr + i, mask=mask, other=0.0).to(tl.float32)
        m = tl.load(m_ptr + i, mask=mask, other=0).to(tl.float32)
        v = tl.load(v_ptr + i, mask=mask, other=0).to(tl.float32)
        m_scale = tl.load(m_scale_ptr + row, mask=rows, other=0.0)[:, None]
        v_scale = tl.load(v_scale_ptr + row, mask=rows, other=0.0)[:, None]
        sign = tl.where(m > 0, 1.0, tl.where(m < 0, -1.0, 0.0))
        m = B1 * (tl.exp2((tl.abs(m) - 1 - LEVELS1) * GAP1) * sign * m_scale) + (1 - B1) * g
        v = tl.where(mask, B2 * (tl.exp2((v - LEVELS2) * GAP2) * v_scale) + (1 - B2) * g * g, 0.0)

        p = tl.load(p_ptr + i, mask=mask, other=0.0).to(tl.int16, bitcast=True).to(tl.int32) << 16
        p += tl.load(rest_ptr + i, mask=mask, other=0).to(tl.int32) << 8
        denominator = tl.sqrt(v / (1 - tl.exp2(t * LOG_B2))) + eps
        moved = p.to(tl.float32, bitcast=True) - tl.load(lr_ptr) * (m / (1 - tl.exp2(t * LOG_B1))) / denominator
        bits = (moved.to(tl.int32, bitcast=True) + (a & 0xFF).to(tl.int32)) >> 8
        high = (bits + 128) >> 8
        tl.store(p_ptr + i, high.to(tl.int16).to(tl.bfloat16, bitcast=True), mask=mask)
        tl.store(rest_ptr + i, (bits - (high << 8)).to(tl.int8), mask=mask)

        m_scale, v_scale = tl.max(tl.abs(m), axis=1), tl.max(v, axis=1)
        tl.store(m_scale_ptr + row, m_scale, mask=rows)
        tl.store(v_scale_ptr + row, v_scale, mask=rows)
        r = tl.abs(m) / tl.where(m_scale > 0, m_scale, 1.0)[:, None]
        code = 1 + LEVELS1 + _levels(r, ((a >> 16).to(tl.float32) + 0.5) / 65536, GAP1, -LEVELS1, 1)
        sign = tl.where(m > 0, 1.0, tl.where(m < 0, -1.0, 0.0))
        tl.store(m_ptr + i, (code * sign).to(tl.int8), mask=mask)
        r = v / tl.where(v_scale > 0, v_scale, 1.0)[:, None]
        code = LEVELS2 + _levels(r, ((b >> 16).to(tl.float32) + 0.5) / 65536, GAP2, -LEVELS2, 0)
        tl.store(v_ptr + i, code.to(tl.uint8), mask=mask)


@on_device
def adam_step(
    p: Tensor, grad: Tensor, state: dict[str, Tensor], *, lr: Tensor, hold: Tensor, eps: float, key: int
) -> None:
    """See `reference.adam_step`."""
    assert p.is_contiguous()
    state["step"].add_(hold == 0)
    n, names = p.numel(), ("rest", "exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale", "step")
    _step[(triton.cdiv(n, _ROWS * BLOCK),)](
        p, grad.contiguous(), *(state[name] for name in names), lr, hold, n, eps, key,
        B1=BETA1, B2=BETA2, LOG_B1=_LOG_BETA1, LOG_B2=_LOG_BETA2,
        GAP1=FIRST_GAP, LEVELS1=FIRST_LEVELS, GAP2=SECOND_GAP, LEVELS2=SECOND_LEVELS,
        ROWS=_ROWS, N=BLOCK,
    )  # fmt: skip
