"""FlattenQuant (LREC-COLING 2024, arXiv 2402.17985): one scale for a tensor, large channels split into several.

**A reconstruction.** No code was published; what follows is the abstract's idea, made definite: smooth first
(alpha = 0.5), then cut channels that reach beyond a threshold into pieces that share one static scale, with their
weight columns repeated; weights have one scale for a tensor as well; GPTQ compensates. Ours: pieces saturate one after
the other (their errors do not add up); the threshold is the least that keeps within `width` times the channels;
o_proj's and down_proj's inputs are split but not smoothed (rows of v_proj and up_proj would take the scales, under the
one scale of their tensor); weights themselves are not split. The authors choose 4 or 8 bits per layer; here the scheme
does (`w4a4,mlp_mid=w8a8`).
"""

import dataclasses

from flatquant.recipes.common import of_preset
from flatquant.spec import Recipe, Scheme, SolverSpec, TransformSpec

SMOOTH = TransformSpec(kind="diagonal", init="absmax", alpha=0.5)


def flattenquant(scheme: str | Scheme = "w4a4", preset: str = "reference", width: float = 1.25) -> Recipe:
    """The reconstructed recipe; `quick` reads less text. `width` is how much wider split activations may be.

    Raises:
        SpecError: an unknown preset or a scheme that is none.
    """
    if isinstance(scheme, str):
        scheme = Scheme.parse(scheme, clip="none")
        weights, activations = scheme.weights, scheme.activations
        if weights is not None and weights.group_size is None:
            weights = dataclasses.replace(weights, scope="tensor")
        if activations is not None:
            activations = dataclasses.replace(activations, scope="tensor", width=width)
        scheme = dataclasses.replace(scheme, weights=weights, activations=activations)
    return Recipe(
        name="flattenquant",
        scheme=scheme,
        transforms={"attn_in": (SMOOTH,), "mlp_in": (SMOOTH,)},
        solver=SolverSpec(kind="gptq"),
        data=of_preset(preset),
    )
