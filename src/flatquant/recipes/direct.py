"""Direct Quantization (IJCAI 2020, arXiv 2012.13762): weights that are codes and levels, both trained as what they are.

**A reconstruction**, and on another field: the paper is about convolutional networks, no code was published, and only
its abstract could be read. Stated there: quantised weights and their levels are updated by gradients themselves, rather
than full-precision weights that are rounded on the way; levels of activations mind the error of every channel, rather
than a total that few channels decide.

Ours: a row's levels are the sums, with signs, of as many numbers as a weight has bits; a weight is a position among
them; both start at the original weights by least squares and train end to end on the cross entropy of the text, the
paper's task loss (`quantizers/levels.py`). Activations have a scale per token, a sign, and levels from the text that
weigh channels by the inverse of their power; they are found once, not with every batch. Keys and values, which the
paper does not know, are on uniform grids.
"""

import dataclasses

from flatquant.errors import SpecError
from flatquant.recipes.common import trained
from flatquant.spec import EndToEndSpec, Recipe, Scheme


def direct(scheme: str | Scheme = "w2a16", preset: str = "reference", by_channel: bool = True) -> Recipe:
    """The reconstructed recipe: 400 steps of 4 windows; `quick` takes 20 small steps.

    All positions train at once: 20 bytes a weight on the device. Without `by_channel`, levels of activations minimise
    the total error: better where few channels carry much, as in language models at 4 bits (docs/experiments.md, "Levels
    of activations, by channel or in total").

    Raises:
        SpecError: an unknown preset or a scheme that is none.
    """
    if isinstance(scheme, str):
        scheme = Scheme.parse(scheme, clip="none")
        weights, activations = scheme.weights, scheme.activations
        if named := sorted(scheme.named("weights") | scheme.named("activations")):
            raise SpecError(f"direct finds levels of its own: name bits in its scheme, not {', '.join(named)}")
        if weights is not None:
            weights = dataclasses.replace(weights, kind="levels")
        if activations is not None:
            weigh = "channels" if by_channel else "total"
            activations = dataclasses.replace(activations, kind="levels", weigh=weigh)
        scheme = dataclasses.replace(scheme, weights=weights, activations=activations)
    fit = EndToEndSpec(objective="cross_entropy", lr=2e-3, code_lr=2e-3, steps=400, batch_size=4)
    fit, data = trained(preset, fit)
    return Recipe(name="direct", scheme=scheme, end_to_end=fit, data=data)
