"""GPTQ (ICLR 2023, arXiv 2210.17323) on the original coordinates: error-compensated rounding, nothing else.

At 2 and 3 bits grids are asymmetric, as the authors', and searched (an option of their code). Other than the official
code: from 4 bits on grids are symmetric, and scales of groups are those of the weights as they were, not as
compensation has left them. Columns keep their order, as the authors' do by default.
"""

from flatquant.recipes.common import TEXT, fitting_few_levels, of_preset
from flatquant.spec import Recipe, Scheme, SolverSpec

TEXTS = {**TEXT, "best": TEXT["reference"]}


def gptq(scheme: str | Scheme, preset: str = "reference") -> Recipe:
    """GPTQ with full ranges, at 2 and 3 bits with searched ones; `quick` reads less text."""
    scheme = fitting_few_levels(scheme)
    return Recipe(name="gptq", scheme=scheme, solver=SolverSpec(kind="gptq"), data=of_preset(preset, TEXTS))
