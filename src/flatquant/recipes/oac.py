"""OAC (AAAI 2025, arXiv 2405.15025): error-compensated rounding by what the model's loss says, not the layer's output.

The Hessian of every layer is the mean outer product of the gradients of a sequence's cross entropy, summed over the
rows of the weight; what uses it is the recursion of GPTQ, unchanged. The sources for this file were the paper's
abstract and summaries by others, not its body: the form of the Hessian and all settings are a reconstruction.
"""

from flatquant.recipes.common import of_preset, unclipped
from flatquant.spec import Recipe, Scheme, SolverSpec


def oac(scheme: str | Scheme, preset: str = "reference") -> Recipe:
    """Output-adaptive calibration with full ranges; `quick` reads less text."""
    scheme = unclipped(scheme)
    solver = SolverSpec(kind="gptq", hessian="output_adaptive", gradients="sequence", damping=0.1)
    return Recipe(name="oac", scheme=scheme, solver=solver, data=of_preset(preset))
