"""Families with a mixture of experts in the place of the MLP."""

from dataclasses import replace

from flatquant.wiring.arch import Arch, Edge, Residual
from flatquant.wiring.archs.dense import (
    COHERE2,
    ERNIE,
    EXAONE4,
    GEMMA4,
    GRANITE_SWA,
    HUNYUAN,
    LLAMA,
    MLP_IN,
    MLP_MID,
    OLMO2,
    QWEN3,
)


def mixture(arch: Arch, mlp: str, *routers: str, shared: str | None = None) -> Arch:
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


MIXTRAL = replace(mixture(LLAMA, "mlp", "gate"), model_types=("mixtral",))

QWEN2_MOE = replace(
    mixture(LLAMA, "mlp", "gate", "shared_expert_gate", shared="shared_expert"),
    model_types=("qwen2_moe",),
    others=(LLAMA,),  # some blocks have no experts
)

QWEN3_MOE = replace(
    mixture(QWEN3, "mlp", "gate"), model_types=("qwen3_moe", "olmoe", "minimax_m2", "mellum"), others=(QWEN3,)
)

FLEX_OLMO = replace(mixture(OLMO2, "mlp", "gate"), model_types=("flex_olmo",))

GLM4_MOE = replace(
    mixture(QWEN3, "mlp", "gate", shared="shared_experts"),
    model_types=("glm4_moe", "dots1", "hy_v3", "solar_open", "sarvam_moe"),
    others=(QWEN3,),
)

_SOME_TURNED = replace(QWEN3, unturned=EXAONE4.unturned)

EXAONE_MOE = replace(
    mixture(_SOME_TURNED, "mlp", "gate", shared="shared_experts"), model_types=("exaone_moe",), others=(_SOME_TURNED,)
)

KOLIBRI = replace(EXAONE_MOE, model_types=("kolibri1",), residual=None, others=())  # norms behind attention and experts

_SLIDING_TURNED = replace(QWEN3, unturned={"sliding_window": None})

FLINT = replace(  # sinks
    mixture(_SLIDING_TURNED, "mlp", "gate", shared="shared_expert"), model_types=("flint",), others=(_SLIDING_TURNED,)
)

PHIMOE = replace(mixture(LLAMA, "mlp", "router"), model_types=("phimoe",), residual=None)  # layer norms


def _gated(arch: Arch, gate: str) -> Arch:
    """Attention with a gate for each head, which a matrix inside a head passes."""
    attn_in, *others = arch.edges
    return replace(arch, edges=(replace(attn_in, routers=(gate,)), *others))


LAGUNA = replace(
    _gated(mixture(QWEN3, "mlp", "gate", shared="shared_experts"), "self_attn.g_proj"),
    model_types=("laguna",),
    others=(_gated(QWEN3, "self_attn.g_proj"),),
)


def _channel_gated(arch: Arch) -> Arch:
    """AFMoE: attention with a gate for each channel, which reads what queries do; norms behind attention and MLP."""
    attn_in, attn_out, mlp_in, *others = arch.edges
    return replace(
        arch,
        edges=(
            replace(attn_in, readers=(*attn_in.readers, "self_attn.gate_proj")),
            replace(attn_out, writer=None, passes="nothing"),
            replace(mlp_in, norm="pre_mlp_layernorm"),
            *others,
        ),
        residual=None,
        unturned={"is_local_attention": False},
    )


AFMOE = replace(
    _channel_gated(mixture(QWEN3, "mlp", "router.gate", shared="shared_experts")),
    model_types=("afmoe",),
    others=(_channel_gated(QWEN3),),
)

HUNYUAN_MOE = replace(mixture(HUNYUAN, "mlp", "gate.wg", shared="shared_mlp"), model_types=("hunyuan_v1_moe",))

ERNIE_MOE = replace(
    mixture(ERNIE, "mlp", "gate", shared="shared_experts"),
    model_types=("ernie4_5_moe",),
    others=(mixture(ERNIE, "mlp", "gate"), ERNIE),
)

GRANITE_MOE = replace(mixture(LLAMA, "block_sparse_moe", "router"), model_types=("granitemoe",))

GRANITE_MOE_SWA = replace(mixture(GRANITE_SWA, "block_sparse_moe", "router"), model_types=("granitemoe_swa",))


def _parallel(arch: Arch) -> Arch:
    """A description with attention and experts on one norm."""
    attn_in, attn_out, mlp_in, *others = arch.edges
    both = replace(attn_in, readers=attn_in.readers + mlp_in.readers, routers=mlp_in.routers)
    return replace(COHERE2, edges=(both, attn_out, *others), unturned={"sliding_window": None, "force_rope": False})


COHERE2_MOE = replace(
    _parallel(mixture(LLAMA, "mlp", "gate", shared="shared_experts")),
    model_types=("cohere2_moe",),
    others=(_parallel(mixture(LLAMA, "mlp", "gate")), _parallel(LLAMA)),
)


def _beside(arch: Arch) -> Arch:
    """A description of Gemma 4 with experts beside its MLP, which a norm of their own and the router read for."""
    experts = mixture(LLAMA, "experts").edges
    mlp_in, mlp_mid = (
        replace(
            edge,
            site=site,
            like=edge.site,
            readers=tuple(path.replace("experts.experts", "experts") for path in edge.readers),
            writer=edge.writer and edge.writer.replace("experts.experts", "experts"),
        )
        for site, edge in zip(("experts_in", "experts_mid"), experts[2:], strict=True)
    )
    return replace(
        arch,
        edges=(*arch.edges[:4], replace(mlp_in, norm="pre_feedforward_layernorm_2"), mlp_mid, *arch.edges[4:]),
        kept=("router.proj",),
        others=(),
    )


GEMMA4_MOE = replace(
    _beside(GEMMA4),
    model_types=("gemma4_text",),
    when={**GEMMA4.when, "enable_moe_block": True},
    others=tuple(_beside(arch) for arch in GEMMA4.others),
)

_FEED_FORWARD = tuple(f"feed_forward.{leaf}" for leaf in ("gate_proj", "up_proj", "down_proj"))

LLAMA4 = replace(  # chunked attention; norms of q and k behind a rotary embedding of complex numbers
    mixture(replace(LLAMA, scores=None, rotary=None), "feed_forward", "router", shared="shared_expert"),
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
    mixture(replace(LLAMA, scores=None, rotary=None), "mlp", "router"), model_types=("gpt_oss",)
)
GPT_OSS = replace(GPT_OSS, edges=(*GPT_OSS.edges[:3], Edge(site="mlp_mid", readers=GPT_OSS.edges[3].readers)))

ARCHS = (
    MIXTRAL, QWEN2_MOE, QWEN3_MOE, FLEX_OLMO, GLM4_MOE, EXAONE_MOE, KOLIBRI, FLINT, PHIMOE, LAGUNA, AFMOE, HUNYUAN_MOE,
    ERNIE_MOE, GRANITE_MOE, GRANITE_MOE_SWA, COHERE2_MOE, GEMMA4_MOE, LLAMA4, GPT_OSS,
)  # fmt: skip
