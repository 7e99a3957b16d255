"""What a solver is: plain weights in, integers on a grid out.

A solver receives its grid; it never makes one. Transforms and clipping have happened before: the solver sees weights
and, where it uses one, a Hessian in the same coordinates.
"""

from abc import ABC, abstractmethod
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from flatquant.qtensor import QTensor
from flatquant.spec import QuantSpec


class Grid(Protocol):
    """The part of a weight quantizer that solvers use."""

    spec: QuantSpec

    def grid(self, w: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point for w.  # (o, g)"""
        ...


GridT = TypeVar("GridT", contravariant=True)
Result = TypeVar("Result", covariant=True)


class Solver(ABC, Generic[GridT, Result]):
    """Chooses, for a weight matrix, integers on a grid (a `QTensor`) or entries of codebooks (a `CodebookTensor`)."""

    needs_hessian: bool

    @abstractmethod
    def solve(self, w: Tensor, grid: GridT, hessian: Tensor | None) -> Result:
        """Quantise w.

        Args:
            w: float32 or float64, (o, n).
            grid: where the integers live, or what the entries are.
            hessian: (n, n), or None for solvers that do without.
        """


def as_qtensor(values: Tensor, scale: Tensor, zero: Tensor | None, spec: QuantSpec) -> QTensor:
    """Integers held in floats, (o, n), with (o, g) scales, as a QTensor."""
    dtype = torch.int8 if spec.symmetric else torch.uint8
    return QTensor(
        values=values.to(dtype).contiguous(),
        scale=scale.float().contiguous(),
        zero=None if zero is None else zero.float().contiguous(),
        spec=spec,
    )
