"""The serving stage of a linear with a low-rank branch: what it wraps, plus (x L2^T) L1^T in 16-bit weights."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from flatquant.modules import ExactBuffers
from flatquant.runtime.linear import FrozenSite, SiteLinear


class BranchedLinear(ExactBuffers):
    """A linear of any kind and its own half of the site's branch.

    The site holds L2, which all its readers share, and applies it to its output *before* that is put on a grid: what
    the branch carries is not rounded.
    """

    up: Tensor

    def __init__(self, inner: SiteLinear, up: Tensor) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("up", up)  # L1, float16, (o, r)

    @property
    def site(self) -> FrozenSite:
        return self.inner.site

    @property
    def bias(self) -> Tensor | None:
        return self.inner.bias

    def plain(self) -> Tensor:
        """The weight and the branch as one matrix, in the site's coordinates.  # float32, (o, n)"""
        assert self.site.down is not None
        return self.inner.plain() + self.up.float() @ self.site.down.float()

    def forward(self, x: Tensor) -> Tensor:
        """(.., n) -> (.., o)"""
        low = self.site.branch(x)  # (.., r)
        return self.inner(x) + F.linear(low, self.up.to(low.dtype)).to(x.dtype)
