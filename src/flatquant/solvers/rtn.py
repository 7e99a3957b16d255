"""Round to nearest: the paper's default after a fitted transform."""

from torch import Tensor

from flatquant.ops.quantize.reference import quantize
from flatquant.qtensor import QTensor
from flatquant.solvers.base import Grid, Solver, as_qtensor


class RTN(Solver[Grid, QTensor]):
    """Each weight to its nearest grid point; no data."""

    needs_hessian = False

    def solve(self, w: Tensor, grid: Grid, hessian: Tensor | None) -> QTensor:
        scale, zero = grid.grid(w)
        scale = scale.float().to(w.dtype)  # round with the scale that will be stored
        group = w.shape[-1] // scale.shape[-1]
        q = quantize(w, scale.repeat_interleave(group, -1), _expand(zero, group), grid.spec.low, grid.spec.high)
        return as_qtensor(q, scale, zero, grid.spec)


def _expand(zero: Tensor | None, group: int) -> Tensor | None:
    return None if zero is None else zero.repeat_interleave(group, -1)
