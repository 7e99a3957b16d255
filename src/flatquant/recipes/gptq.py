"""GPTQ (ICLR 2023, arXiv 2210.17323) on the original coordinates: error-compensated rounding, nothing else.

At 2 and 3 bits grids are asymmetric, as the authors', and searched, and columns of large curvature come first (two
options of their code). Other than the official code: from 4 bits on grids are symmetric, and scales of groups are those
of the weights as they were, not as compensation has left them.
"""

from flatquant.recipes.common import TEXT, fitting_few_levels, has_few_levels, of_preset
from flatquant.spec import Recipe, Scheme, SolverSpec

TEXTS = {**TEXT, "best": TEXT["reference"]}


def gptq(scheme: str | Scheme, preset: str = "reference") -> Recipe:
    """GPTQ on grids that cover all, at 2 and 3 bits on searched ones; `quick` reads less text."""
    solver = SolverSpec(kind="gptq", act_order=has_few_levels(scheme))
    return Recipe(name="gptq", scheme=fitting_few_levels(scheme), solver=solver, data=of_preset(preset, TEXTS))
