"""Families with a mixture of experts in the place of the MLP."""

from dataclasses import replace

from flatquant.wiring.arch import Arch, Edge, Residual
from flatquant.wiring.archs.dense import ERNIE, HUNYUAN, LLAMA, MLP_IN, MLP_MID, OLMO2, QWEN3


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
    model_types=("glm4_moe", "dots1", "hy_v3", "solar_open"),
    others=(QWEN3,),
)

HUNYUAN_MOE = replace(mixture(HUNYUAN, "mlp", "gate.wg", shared="shared_mlp"), model_types=("hunyuan_v1_moe",))

ERNIE_MOE = replace(
    mixture(ERNIE, "mlp", "gate", shared="shared_experts"),
    model_types=("ernie4_5_moe",),
    others=(mixture(ERNIE, "mlp", "gate"), ERNIE),
)

GRANITE_MOE = replace(mixture(LLAMA, "block_sparse_moe", "router"), model_types=("granitemoe",))

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

ARCHS = (MIXTRAL, QWEN2_MOE, QWEN3_MOE, FLEX_OLMO, GLM4_MOE, HUNYUAN_MOE, ERNIE_MOE, GRANITE_MOE, LLAMA4, GPT_OSS)
