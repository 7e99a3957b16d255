"""How vectors in codebooks lie in a file. What they stand for is `flatquant.codebook.CodebookTensor`'s."""

from __future__ import annotations

import torch

from flatquant.formats.base import Layout, Part
from flatquant.ops.pack.reference import packed_width
from flatquant.spec import CodebookSpec


def layout(spec: CodebookSpec, bits: int, o: int, n: int) -> Layout:
    """The tensors that an (o, n) matrix is stored as, at `bits` a weight; the vectors' lengths divide o."""
    few = spec.outlier_columns(n)
    main_bits, residual_bits = spec.index_bits(bits)
    books = {"main": (spec.length, main_bits, n - few)}
    if residual_bits:
        books["residual"] = (spec.length, residual_bits, n - few)
    if few:
        books["outliers"] = (spec.outlier_length, spec.outlier_bits, few)
    found: Layout = {"columns": Part(torch.int32, (few,), "grids")} if few else {}
    for name, (length, each, columns) in books.items():
        entries = spec.entries(each, o // length * columns)
        found[f"books.{name}.packed"] = Part(torch.uint8, (o // length, packed_width(columns, each)), "packed")
        found[f"books.{name}.entries"] = Part(torch.float16, (entries, length), "grids")
    return found
