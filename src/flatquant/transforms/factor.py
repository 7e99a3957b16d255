"""Square matrices with a differentiable inverse transpose: the building blocks of `Matrix` and `Kronecker`.

Two parameterisations of any invertible matrix (FlatQuant, section 3.1 and appendix; both end within 3 % of each other's
loss):
- `DirectFactor` trains the entries of P. A batched, sync-free solve gives the inverse.
- `SVDFactor` trains U diag(d) V^T. Its inverse transpose, U diag(1/d) V^T, needs no general inverse, and d shows the
  conditioning. U and V are a fixed start times a Cayley factor (I - A/2)^-1 (I + A/2) of a skew A that starts at 0, so
  that P starts at exactly the matrix asked for.

And two that are orthogonal, P^-T = P: `FixedFactor` stays what it is (QuaRot), `OrthogonalFactor` is trained on the
manifold of orthogonal matrices (SpinQuant).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from flatquant.modules import Neutral, Trainable


class Factor(nn.Module, ABC):
    """An invertible (n, n) matrix."""

    @property
    @abstractmethod
    def size(self) -> int:
        """n."""

    @abstractmethod
    def matrix(self) -> Float[Tensor, "*batch n n"]:
        """P.  # (n, n)"""

    @abstractmethod
    def inverse_t(self) -> Float[Tensor, "*batch n n"]:
        """P^-T.  # (n, n)"""


class DirectFactor(Factor, Trainable, Neutral):
    """P is the parameter."""

    group = "transform"

    def __init__(self, start: Tensor) -> None:
        """Start from `start`, (n, n), invertible."""
        super().__init__()
        self.p = nn.Parameter(start.clone())
        self.shared: Tensor | None = None  # set while `shared_inverses` lasts

    @property
    def size(self) -> int:
        return self.p.shape[0]

    def matrix(self) -> Float[Tensor, "*batch n n"]:
        return self.p

    @torch.no_grad()
    def neutralise(self) -> None:
        self.p.copy_(torch.eye(self.size))

    def inverse_t(self) -> Float[Tensor, "*batch n n"]:
        if self.shared is not None:
            return self.shared
        return inverse(self.p.mT)


def inverse(matrices: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch n n"]:
    """By LU, without a look at whether there is one: a CUDA graph can hold it.  # (.., n, n)"""
    # On CUDA, torch permutes rows by a scatter to distinct places. Where it is to take deterministic kernels it sorts
    # these places, in dozens of small kernels, for the same bits.
    strict, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        return torch.linalg.inv_ex(matrices).inverse
    finally:
        torch.use_deterministic_algorithms(strict, warn_only=warns)


@contextmanager
def shared_inverses(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Invert all `DirectFactor`s in `modules` together, and polish orthogonal ones, once while the context lasts.

    A GPU inverts one small matrix no faster than a batch of them. Factors of similar size are padded with an identity
    to a common one. Gradients flow as they would one by one.
    """
    factors = {id(m): m for root in modules for m in root.modules() if isinstance(m, DirectFactor)}
    for size, members in _batches(factors.values()):
        if len(members) == 1:
            members[0].shared = members[0].inverse_t()
            continue
        eye = torch.eye(size, dtype=members[0].p.dtype, device=members[0].p.device)
        padded = [torch.block_diag(f.p.mT, eye[f.size :, f.size :]) if f.size < size else f.p.mT for f in members]
        inverses = inverse(torch.stack(padded))  # (batch, size, size)
        for factor, one in zip(members, inverses.unbind(), strict=True):
            factor.shared = one[: factor.size, : factor.size]
    orthogonal = {id(m): m for root in modules for m in root.modules() if isinstance(m, Orthogonal)}
    for factor in orthogonal.values():
        factor.shared = polish(factor.q)
    try:
        yield
    finally:
        for factor in (*factors.values(), *orthogonal.values()):
            factor.shared = None


def _batches(factors: Iterable[DirectFactor]) -> Iterator[tuple[int, list[DirectFactor]]]:
    """Factors to invert together, and the size to pad them to.

    Such that torch leaves their inverses to cuSOLVER or cuBLAS: those of MAGMA cannot be held by a CUDA graph.
    """
    sizes: dict[int, list[DirectFactor]] = {}
    for factor in factors:
        sizes.setdefault(max(32, 1 << (factor.size - 1).bit_length()), []).append(factor)
    for size, members in sizes.items():
        most = 16 if size <= 128 else 1
        for i in range(0, len(members), most):
            yield size, members[i : i + most]


class ProductFactor(Factor, Neutral):
    """P = A (x) B: fewer parameters, and a small product for each of two small matrices."""

    def __init__(self, left: Factor, right: Factor) -> None:
        super().__init__()
        self.left, self.right = left, right

    @property
    def size(self) -> int:
        return self.left.size * self.right.size

    def matrix(self) -> Float[Tensor, "*batch n n"]:
        return torch.kron(self.left.matrix(), self.right.matrix())

    def inverse_t(self) -> Float[Tensor, "*batch n n"]:
        return torch.kron(self.left.inverse_t(), self.right.inverse_t())

    def neutralise(self) -> None:
        """A and B are neutral themselves."""


class BlockFactor(Factor, Neutral):
    """P is block-diagonal: P = diag(A, B, ..), of factors of one size."""

    def __init__(self, factors: Iterable[Factor]) -> None:
        super().__init__()
        self.factors = nn.ModuleList(factors)

    @property
    def _own(self) -> list[Factor]:
        return cast(list[Factor], list(self.factors))

    @property
    def size(self) -> int:
        return sum(factor.size for factor in self._own)

    def matrix(self) -> Float[Tensor, "*batch n n"]:
        return torch.block_diag(*(factor.matrix() for factor in self._own))

    def inverse_t(self) -> Float[Tensor, "*batch n n"]:
        return torch.block_diag(*(factor.inverse_t() for factor in self._own))

    def neutralise(self) -> None:
        """The blocks are neutral themselves."""


class SVDFactor(Factor, Trainable):
    """P = U diag(exp(log_d)) V^T with U, V orthogonal."""

    group = "transform"

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

    def matrix(self) -> Float[Tensor, "*batch n n"]:
        u, v = self._orthogonal()
        return (u * self.log_d.exp()) @ v.mT

    def inverse_t(self) -> Float[Tensor, "*batch n n"]:
        u, v = self._orthogonal()
        return (u * (-self.log_d).exp()) @ v.mT


class Orthogonal(Factor, ABC):
    """P = Q, which is its own inverse transpose; `polish` takes out what rounding or steps leave of a deviation."""

    q: Tensor  # a buffer or a parameter, (n, n)

    def __init__(self) -> None:
        super().__init__()
        self.shared: Tensor | None = None  # set while `shared_inverses` lasts

    @property
    def size(self) -> int:
        return self.q.shape[0]

    def matrix(self) -> Float[Tensor, "*batch n n"]:
        return polish(self.q) if self.shared is None else self.shared

    def inverse_t(self) -> Float[Tensor, "*batch n n"]:
        return self.matrix()


class FixedFactor(Orthogonal):
    """An orthogonal P that is not trained."""

    def __init__(self, start: Tensor) -> None:
        """Stay at `start`, (n, n), orthogonal."""
        super().__init__()
        self.register_buffer("q", start.clone())


class OrthogonalFactor(Orthogonal, Trainable, Neutral):
    """An orthogonal P that an optimiser on the manifold trains.

    `polish`'s derivative projects gradients onto the manifold's tangent space: only turning counts, not stretching.
    """

    group = "rotation"

    def __init__(self, start: Tensor) -> None:
        """Start from `start`, (n, n), orthogonal."""
        super().__init__()
        self.q = nn.Parameter(start.clone())

    @torch.no_grad()
    def neutralise(self) -> None:
        self.q.copy_(torch.eye(self.size))


def polish(u: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch n n"]:
    """One Newton-Schulz step to the nearest orthogonal matrix: an error e in u^T u - I becomes e^2.

    A start that was rounded to float32 is orthogonal to 1e-7 only; folding in float64 needs better. In its own
    precision under autocast, too: float16 holds neither the step nor, of a rotation that every block shares, the
    gradient.
    """
    with torch.autocast(u.device.type, enabled=False):
        return 1.5 * u - 0.5 * u @ (u.mT @ u)


def cayley(raw: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """(I - A/2)^-1 (I + A/2) for the skew part A = tril(raw) - tril(raw)^T: orthogonal, I at raw = 0.  # (n, n)"""
    lower = raw.tril(-1)
    half = (lower - lower.mT) / 2
    eye = torch.eye(raw.shape[0], dtype=raw.dtype, device=raw.device)
    return torch.linalg.solve_ex(eye - half, eye + half).result
