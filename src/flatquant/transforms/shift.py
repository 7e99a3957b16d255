"""A shift of channels: x -> x - d, whose readers add W d to their bias (OmniQuant, arXiv 2308.13137, section 3.3).

What a channel has in all tokens takes up a grid's range and says nothing. It is no linear map, so it stands beside a
site's transform, before it. A norm with a bias absorbs it; elsewhere it is one subtraction online.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from flatquant.modules import Neutral, Trainable


class Shift(Trainable, Neutral):
    """x -> x - d."""

    group = "scale"

    def __init__(self, start: Tensor) -> None:
        """Start from `start`, (n,)."""
        super().__init__()
        self.d = nn.Parameter(start.clone())

    def forward(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        """(.., n)"""
        return (x - self.d).to(x.dtype)

    @torch.no_grad()
    def neutralise(self) -> None:
        self.d.zero_()

    def product(self, w: Float[Tensor, "*rows n"]) -> Float[Tensor, "*rows"]:
        """What readers add to their bias, W d.  # (o, n) -> (o,)"""
        return w @ self.d.to(torch.promote_types(w.dtype, self.d.dtype))
