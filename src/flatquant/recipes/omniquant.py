"""OmniQuant (ICLR 2024, arXiv 2308.13137): learned weight clipping and learned equivalent transformation.

Clips of every weight row (LWC, section 3.2) and, where activations are quantised, per-channel scales (LET, section 3.3)
from a norm to its readers, from v_proj to o_proj and from keys to queries; down_proj's input has none (its gradients
are unstable). All of it is folded into weights. Fitted block by block with AdamW at constant rates, on what the
quantised blocks before give, against the full-precision model's outputs (section 3.1); then rounded.

Other than the official code: key and query channels that RoPE turns into one another share a scale, so that the
function is unchanged, and each key and value head has its own, shared by its queries (GQA); a scale starts from the
largest weight of all its readers, not of the first; scales train as logarithms; grids are the scheme's (the authors'
are asymmetric). Shifts are the authors' for models with biases in their norms, and stay 0 for others: they are an
option, start between a channel's ends, and have none from v_proj to o_proj.
"""

from flatquant.recipes.common import of_preset
from flatquant.spec import DataSpec, FitSpec, Recipe, Scheme, TransformSpec

TEXTS = {"reference": DataSpec(samples=128, seqlen=2048), "quick": DataSpec(samples=16, seqlen=256)}
SCALE = TransformSpec(kind="diagonal", init="absmax", alpha=0.5)
SHIFT = TransformSpec(kind="shift", init="center")
LEARNED_FROM_ONE = TransformSpec(kind="diagonal")


def omniquant(scheme: str | Scheme = "w4a4kv4", preset: str = "reference", shift: bool = False) -> Recipe:
    """The paper's recipe: 20 epochs; for 2-bit weights 40, and a second loss term; `quick` reads less text.

    With `shift`, inputs behind norms are also shifted, where activations are quantised.

    Raises:
        SpecError: an unknown preset or a scheme that is none.
    """
    if isinstance(scheme, str):
        scheme = Scheme.parse(scheme, clip="none").with_clips(weights="learned")
    two_bits = scheme.weights is not None and scheme.weights.bits == 2
    epochs = 40 if two_bits else 20
    fit = FitSpec(
        epochs=epochs,
        batch_size=1,
        lr=5e-3,
        clip_lr=1e-2,
        weight_decay=0.0,
        inputs="quantised",
        schedule="constant",
        both_targets=two_bits,
    )
    behind_norms = (SHIFT, SCALE) if shift else (SCALE,)
    scales = {"attn_in": behind_norms, "attn_out": (SCALE,), "mlp_in": behind_norms, "qk": (LEARNED_FROM_ONE,)}
    return Recipe(
        name="omniquant",
        scheme=scheme,
        transforms={} if scheme.weights_only else scales,
        fit=fit,
        data=of_preset(preset, TEXTS),
    )
