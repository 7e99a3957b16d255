"""What a transform is: a linear map on the last dimension of activations and its inverse transpose on weights.

Row-vector convention throughout: y = x W^T with x (.., n) and W (o, n). For invertible P,
y = (x P) (W P^-T)^T, so activations take `forward` and weights take `inverse_t`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from jaxtyping import Float
from torch import Tensor, nn


class Transform(nn.Module, ABC):
    """An invertible linear map on rows of length n."""

    @abstractmethod
    def forward(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        """x P.  # (.., n)"""

    @abstractmethod
    def inverse_t(self, w: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        """w P^-T.  # (.., n)"""


class Identity(Transform):
    """P = I."""

    def forward(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        return x

    def inverse_t(self, w: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        return w
