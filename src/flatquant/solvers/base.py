"""What a solver is: plain weights in, integers on a grid out.

A solver receives its grid; it never makes one. Transforms and clipping have happened before: the solver sees weights
and, where it uses one, a Hessian in the same coordinates.
"""

from abc import ABC, abstractmethod
from typing import Protocol

import torch
from torch import Tensor

from flatquant.ops.quantize.reference import quantize
from flatquant.qtensor import QTensor
from flatquant.spec import QuantSpec


class Grid(Protocol):
    """The part of a weight quantizer that solvers use."""

    spec: QuantSpec

    def grid(self, w: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point for w.  # (o, g)"""
        ...


class Solver(ABC):
    """Chooses integers for a weight matrix."""

    needs_hessian: bool

    @abstractmethod
    def solve(self, w: Tensor, grid: Grid, hessian: Tensor | None) -> QTensor:
        """Quantise w.

        Args:
            w: float32 or float64, (o, n).
            grid: where the integers live.
            hessian: (n, n), or None for solvers that do without.

        Returns:
            The quantised matrix, scales in float32.
        """


def round_to(w: Tensor, scale: Tensor, zero: Tensor | None, spec: QuantSpec) -> Tensor:
    """Nearest integers for columns that share the scale's shape, as w's dtype.  # w's shape"""
    return quantize(w, scale, zero, spec.low, spec.high)


def as_qtensor(values: Tensor, scale: Tensor, zero: Tensor | None, spec: QuantSpec) -> QTensor:
    """Integers held in floats, (o, n), with (o, g) scales, as a QTensor."""
    dtype = torch.int8 if spec.symmetric else torch.uint8
    return QTensor(
        values=values.to(dtype).contiguous(),
        scale=scale.float().contiguous(),
        zero=None if zero is None else zero.float().contiguous(),
        spec=spec,
    )
