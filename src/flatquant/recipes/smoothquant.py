"""SmoothQuant (ICML 2023, arXiv 2211.10438): per-channel scales move outliers from activations into weights.

c_j = max|W_j|^(1-alpha) / max|X_j|^alpha (section 4, eq. 4, inverted) at the inputs of q, k, v and of gate and up,
where the norm absorbs it; max|W_j| over all linears that share the input. No training, nothing online. Made for W8A8:
at 4 bits it is the diagonal baseline.

Other than the official code: statistics are float32, and o_proj's and down_proj's inputs and the KV cache are quantised
where the scheme says so (they are not smoothed).
"""

from flatquant.recipes.common import of_preset, unclipped
from flatquant.spec import DataSpec, Recipe, Scheme, TransformSpec

TEXTS = {"reference": DataSpec(samples=512, seqlen=512), "quick": DataSpec(samples=32, seqlen=512)}


def smoothquant(scheme: str | Scheme = "w8a8", preset: str = "reference", alpha: float = 0.5) -> Recipe:
    """The paper's recipe; `quick` reads less text. `alpha` 0.85 is the authors' choice for Llama 2 and 3 at W8A8.

    Raises:
        SpecError: an unknown preset or a scheme that is none.
    """
    scale = TransformSpec(kind="diagonal", init="absmax", alpha=alpha)
    return Recipe(
        name="smoothquant",
        scheme=unclipped(scheme),
        transforms={"attn_in": (scale,), "mlp_in": (scale,)},
        data=of_preset(preset, TEXTS),
    )
