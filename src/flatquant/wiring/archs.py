"""The families we know: one literal each. docs/families.md says how to add one, and the laws decide whether it holds.

Most differ from Llama in what the attention function, the norms and the masks do, which no transform touches: q and k
norms, rotary embeddings, sliding windows and logit caps all lie between an edge's readers and the next edge.
"""

from collections.abc import Mapping
from dataclasses import replace
from difflib import get_close_matches

from torch import Tensor, nn

from flatquant.errors import ModelError
from flatquant.models import WRAPPERS
from flatquant.runtime.experts import is_stacked
from flatquant.spec import Pairing
from flatquant.wiring.arch import Arch, Edge, Residual, Scores, find

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")

ATTN_IN = Edge(site="attn_in", readers=_QKV, norm="input_layernorm")
ATTN_OUT = Edge(site="attn_out", readers=("self_attn.o_proj",), writer="self_attn.v_proj", passes="per_head")
MLP_IN = Edge(site="mlp_in", readers=_GATE_UP, norm="post_attention_layernorm")
MLP_MID = Edge(site="mlp_mid", readers=("mlp.down_proj",), writer="mlp.up_proj", passes="diagonal")
MLP_UP = replace(MLP_IN, readers=("mlp.up_proj",))  # without a gate, no scale passes the activation function
MLP_DOWN = Edge(site="mlp_mid", readers=("mlp.down_proj",))

LLAMA = Arch(
    model_types=("llama", "mistral", "ministral", "ministral3", "qwen2", "granite", "smollm3", "seed_oss"),
    edges=(ATTN_IN, ATTN_OUT, MLP_IN, MLP_MID),
    residual=Residual(writers=("self_attn.o_proj", "mlp.down_proj")),
    scores=Scores(queries="self_attn.q_proj", keys="self_attn.k_proj"),
)

QWEN3 = replace(LLAMA, model_types=("qwen3",), scores=None)  # norms of q and k

HUNYUAN = replace(QWEN3, model_types=("hunyuan_v1_dense",), rotary=None)  # behind the rotary embedding

ERNIE = replace(LLAMA, model_types=("ernie4_5", "helium"), scores=None, rotary="neighbours")

GEMMA1 = replace(LLAMA, model_types=("gemma",), norm_offset=1.0)

UNGATED = replace(LLAMA, model_types=("arcee",), edges=(*LLAMA.edges[:2], MLP_UP, MLP_DOWN))

APERTUS = replace(  # norms of q and k
    UNGATED,
    model_types=("apertus",),
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

EXAONE4 = replace(OLMO2, model_types=("exaone4",), unturned={"is_sliding": False, "sliding_window": int})

# Values pass a norm, and are the keys before their norm in some blocks. With embeddings for every layer, or keys and
# values of other layers, what a block is given depends on the text and on other blocks.
_GEMMA4_OUT = replace(ATTN_OUT, writer=None, passes="nothing")

GEMMA4 = replace(
    GEMMA,
    model_types=("gemma4_text",),
    edges=(ATTN_IN, _GEMMA4_OUT, *GEMMA.edges[2:]),
    when={"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, "enable_moe_block": False},
    norm_offset=0.0,
    others=(
        replace(
            GEMMA,
            edges=(replace(ATTN_IN, readers=_QKV[:2]), _GEMMA4_OUT, *GEMMA.edges[2:]),
            norm_offset=0.0,
        ),
    ),
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


def _mixture(arch: Arch, mlp: str, *routers: str, shared: str | None = None) -> Arch:
    """A description with a mixture of experts in the place of its MLP: all of them read what the router reads.

    Args:
        mlp: path of the mixture.
        routers: what reads its input in 16 bit, below that path.
        shared: those experts that every token passes, likewise; what they write inside is a site of its own.
    """
    attn_in, attn_out, mlp_in, _ = arch.edges
    experts, shared = f"{mlp}.experts.*", f"{mlp}.{shared}" if shared else None
    roots = ([shared] if shared else []) + [experts]
    readers = tuple(f"{root}.{leaf}" for root in roots for leaf in ("gate_proj", "up_proj"))
    downs = tuple(f"{root}.down_proj" for root in roots)
    mlp_in = replace(mlp_in, readers=readers, routers=tuple(f"{mlp}.{router}" for router in routers))
    mlp_mid = replace(MLP_MID, readers=downs[-1:], writer=f"{experts}.up_proj")
    beside = replace(MLP_MID, site="shared_mid", like="mlp_mid", readers=downs[:1], writer=f"{shared}.up_proj")
    return replace(
        arch,
        edges=(attn_in, attn_out, mlp_in, mlp_mid, *([beside] if shared else [])),
        residual=arch.residual and Residual(writers=(*attn_out.readers, *downs)),
    )


MIXTRAL = replace(_mixture(LLAMA, "mlp", "gate"), model_types=("mixtral",))

QWEN2_MOE = replace(
    _mixture(LLAMA, "mlp", "gate", "shared_expert_gate", shared="shared_expert"),
    model_types=("qwen2_moe",),
    others=(LLAMA,),  # some blocks have no experts
)

QWEN3_MOE = replace(_mixture(QWEN3, "mlp", "gate"), model_types=("qwen3_moe", "olmoe", "minimax_m2"), others=(QWEN3,))

GLM4_MOE = replace(
    _mixture(QWEN3, "mlp", "gate", shared="shared_experts"), model_types=("glm4_moe", "dots1"), others=(QWEN3,)
)


def _latent(arch: Arch, queries: bool) -> Arch:
    """A description with latent attention in the place of its own.

    Args:
        queries: are made of latent vectors too.
    """
    kv = Edge(
        site="kv_latent",
        like="attn_in",
        readers=("self_attn.kv_b_proj",),
        norm="self_attn.kv_a_layernorm",
        writer="self_attn.kv_a_proj_with_mqa[latent]",
        passes="rotation",
    )
    q = replace(
        kv,
        site="q_latent",
        readers=("self_attn.q_b_proj",),
        norm="self_attn.q_a_layernorm",
        writer="self_attn.q_a_proj",
    )
    down = "self_attn.q_a_proj" if queries else "self_attn.q_proj"
    return replace(
        arch,
        edges=(
            replace(ATTN_IN, readers=(down, "self_attn.kv_a_proj_with_mqa")),
            *([q] if queries else []),
            kv,
            replace(ATTN_OUT, writer="self_attn.kv_b_proj[*.last]"),
            *arch.edges[2:],
        ),
        scores=None,
        keys="self_attn.kv_a_proj_with_mqa[rotary]",
        latent=kv.site,
    )


def _deepseek(*kinds: str, rotary: Pairing | None = "halves", base: Arch = LLAMA) -> Arch:
    """Latent attention, with queries of latent vectors or without, and experts or none."""
    mixture = _mixture(base, "mlp", "gate", shared="shared_experts")
    own, *others = (
        replace(_latent(arch, queries), model_types=kinds, rotary=rotary)
        for arch in (mixture, base)
        for queries in (True, False)
    )
    return replace(own, others=tuple(others))


# Most sort pairs of neighbours into halves before they turn them.
DEEPSEEK_V3 = _deepseek("deepseek_v3", "glm4_moe_lite", "minicpm3", "youtu")

DEEPSEEK_V2 = _deepseek("deepseek_v2", rotary=None)  # complex numbers

AXK1 = _deepseek("axk1", base=replace(LLAMA, residual=None))  # a norm behind experts

HUNYUAN_MOE = replace(_mixture(HUNYUAN, "mlp", "gate.wg", shared="shared_mlp"), model_types=("hunyuan_v1_moe",))

ERNIE_MOE = replace(
    _mixture(ERNIE, "mlp", "gate", shared="shared_experts"),
    model_types=("ernie4_5_moe",),
    others=(_mixture(ERNIE, "mlp", "gate"), ERNIE),
)

GRANITE_MOE = replace(_mixture(LLAMA, "block_sparse_moe", "router"), model_types=("granitemoe",))

_FEED_FORWARD = tuple(f"feed_forward.{leaf}" for leaf in ("gate_proj", "up_proj", "down_proj"))

LLAMA4 = replace(  # chunked attention; norms of q and k behind a rotary embedding of complex numbers
    _mixture(replace(LLAMA, scores=None, rotary=None), "feed_forward", "router", shared="shared_expert"),
    model_types=("llama4_text",),
    others=(
        replace(
            LLAMA,
            edges=(
                *LLAMA.edges[:2],
                replace(MLP_IN, readers=_FEED_FORWARD[:2]),
                replace(MLP_MID, readers=_FEED_FORWARD[2:], writer=_FEED_FORWARD[1]),
            ),
            residual=Residual(writers=("self_attn.o_proj", *_FEED_FORWARD[2:])),
            scores=None,
            rotary=None,
        ),
    ),
)

GPT_OSS = replace(  # sinks; what experts multiply is clamped, so no scale passes
    _mixture(replace(LLAMA, scores=None, rotary=None), "mlp", "router"), model_types=("gpt_oss",)
)
GPT_OSS = replace(GPT_OSS, edges=(*GPT_OSS.edges[:3], Edge(site="mlp_mid", readers=GPT_OSS.edges[3].readers)))

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
    _mixture(GATED, "mlp", "gate", "shared_expert_gate", shared="shared_expert"),
    model_types=("qwen3_5_moe_text",),
    others=(_mixture(DELTA, "mlp", "gate", "shared_expert_gate", shared="shared_expert"),),
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
        _mixture(DELTA_NEXT, "mlp", "gate", "shared_expert_gate", shared="shared_expert"),
        GATED,
        DELTA_NEXT,
    ),
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
    mixture = _mixture(arch, "block_sparse_moe", "router")
    mlp_in = replace(mixture.edges[2], readers=arch.edges[2].readers + mixture.edges[2].readers)
    return replace(
        mixture,
        edges=(*attention, mlp_in, mixture.edges[3], replace(own, site="shared_mid", like="mlp_mid")),
        residual=Residual(writers=(*attention[1].readers, *own.readers, *mixture.edges[3].readers)),
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

ARCHS = (
    LLAMA, QWEN3, HUNYUAN, ERNIE, GEMMA1, GEMMA, UNGATED, APERTUS, OLMO2, EXAONE4, GEMMA4, PHI3, GLM4, STABLELM,
    STABLELM_PARALLEL, PARALLEL, COHERE2, PHI, STARCODER2, NEMOTRON, OPT, GPT_NEOX, BLOOM, FALCON, MIXTRAL, QWEN2_MOE,
    QWEN3_MOE, GLM4_MOE, DEEPSEEK_V3, DEEPSEEK_V2, AXK1, HUNYUAN_MOE, ERNIE_MOE, GRANITE_MOE, LLAMA4, GPT_OSS, QWEN3_5,
    QWEN3_5_MOE, QWEN3_NEXT, LFM2,
    NEMOTRON_H, GRANITE_HYBRID,
)  # fmt: skip


# Text parts that transformers has inside wrappers alone. Their rotary embedding turns by positions of three kinds.
PARTS = (
    replace(LLAMA, model_types=("qwen2_5_vl_text",)),
    replace(QWEN3, model_types=("qwen3_vl_text",)),
)

_TEXT = "model.language_model"  # the text part of a wrapper


def arch_of(config, model: nn.Module | None = None) -> Arch:
    """The description for a transformers config; of a wrapper's, that of its text part, where the wrapper has it.

    Args:
        model: of that config; a note of the error then says what it is made of.

    Raises:
        ModelError: a family without a description; in a note, where one can be had, a draft of it.
    """
    wrapped = config.model_type in WRAPPERS
    text = config.get_text_config() if wrapped else config
    for arch in (*ARCHS, *PARTS) if wrapped else ARCHS:
        if text.model_type in arch.model_types and all(getattr(text, k, v) == v for k, v in arch.when.items()):
            return _inside(arch) if wrapped else arch
    raise _unknown(config, model)


def _inside(arch: Arch) -> Arch:
    """A description with the paths that its modules have inside a wrapper."""
    blocks, norm = (f"{_TEXT}.{path.partition('.')[2]}" for path in (arch.blocks, arch.final_norm))
    return replace(arch, blocks=blocks, final_norm=norm)


def _unknown(config, model: nn.Module | None) -> ModelError:
    """One short line, and the way to a description in a note."""
    kind = str(config.model_type)[:40]
    known = [*known_types(), *WRAPPERS]
    near = [name for name in (f"{kind}_text",) if name in known]  # of a wrapper, its text part first
    near = [*dict.fromkeys([*near, *get_close_matches(kind, known, n=3, cutoff=0.65)])][:3]
    hint = f"near it: {', '.join(near)}" if near else "`flatquant methods --families` lists those that are"
    error = ModelError(f"model type {kind!r} is not supported; {hint}; docs/families.md says how to add one")
    text = getattr(getattr(config, "text_config", None), "model_type", None)
    if text in known_types() and (model is None or find(model, "model.language_model")):
        error.add_note(_TEXT_PART.format(kind=text))
    elif model is not None:
        error.add_note(_draft(kind, model))
    return error


def known_types() -> list[str]:
    """The model types that have a description."""
    return sorted({kind for arch in ARCHS for kind in arch.model_types})


_TEXT_PART = """\
Its text part is a {kind}, which is supported as a model of its own:

    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    whole = AutoModelForImageTextToText.from_pretrained(MODEL, dtype="auto")
    text = AutoModelForCausalLM.from_config(whole.config.text_config, dtype=whole.dtype)
    text.config.tie_word_embeddings = whole.config.tie_word_embeddings
    text.model, text.lm_head = whole.model.language_model, whole.lm_head
    text.save_pretrained(FOLDER)  # and the tokenizer"""


# --------------------------------------------------------------------------------- a start for a new family

# What the linears of a site are called, in the families seen so far.
_NAMES = {
    "attn_in": ("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value", "c_attn", "Wqkv", "query", "key", "value"),
    "attn_out": ("o_proj", "out_proj", "dense", "wo"),
    "mlp_in": ("gate_proj", "up_proj", "gate_up_proj", "fc1", "c_fc", "w1", "w3", "dense_h_to_4h"),
    "mlp_mid": ("down_proj", "fc2", "w2", "dense_4h_to_h"),
}


def _draft(model_type: str, model: nn.Module) -> str:
    """What a model's blocks hold, and a description that fits the names, or why there can be none."""
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    if not lists:
        return f"There is no draft of a description: {type(model).__name__} has no list of blocks."
    path = max(lists, key=lambda name: len(list(lists[name].parameters())))
    block = max(lists[path], key=lambda block: sum(p.numel() for p in block.parameters()))  # one with experts, if any
    modules = {name: m for name, m in block.named_modules() if next(m.parameters(recurse=False), None) is not None}
    held = "".join(f"\n    {name}: {type(m).__name__} {_shape(m)}" for name, m in modules.items())
    edges, missing = _drafted_edges(modules)
    if missing:
        end = f"There is no draft of a description: no Linear of it is known as a reader of {' or '.join(missing)}."
    else:
        lines = "".join(f"\n        {edge}," for edge in edges)
        end = f"A draft: Arch(\n    model_types=({model_type!r},),\n    blocks={path!r},\n    edges=({lines}\n    ),\n)"
    return f"A block of {type(model).__name__} ({path}) holds{held}\n{end}"


def _drafted_edges(modules: Mapping[str, nn.Module]) -> tuple[list[str], list[str]]:
    """Literals of the edges of a block with these modules, and the sites that every description has and this lacks."""
    norms = [n for n, m in modules.items() if next(m.parameters(recurse=False)).ndim == 1 and "." not in n]
    experts = [name for name, m in modules.items() if is_stacked(m)]
    linears = [name for name, m in modules.items() if isinstance(m, nn.Linear)]
    linears += [f"{name}.*.{leaf}" for name in experts for leaf in ("gate_proj", "up_proj", "down_proj")]
    # Beside experts, whatever gives a number for each of them.
    routers = tuple(
        name
        for root in experts
        for name, m in modules.items()
        if _parent(name) == _parent(root) and _routes(m, modules[root])
    )
    edges, missing = [], []
    for site, names in _NAMES.items():
        readers = tuple(n for n in linears if n.split(".")[-1] in names and n not in routers)
        missing += [] if readers else [site]
        norm = f", norm={norms[site == 'mlp_in' and len(norms) > 1]!r}" if site.endswith("_in") and norms else ""
        chosen = f", routers={routers!r}" if site == "mlp_in" and routers else ""
        written = {"attn_out": ", writer='...', passes='per_head'", "mlp_mid": ", writer='...', passes='diagonal'"}
        edges.append(f"Edge(site={site!r}, readers={readers!r}{norm}{chosen}{written.get(site, '')})")
    return edges, missing


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _shape(module: nn.Module) -> str:
    return "x".join(map(str, next(module.parameters(recurse=False)).shape))


def _routes(module: nn.Module, stacked: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    experts, _, hidden = stacked.get_parameter("gate_up_proj").shape
    return isinstance(weight, Tensor) and tuple(weight.shape) == (experts, hidden)
