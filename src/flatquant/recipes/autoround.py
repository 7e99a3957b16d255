"""AutoRound (EMNLP 2024, arXiv 2309.05516): rounding and ranges of weights by signed gradients, block by block.

An offset of up to half a step for every weight and a factor for every scale, trained by SignSGD with linearly falling
steps on the error of the block's output; the best is kept (section 3, algorithm 1). Blocks are trained on what the
quantised blocks before them give, as in the authors' code. Nothing is left of it at inference but other integers.

Other than the official code: batches follow one another and are not drawn; the best is chosen on all windows, at the
start and four times on the way, not on each step's batch; factors are relative to a searched grid and may grow.
"""

from flatquant.recipes.common import fitting_few_levels, of_preset
from flatquant.spec import DataSpec, Recipe, RoundingSpec, Scheme, SolverSpec

TEXTS = {
    "reference": DataSpec(samples=128, seqlen=2048),
    "best": DataSpec(samples=128, seqlen=2048),
    "quick": DataSpec(samples=16, seqlen=512),
}


def autoround(scheme: str | Scheme = "w4a16", preset: str = "reference") -> Recipe:
    """The paper's 200 steps from plain rounding; `best` starts from GPTQ's; `quick` takes 50 on less text.

    Raises:
        SpecError: an unknown preset or a scheme that is none.
    """
    data = of_preset(preset, TEXTS)
    match preset:
        case "best":
            solver = SolverSpec(kind="gptq", act_order=True, learned=RoundingSpec(steps=400))
        case "quick":
            solver = SolverSpec(learned=RoundingSpec(steps=50, batch_size=4))
        case _:
            solver = SolverSpec(learned=RoundingSpec())
    return Recipe(name="autoround", scheme=fitting_few_levels(scheme), solver=solver, data=data)
