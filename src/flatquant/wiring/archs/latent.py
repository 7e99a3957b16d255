"""Families with latent attention: a cache holds what keys and values are made of."""

from dataclasses import replace

from flatquant.spec import Pairing
from flatquant.wiring.arch import Arch, Edge
from flatquant.wiring.archs.dense import ATTN_IN, ATTN_OUT, LLAMA
from flatquant.wiring.archs.experts import mixture


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
    experts = mixture(base, "mlp", "gate", shared="shared_experts")
    own, *others = (
        replace(_latent(arch, queries), model_types=kinds, rotary=rotary)
        for arch in (experts, base)
        for queries in (True, False)
    )
    return replace(own, others=tuple(others))


# Most sort pairs of neighbours into halves before they turn them.
DEEPSEEK_V3 = _deepseek("deepseek_v3", "glm4_moe_lite", "minicpm3", "youtu", "sarvam_mla")

DEEPSEEK_V2 = _deepseek("deepseek_v2", rotary=None)  # complex numbers

AXK1 = _deepseek("axk1", base=replace(LLAMA, residual=None))  # a norm behind experts

ARCHS = (DEEPSEEK_V3, DEEPSEEK_V2, AXK1)
