"""Transforms that the writer of a tensor has already applied: its readers' weights undo them, nothing runs online."""

import torch
from jaxtyping import Float
from torch import Tensor

from flatquant.transforms.base import Transform


class Written(Transform):
    """Identity on activations, `inner`'s inverse transpose on weights."""

    def __init__(self, inner: Transform) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        return x

    def inverse_t(self, w: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        return self.inner.inverse_t(w)


class MovedGain(Transform):
    """A norm's gain g that its readers have taken over, so that the norm commutes with rotations (QuaRot, section 3).

    Identity on activations, w * g on weights.
    """

    gain: Tensor

    def __init__(self, gain: Tensor) -> None:
        """Take over `gain`, (n,), float32 or float64; the norm's own is then 1."""
        super().__init__()
        self.register_buffer("gain", gain.detach().to(torch.promote_types(gain.dtype, torch.float32), copy=True))

    def forward(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        return x

    def inverse_t(self, w: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        return w * self.gain
