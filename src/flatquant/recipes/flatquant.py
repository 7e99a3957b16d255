"""FlatQuant (ICML 2025, arXiv 2410.09426): learned Kronecker transforms that flatten weights and activations.

Per-channel scale, then P1 (x) P2, at every linear's input (section 3.1); across heads and inside heads at the attention
output; inside heads for keys and queries (section 3.2, figure 3); learned clipping of weights and activations; fitted
block by block (section 4.1); round to nearest by default.
"""

from flatquant.errors import SpecError
from flatquant.spec import DataSpec, FitSpec, Recipe, Scheme, SolverSpec, TransformSpec

SCALE = TransformSpec(kind="diagonal", init="absmax", alpha=0.3)
KRON = TransformSpec(kind="kronecker", init="orthogonal")
HEAD = TransformSpec(kind="matrix", init="orthogonal")


def flatquant(scheme: str | Scheme = "w4a4kv4", preset: str = "reference") -> Recipe:
    """The paper's recipe (`reference`), or one that a laptop CPU finishes in minutes (`quick`).

    Raises:
        SpecError: an unknown preset or a scheme that is none.
    """
    scheme = Scheme.parse(scheme) if isinstance(scheme, str) else scheme
    if preset == "reference":
        return Recipe(
            name="flatquant",
            scheme=scheme,
            transforms={
                "attn_in": (SCALE, KRON),
                "attn_out": (KRON,),
                "mlp_in": (SCALE, KRON),
                "mlp_mid": (SCALE, KRON),
                "qk": (HEAD,),
            },
            fit=FitSpec(epochs=15, batch_size=4, lr=5e-3, clip_lr=5e-2),
            solver=SolverSpec(kind="rtn"),
            data=DataSpec(samples=128, seqlen=2048),
        )
    raise SpecError(f"unknown preset {preset!r}; known: quick, reference")
