"""Square matrices with a differentiable inverse transpose: the building blocks of `Matrix` and `Kronecker`.

Two parameterisations (FlatQuant, section 3.1 and appendix; both end within 3 % of each other's loss):
- `DirectFactor` trains the entries of P. A batched, sync-free solve gives the inverse.
- `SVDFactor` trains U diag(d) V^T. Its inverse transpose, U diag(1/d) V^T, needs no general inverse, and d shows the
  conditioning. U and V are a fixed start times a Cayley factor (I - A/2)^-1 (I + A/2) of a skew A that starts at 0, so
  that P starts at exactly the matrix asked for.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from flatquant.modules import Trainable


class Factor(Trainable, ABC):
    """An invertible (n, n) matrix with trainable entries."""

    group = "transform"

    @property
    @abstractmethod
    def size(self) -> int:
        """n."""

    @abstractmethod
    def matrix(self) -> Tensor:
        """P.  # (n, n)"""

    @abstractmethod
    def inverse_t(self) -> Tensor:
        """P^-T.  # (n, n)"""


class DirectFactor(Factor):
    """P is the parameter."""

    def __init__(self, start: Tensor) -> None:
        """Start from `start`, (n, n), invertible."""
        super().__init__()
        self.p = nn.Parameter(start.clone())

    @property
    def size(self) -> int:
        return self.p.shape[0]

    def matrix(self) -> Tensor:
        return self.p

    def inverse_t(self) -> Tensor:
        return torch.linalg.inv_ex(self.p.mT).inverse  # inv_ex: no host sync, so a CUDA graph can hold it


class SVDFactor(Factor):
    """P = U diag(exp(log_d)) V^T with U, V orthogonal."""

    u0: Tensor
    v0: Tensor

    def __init__(self, start: Tensor) -> None:
        """Start from `start`, (n, n), invertible."""
        super().__init__()
        n = start.shape[0]
        u, d, vt = torch.linalg.svd(start.double())
        self.register_buffer("u0", u.to(start.dtype))
        self.register_buffer("v0", vt.mT.to(start.dtype).contiguous())
        self.log_d = nn.Parameter(d.log().to(start.dtype))
        self.skew_u = nn.Parameter(start.new_zeros(n, n))
        self.skew_v = nn.Parameter(start.new_zeros(n, n))

    @property
    def size(self) -> int:
        return self.log_d.shape[0]

    def _orthogonal(self) -> tuple[Tensor, Tensor]:
        return polish(self.u0) @ cayley(self.skew_u), polish(self.v0) @ cayley(self.skew_v)

    def matrix(self) -> Tensor:
        u, v = self._orthogonal()
        return (u * self.log_d.exp()) @ v.mT

    def inverse_t(self) -> Tensor:
        u, v = self._orthogonal()
        return (u * (-self.log_d).exp()) @ v.mT


def polish(u: Tensor) -> Tensor:
    """One Newton-Schulz step to the nearest orthogonal matrix: an error e in u^T u - I becomes e^2.

    A start that was rounded to float32 is orthogonal to 1e-7 only; folding in float64 needs better.
    """
    return 1.5 * u - 0.5 * u @ (u.mT @ u)


def cayley(raw: Tensor) -> Tensor:
    """(I - A/2)^-1 (I + A/2) for the skew part A = tril(raw) - tril(raw)^T: orthogonal, I at raw = 0.  # (n, n)"""
    lower = raw.tril(-1)
    half = (lower - lower.mT) / 2
    eye = torch.eye(raw.shape[0], dtype=raw.dtype, device=raw.device)
    return torch.linalg.solve_ex(eye - half, eye + half).result
