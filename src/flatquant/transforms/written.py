"""A transform that the writer of a tensor has already applied: its readers' weights undo it, nothing runs online."""

from torch import Tensor

from flatquant.transforms.base import Transform


class Written(Transform):
    """Identity on activations, `inner`'s inverse transpose on weights."""

    def __init__(self, inner: Transform) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x

    def inverse_t(self, w: Tensor) -> Tensor:
        return self.inner.inverse_t(w)
