"""Rounding of weights to a grid or to codebooks: nearest, or with error compensation."""

from flatquant.solvers.base import Grid, Solver
from flatquant.solvers.gptq import GPTQ
from flatquant.solvers.hessian import InputGram, OutputAdaptive, blended
from flatquant.solvers.rtn import RTN
from flatquant.solvers.vectors import VectorSolver

__all__ = ["GPTQ", "RTN", "Grid", "InputGram", "OutputAdaptive", "Solver", "VectorSolver", "blended"]
