"""A low-rank branch in 16 bit beside the rounded weights: W = L1 L2 + R, and only R is rounded (arXiv 2411.05007).

The truncated singular value decomposition takes the R of least norm, and the error of rounding R, weights and
activations, shrinks with R's norm (section 4.2, proposition 4.1). The branch is rounded to 16 bit first, so that R
takes up what that loses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

_EXACT = 1024  # up to this smaller side the decomposition is the full one
_OVERSAMPLING, _POWERS = 8, 4


@dataclass(frozen=True, kw_only=True)
class Branch:
    """x -> (x L2^T) L1^T."""

    down: Tensor  # L2, float16, (r, n)
    up: Tensor  # L1, float16, (o, r)

    def weight(self, like: Tensor) -> Tensor:
        """L1 L2 in float64, then in `like`'s dtype.  # (o, n)"""
        return (self.up.double() @ self.down.double()).to(like.dtype)


def low_rank(w: Float[Tensor, "o n"], rank: int) -> Branch:
    """The best approximation of w, (o, n), of this rank, rounded to float16; singular values shared evenly."""
    u, s, vt = _decomposed(w.double(), rank)
    root = s[:rank].sqrt()
    return Branch(down=(root[:, None] * vt[:rank]).half().contiguous(), up=(u[:, :rank] * root).half().contiguous())


def split(
    w: Float[Tensor, "o n"],
    rank: int,
    *,
    rounds: int = 1,
    rounded: Callable[[Tensor], Tensor] | None = None,
    hessian: Float[Tensor, "n n"] | None = None,
) -> Branch:
    """The branch of a weight: of w itself, or, in further rounds, of what rounding leaves of it.

    L_t = SVD_r(W - Q_{t-1}) with Q_t = Q(W - L_t) and Q_0 = 0, as long as the error falls; the best is kept
    (section 4.2, "iterative refinement" in the authors' code).

    Args:
        w: float32 or float64, (o, n).
        rounds: at least 1.
        rounded: R -> Q(R), to nearest; needed for more than one round.
        hessian: of the error, tr(dW H dW^T); the sum of squares without one.
    """
    best = low_rank(w, rank)
    if rounds == 1:
        return best
    assert rounded is not None, "refining a branch needs the rounding that follows it"

    def error(q: Tensor, branch: Branch) -> float:
        d = (w - branch.weight(w) - q).double()
        return float((d.square() if hessian is None else (d @ hessian.double()) * d).sum())

    q = rounded(w - best.weight(w))
    least = error(q, best)
    for _ in range(rounds - 1):
        branch = low_rank(w - q, rank)
        q = rounded(w - branch.weight(w))
        now = error(q, branch)
        if now >= least:
            break
        best, least = branch, now
    return best


def _decomposed(w: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U, S, V^T of w; for large ones the leading part only, by subspace iteration (Halko et al., arXiv 0909.4061)."""
    if min(w.shape) <= max(_EXACT, rank + _OVERSAMPLING):
        return torch.linalg.svd(w, full_matrices=False)
    generator = torch.Generator(w.device).manual_seed(0)
    basis = w @ torch.randn(w.shape[1], rank + _OVERSAMPLING, generator=generator, dtype=w.dtype, device=w.device)
    for _ in range(_POWERS):
        basis = w @ torch.linalg.qr(w.mT @ torch.linalg.qr(basis).Q).Q
    basis = torch.linalg.qr(basis).Q  # (o, r + 8)
    u, s, vt = torch.linalg.svd(basis.mT @ w, full_matrices=False)
    return basis @ u, s, vt
