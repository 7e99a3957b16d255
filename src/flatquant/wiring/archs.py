"""The families we know: one literal each. `docs/` says how to add one; the laws in `tests/` decide whether it holds."""

from flatquant.errors import ModelError
from flatquant.wiring.arch import Arch, Edge, Residual, Scores

LLAMA = Arch(
    model_types=("llama", "mistral", "qwen2"),
    edges=(
        Edge(
            site="attn_in",
            readers=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            norm="input_layernorm",
        ),
        Edge(site="attn_out", readers=("self_attn.o_proj",), writer="self_attn.v_proj", passes="per_head"),
        Edge(site="mlp_in", readers=("mlp.gate_proj", "mlp.up_proj"), norm="post_attention_layernorm"),
        Edge(site="mlp_mid", readers=("mlp.down_proj",), writer="mlp.up_proj", passes="diagonal"),
    ),
    residual=Residual(writers=("self_attn.o_proj", "mlp.down_proj")),
    scores=Scores(queries="self_attn.q_proj", keys="self_attn.k_proj"),
)

ARCHS = (LLAMA,)


def arch_of(config) -> Arch:
    """The description for a transformers config.

    Raises:
        ModelError: a family without a description.
    """
    for arch in ARCHS:
        if config.model_type in arch.model_types:
            return arch
    known = ", ".join(sorted(t for arch in ARCHS for t in arch.model_types))
    raise ModelError(
        f"unknown architecture {config.model_type!r}; known: {known}. "
        "To add one, describe its edges in flatquant/wiring/archs.py"
    )
