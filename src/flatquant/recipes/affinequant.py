"""AffineQuant (ICLR 2024, arXiv 2403.12544): full matrices in place of scales, kept invertible by a gradual mask.

x A^-1 and W A^T (section 3.1, eq. 4), A opened band by band from the diagonal (section 3.3, eq. 6), fitted to block
outputs on the quantised stream, with learned weight clips; then rounding. Where activations are quantised, only what
costs nothing online is a matrix, as in the authors' W4A4 scripts: one for every value head, v_proj to o_proj; norms
keep scales. For weights only, the inputs of q, k, v and of gate and up get full matrices, which run online (2 h^2
operations a token each).

Other than the official code: queries and keys keep a scale per pair of channels, since a matrix before RoPE changes the
function; value heads have their matrices under GQA too; matrices start from a scale and the identity, the diagonal
trains as a logarithm and alone is kept from 0; grids are the scheme's; no shift.
"""

from dataclasses import replace

from flatquant.recipes.omniquant import LEARNED_FROM_ONE, SCALE, omniquant
from flatquant.spec import Recipe, Scheme, TransformSpec


def affinequant(scheme: str | Scheme = "w4a4kv4", preset: str = "reference") -> Recipe:
    """The paper's recipe: 20 epochs, 40 for 2-bit weights; `quick` reads less text.

    Raises:
        SpecError: an unknown preset or a scheme that is none.
    """
    base = omniquant(scheme, preset)  # clips, loop and text are the same
    weights_only = base.scheme.weights_only
    stability = 0.01 if weights_only else 0.1
    heads = TransformSpec(kind="heads", parameters="masked", stability=stability)
    whole = TransformSpec(kind="matrix", parameters="masked", stability=stability)
    wide = (SCALE, whole) if weights_only else (SCALE,)
    transforms = {"attn_in": wide, "attn_out": (SCALE, heads), "mlp_in": wide, "qk": (LEARNED_FROM_ONE,)}
    return replace(base, name="affinequant", transforms=transforms)
