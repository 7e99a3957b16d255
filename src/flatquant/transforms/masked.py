"""A full matrix that opens band by band (AffineQuant, section 3.3: the gradual mask).

P^-T = diag(d) + s (M o B): d > 0 is stored as a logarithm, M is 1 on the bands that are open, the stability factor s
holds back values and gradients of all but the diagonal. A strictly diagonally dominant matrix is invertible
(Levy-Desplanques); the mask keeps the fit near one: it starts diagonal, and opens one further band after another, at
entries that are still 0.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from flatquant.modules import Scheduled, Trainable
from flatquant.transforms.base import Transform
from flatquant.transforms.factor import Factor, inverse


def band(n: int, epoch: int, epochs: int) -> int:
    """How many bands, the diagonal counted, are open in `epoch` (0-based): 1 in the first, n in the last (eq. 6)."""
    return n if epochs == 1 else (n - 1) * epoch // (epochs - 1) + 1


class MaskedFactor(Factor, Trainable, Scheduled):
    """One matrix, (n, n), or a batch of them, (b, n, n), that start at the identity."""

    group = "transform"

    mask: Tensor

    def __init__(self, n: int, stability: float, *, batch: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.log_d = nn.Parameter(torch.zeros(*batch, n))
        self.off = nn.Parameter(torch.zeros(*batch, n, n))
        self.register_buffer("mask", stability * (1 - torch.eye(n)))
        self.stability = stability

    @property
    def size(self) -> int:
        return self.log_d.shape[-1]

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        index = torch.arange(self.size, device=self.mask.device)
        distance = (index[:, None] - index).abs()
        self.mask.copy_(self.stability * ((distance > 0) & (distance < band(self.size, epoch, epochs))))

    def matrix(self) -> Float[Tensor, "*batch n n"]:
        return inverse(self.inverse_t().mT)

    def inverse_t(self) -> Float[Tensor, "*batch n n"]:
        return torch.diag_embed(self.log_d.exp()) + self.mask * self.off

    @torch.no_grad()
    def dominance(self) -> float:
        """Least margin of a diagonal entry over the sum of its row's others; above 0, P is surely invertible."""
        a = self.inverse_t()
        diagonal = a.diagonal(dim1=-2, dim2=-1)
        return float((2 * diagonal - a.abs().sum(-1)).min())


class HeadMatrices(Transform):
    """One matrix per key or value head, shared by the query heads that read that head."""

    def __init__(self, factor: Factor, readers: int) -> None:
        """`factor` gives (kv_heads, head_dim, head_dim); `readers` query heads read a head."""
        super().__init__()
        self.factor = factor
        self.readers = readers

    def _times(self, x: Tensor, matrices: Tensor, readers: int) -> Tensor:
        heads, n, _ = matrices.shape
        grouped = x.unflatten(-1, (heads, readers, n))  # (.., kv_heads, readers, head_dim)
        return (grouped @ matrices.to(x.dtype)).flatten(-3)

    def write(self, y: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        """What the heads' writer gives, times its own head's P.  # (.., kv_heads * head_dim)"""
        return self._times(y, self.factor.matrix(), 1)

    def forward(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        return self._times(x, self.factor.matrix(), self.readers)

    def inverse_t(self, w: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        return self._times(w, self.factor.inverse_t(), self.readers)
