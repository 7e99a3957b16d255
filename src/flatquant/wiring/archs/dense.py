"""Families whose blocks are attention and one MLP."""

from dataclasses import replace

from flatquant.wiring.arch import Arch, Edge, Residual, Scores

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")

ATTN_IN = Edge(site="attn_in", readers=_QKV, norm="input_layernorm")
ATTN_OUT = Edge(site="attn_out", readers=("self_attn.o_proj",), writer="self_attn.v_proj", passes="per_head")
MLP_IN = Edge(site="mlp_in", readers=_GATE_UP, norm="post_attention_layernorm")
MLP_MID = Edge(site="mlp_mid", readers=("mlp.down_proj",), writer="mlp.up_proj", passes="diagonal")
MLP_UP = replace(MLP_IN, readers=("mlp.up_proj",))  # without a gate, no scale passes the activation function
MLP_DOWN = Edge(site="mlp_mid", readers=("mlp.down_proj",))

LLAMA = Arch(
    model_types=(
        "llama",
        "mistral",
        "ministral",
        "ministral3",
        "qwen2",
        "granite",
        "smollm3",
        "seed_oss",
        "cwm",
        "exaone",
        "internlm3",
        "iquestcoder",
    ),
    edges=(ATTN_IN, ATTN_OUT, MLP_IN, MLP_MID),
    residual=Residual(writers=("self_attn.o_proj", "mlp.down_proj")),
    scores=Scores(queries="self_attn.q_proj", keys="self_attn.k_proj"),
)

QWEN3 = replace(LLAMA, model_types=("qwen3",), scores=None)  # norms of q and k

GRANITE_SWA = replace(LLAMA, model_types=("granite_swa",), rotary=None)  # sinks; a rotary embedding in some blocks

# With norms behind attention and MLP, or without.
HYPERCLOVAX = replace(LLAMA, model_types=("hyperclovax",), when={"use_post_norm": False})

HYPERCLOVAX_POST = replace(HYPERCLOVAX, when={"use_post_norm": True}, residual=None)

HUNYUAN = replace(QWEN3, model_types=("hunyuan_v1_dense",), rotary=None)  # behind the rotary embedding

ERNIE = replace(LLAMA, model_types=("ernie4_5", "helium"), scores=None, rotary="neighbours")

GEMMA1 = replace(LLAMA, model_types=("gemma",), norm_offset=1.0)

VAULTGEMMA = replace(
    GEMMA1,
    model_types=("vaultgemma",),
    edges=(*LLAMA.edges[:2], replace(MLP_IN, norm="pre_feedforward_layernorm"), MLP_MID),
)

UNGATED = replace(LLAMA, model_types=("arcee",), edges=(*LLAMA.edges[:2], MLP_UP, MLP_DOWN))

APERTUS = replace(  # norms of q and k
    UNGATED,
    model_types=("apertus", "apertus1p5_text"),
    edges=(
        replace(ATTN_IN, norm="attention_layernorm"),
        ATTN_OUT,
        replace(MLP_UP, norm="feedforward_layernorm"),
        MLP_DOWN,
    ),
    scores=None,
)

GEMMA = Arch(  # norms on both sides of attention and MLP; those in front multiply by 1 + weight
    model_types=("gemma2", "gemma3_text"),
    edges=(ATTN_IN, ATTN_OUT, replace(MLP_IN, norm="pre_feedforward_layernorm"), MLP_MID),
    norm_offset=1.0,
)

OLMO2 = Arch(  # norms behind attention and MLP only: nothing in front absorbs a diagonal
    model_types=("olmo2", "olmo3"),
    edges=(replace(ATTN_IN, norm=None), ATTN_OUT, replace(MLP_IN, norm=None), MLP_MID),
)

OLMO1 = replace(  # norms in front have no weights; where clip_qkv is set, no matrix passes its clamp
    OLMO2, model_types=("olmo",), when={"clip_qkv": None}, scores=LLAMA.scores
)

EXAONE4 = replace(OLMO2, model_types=("exaone4",), unturned={"is_sliding": False, "sliding_window": int})

_PER_LAYER = (  # behind the MLP, multiplied by what an embedding says of the token for this very block
    Edge(site="layer_in", like="mlp_in", readers=("per_layer_input_gate",)),
    Edge(site="layer_mid", like="mlp_mid", readers=("per_layer_projection",)),
)


def _gemma4(readers: tuple[str, ...], *per_layer: Edge) -> Arch:
    """One kind of block. Values pass a norm. Without `v_proj`, they are the keys before their norm.

    A block without `k_proj` reads the keys and values of an earlier one, and has none of its own.
    """
    attn_out = replace(ATTN_OUT, writer=None, passes="nothing")
    return replace(
        GEMMA,
        edges=(replace(ATTN_IN, readers=readers), attn_out, *GEMMA.edges[2:], *per_layer),
        attention="self_attn" if len(readers) > 1 else None,
        norm_offset=0.0,
    )


_FULL, *_OTHERS = (_gemma4(_QKV[:n], *edges) for edges in (_PER_LAYER, ()) for n in (3, 2, 1))

GEMMA4 = replace(
    _FULL,
    model_types=("gemma4_text", "gemma4_unified_text"),
    when={"enable_moe_block": False},
    own=(0,),
    others=tuple(_OTHERS),
    example={"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2},
)

PHI3 = Arch(  # fused projections; glm4 has its gate and up fused only
    model_types=("phi3",),
    edges=(
        Edge(site="attn_in", readers=("self_attn.qkv_proj",), norm="input_layernorm"),
        replace(ATTN_OUT, writer="self_attn.qkv_proj[v]"),
        Edge(site="mlp_in", readers=("mlp.gate_up_proj",), norm="post_attention_layernorm"),
        replace(MLP_MID, writer="mlp.gate_up_proj[up]"),
    ),
    residual=LLAMA.residual,
    keys="self_attn.qkv_proj[k]",
)

GLM4 = replace(  # norms behind attention and MLP too
    PHI3,
    model_types=("glm4",),
    edges=(*LLAMA.edges[:2], *PHI3.edges[2:]),
    residual=None,
    keys=LLAMA.keys,
    rotary="neighbours",
)

GLM = replace(GLM4, model_types=("glm",), residual=LLAMA.residual)  # without these norms

STABLELM = replace(  # layer norms, which a rotation does not pass, and a rotary embedding of some channels
    LLAMA, model_types=("stablelm",), when={"use_parallel_residual": False}, residual=None, scores=None
)

PARALLEL = Arch(  # attention and MLP side by side on one norm: one tensor, one site
    model_types=("cohere",),
    edges=(Edge(site="attn_in", readers=_QKV + _GATE_UP, norm="input_layernorm"), ATTN_OUT, MLP_MID),
    rotary="interleaved",
)

COHERE2 = replace(PARALLEL, model_types=("cohere2",), unturned={"sliding_window": None})

STABLELM_PARALLEL = replace(PARALLEL, model_types=("stablelm",), when={"use_parallel_residual": True}, rotary="halves")

PHI = Arch(
    model_types=("phi",),
    edges=(
        replace(ATTN_IN, readers=(*_QKV, "mlp.fc1")),
        replace(ATTN_OUT, readers=("self_attn.dense",)),
        Edge(site="mlp_mid", readers=("mlp.fc2",)),
    ),
    final_norm="model.final_layernorm",
)

STARCODER2 = replace(  # layer norms
    LLAMA,
    model_types=("starcoder2",),
    edges=(
        ATTN_IN,
        ATTN_OUT,
        replace(MLP_IN, readers=("mlp.c_fc",)),
        Edge(site="mlp_mid", readers=("mlp.c_proj",)),
    ),
    residual=None,
)

JAIS2 = replace(UNGATED, model_types=("jais2",), residual=None)  # layer norms with shifts

NEMOTRON = replace(UNGATED, model_types=("nemotron",), residual=None, scores=None, norm_offset=1.0)  # layer norms

OPT = Arch(
    model_types=("opt",),
    edges=(
        replace(ATTN_IN, norm="self_attn_layer_norm"),
        replace(ATTN_OUT, readers=("self_attn.out_proj",)),
        Edge(site="mlp_in", readers=("fc1",), norm="final_layer_norm"),
        Edge(site="mlp_mid", readers=("fc2",)),
    ),
    when={"do_layer_norm_before": True},  # OPT-350m has its norms elsewhere, and none at the end
    rotary="none",
    blocks="model.decoder.layers",
    final_norm="model.decoder.final_layer_norm",
)

GPT_NEOX = Arch(  # queries, keys and values of a head side by side
    model_types=("gpt_neox",),
    edges=(
        replace(ATTN_IN, readers=("attention.query_key_value",)),
        replace(ATTN_OUT, readers=("attention.dense",), writer="attention.query_key_value[*.v]"),
        replace(MLP_IN, readers=("mlp.dense_h_to_4h",)),
        Edge(site="mlp_mid", readers=("mlp.dense_4h_to_h",)),
    ),
    keys="attention.query_key_value[*.k]",
    blocks="gpt_neox.layers",
    attention="attention",
    final_norm="gpt_neox.final_layer_norm",
)

PERSIMMON = replace(  # with norms of q and k
    GPT_NEOX,
    model_types=("persimmon",),
    edges=(
        replace(ATTN_IN, readers=("self_attn.query_key_value",)),
        replace(ATTN_OUT, readers=("self_attn.dense",), writer="self_attn.query_key_value[*.v]"),
        *GPT_NEOX.edges[2:],
    ),
    keys="self_attn.query_key_value[*.k]",
    blocks=LLAMA.blocks,
    attention=LLAMA.attention,
    final_norm="model.final_layernorm",
)

BLOOM = replace(  # ALiBi, in an attention of its own
    GPT_NEOX,
    model_types=("bloom",),
    edges=(
        replace(ATTN_IN, readers=("self_attention.query_key_value",)),
        replace(ATTN_OUT, readers=("self_attention.dense",), writer="self_attention.query_key_value[*.v]"),
        *GPT_NEOX.edges[2:],
    ),
    when={"apply_residual_connection_post_layernorm": False},
    repeated=("alibi",),
    blocks="transformer.h",
    attention=None,
    final_norm="transformer.ln_f",
)

FALCON = replace(  # one after the other, or both on one norm, or on a norm each
    BLOOM,
    model_types=("falcon",),
    when={},
    repeated=(),
    others=(
        replace(
            BLOOM,
            edges=(
                replace(BLOOM.edges[0], norm="ln_attn"),
                BLOOM.edges[1],
                replace(BLOOM.edges[2], norm="ln_mlp"),
                BLOOM.edges[3],
            ),
        ),
        replace(
            BLOOM,
            edges=(
                replace(BLOOM.edges[0], readers=BLOOM.edges[0].readers + BLOOM.edges[2].readers),
                BLOOM.edges[1],
                BLOOM.edges[3],
            ),
        ),
    ),
)

ARCHS = (
    LLAMA, QWEN3, GRANITE_SWA, HYPERCLOVAX, HYPERCLOVAX_POST, HUNYUAN, ERNIE, GEMMA1, VAULTGEMMA, GEMMA, UNGATED,
    APERTUS, OLMO1, OLMO2, EXAONE4, GEMMA4, PHI3, GLM4, GLM, STABLELM, STABLELM_PARALLEL, PARALLEL, COHERE2, PHI,
    STARCODER2, JAIS2, NEMOTRON, OPT, GPT_NEOX, PERSIMMON, BLOOM, FALCON,
)  # fmt: skip
