"""How much of a tensor's range a grid covers.

A clip maps the range [low, high] of the data to the range of the grid. Learned clipping multiplies each end by
sigmoid(logit) (FlatQuant, section 3.1, after OmniQuant's learnable weight clipping). The papers start at logit 4, a
share of 0.982, and have hundreds of steps to find the right one; a short fit starts nearer to it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from flatquant.modules import Neutral, Trainable

START = 4.0
_WHOLE = 20.0  # a logit whose sigmoid is 1 in float32


class Range(nn.Module, ABC):
    """Maps a data range to a grid range, end by end."""

    @abstractmethod
    def ratios(self) -> tuple[Tensor, Tensor] | None:
        """The factors for (low, high), or None where nothing is cut."""

    def forward(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Clipped (low, high), same shapes."""
        ratios = self.ratios()
        return (low, high) if ratios is None else (low * ratios[0], high * ratios[1])


class NoClip(Range):
    """The full range."""

    def ratios(self) -> None:
        return None


class LearnedClip(Range, Trainable, Neutral):
    """Fitted factors: one pair for all tokens, or a pair for every scale of a weight matrix."""

    group = "clip"

    def __init__(self, shape: tuple[int, ...] = (1,), start: float = START) -> None:
        """Factors of `shape`, which broadcasts against the ranges, at sigmoid(start)."""
        super().__init__()
        self.low_logit = nn.Parameter(torch.full(shape, start))
        self.high_logit = nn.Parameter(torch.full(shape, start))

    def ratios(self) -> tuple[Tensor, Tensor]:
        return torch.sigmoid(self.low_logit), torch.sigmoid(self.high_logit)

    @torch.no_grad()
    def neutralise(self) -> None:
        self.low_logit.fill_(_WHOLE)
        self.high_logit.fill_(_WHOLE)


class FixedClip(Range):
    """Frozen factors, scalars, for serving.  # float32, (2,): low, high"""

    ratio: Tensor

    def __init__(self, ratios: Tensor) -> None:
        super().__init__()
        self.register_buffer("ratio", ratios.detach().float().reshape(2).clone())

    def ratios(self) -> tuple[Tensor, Tensor]:
        low, high = self.ratio.unbind()
        return low, high
