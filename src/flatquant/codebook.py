"""`CodebookTensor`: a matrix whose columns are cut into short vectors, each an entry of a codebook.

A `Book` covers some columns of an (o, n) matrix. Vectors run along the *outputs*: vector r of a column is its rows
r v .. r v + v - 1. So every weight of a vector meets the same input, and the same number of a Hessian (arXiv
2409.17066, section 3). Invariants, checked on construction:

- `indices` is uint8 (up to 8 bits) or int32, shape (o / v, m) for m columns, each below 2^bits;
- `entries` is float16, shape (k, v).

A `CodebookTensor` has a book for its ordinary columns, perhaps a second one of the same columns whose entries are
added, and perhaps one for `columns`, the few that matter most.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flatquant.ops.pack.reference import pack_bits, unpack_bits


def index_dtype(bits: int) -> torch.dtype:
    """What holds indices of so many bits."""
    return torch.uint8 if bits <= 8 else torch.int32


@dataclass(frozen=True, kw_only=True)
class Book:
    """Indices and what they stand for; see the module docstring."""

    indices: Tensor  # uint8 | int32, (o / v, m)
    entries: Tensor  # float16, (k, v)
    bits: int

    def __post_init__(self) -> None:
        if self.indices.dtype != index_dtype(self.bits) or self.indices.dim() != 2:
            raise ValueError(f"indices must be a {index_dtype(self.bits)} matrix, got {self.indices.dtype}")
        if self.entries.dtype != torch.float16 or self.entries.dim() != 2:
            raise ValueError(f"entries must be a float16 matrix, got {self.entries.dtype}")

    def check_range(self) -> None:
        """Raise ValueError unless every index points at an entry and every entry is finite."""
        if self.indices.numel() and int(self.indices.max()) >= self.entries.shape[0]:
            raise ValueError(f"index {int(self.indices.max())} of {self.entries.shape[0]} entries")
        if not bool(torch.isfinite(self.entries).all()):
            raise ValueError("entries must be finite")

    def dequantize(self) -> Tensor:
        """The columns, float32.  # (o, m)"""
        rows = self.entries.float()[self.indices.long()]  # (o / v, m, v)
        return rows.transpose(1, 2).flatten(0, 1)

    def packed(self) -> Tensor:
        """The indices as a little-endian stream of `bits`-bit fields.  # uint8, (o / v, ceil(m * bits / 8))"""
        return pack_bits(self.indices, self.bits)

    @classmethod
    def from_packed(cls, packed: Tensor, entries: Tensor, bits: int, m: int) -> Book:
        """Undo `packed`; m is the number of columns."""
        return cls(indices=unpack_bits(packed, bits, m), entries=entries, bits=bits)


@dataclass(frozen=True, kw_only=True)
class CodebookTensor:
    """A matrix in codebooks; see the module docstring."""

    main: Book
    residual: Book | None = None
    columns: Tensor | None = None  # int32, (c,): those of `outliers`, ascending
    outliers: Book | None = None

    def __post_init__(self) -> None:
        if (self.columns is None) != (self.outliers is None):
            raise ValueError("columns and their book come together")
        if self.residual is not None and self.residual.indices.shape != self.main.indices.shape:
            raise ValueError("the residual book is of the same vectors")

    @property
    def shape(self) -> torch.Size:
        m = 0 if self.columns is None else self.columns.shape[0]
        return torch.Size((self.main.indices.shape[0] * self.main.entries.shape[1], self.main.indices.shape[1] + m))

    def check_range(self) -> None:
        """Raise ValueError unless the books hold what they may; see `Book.check_range`."""
        for book in (self.main, self.residual, self.outliers):
            if book is not None:
                book.check_range()

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix, put together in float32, then cast.  # (o, n)"""
        w = self.main.dequantize()
        if self.residual is not None:
            w = w + self.residual.dequantize()
        if self.columns is None or self.outliers is None:
            return w.to(dtype)
        whole = torch.empty(self.shape, device=w.device)
        columns = self.columns.long()
        ordinary = torch.ones(self.shape[1], dtype=torch.bool, device=w.device)
        ordinary[columns] = False
        whole[:, ordinary] = w
        whole[:, columns] = self.outliers.dequantize()
        return whole.to(dtype)
