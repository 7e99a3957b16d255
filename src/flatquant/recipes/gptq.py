"""GPTQ (ICLR 2023, arXiv 2210.17323) on the original coordinates: error-compensated rounding, nothing else."""

from flatquant.recipes.common import TEXT, of_preset, unclipped
from flatquant.spec import Recipe, Scheme, SolverSpec

TEXTS = {**TEXT, "best": TEXT["reference"]}


def gptq(scheme: str | Scheme, preset: str = "reference") -> Recipe:
    """GPTQ with full ranges; `quick` reads less text."""
    scheme = unclipped(scheme)
    return Recipe(name="gptq", scheme=scheme, solver=SolverSpec(kind="gptq"), data=of_preset(preset, TEXTS))
