"""AutoRound (EMNLP 2024, arXiv 2309.05516): rounding and ranges of weights by signed gradients, block by block.

An offset of up to half a step for every weight and a factor for every scale, trained by SignSGD with linearly falling
steps on the error of the block's output; the best is kept (section 3, algorithm 1). Blocks are trained on what the
quantised blocks before them give, as in the authors' code. Nothing is left of it at inference but other integers.

Other than the official code: batches follow one another and are not drawn; the best is chosen on all windows, at the
start and four times on the way, not on each step's batch; factors are relative to the solver's grid and may grow.
Grids of 2 and 3 bits are asymmetric and searched. From 4 bits on they are symmetric, as the authors': a scale has the
sign that puts the largest weight on the end -2^(b-1).
"""

from dataclasses import replace

from flatquant.recipes.common import TEXTS, has_few_levels, of_preset, signed_scales
from flatquant.recipes.flatquant import flatquant
from flatquant.spec import Recipe, RoundingSpec, Scheme, SolverSpec


def autoround(scheme: str | Scheme = "w4a16", preset: str = "reference") -> Recipe:
    """The paper's 200 steps of 8 windows; `quick` takes 50 of 4, on less text.

    `best` is not the paper's: weights and ranges are fitted block by block, then those of all blocks together by KL
    divergence to the original (as EfficientQAT, arXiv 2407.11062, which trains scales alone then), on the text of
    FlatQuant's `best` and without its transforms; then rounded to nearest. It leaves ordinary integers too. All blocks
    are on the device: 16 bytes a weight.

    Raises:
        SpecError: an unknown preset or a scheme that is none.
    """
    data = of_preset(preset, TEXTS)
    if preset == "best":
        made = flatquant(_fitted(scheme), "best")
        assert made.fit is not None
        fit = replace(made.fit, epochs=2, weight_lr=5e-4)
        return replace(made, name="autoround", transforms={}, fit=fit)
    learned = RoundingSpec(steps=50, batch_size=4) if preset == "quick" else RoundingSpec()
    return Recipe(name="autoround", scheme=signed_scales(scheme), solver=SolverSpec(learned=learned), data=data)


def _fitted(scheme: str | Scheme) -> Scheme:
    """A scheme as it is; read from a text, one with learned ranges on the grids of `signed_scales`."""
    if not isinstance(scheme, str):
        return scheme
    read = Scheme.parse(scheme)
    if read.weights is None or read.weights.format:
        return read
    few = has_few_levels(scheme)
    return replace(read, weights=replace(read.weights, symmetric=not few, signed_scale=not few))
