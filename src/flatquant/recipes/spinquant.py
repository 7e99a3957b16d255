"""SpinQuant (ICLR 2025, arXiv 2405.16406): the rotations that can be folded away are learned, end to end.

R1 turns the residual stream, one matrix for the model; R2 turns value heads, one per block; both start as random
Hadamards and are trained by Cayley SGD on the cross entropy of the quantised model (section 3.2). R3 (keys and queries)
and R4 (down_proj's input) are fixed Hadamards, online (section 3.1).

For GPTQ the rotations are trained with activations quantised and weights not (section 4.3); with rounding, or where
only weights are quantised, with both.

Other than the official code: activations are symmetric and o_proj's have one scale per token, as the scheme says and as
for every other method here (the authors': asymmetric, one scale per head); 100 steps of 8 windows read 128 windows
again and again, not 800 once; the embedding's mean is not subtracted; value biases are rotated.
"""

from typing import Literal

from flatquant.recipes.common import trained
from flatquant.spec import EndToEndSpec, Recipe, Scheme, SolverSpec, TransformSpec

R1 = TransformSpec(kind="matrix", parameters="rotation", init="hadamard")
R2 = TransformSpec(kind="head", parameters="rotation", init="hadamard")
R3 = TransformSpec(kind="matrix", parameters="fixed", init="hadamard")
R4 = TransformSpec(kind="kronecker", parameters="fixed", init="hadamard")


def spinquant(
    scheme: str | Scheme = "w4a4kv4", preset: str = "reference", solver: Literal["gptq", "rtn"] = "gptq"
) -> Recipe:
    """The paper's recipe; `quick` takes 20 small steps.

    Raises:
        SpecError: an unknown preset or a scheme that is none.
    """
    if isinstance(scheme, str):
        scheme = Scheme.parse(scheme, clip="none").with_clips(weights="search")
    both = solver == "rtn" or scheme.weights_only
    fit = EndToEndSpec(objective="cross_entropy", round_weights=both, rotation_lr=1.5, steps=100, batch_size=8)
    fit, data = trained(preset, fit)
    return Recipe(
        name="spinquant",
        scheme=scheme,
        transforms={"residual": (R1,), "attn_out": (R2,), "mlp_mid": (R4,), "qk": (R3,)},
        end_to_end=fit,
        solver=SolverSpec(kind=solver),
        data=data,
    )
