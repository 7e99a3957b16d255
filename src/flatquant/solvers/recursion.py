"""The recursion that error-compensating solvers share: fix a column, push its error onto those still free, repeat.

With U the upper Cholesky factor of H^-1 (H^-1 = U^T U), fixing column q costs e = (w_q - Q(w_q)) / U_qq per row and
the best correction of the rest is -e U_q,q+1: (GPTQ, arXiv 2210.17323, section 3, eq. 2-3). What Q is, a grid or a
codebook, and where H comes from make no difference. Updates reach columns outside the current block lazily. The sum of
e^2 is exactly tr(dW H dW^T) of the damped H: tests hold the code to that.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from flatquant.errors import CalibrationError


def revived(
    w: Float[Tensor, "o n"], hessian: Float[Tensor, "n n"] | None
) -> tuple[Float[Tensor, "o n"], Float[Tensor, "n n"]]:
    """Copies of (w, H) in w's dtype, where channels that are never used have weight 0 and curvature 1.

    Raises:
        CalibrationError: there is no Hessian.
    """
    if hessian is None:
        raise CalibrationError("error compensation needs calibration text; give some, or use the rtn solver")
    w, h = w.clone(), hessian.to(w.dtype).clone()
    dead = h.diagonal() == 0
    h.diagonal()[dead] = 1.0
    w[:, dead] = 0.0
    return w, h


def compensate(
    w: Float[Tensor, "o n"],
    h: Float[Tensor, "n n"],
    order: Int64[Tensor, " n"],
    fix: Callable[[Tensor, Tensor, Tensor], Tensor],
    *,
    damping: float,
    block_size: int,
) -> None:
    """Fix all columns.

    Args:
        w: (o, n), `revived`.
        h: (n, n), likewise.
        order: the columns in the order in which they are fixed, int64, (n,).
        fix: fixes a block of columns: called with their indices (b,), what compensation has made of them (o, b), and
            their block of U (b, b); returns the errors e, (o, b).
        damping: relative to the mean of h's diagonal.
        block_size: columns in a block; the result does not depend on it.

    Raises:
        CalibrationError: h stays indefinite under 1000 times the damping.
    """
    w, h = w[:, order], h[order][:, order]
    upper = inverse_factor(h, damping)
    n = w.shape[-1]
    for start in range(0, n, block_size):
        here, rest = slice(start, start + block_size), slice(start + block_size, n)
        errors = fix(order[here], w[:, here], upper[here, here])
        w[:, rest] -= errors @ upper[here, rest]


def one_by_one(
    w: Float[Tensor, "o b"], u: Float[Tensor, "b b"], fix: Callable[[int, Tensor], Tensor]
) -> Float[Tensor, "o b"]:
    """The errors of a block whose columns are fixed by a function, from left to right.

    Args:
        w: (o, b); unchanged.
        u: (b, b).
        fix: called with a column's place in the block and what compensation has made of it, (o,); returns what it
            becomes.
    """
    w = w.clone()
    errors = torch.empty_like(w)
    for i in range(w.shape[1]):
        errors[:, i] = (w[:, i] - fix(i, w[:, i])) / u[i, i]
        w[:, i + 1 :] -= errors[:, i : i + 1] * u[i, i + 1 :]
    return errors


def inverse_factor(h: Float[Tensor, "n n"], damping: float) -> Float[Tensor, "n n"]:
    """Upper Cholesky factor of (h + damping)^-1.  # (n, n)"""
    added = damping * h.diagonal().mean()
    for _ in range(4):
        lower, info = torch.linalg.cholesky_ex(h + added * torch.eye(h.shape[0], dtype=h.dtype, device=h.device))
        if int(info) == 0:
            upper, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if int(info) == 0:
                return upper
        added = added * 10
    raise CalibrationError(
        "the solver's Hessian is not positive definite even under strong damping: NaN in the inputs, or far too few "
        "calibration tokens; use more samples, a larger damping, or the rtn solver"
    )
