"""Families whose blocks differ in kind: attention in some; linear attention, convolutions or Mamba in others."""

from dataclasses import replace

from flatquant.wiring.arch import Arch, Edge, Residual
from flatquant.wiring.archs.dense import ATTN_IN, ATTN_OUT, LLAMA, MLP_IN, MLP_MID, OLMO2, QWEN3
from flatquant.wiring.archs.experts import mixture

# Blocks of linear attention beside those of attention, whose output passes a gate: neither lets anything pass.
_GATED_OUT = replace(ATTN_OUT, writer=None, passes="nothing")

GATED = replace(
    LLAMA, model_types=("qwen3_5_text",), edges=(ATTN_IN, _GATED_OUT, MLP_IN, MLP_MID), scores=None, norm_offset=1.0
)

DELTA = replace(
    GATED,
    edges=(
        replace(
            ATTN_IN,
            readers=("linear_attn.in_proj_qkv", "linear_attn.in_proj_z"),
            routers=("linear_attn.in_proj_a", "linear_attn.in_proj_b"),
        ),
        replace(_GATED_OUT, readers=("linear_attn.out_proj",)),
        MLP_IN,
        MLP_MID,
    ),
    residual=Residual(writers=("linear_attn.out_proj", "mlp.down_proj")),
    attention=None,
)

QWEN3_5 = replace(GATED, others=(DELTA,))

QWEN3_5_MOE = replace(
    mixture(GATED, "mlp", "gate", "shared_expert_gate", shared="shared_expert"),
    model_types=("qwen3_5_moe_text",),
    others=(mixture(DELTA, "mlp", "gate", "shared_expert_gate", shared="shared_expert"),),
)

DELTA_NEXT = replace(  # the same, fused otherwise
    DELTA,
    edges=(
        replace(ATTN_IN, readers=("linear_attn.in_proj_qkvz",), routers=("linear_attn.in_proj_ba",)),
        *DELTA.edges[1:],
    ),
)

QWEN3_NEXT = replace(
    QWEN3_5_MOE,
    model_types=("qwen3_next",),
    others=(
        mixture(DELTA_NEXT, "mlp", "gate", "shared_expert_gate", shared="shared_expert"),
        GATED,
        DELTA_NEXT,
    ),
)

LARA_MINI = replace(  # without gates of attention and of the shared expert
    mixture(QWEN3, "mlp", "gate", shared="shared_expert"),
    model_types=("lara_mini",),
    unturned={"sliding_window": None},
    others=(replace(mixture(DELTA, "mlp", "gate", shared="shared_expert"), norm_offset=0.0),),
)

_W = tuple(f"feed_forward.{leaf}" for leaf in ("w1", "w3", "w2"))

LFM2 = replace(
    LLAMA,
    model_types=("lfm2",),
    edges=(
        replace(ATTN_IN, norm="operator_norm"),
        replace(ATTN_OUT, readers=("self_attn.out_proj",)),
        replace(MLP_IN, readers=_W[:2], norm="ffn_norm"),
        replace(MLP_MID, readers=_W[2:], writer=_W[1]),
    ),
    residual=Residual(writers=("self_attn.out_proj", *_W[2:])),
    scores=None,
    final_norm="model.embedding_norm",
)

CONVOLUTION = replace(
    LFM2,
    edges=(
        replace(ATTN_IN, readers=("conv.in_proj",), norm="operator_norm"),
        Edge(site="attn_out", readers=("conv.out_proj",)),
        *LFM2.edges[2:],
    ),
    residual=Residual(writers=("conv.out_proj", *_W[2:])),
    attention=None,
)

LFM2_MOE = replace(
    mixture(LFM2, "feed_forward", "gate"),
    model_types=("lfm2_moe",),
    others=(mixture(CONVOLUTION, "feed_forward", "gate"), LFM2, CONVOLUTION),
    example={"layer_types": ["conv", "full_attention", "conv", "full_attention"], "num_dense_layers": 2},
)

LFM3 = replace(  # norms behind attention, convolution and MLP; a gate for each head
    LFM2,
    model_types=("lfm3",),
    edges=(
        replace(ATTN_IN, norm="operator_norm", routers=("self_attn.g_proj",)),
        ATTN_OUT,
        *LFM2.edges[2:],
    ),
    residual=None,
    when={"use_attention_gate": True},
    others=(replace(CONVOLUTION, residual=None),),
)

LFM2 = replace(LFM2, others=(CONVOLUTION,))

_MIXER = replace(LLAMA, scores=None, rotary="none", final_norm="model.norm_f")
_MIXER_IN = "mixer.q_proj", "mixer.k_proj", "mixer.v_proj"

NEMOTRON_H = replace(  # one mixer a block
    _MIXER,
    model_types=("nemotron_h",),
    edges=(
        Edge(site="attn_in", readers=_MIXER_IN, norm="norm"),
        Edge(site="attn_out", readers=("mixer.o_proj",), writer="mixer.v_proj", passes="per_head"),
    ),
    residual=Residual(writers=("mixer.o_proj",)),
    keys="mixer.k_proj",
    attention="mixer",
    others=(
        replace(
            _MIXER,
            edges=(
                Edge(site="attn_in", readers=("mixer.in_proj",), norm="norm"),
                Edge(site="attn_out", readers=("mixer.out_proj",)),
            ),
            residual=Residual(writers=("mixer.out_proj",)),
            attention=None,
        ),
        replace(
            _MIXER,
            edges=(
                Edge(
                    site="mlp_in",
                    readers=("mixer.shared_experts.up_proj", "mixer.experts.*.up_proj"),
                    norm="norm",
                    routers=("mixer.gate",),
                ),
                Edge(site="mlp_mid", readers=("mixer.experts.*.down_proj",)),
                Edge(site="shared_mid", like="mlp_mid", readers=("mixer.shared_experts.down_proj",)),
            ),
            residual=Residual(writers=("mixer.shared_experts.down_proj", "mixer.experts.*.down_proj")),
            attention=None,
        ),
        replace(
            _MIXER,
            edges=(
                Edge(site="mlp_in", readers=("mixer.up_proj",), norm="norm"),
                Edge(site="mlp_mid", readers=("mixer.down_proj",)),
            ),
            residual=Residual(writers=("mixer.down_proj",)),
            attention=None,
        ),
    ),
)


def _hybrid(experts: bool, mamba: bool) -> Arch:
    """A block of Granite 4: attention or Mamba, and an MLP with experts beside it or without."""
    attention = (
        (replace(ATTN_IN, readers=("mamba.in_proj",)), Edge(site="attn_out", readers=("mamba.out_proj",)))
        if mamba
        else (ATTN_IN, ATTN_OUT)
    )
    own = Edge(
        site="mlp_mid", readers=("shared_mlp.output_linear",), writer="shared_mlp.input_linear[up]", passes="diagonal"
    )
    arch = replace(
        LLAMA,
        edges=(*attention, replace(MLP_IN, readers=("shared_mlp.input_linear",)), own),
        residual=Residual(writers=(*attention[1].readers, *own.readers)),
        scores=None,
        rotary=None,  # in some
        attention=None if mamba else "self_attn",
    )
    if not experts:
        return arch
    mixed = mixture(arch, "block_sparse_moe", "router")
    mlp_in = replace(mixed.edges[2], readers=arch.edges[2].readers + mixed.edges[2].readers)
    return replace(
        mixed,
        edges=(*attention, mlp_in, mixed.edges[3], replace(own, site="shared_mid", like="mlp_mid")),
        residual=Residual(writers=(*attention[1].readers, *own.readers, *mixed.edges[3].readers)),
    )


GRANITE_HYBRID = replace(
    _hybrid(experts=True, mamba=False),
    model_types=("granitemoehybrid",),
    example={"layer_types": ["mamba", "attention"] * 2},
    others=(
        _hybrid(experts=True, mamba=True),
        _hybrid(experts=False, mamba=False),
        _hybrid(experts=False, mamba=True),
    ),
)

GRANITE_SHARED = replace(  # attention in every block
    _hybrid(experts=True, mamba=False),
    model_types=("granitemoeshared",),
    scores=LLAMA.scores,
    rotary="halves",
    others=(mixture(LLAMA, "block_sparse_moe", "router"),),
)

_FFN = tuple(f"feed_forward.{leaf}" for leaf in ("gate_proj", "up_proj", "down_proj"))

# Attention and Mamba side by side. A layer of the cache holds keys beside Mamba's states, and keys stay in 16 bit.
FALCON_H1 = replace(
    LLAMA,
    model_types=("falcon_h1",),
    edges=(
        replace(ATTN_IN, readers=(*ATTN_IN.readers, "mamba.in_proj")),
        ATTN_OUT,
        Edge(site="mamba_out", like="attn_out", readers=("mamba.out_proj",)),
        replace(MLP_IN, readers=_FFN[:2], norm="pre_ff_layernorm"),
        replace(MLP_MID, readers=_FFN[2:], writer=_FFN[1]),
    ),
    residual=Residual(writers=("self_attn.o_proj", "mamba.out_proj", _FFN[2])),
    scores=None,
    attention=None,
    final_norm="model.final_layernorm",
)

_DELTA_QKV = tuple(f"linear_attn.{leaf}" for leaf in ("q_proj", "k_proj", "v_proj", "g_proj"))

OLMO_HYBRID = replace(  # norms behind attention and its MLP, in front of gated delta attention and its MLP
    OLMO2,
    model_types=("olmo_hybrid",),
    rotary=None,  # in some models
    others=(
        replace(
            LLAMA,
            edges=(
                replace(ATTN_IN, readers=_DELTA_QKV, routers=("linear_attn.a_proj", "linear_attn.b_proj")),
                Edge(site="attn_out", readers=("linear_attn.o_proj",)),
                MLP_IN,
                MLP_MID,
            ),
            residual=None,
            attention=None,
        ),
    ),
)

ARCHS = (
    QWEN3_5, QWEN3_5_MOE, QWEN3_NEXT, LARA_MINI, LFM2, LFM2_MOE, LFM3, NEMOTRON_H, GRANITE_HYBRID, GRANITE_SHARED,
    FALCON_H1, OLMO_HYBRID,
)  # fmt: skip
