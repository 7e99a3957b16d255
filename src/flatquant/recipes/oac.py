"""OAC (AAAI 2025, arXiv 2405.15025): error-compensated rounding by what the model's loss says, not the layer's output.

The Hessian of every layer is the mean outer product of the gradients of a sequence's cross entropy, summed over the
rows of the weight; what uses it is the recursion of GPTQ, unchanged. The sources for this file were the paper's
abstract and summaries by others, not its body: the form of the Hessian and all settings are a reconstruction.

Grids of 2 and 3 bits are asymmetric and searched, with a scale a row or group (`w2g16`), and columns of large curvature
come first. The authors' host at 2 bits, SpQR, has groups of 16 whose scales are quantised themselves, and outliers in
16 bit.
"""

from flatquant.recipes.common import fitting_few_levels, has_few_levels, of_preset
from flatquant.spec import Recipe, Scheme, SolverSpec


def oac(scheme: str | Scheme, preset: str = "reference") -> Recipe:
    """Output-adaptive calibration on grids as those of GPTQ; `quick` reads less text."""
    order = has_few_levels(scheme)
    solver = SolverSpec(kind="gptq", hessian="output_adaptive", gradients="sequence", damping=0.1, act_order=order)
    return Recipe(name="oac", scheme=fitting_few_levels(scheme), solver=solver, data=of_preset(preset))
