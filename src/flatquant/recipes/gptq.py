"""GPTQ (ICLR 2023, arXiv 2210.17323) on the original coordinates: error-compensated rounding, nothing else.

Settings are those that measured best (docs/experiments.md, "GPTQ's settings"): columns of large curvature first, ten
times the authors' damping, ranges searched in groups and at 2 and 3 bits, where grids are asymmetric too. `authors`
gives those of the authors' code: columns as they come, full ranges, a hundredth of the mean as damping.

Other than that code, with either: from 4 bits on grids are symmetric, and scales of groups are those of the weights as
they were, not as compensation has left them.
"""

from flatquant.recipes.common import TEXTS, fitting_few_levels, of_preset, searched_groups
from flatquant.spec import Recipe, Scheme, SolverSpec


def gptq(scheme: str | Scheme, preset: str = "reference", authors: bool = False) -> Recipe:
    """GPTQ with the settings that measured best, or the authors'; `quick` reads less text.

    Raises:
        SpecError: an unknown preset or a scheme that is none.
    """
    data = of_preset(preset, TEXTS)
    if authors:
        return Recipe(name="gptq", scheme=fitting_few_levels(scheme, "none"), solver=SolverSpec(kind="gptq"), data=data)
    solver = SolverSpec(kind="gptq", act_order=True, damping=0.1)
    return Recipe(name="gptq", scheme=searched_groups(scheme), solver=solver, data=data)
