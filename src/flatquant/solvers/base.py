"""What a solver is: plain weights in, integers on a grid, or codes of a format, out.

A solver receives its grid; it never makes one. Transforms and clipping have happened before: the solver sees weights
and, where it uses one, a Hessian in the same coordinates. What a number can become is the grid's: `nearest` for all at
once, `columns` for one column after another.
"""

from abc import ABC, abstractmethod
from typing import Generic, Protocol, TypeVar

from torch import Tensor

Result = TypeVar("Result", covariant=True)


class Columns(Protocol[Result]):
    """A matrix of which columns are fixed, some at a time."""

    block: int  # neighbours that must be fixed together; 1 where any column may come alone

    def fix(self, columns: Tensor, block: Tensor, u: Tensor) -> Tensor:
        """Fix columns: see `recursion.compensate`."""
        ...

    def result(self) -> Result:
        """The matrix, once all columns are fixed."""
        ...


class Grid(Protocol[Result]):
    """The part of a weight quantizer that solvers use."""

    def nearest(self, w: Tensor) -> Result:
        """Every weight to its nearest number.  # (o, n)"""
        ...

    def columns(self, w: Tensor, *, updated: bool = False) -> Columns[Result]:
        """Begin to fix the columns of w, (o, n), with scales that stay, or that follow compensation."""
        ...


GridT = TypeVar("GridT", contravariant=True)


class Solver(ABC, Generic[GridT, Result]):
    """Chooses, for a weight matrix, numbers of a grid or entries of codebooks (a `CodebookTensor`)."""

    needs_hessian: bool

    @abstractmethod
    def solve(self, w: Tensor, grid: GridT, hessian: Tensor | None) -> Result:
        """Quantise w.

        Args:
            w: float32 or float64, (o, n).
            grid: where the numbers live, or what the entries are.
            hessian: (n, n), or None for solvers that do without.
        """
