"""Descriptions of families: what they do not match is an error in one line."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoConfig, LlamaConfig, PretrainedConfig

from flatquant.errors import ModelError, SpecError
from flatquant.models import CacheShape
from flatquant.recipes import flatquant, rtn
from flatquant.runtime.experts import open_experts
from flatquant.runtime.fused import FAMILIES as FUSED
from flatquant.spec import SITES
from flatquant.wiring.arch import Arch, Geometry, replace_submodule, submodule
from flatquant.wiring.archs import ARCHS, LLAMA, arch_of
from flatquant.wiring.plan import make_plan
from tests.laws import family
from tests.tiny_models import FAMILIES, tiny_family


def test_families_are_found_by_their_type() -> None:
    for arch in ARCHS:
        for name in arch.model_types:
            assert arch_of(SimpleNamespace(model_type=name, **arch.when)) is arch
    names = [(name, *arch.when.values()) for arch in ARCHS for name in arch.model_types]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    "name, near",
    [
        ("qwen2_5_omni", "qwen2_5_vl, qwen3_5_moe, qwen2_moe"),
        ("qwen3_omni", "qwen3_moe, qwen3_5, qwen3_next"),
        ("Llama", "llama"),
        ("mamba", None),
        ("", None),
        ("x" * 5000 + "\n", None),
    ],
)
def test_an_unknown_family_is_a_short_line_that_names_what_is_near(name: str, near: str | None) -> None:
    with pytest.raises(ModelError) as caught:
        arch_of(SimpleNamespace(model_type=name))
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) <= 200
    assert f"'{name[:40]}" in message
    assert "docs/families.md" in message  # how to add one
    assert (f"near it: {near}" if near else "`flatquant methods --families`") in message
    assert not hasattr(caught.value, "__notes__")


def test_a_form_that_is_not_described_is_named_by_its_fields() -> None:
    whole = AutoConfig.for_model("llava", text_config={"model_type": "opt", "do_layer_norm_before": False})
    for config in (whole, whole.text_config):
        with pytest.raises(ModelError) as caught:
            arch_of(config)
        wanted = "opt with do_layer_norm_before=False is not supported"
        assert str(caught.value) == f"{wanted}; docs/families.md says why"


@pytest.mark.parametrize("arch", ARCHS, ids=lambda a: a.model_types[0])
def test_descriptions_have_all_roles(arch: Arch) -> None:
    assert {edge.role for kind in arch.kinds for edge in kind.edges} >= {"attn_in", "attn_out", "mlp_mid"}


@pytest.mark.parametrize("arch", [kind for arch in ARCHS for kind in arch.kinds], ids=lambda a: a.model_types[0])
def test_descriptions_are_complete_and_consistent(arch: Arch) -> None:
    sites = tuple(edge.site for edge in arch.edges)
    assert len(sites) == len(set(sites))
    own = tuple(site for site in sites if site in SITES)
    assert own == tuple(s for s in SITES if s in own)  # in the order data meets them
    assert {edge.role for edge in arch.edges} <= set(SITES)
    readers = [path for edge in arch.edges for path in edge.readers]
    assert len(readers) == len(set(readers))
    for edge in arch.edges:
        # A writer is itself a reader of an earlier site.
        assert edge.writer is None or edge.writes.path in readers
        assert (edge.writer is None) == (edge.passes == "nothing")
        assert (edge.norm is not None and edge.writer is not None) == (edge.passes == "rotation")


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
def test_every_linear_of_a_block_has_a_reader(kind: str) -> None:
    model = family(kind)
    arch = arch_of(model.config)
    for block in submodule(model, arch.blocks):
        linears = {n for n, m in block.named_modules() if isinstance(m, nn.Linear)}
        assert linears == {path for edge in arch.edges for path in edge.readers}
        for edge in arch.edges:
            if edge.norm:
                assert submodule(block, edge.norm).weight.shape == (model.config.hidden_size,)
        submodule(block, arch.attention)
    submodule(model, arch.final_norm)


@pytest.mark.parametrize("change", ["reader", "blocks"])
def test_an_edge_that_matches_nothing_is_an_error(change: str) -> None:
    model = family("llama")
    if change == "reader":
        edge = dataclasses.replace(LLAMA.edges[0], readers=("self_attn.q_proj", "self_attn.qkv_proj"))
        arch = dataclasses.replace(LLAMA, edges=(edge, *LLAMA.edges[1:]))
        with pytest.raises(ModelError, match=r"LlamaDecoderLayer has no module 'self_attn\.qkv_proj'") as caught:
            make_plan(rtn("w4"), arch, Geometry.of(model.config), model.model.layers)
    else:
        with pytest.raises(ModelError, match=r"LlamaForCausalLM has no module 'transformer\.h'") as caught:
            submodule(model, "transformer.h")
    assert "\n" not in str(caught.value)


def test_geometry_reads_the_explicit_head_dim() -> None:
    config = LlamaConfig(hidden_size=24, num_attention_heads=4, num_key_value_heads=2, head_dim=10)
    assert Geometry.of(config) == Geometry(heads=4, kv_heads=2, head_dim=10)
    # Older configurations have neither field.
    config = PretrainedConfig(num_hidden_layers=1, hidden_size=24, num_attention_heads=4)
    assert Geometry.of(config) == Geometry(heads=4, kv_heads=4, head_dim=6)
    config = PretrainedConfig(
        num_hidden_layers=1, hidden_size=24, num_attention_heads=4, head_dim=None, num_key_value_heads=None
    )
    assert Geometry.of(config) == Geometry(heads=4, kv_heads=4, head_dim=6)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_cache_holds_by_the_config_what_it_holds_by_the_modules(name: str) -> None:
    model = tiny_family(name)
    open_experts(model)
    text = model.config.get_text_config()
    if not hasattr(type(text)(), "num_key_value_heads"):
        vars(text).pop("num_key_value_heads", None)  # that a tiny model is given, and does not read
    arch, geometry = arch_of(model.config), Geometry.of(model.config)
    blocks = [(block, arch.of(block)) for block in submodule(model, arch.blocks).children()]
    attended = [geometry.at(block, kind) for block, kind in blocks if kind.attention is not None]
    assert not attended or CacheShape.of(model.config).numbers == attended[0].cached


@pytest.mark.parametrize("kind", FUSED)
def test_fused_families_are_wired_as_they_are_described(kind: str) -> None:
    """Serving does not know the descriptions; what it repeats of them is the same."""
    arch, fused = next(arch for arch in ARCHS if kind in arch.model_types), FUSED[kind]
    assert fused.readers == {edge.site: edge.readers for edge in arch.edges}
    assert list(fused.norms) == [edge.norm for edge in arch.edges if edge.norm is not None]
    assert fused.norm_offset == arch.norm_offset
    assert arch.rotary == "halves"


def test_modules_are_replaced_at_any_depth() -> None:
    model = family("llama")
    new = nn.Linear(2, 2)
    replace_submodule(model, "model.layers.1.mlp.up_proj", new)
    assert model.model.layers[1].mlp.up_proj is new
    replace_submodule(model, "lm_head", new)
    assert model.lm_head is new
    with pytest.raises(ModelError):
        replace_submodule(model, "model.nowhere.up_proj", new)


# -------------------------------------------------------------------------------------------------- plans


def planned(scheme: str, *, force: bool = False, ranks: int = 1, **shape):
    model = family("llama", dtype=torch.float32, **shape)
    geometry = Geometry.of(model.config)
    return make_plan(flatquant(scheme).for_ranks(ranks), LLAMA, geometry, model.model.layers, force=force)


def test_a_plan_says_what_runs_online() -> None:
    plan = planned("w4a4kv4", head_dim=10)
    assert (plan.blocks_path, plan.attention, len(plan.blocks)) == ("model.layers", "self_attn", 2)
    for block in plan.blocks:
        assert block.qk
        assert block.head_dim == 10
        shapes = {name: (site.shape, site.left, site.right) for name, site in block.sites.items()}
        assert shapes == {
            "attn_in": ((4, 6), True, True),
            "attn_out": ((4, 10), True, False),  # v_proj has applied the factor inside heads
            "mlp_in": ((4, 6), True, True),
            "mlp_mid": ((5, 8), True, True),
        }


def test_a_plan_for_ranks_has_blocks_where_ranks_hold_parts() -> None:
    for block in planned("w4a4kv4", ranks=4).blocks:
        found = {name: (site.shape, site.ranks) for name, site in block.sites.items()}
        assert found == {
            "attn_in": ((4, 6), 1),
            "attn_out": ((4, 6), 4),
            "mlp_in": ((4, 6), 1),
            "mlp_mid": ((8, 5), 4),
        }
    with pytest.raises(SpecError, match="attn_out: 4 heads do not divide over 3 ranks"):
        planned("w4a4kv4", ranks=3)
    with pytest.raises(SpecError, match="mlp_mid: 42 channels do not divide over 4 ranks"):
        planned("w4a4kv4", ranks=4, intermediate=42)


@pytest.mark.parametrize(
    "scheme, transformed, qk",
    [
        ("w4", {"attn_in", "attn_out", "mlp_in", "mlp_mid"}, False),
        ("a4", {"attn_in", "attn_out", "mlp_in", "mlp_mid"}, False),
        ("kv4", set(), True),
        ("k4", set(), True),
        ("v4", set(), False),
        ("w16", set(), False),
        ("mlp_mid only", {"mlp_mid"}, False),
    ],
)
def test_nothing_runs_online_where_nothing_is_quantised(scheme: str, transformed: set, qk: bool) -> None:
    if scheme == "mlp_mid only":
        scheme = "w16,mlp_mid=w4"
    for block in planned(scheme).blocks:
        assert {n for n, s in block.sites.items() if s.left or s.right} == transformed
        assert block.qk == qk
        assert (block.keys is not None) == (scheme in ("kv4", "k4"))
        assert (block.values is not None) == (scheme in ("kv4", "v4"))


def test_overrides_reach_their_block_and_site_only() -> None:
    plan = planned("w4a4kv4,mlp_mid=w8a8,1.attn_in=w16a16")
    bits = [
        {n: (s.weights and s.weights.bits, s.activations and s.activations.bits) for n, s in b.sites.items()}
        for b in plan.blocks
    ]
    rest = {"attn_out": (4, 4), "mlp_in": (4, 4), "mlp_mid": (8, 8)}
    assert bits == [{"attn_in": (4, 4), **rest}, {"attn_in": (None, None), **rest}]
    assert not plan.blocks[1].sites["attn_in"].left


def test_keys_of_one_block_may_have_other_bits_and_are_transformed_only_where_quantised() -> None:
    plan = planned("w4a4kv4,1.k16v8")
    assert [(b.qk, b.keys and b.keys.bits, b.values and b.values.bits) for b in plan.blocks] == [
        (True, 4, 4),
        (False, None, 8),
    ]
    with pytest.raises(SpecError, match=r"'2.k8': the model has blocks 0 to 1"):
        planned("w4a4kv4,2.k8")
