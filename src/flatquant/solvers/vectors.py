"""The recursion with codebooks: a column at a time, cut into vectors along the outputs (arXiv 2409.17066).

All weights of a vector belong to one input, so the loss of replacing it is the squared distance times one number of the
Hessian, and the nearest entry is the best (section 3.1: "channel-independent" second-order optimisation). Entries come
from k-means with that number as weight (section 3.2); a second book on what the first leaves, and a book of their own
for the columns with the largest curvature, are sections 3.3 and 3.4.

What was given up against the paper: groups of columns with a codebook each, normalised columns, and training of the
entries after assignment (its best figures at 2 bits include end-to-end training).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from flatquant.codebook import Book, CodebookTensor, index_dtype
from flatquant.solvers.base import Solver
from flatquant.solvers.recursion import compensate, one_by_one, revived
from flatquant.spec import CodebookSpec


class Codebooks(Protocol):
    """The part of a vector quantizer that the solver uses."""

    spec: CodebookSpec
    bits: int

    def fit(self, vectors: Tensor, weights: Tensor, bits: int) -> Tensor:
        """Entries for weighted vectors.  # (N, v), (N,) -> (k, v)"""
        ...

    def nearest(self, vectors: Tensor, entries: Tensor) -> Tensor:
        """The index of the entry nearest to each vector.  # (N, v), (k, v) -> int64, (N,)"""
        ...


@dataclass
class _Stage:
    """A book that is being filled."""

    entries: Tensor  # (k, v), in the weights' dtype
    indices: Tensor  # int64, (o / v, n): those of all columns; ours are read off at the end
    bits: int

    @classmethod
    def of(cls, entries: Tensor, w: Tensor, bits: int) -> _Stage:
        shape = (w.shape[0] // entries.shape[1], w.shape[1])
        return cls(entries.to(w.dtype), torch.zeros(shape, dtype=torch.int64, device=w.device), bits)

    def book(self, columns: Tensor) -> Book:
        indices = self.indices[:, columns].to(index_dtype(self.bits)).contiguous()
        return Book(indices=indices, entries=self.entries.half(), bits=self.bits)


class VectorSolver(Solver[Codebooks, CodebookTensor]):
    """Error-compensating choice of codebook entries; columns of large curvature come first."""

    needs_hessian = True

    def __init__(self, *, damping: float = 0.01, block_size: int = 128) -> None:
        """`damping` is relative to the mean of H's diagonal."""
        self.damping = damping
        self.block_size = block_size

    def solve(self, w: Tensor, grid: Codebooks, hessian: Tensor | None) -> CodebookTensor:
        """Quantise w.

        Args:
            w: float32 or float64, (o, n); o is a multiple of the vectors' lengths.
            grid: chooses the entries.
            hessian: (n, n).

        Raises:
            CalibrationError: no Hessian, or one that stays indefinite under 1000 times the damping.
        """
        w, h = revived(w, hessian)
        spec, n = grid.spec, w.shape[1]
        order = torch.argsort(h.diagonal(), descending=True, stable=True)
        few = spec.outlier_columns(n)
        outliers, ordinary = order[:few].sort().values, order[few:].sort().values
        main_bits, residual_bits = spec.index_bits(grid.bits)

        def fitted(values: Tensor, columns: Tensor, length: int, bits: int) -> _Stage:
            vectors = values[:, columns].mT.reshape(-1, length)  # column by column
            weights = h.diagonal()[columns].repeat_interleave(w.shape[0] // length)
            return _Stage.of(grid.fit(vectors, weights, bits), w, bits)

        stages = [fitted(w, ordinary, spec.length, main_bits)]
        special = [fitted(w, outliers, spec.outlier_length, spec.outlier_bits)] if few else []
        left = self._run(w, h, order, grid, stages, special, outliers)
        if residual_bits:
            stages.append(fitted(left, ordinary, spec.length, residual_bits))
            self._run(w, h, order, grid, stages, special, outliers)
        books = [stage.book(ordinary) for stage in stages]
        return CodebookTensor(
            main=books[0],
            residual=books[1] if len(books) > 1 else None,
            columns=outliers.int() if few else None,
            outliers=special[0].book(outliers) if few else None,
        )

    def _run(
        self,
        w: Tensor,
        h: Tensor,
        order: Tensor,
        grid: Codebooks,
        stages: list[_Stage],
        special: list[_Stage],
        outliers: Tensor,
    ) -> Tensor:
        """Choose all indices; what the stages left of each column when it was fixed.  # (o, n)"""
        left = torch.empty_like(w)
        apart = set(outliers.tolist())

        def fix_column(index: int, column: Tensor) -> Tensor:
            total = torch.zeros_like(column)
            for stage in special if index in apart else stages:
                vectors = (column - total).view(-1, stage.entries.shape[1])
                chosen = stage.indices[:, index] = grid.nearest(vectors, stage.entries)
                total = total + stage.entries[chosen].flatten()
            left[:, index] = column - total
            return total

        def fix(columns: Tensor, block: Tensor, u: Tensor) -> Tensor:
            indices = columns.tolist()
            return one_by_one(block, u, lambda i, column: fix_column(indices[i], column))

        compensate(w, h, order, fix, damping=self.damping, block_size=self.block_size)
        return left
