"""QuaRot (NeurIPS 2024, arXiv 2404.00456): fixed random Hadamard rotations of everything that is quantised.

The residual stream by one matrix for the whole model (section 3, stage 1a), down_proj's input (1b), value heads and the
attention's output across and inside heads (1c), keys and queries after RoPE (1d); nothing is trained. Weights by GPTQ
with searched ranges; up to 4 bits, activations are clipped to 0.9 of their range, keys and values to 0.95 (section 4).

Other than the official code: the embedding's mean is not subtracted (an RMSNorm is not shift invariant); value biases
are rotated; GPTQ sees activations as serving quantises them; a size without a Hadamard matrix gets a random orthogonal
factor; every weight is rotated once, in float64.
"""

from flatquant.recipes.common import of_preset
from flatquant.spec import Recipe, Scheme, SolverSpec, TransformSpec

WHOLE = TransformSpec(kind="matrix", parameters="fixed", init="hadamard")
KRON = TransformSpec(kind="kronecker", parameters="fixed", init="hadamard")


def quarot(scheme: str | Scheme = "w4a4kv4", preset: str = "reference") -> Recipe:
    """The paper's recipe; `quick` shows GPTQ less text. With `SolverSpec(kind="rtn")` in its place, no text is read.

    Raises:
        SpecError: an unknown preset or a scheme that is none.
    """
    if isinstance(scheme, str):
        scheme = Scheme.parse(scheme, clip="none").with_clips(weights="search", activations=0.9, cache=0.95, up_to=4)
    return Recipe(
        name="quarot",
        scheme=scheme,
        transforms={"residual": (WHOLE,), "attn_out": (KRON,), "mlp_mid": (KRON,), "qk": (WHOLE,)},
        solver=SolverSpec(kind="gptq"),
        data=of_preset(preset),
    )
