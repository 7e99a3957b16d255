"""`LevelTensor`: a matrix whose values are sums of a few numbers with signs, W_ij = sum_k +-v_ik (arXiv 2012.13762).

Invariants, checked on construction:

- `indices` is uint8, shape (o, n), each below 2^K: bit k is set where v_k is added, clear where it is subtracted;
- `levels` is float32, shape (o, g, K): the numbers v of every row, or of every group of n / g neighbours in a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flatquant.ops.pack.reference import pack_bits, unpack_bits


@dataclass(frozen=True, kw_only=True)
class LevelTensor:
    """Indices and the levels they choose; see the module docstring."""

    indices: Tensor  # uint8, (o, n)
    levels: Tensor  # float32, (o, g, K)

    def __post_init__(self) -> None:
        if self.indices.dtype != torch.uint8 or self.indices.dim() != 2:
            raise ValueError(f"indices must be a uint8 matrix, got {self.indices.dtype}")
        o, n = self.indices.shape
        if self.levels.dim() != 3 or self.levels.shape[0] != o or n % self.levels.shape[1]:
            raise ValueError(f"indices {o, n} do not split into levels {tuple(self.levels.shape)}")

    @property
    def bits(self) -> int:
        """K, of an index."""
        return self.levels.shape[-1]

    @property
    def shape(self) -> torch.Size:
        return self.indices.shape

    def check_range(self) -> None:
        """Raise ValueError unless every index has K bits and every level is finite."""
        if self.indices.numel() and int(self.indices.max()) >> self.bits:
            raise ValueError(f"index {int(self.indices.max())} of {1 << self.bits} levels")
        if not bool(torch.isfinite(self.levels).all()):
            raise ValueError("levels must be finite")

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix, put together in float32 (float64 if asked for), then cast.  # (o, n)"""
        levels = self.levels.to(torch.float64 if dtype == torch.float64 else torch.float32)
        places = torch.arange(self.bits, device=levels.device)
        set_bits = torch.arange(1 << self.bits, device=levels.device)[:, None] >> places & 1  # (2^K, K)
        sums = levels @ (2 * set_bits - 1).to(levels).mT  # (o, g, 2^K)
        chosen = self.indices.long().unflatten(-1, (levels.shape[1], -1))  # (o, g, n / g)
        return sums.gather(-1, chosen).flatten(-2).to(dtype)

    def split(self, rows: list[int]) -> list[LevelTensor]:
        """Cut the first dimension into parts of these sizes, each with its own storage."""
        parts = zip(self.indices.split(rows), self.levels.split(rows), strict=True)
        return [LevelTensor(indices=i.clone(), levels=v.clone()) for i, v in parts]

    def packed(self) -> Tensor:
        """The indices as a little-endian stream of K-bit fields.  # uint8, (o, ceil(n * K / 8))"""
        return pack_bits(self.indices, self.bits)

    @classmethod
    def from_packed(cls, packed: Tensor, levels: Tensor, n: int) -> LevelTensor:
        """Undo `packed`; n is the number of columns."""
        return cls(indices=unpack_bits(packed, levels.shape[-1], n), levels=levels)
