"""The serving stages of linears whose weights are on learned levels.

As with integers there are two types: `FrozenLevels` (indices one by one, as the fit left them) and `PackedLevels` (the
same indices packed into bytes, as they are stored).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from flatquant.levels import LevelTensor
from flatquant.runtime.linear import FrozenSite, NumberLinear, Unpacked


class LevelLinear(NumberLinear, ABC):
    """Weights on levels; activations on a grid are multiplied as the numbers they stand for."""

    levels: Tensor

    def __init__(self, site: FrozenSite, levels: Tensor, bias: Tensor | None) -> None:
        super().__init__(site, bias)
        self.register_buffer("levels", levels)  # float32, (o, g, K)

    @abstractmethod
    def qweight(self) -> LevelTensor:
        """The weight.  # (o, n)"""

    def numbers(self, dtype: torch.dtype) -> Tensor:
        return self.qweight().dequantize(dtype)


class FrozenLevels(LevelLinear, Unpacked):
    """Indices one per byte: what the fit chose."""

    indices: Tensor
    loose = "indices"

    def __init__(self, site: FrozenSite, weight: LevelTensor, bias: Tensor | None) -> None:
        super().__init__(site, weight.levels, bias)
        self.register_buffer("indices", weight.indices)  # uint8, (o, n)

    def qweight(self) -> LevelTensor:
        return LevelTensor(indices=self.indices, levels=self.levels)

    def pack(self) -> Tensor:
        return self.qweight().packed()

    @property
    def packed_bytes(self) -> int:
        o, n = self.indices.shape
        return o * -(-n * self.levels.shape[-1] // 8)


class PackedLevels(LevelLinear):
    """Indices packed into bytes: what is stored and served."""

    packed: Tensor

    def __init__(self, site: FrozenSite, packed: Tensor, levels: Tensor, bias: Tensor | None, n: int) -> None:
        super().__init__(site, levels, bias)
        self.register_buffer("packed", packed)  # uint8, (o, ceil(n * K / 8))
        self.n = n

    @classmethod
    def of(cls, frozen: FrozenLevels) -> PackedLevels:
        """Pack a frozen linear."""
        return cls(frozen.site, frozen.pack(), frozen.levels, frozen.bias, frozen.indices.shape[1])

    def qweight(self) -> LevelTensor:
        return LevelTensor.from_packed(self.packed, self.levels, self.n)
