"""The serving stages of linears whose weights are in codebooks.

`CodebookLinear` is one type; its books come in two: `FrozenBook` (indices one by one, as the solver left them) and
`PackedBook` (the same indices packed into bytes, as they are stored). Weights are gathered on every forward pass.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from flatquant.codebook import Book, CodebookTensor
from flatquant.modules import ExactBuffers
from flatquant.runtime.linear import FrozenSite, NumberLinear, Unpacked


class SiteBook(ExactBuffers, ABC):
    """A book of some columns of a weight matrix."""

    entries: Tensor

    def __init__(self, entries: Tensor, bits: int) -> None:
        super().__init__()
        self.register_buffer("entries", entries)  # float16, (k, v)
        self.bits = bits

    @abstractmethod
    def book(self) -> Book:
        """Indices and entries."""


class FrozenBook(SiteBook, Unpacked):
    """Indices as the solver left them."""

    indices: Tensor
    loose = "indices"

    def __init__(self, book: Book) -> None:
        super().__init__(book.entries, book.bits)
        self.register_buffer("indices", book.indices)  # uint8 | int32, (o / v, m)

    def book(self) -> Book:
        return Book(indices=self.indices, entries=self.entries, bits=self.bits)

    def pack(self) -> Tensor:
        return self.book().packed()


class PackedBook(SiteBook):
    """Indices packed into bytes."""

    packed: Tensor

    def __init__(self, packed: Tensor, entries: Tensor, bits: int, m: int) -> None:
        super().__init__(entries, bits)
        self.register_buffer("packed", packed)  # uint8, (o / v, ceil(m * bits / 8))
        self.m = m

    @classmethod
    def of(cls, frozen: FrozenBook) -> PackedBook:
        """Pack a frozen book."""
        return cls(frozen.pack(), frozen.entries, frozen.bits, frozen.indices.shape[1])

    def book(self) -> Book:
        return Book.from_packed(self.packed, self.entries, self.bits, self.m)


class CodebookLinear(NumberLinear):
    """Weights in codebooks; activations on a grid are multiplied as the numbers they stand for."""

    columns: Tensor | None

    def __init__(
        self,
        site: FrozenSite,
        main: SiteBook,
        residual: SiteBook | None,
        outliers: SiteBook | None,
        columns: Tensor | None,
        bias: Tensor | None,
    ) -> None:
        """`columns` are those of `outliers`; see `CodebookTensor`."""
        super().__init__(site, bias)
        self.books = nn.ModuleDict(
            {n: b for n, b in (("main", main), ("residual", residual), ("outliers", outliers)) if b is not None}
        )
        self.register_buffer("columns", columns)  # int32, (c,)

    @classmethod
    def of(cls, site: FrozenSite, weight: CodebookTensor, bias: Tensor | None) -> CodebookLinear:
        """The solver's output."""
        books = (None if b is None else FrozenBook(b) for b in (weight.main, weight.residual, weight.outliers))
        main, residual, outliers = books
        assert main is not None
        return cls(site, main, residual, outliers, weight.columns, bias)

    def qweight(self) -> CodebookTensor:
        """The weight.  # (o, n)"""
        books = {name: module.book() for name, module in self.books.items() if isinstance(module, SiteBook)}
        return CodebookTensor(
            main=books["main"],
            residual=books.get("residual"),
            columns=self.columns,
            outliers=books.get("outliers"),
        )

    def numbers(self, dtype: torch.dtype) -> Tensor:
        return self.qweight().dequantize(dtype)
