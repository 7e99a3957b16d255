"""x (P1 (x) P2) without ever forming the product: 2 n (n1 + n2) operations a row instead of 2 n^2."""

import torch
from jaxtyping import Float
from torch import Tensor


def kron_matmul(
    x: Float[Tensor, "*batch n"], left: Float[Tensor, "n1 n1"] | None, right: Float[Tensor, "n2 n2"] | None
) -> Float[Tensor, "*batch n"]:
    """Multiply rows by a Kronecker product (FlatQuant, section 3.1, eq. 3: X' = P1^T X P2).

    Args:
        x: (.., n1 * n2), n1 the slow index.
        left: P1, (n1, n1), or None for the identity.
        right: P2, (n2, n2), or None for the identity. At least one is given unless x is to pass unchanged.

    Returns:
        (.., n1 * n2), equal to `x @ torch.kron(left, right)`.
    """
    if right is not None:
        x = (x.unflatten(-1, (-1, right.shape[0])) @ right).flatten(-2)
    if left is not None:
        n = left.shape[0]
        rows = x.reshape(-1, n, x.shape[-1] // n)
        # A product for each row with one matrix: as one product for all, it would move the rows twice.
        x = torch.bmm(left.to(x.dtype).mT.expand(rows.shape[0], n, n), rows).view(x.shape)
    return x
