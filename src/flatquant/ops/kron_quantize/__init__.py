"""A site's input to integers in one kernel on CUDA: norm, gate or merge, Kronecker transform, clip, scale, rounding."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from flatquant.ops import HAS_TRITON
from flatquant.ops.kron_quantize import reference
from flatquant.ops.kron_quantize.reference import Form

__all__ = ["Form", "Site", "gate", "merge", "norm", "plain"]


@dataclass(frozen=True)
class Site:
    """What happens to every row: transform, clip, grid.

    Attributes:
        shape: (n1, n2), n1 the slow index.
        left, right: P1 (n1, n1) and P2 (n2, n2), float32, None for the identity.
        ratios: shares of a row's ends that the grid covers, float32, (2,).
        bits: of the symmetric grid.
    """

    shape: tuple[int, int]
    left: Tensor | None
    right: Tensor | None
    ratios: Tensor
    bits: int

    @cached_property
    def factors(self) -> tuple[Tensor | None, Tensor | None]:
        """P1 and P2 as the kernel takes them: in bfloat16; as they are where Triton is interpreted, which has none."""
        dtype = torch.bfloat16 if self.ratios.is_cuda else torch.float32
        left, right = (None if p is None else p.to(dtype).contiguous() for p in (self.left, self.right))
        return left, right

    def unsupported(self) -> str | None:
        """Why there is no kernel for it, or None if there is one."""
        if not HAS_TRITON:
            return "Triton is not installed"
        from flatquant.ops.kron_quantize import triton

        shared = triton.shared_memory(self.ratios.device)
        return triton.supports(self.shape, self.left is not None, self.right is not None, self.bits, shared)

    def _fused(self, x: Tensor) -> bool:
        return x.is_cuda and self.unsupported() is None

    def _reference(self, x: Tensor, form: Form) -> tuple[Tensor, Tensor]:
        return reference.kron_quantize(x, self.left, self.right, self.ratios, self.bits, form)

    def _launch(self, x: Tensor, other: Tensor | None, source: str, form: Form, eps: float = 0.0):
        from flatquant.ops.kron_quantize import triton

        left, right = self.factors
        return triton.launch(x, other, source, self.shape, left, right, self.ratios, self.bits, form, eps)


def plain(x: Tensor, site: Site, form: Form) -> tuple[Tensor, Tensor]:
    """Integers of x and their scales.  # (T, n) -> (T, n) in `form`, (T, 1)"""
    return site._launch(x, None, "plain", form) if site._fused(x) else site._reference(x, form)


def norm(x: Tensor, gain: Tensor, eps: float, site: Site, form: Form) -> tuple[Tensor, Tensor]:
    """Integers of the RMS norm of x, with gain (n,).  # (T, n) -> (T, n) in `form`, (T, 1)"""
    if site._fused(x):
        return site._launch(x, gain, "norm", form, eps)
    return site._reference(reference.rms_norm(x, gain, eps), form)


def gate(x: Tensor, g: Tensor, site: Site, form: Form) -> tuple[Tensor, Tensor]:
    """Integers of silu(g) x.  # (T, n), (T, n) -> (T, n) in `form`, (T, 1)"""
    if site._fused(x):
        return site._launch(x, g, "gate", form)
    return site._reference(reference.gated(x, g), form)


def merge(parts: Tensor, lse: Tensor, site: Site, form: Form) -> tuple[Tensor, Tensor]:
    """Integers of attention that was computed in parts.

    Args:
        parts, lse: see `reference.merged`, (T, heads, parts, head_dim) and (T, heads, parts), float32.
    """
    if site._fused(parts):
        return site._launch(parts, lse, "merge", form)
    return site._reference(reference.merged(parts, lse), form)
