"""P = P1 (x) P2 (FlatQuant, section 3.1): 2 n (n1 + n2) operations a row, n1^2 + n2^2 parameters."""

import math

from jaxtyping import Float
from torch import Tensor

from flatquant.ops.kron.reference import kron_matmul
from flatquant.transforms.base import Transform
from flatquant.transforms.factor import Factor


class Kronecker(Transform):
    """x -> x (P1 (x) P2). A missing factor is the identity of size `shape` there."""

    def __init__(self, left: Factor | None, right: Factor | None) -> None:
        super().__init__()
        self.left = left
        self.right = right

    def forward(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        return kron_matmul(
            x,
            self.left.matrix().to(x.dtype) if self.left is not None else None,
            self.right.matrix().to(x.dtype) if self.right is not None else None,
        )

    def inverse_t(self, w: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        return kron_matmul(
            w,
            self.left.inverse_t().to(w.dtype) if self.left is not None else None,
            self.right.inverse_t().to(w.dtype) if self.right is not None else None,
        )


def kronecker_split(n: int, blocks: int = 1) -> tuple[int, int]:
    """Factor n = n1 * n2 with n1 + n2 least: the cheapest Kronecker transform of size n; n1 <= n2 where it can be.

    Any n >= 1 has one; a prime gives (1, n). 576 -> (24, 24), 1536 -> (32, 48), 11008 -> (86, 128).

    Args:
        blocks: n1 is a multiple of it, as it divides n: 1536 in 16 blocks -> (32, 48), 11008 in 4 -> (172, 64).
    """
    divisors = (d for d in range(1, math.isqrt(n // blocks) + 1) if n // blocks % d == 0)
    sizes = ((blocks * a, n // (blocks * a)) for d in divisors for a in (d, n // blocks // d))
    return min(sizes, key=lambda size: (sum(size), size))
