"""`kl_rows` in one pass over the logits forward and one backward.

A vocabulary of 49,152 and 8,192 tokens are 400 million logits: log_softmax, its float32 copies and their gradients
pass over them some fifteen times and keep several gigabytes. Here a program walks one row: with p the teacher and
running maxima, KL = sum p (t - s) - lse(t) + lse(s); the backward pass needs the two log-sum-exps only. Layout: logits
(rows, V) contiguous, tiles of N columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flatquant.ops.triton import on_device

_TILE = 4096
_LEAST = tl.constexpr(-1e30)  # of which differences exist, other than of minus infinity


@triton.jit
def _forward(t_ptr, s_ptr, kl_ptr, lse_ptr, rows, v, N: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, N)
    t_max = _LEAST
    s_max = _LEAST
    t_sum = 0.0
    s_sum = 0.0
    cross = 0.0  # sum exp(t - t_max) (t - s)
    for start in range(0, v, N):
        mask = start + c < v
        t = tl.where(mask, tl.load(t_ptr + row * v + start + c, mask=mask, other=0.0).to(tl.float32), _LEAST)
        s = tl.where(mask, tl.load(s_ptr + row * v + start + c, mask=mask, other=0.0).to(tl.float32), _LEAST)
        t_new = tl.maximum(t_max, tl.max(t, axis=0))
        s_new = tl.maximum(s_max, tl.max(s, axis=0))
        p = tl.exp(t - t_new)
        shrink = tl.exp(t_max - t_new)
        t_sum = t_sum * shrink + tl.sum(p, axis=0)
        cross = cross * shrink + tl.sum(p * (t - s), axis=0)
        s_sum = s_sum * tl.exp(s_max - s_new) + tl.sum(tl.exp(s - s_new), axis=0)
        t_max = t_new
        s_max = s_new
    t_lse = t_max + tl.log(t_sum)
    s_lse = s_max + tl.log(s_sum)
    tl.store(kl_ptr + row, cross / t_sum - t_lse + s_lse)
    tl.store(lse_ptr + row, t_lse)
    tl.store(lse_ptr + rows + row, s_lse)


@triton.jit
def _backward(t_ptr, s_ptr, lse_ptr, g_ptr, gs_ptr, rows, v, N: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * N + tl.arange(0, N)
    mask = c < v
    t = tl.where(mask, tl.load(t_ptr + row * v + c, mask=mask, other=0.0).to(tl.float32), _LEAST)
    s = tl.where(mask, tl.load(s_ptr + row * v + c, mask=mask, other=0.0).to(tl.float32), _LEAST)
    g = tl.load(g_ptr + row)
    gs = g * (tl.exp(s - tl.load(lse_ptr + rows + row)) - tl.exp(t - tl.load(lse_ptr + row)))
    tl.store(gs_ptr + row * v + c, gs.to(gs_ptr.dtype.element_ty), mask=mask)


class _KL(torch.autograd.Function):
    @staticmethod
    @on_device
    def forward(ctx, teacher: Tensor, student: Tensor) -> Tensor:
        teacher, student = teacher.contiguous(), student.contiguous()
        v = student.shape[-1]
        rows = student.numel() // v
        kl = torch.empty(student.shape[:-1], dtype=torch.float32, device=student.device)
        lse = torch.empty((2, rows), dtype=torch.float32, device=student.device)
        _forward[(rows,)](teacher, student, kl, lse, rows, v, N=_TILE, num_warps=8)
        ctx.save_for_backward(teacher, student, lse)
        return kl

    @staticmethod
    @on_device
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        teacher, student, lse = ctx.saved_tensors
        v = student.shape[-1]
        rows = student.numel() // v
        out = torch.empty_like(student)
        grid = (rows, triton.cdiv(v, _TILE))
        _backward[grid](teacher, student, lse, grad.contiguous().float(), out, rows, v, N=_TILE, num_warps=8)
        return None, out


def kl_rows(teacher: Tensor, student: Tensor) -> Tensor:
    """See `reference.kl_rows`."""
    return _KL.apply(teacher, student)  # type: ignore[return-value]
