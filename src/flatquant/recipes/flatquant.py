"""FlatQuant (ICML 2025, arXiv 2410.09426): learned Kronecker transforms that flatten weights and activations.

Per-channel scale, then P1 (x) P2, at every linear's input (section 3.1); across heads and inside heads at the attention
output; inside heads for keys and queries (section 3.2, figure 3); learned clipping of weights and activations; fitted
block by block (section 4.1); round to nearest by default.
"""

from typing import Literal

from flatquant.errors import SpecError
from flatquant.spec import (
    DataSpec,
    EndToEndSpec,
    FitSpec,
    Recipe,
    Scheme,
    SolverSpec,
    Transforms,
    TransformSpec,
)

PAPER_SCALE = TransformSpec(kind="diagonal", init="absmax", alpha=0.3)
BALANCED_SCALE = TransformSpec(kind="diagonal", init="second_moment")
# Where clips start at 2, 3, .. 8 bits if few steps are left to move them: sigmoid(1.75) = 0.85, and from 5 bits on what
# is best for 64 normal numbers.
SHORT_FIT_CLIPS = (1.75, 1.75, 1.75, 3.0, 4.5, 6.0, 7.0)


def transforms(
    scale: TransformSpec, factors: Literal["orthogonal", "hadamard"] = "orthogonal"
) -> dict[str, Transforms]:
    """What sits where (figure 3 of the paper), for one start of the per-channel scales and one of all factors."""
    kron, head = TransformSpec(kind="kronecker", init=factors), TransformSpec(kind="matrix", init=factors)
    return {
        "attn_in": (scale, kron),
        "attn_out": (kron,),
        "mlp_in": (scale, kron),
        "mlp_mid": (scale, kron),
        "qk": (head,),
    }


def flatquant(scheme: str | Scheme = "w4a4kv4", preset: str = "reference") -> Recipe:
    """The paper's recipe (`reference`), a more accurate one (`best`), or one for minutes of a laptop CPU (`quick`).

    `best` spends few epochs on block-wise reconstruction and then fits all blocks at once by KL divergence to the
    original, the weights included (quantisation-aware distillation, arXiv 2601.20088), at the same cost of inference
    (docs/experiments.md, "What the `best` preset is made of"). It keeps all blocks on the device: 16 bytes a weight, or
    5 where that is too much (`EndToEndSpec.memory`). Its text is a mixture, since a fit that moves weights learns what
    one kind of text is like.

    `quick` sees too little text for block-wise reconstruction, which then fits noise: it starts from scales that
    balance second moments, Hadamard factors and clips near where they end, and spends its minutes on end-to-end steps
    (docs/experiments.md, "The quick preset", "One change at a time").

    Raises:
        SpecError: an unknown preset or a scheme that is none.
    """
    if preset == "reference":
        return Recipe(
            name="flatquant",
            scheme=Scheme.parse(scheme) if isinstance(scheme, str) else scheme,
            transforms=transforms(PAPER_SCALE),
            fit=FitSpec(epochs=15, batch_size=4, lr=5e-3, clip_lr=5e-2),
            solver=SolverSpec(kind="rtn"),
            data=DataSpec(samples=128, seqlen=2048),
        )
    if preset == "best":
        return Recipe(
            name="flatquant",
            scheme=Scheme.parse(scheme) if isinstance(scheme, str) else scheme,
            transforms=transforms(BALANCED_SCALE),
            fit=FitSpec(epochs=1, batch_size=4, lr=5e-3, clip_lr=5e-2),
            end_to_end=EndToEndSpec(steps=600, batch_size=4, lr=2e-3, clip_lr=2e-2, weight_lr=5e-4, memory="auto"),
            solver=SolverSpec(kind="rtn"),
            data=DataSpec(samples=384, seqlen=2048, text="wikitext2:1,c4:3"),
        )
    if preset == "quick":
        return Recipe(
            name="flatquant",
            scheme=Scheme.parse(scheme, clip_starts=SHORT_FIT_CLIPS) if isinstance(scheme, str) else scheme,
            transforms=transforms(BALANCED_SCALE, "hadamard"),
            end_to_end=EndToEndSpec(
                steps=20, batch_size=2, lr=3e-3, clip_lr=3e-2, final_lr=0.1, eps=5e-6, checkpoint=False
            ),
            solver=SolverSpec(kind="rtn"),
            data=DataSpec(samples=40, seqlen=256),
        )
    raise SpecError(f"unknown preset {preset!r}; known: best, quick, reference")
