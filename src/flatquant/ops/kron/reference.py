"""x (P1 (x) P2) without ever forming the product: 2 n (n1 + n2) operations a row instead of 2 n^2."""

from torch import Tensor


def kron_matmul(x: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
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
        x = (left.mT @ x.unflatten(-1, (left.shape[0], -1))).flatten(-2)
    return x
