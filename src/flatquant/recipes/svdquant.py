"""SVDQuant (ICLR 2025, arXiv 2411.05007): smooth, take the largest singular directions apart, round the rest.

Per-channel scales move outliers from activations into weights (section 4.1), the branch of rank 32 takes them from
there (section 4.2), GPTQ rounds the residual (the authors' variant with the better figures). The paper's field is
diffusion transformers; this is its extension to language models, which the authors' code has no configuration for:
scales go into norms and up_proj, so that nothing but the branch runs online, and o_proj has a branch but no scales.
Scales are the closed form with a fixed exponent rather than the best of 40 candidates, and grids are the scheme's: the
paper's groups of 64 are `w4g64`, its groups of activations do not exist here.
"""

from flatquant.recipes.common import of_preset, unclipped
from flatquant.spec import BranchSpec, Recipe, Scheme, SolverSpec, TransformSpec


def svdquant(scheme: str | Scheme = "w4a4", preset: str = "reference", rank: int = 32, alpha: float = 0.5) -> Recipe:
    """A branch of this rank; `alpha` is how much of the activations' range the scales move; `quick` reads less text.

    Raises:
        SpecError: an unknown preset or a scheme that is none.
    """
    scale = TransformSpec(kind="diagonal", init="absmax", alpha=alpha)
    return Recipe(
        name="svdquant",
        scheme=unclipped(scheme),
        transforms=dict.fromkeys(("attn_in", "mlp_in", "mlp_mid"), (scale,)),
        solver=SolverSpec(kind="gptq"),
        branch=BranchSpec(rank=rank),
        data=of_preset(preset),
    )
