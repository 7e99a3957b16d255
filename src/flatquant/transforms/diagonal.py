"""Per-channel scale: P = diag(c), c > 0.

The scale is stored as log c, so that it cannot cross zero (the original trains c itself, which can); the learning
rate then acts on relative changes. It costs nothing at inference: a norm's gain or the rows of a writer absorb it.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from flatquant.modules import Neutral, Trainable
from flatquant.transforms.base import Transform

# A channel that is always zero has no second moment to balance; bounds keep half precision finite.
BOUND = 1e4


class Diagonal(Transform, Trainable, Neutral):
    """x -> x * c."""

    group = "scale"

    def __init__(self, scale: Tensor) -> None:
        """Start from `scale`, (n,), positive."""
        super().__init__()
        self.log_scale = nn.Parameter(scale.clamp(1 / BOUND, BOUND).log())

    @property
    def scale(self) -> Tensor:
        """c.  # (n,)"""
        return self.log_scale.exp()

    def forward(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        return (x * self.scale).to(x.dtype)

    @torch.no_grad()
    def neutralise(self) -> None:
        self.log_scale.zero_()

    def inverse_t(self, w: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        return w / self.scale


class HeadDiagonal(Transform, Trainable, Neutral):
    """One scale per channel of every key or value head, shared by the query heads that read that head.

    The head's writer applies `scale` to its output; this transform is what its readers see.
    """

    group = "scale"

    def __init__(self, scale: Tensor, head_dim: int, readers: int, *, paired: bool = False) -> None:
        """Start from `scale`, positive, (kv_heads * head_dim,); `readers` query heads read a head.

        Args:
            paired: channels j and j + head_dim / 2 share a scale, which then commutes with RoPE's rotation of the two
                (the official code of learned equivalent transformations lacks this, and changes the function).
        """
        super().__init__()
        log = scale.clamp(1 / BOUND, BOUND).log().unflatten(0, (-1, head_dim))  # (kv_heads, head_dim)
        self.log_scale = nn.Parameter((log[:, : head_dim // 2] + log[:, head_dim // 2 :]) / 2 if paired else log)
        self.readers, self.paired = readers, paired

    @property
    def scale(self) -> Tensor:
        """c.  # (kv_heads * head_dim,)"""
        log = torch.cat([self.log_scale, self.log_scale], 1) if self.paired else self.log_scale
        return log.exp().flatten()

    @property
    def spread(self) -> Tensor:
        """c as the query heads see it.  # (heads * head_dim,)"""
        heads = self.scale.unflatten(0, (len(self.log_scale), -1))
        return heads.repeat_interleave(self.readers, 0).flatten()

    def write(self, y: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        """What the heads' writer gives, times c.  # (.., kv_heads * head_dim)"""
        return y * self.scale

    def forward(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        return (x * self.spread).to(x.dtype)

    @torch.no_grad()
    def neutralise(self) -> None:
        self.log_scale.zero_()

    def inverse_t(self, w: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        return w / self.spread


def absmax_scale(x_absmax: Float[Tensor, " n"], w_absmax: Float[Tensor, " n"], alpha: float) -> Float[Tensor, " n"]:
    """The paper's start, wmax^(1-alpha) / xmax^alpha (SmoothQuant, eq. 4, inverted; FlatQuant's code).

    Args:
        x_absmax: largest |x_j| over calibration tokens, (n,).
        w_absmax: largest |W_:j| over all weights that share this input, (n,).
    """
    c = w_absmax.clamp(min=1e-5) ** (1 - alpha) / x_absmax.clamp(min=1e-5) ** alpha
    return c.clamp(min=1e-5)


def second_moment_scale(x_square: Float[Tensor, " n"], w_square: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """(E w_j^2 / E x_j^2)^(1/4): minimises ||x P||^2 ||W P^-T||^2, the product both 4-bit errors grow with.

    Args:
        x_square: mean x_j^2 over tokens, (n,).
        w_square: mean W_:j^2 over rows, (n,).
    """
    ratio = (w_square / x_square.clamp(min=torch.finfo(x_square.dtype).tiny)) ** 0.25
    alive = (x_square > 0) & (w_square > 0)
    return torch.where(alive, ratio, torch.ones_like(ratio))
