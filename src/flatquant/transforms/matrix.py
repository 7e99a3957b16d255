"""One full matrix on the whole last dimension: 2 n^2 operations a row. For heads, and as a bound elsewhere."""

from jaxtyping import Float
from torch import Tensor

from flatquant.transforms.base import Transform
from flatquant.transforms.factor import Factor


class Matrix(Transform):
    """x -> x P."""

    def __init__(self, factor: Factor) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        return x @ self.factor.matrix().to(x.dtype)

    def inverse_t(self, w: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        return w @ self.factor.inverse_t().to(w.dtype)
