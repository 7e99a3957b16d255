"""Keys cached less a constant: any constant leaves the function alone, and the right one leaves little to lose."""

import copy
import dataclasses
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

import flatquant
from flatquant import seams, spec
from flatquant.errors import SpecError
from flatquant.recipes import RECIPES, rtn
from flatquant.runtime.artifact import load, save
from flatquant.runtime.experts import open_experts
from flatquant.runtime.folder import plan_from_json, plan_to_json
from flatquant.runtime.keyvalue import FrozenKeyValue
from flatquant.runtime.kvcache import QuantizedCache, token_bytes
from flatquant.seams import CACHE, attached
from flatquant.spec import DataSpec, KeyOffset, QuantSpec, Recipe, Scheme
from flatquant.wiring.arch import Geometry, Rows, replace_submodule, submodule
from flatquant.wiring.archs import ARCHS, arch_of
from flatquant.wiring.fold import fold_block
from flatquant.wiring.plan import make_plan
from tests.laws import (
    BASES,
    bare,
    blocks_of,
    calibrated,
    decoded,
    hidden,
    quick,
    reinstalled,
    relative,
    tokens_for,
    wrap,
)
from tests.tiny_models import FAMILIES, tiny_family

PRESERVED = 1e-9
# Families that have keys which are turned in a way that offsets can follow.
_DESCRIBED = {kind for arch in ARCHS for kind in arch.model_types if arch.attention and arch.rotary}
UNTURNED = {"opt", "nemotron_h"}  # where constant keys are all alike
TURNED = [name for name in FAMILIES if name.split()[0] in _DESCRIBED]
MEAN = Scheme(key_offset="mean")


def with_offset(recipe: Recipe, choice: Literal["auto", "none", "bias", "mean"]) -> Recipe:
    """The same recipe with another choice, and with little text."""
    scheme = dataclasses.replace(recipe.scheme, key_offset=choice)
    return dataclasses.replace(recipe, scheme=scheme, data=DataSpec(samples=4, seqlen=12))


def offset_of(block: nn.Module) -> torch.Tensor:
    kv = next(filter(None, map(attached, block.modules())))
    assert isinstance(kv, FrozenKeyValue)
    assert kv.key_offset is not None
    return kv.key_offset


# ------------------------------------------------------------------------------- any constant is exact


@pytest.mark.parametrize("name", TURNED)
def test_without_grids_the_function_is_unchanged(name: str) -> None:
    """Wrapped, folded, reinstalled, with padding, with caches of both kinds."""
    model = tiny_family(name, dtype=torch.float64)
    seams.use_attention(model, "self_attn")  # gemma2's own sums in float32
    tokens = tokens_for(model, 2, 9)
    padding = torch.ones_like(tokens)
    padding[0, :4] = 0
    wrapped = copy.deepcopy(model)
    plan, fits = wrap(wrapped, bare(BASES["inverse orthogonal"], MEAN), force=True)
    with torch.no_grad():
        keyed = [fit for fit in fits if fit.arch.attention is not None]
        assert keyed
        for fit in keyed:
            assert fit.key_value is not None
            assert fit.key_value.offset is not None
            fit.key_value.offset.copy_(30 * torch.randn(fit.key_value.offset.shape))
    want = hidden(model, tokens)
    assert relative(hidden(wrapped, tokens), want) < PRESERVED
    for fit in fits:
        fold_block(fit, dtype=torch.float64)
    assert offset_of(keyed[-1].block).abs().max() > 10
    folded = hidden(wrapped, tokens)
    assert relative(folded, want) < PRESERVED
    loaded = reinstalled(model, plan, wrapped)
    assert torch.equal(hidden(loaded, tokens), folded)
    assert relative(decoded(loaded, tokens), want) < PRESERVED
    with torch.no_grad():
        got, padded = (m(tokens, attention_mask=padding, use_cache=False).logits[:, 4:] for m in (loaded, model))
    assert relative(got, padded) < PRESERVED


# ------------------------------------------------------------------------------- the right constant


@torch.no_grad()
def constant_keys(model: PreTrainedModel) -> None:
    """Make every key before RoPE (and before a norm) the same vector of its head."""
    open_experts(model)
    for block in blocks_of(model):
        arch = arch_of(model.config).of(block)
        if arch.attention is None:
            continue
        keys, geometry = Rows.parse(arch.keys), Geometry.of(model.config).at(block, arch)
        old = submodule(block, keys.path)
        new = nn.Linear(old.in_features, old.out_features, dtype=old.weight.dtype).requires_grad_(False)
        new.weight.copy_(old.weight)
        new.bias.zero_()
        n = geometry.latent or old.out_features - 2 * geometry.kv_heads * geometry.head_dim
        groups, first, size = keys.place(old.out_features, n, geometry.head_dim)
        new.weight.unflatten(0, (groups, -1))[:, first : first + size] = 0
        new.bias.view(groups, -1)[:, first : first + size] = torch.randn(groups, size, dtype=new.bias.dtype)
        replace_submodule(block, keys.path, new)


@pytest.mark.parametrize("name", [name for name in TURNED if name not in UNTURNED])
@torch.no_grad()
def test_constant_keys_lose_nothing_at_two_bits(name: str) -> None:
    """Their mean over text is the constant, whatever norm and rotary embedding come behind it."""
    model = tiny_family(name)
    constant_keys(model)
    tokens = tokens_for(model, 2, 9)
    errors = []
    for choice in ("mean", "none"):
        recipe = with_offset(rtn("k2"), choice)
        ours, plan, _ = calibrated(model, recipe)
        keyed = [block for block in plan.blocks if block.keys is not None]
        assert keyed
        assert all((block.key_offset is not None) == (choice == "mean") for block in keyed)
        base, _, _ = calibrated(model, rtn("w16"))
        errors.append(relative(ours(tokens).logits, base(tokens).logits))
    assert errors[0] < 1e-4 < 1e-2 < errors[1]


def biased_qwen2(bias: float) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.1,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).float().eval()
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.bias[3] += bias
    return model


@pytest.mark.parametrize("method", ["rtn", "quarot", "flatquant"])
@torch.no_grad()
def test_a_large_bias_of_keys_is_hardly_noticed(method: str) -> None:
    tokens = torch.randint(0, 512, (16, 64))
    losses = []
    for bias in (0.0, 300.0):
        model = biased_qwen2(bias)
        recipe = RECIPES["flatquant"]("kv4", preset="quick") if method == "flatquant" else RECIPES[method]("kv4")
        with torch.enable_grad():
            done = flatquant.quantize(copy.deepcopy(model), recipe, tokens if recipe.data else None)
        p, q = (m(tokens[:4]).logits.log_softmax(-1) for m in (model, done.model))
        losses.append(float((p.exp() * (p - q)).sum(-1).mean()))
    assert losses[1] < 1.3 * losses[0]


def test_without_text_it_is_the_bias_and_with_text_the_mean() -> None:
    model = biased_qwen2(300.0)
    bias = model.model.layers[0].self_attn.k_proj.bias.detach().unflatten(0, (2, 32))
    rounded, _, _ = calibrated(model, rtn("k4"))
    assert torch.equal(offset_of(rounded.model.layers[0]), bias)
    fitted, _, _ = calibrated(model, quick("k4"))
    asked, _, _ = calibrated(
        model, dataclasses.replace(quick("k4"), scheme=dataclasses.replace(Scheme.parse("k4"), key_offset="bias"))
    )
    assert torch.equal(offset_of(asked.model.layers[0]), bias)
    mean = offset_of(fitted.model.layers[0])
    assert not torch.equal(mean, bias)
    with torch.no_grad():
        inputs = model.model.layers[0].input_layernorm(model.model.embed_tokens(tokens_for(model, 4, 12, seed=1)))
        want = model.model.layers[0].self_attn.k_proj(inputs).mean((0, 1)).unflatten(0, (2, 32))
    torch.testing.assert_close(mean, want, rtol=1e-4, atol=1e-4)


def test_a_learned_scale_of_keys_is_the_offset_s_too() -> None:
    model = tiny_family("qwen2", dtype=torch.float64)
    recipe = dataclasses.replace(RECIPES["omniquant"]("w4a4kv4"), scheme=Scheme(key_offset="bias"))
    recipe = dataclasses.replace(recipe, data=DataSpec(samples=4, seqlen=12))
    _, fits = wrap(model, recipe, force=True)
    fit = fits[0]
    assert fit.key_value is not None
    assert fit.key_value.offset is not None
    assert fit.key_value.scale is not None
    scale = fit.key_value.scale.scale.detach().view(2, 6)
    assert (scale - 1).abs().max() > 1e-2
    want = fit.key_value.offset * scale
    fold_block(fit, dtype=torch.float64)
    torch.testing.assert_close(offset_of(fit.block), want)


# ------------------------------------------------------------------------------- who gets one


@pytest.mark.parametrize(
    "name, choice, reads_text, want",
    [
        ("qwen2", "auto", False, KeyOffset(heads=2)),
        ("qwen2", "auto", True, KeyOffset(heads=2)),
        ("qwen2", "none", True, None),
        ("mistral", "auto", False, None),
        ("mistral", "auto", True, KeyOffset(heads=2)),
        ("mistral", "mean", False, KeyOffset(heads=2)),
        ("glm4", "bias", False, KeyOffset(heads=2, pairing="neighbours")),
        ("cohere", "auto", False, None),  # its keys pass a norm after their bias
        ("cohere", "auto", True, KeyOffset(heads=2, pairing="interleaved")),
        ("deepseek_v3", "auto", True, KeyOffset(heads=1)),
        ("deepseek_v2", "auto", True, None),
    ],
)
def test_who_gets_one(name: str, choice, reads_text: bool, want: KeyOffset | None) -> None:
    model = tiny_family(name)
    open_experts(model)
    recipe = with_offset(quick("kv4") if reads_text else rtn("kv4"), choice)
    plan = make_plan(recipe, arch_of(model.config), Geometry.of(model.config), model.model.layers)
    assert [block.key_offset for block in plan.blocks] == [want, want]
    assert recipe.needs_data == (reads_text or choice == "mean")


@pytest.mark.parametrize("name, offset", [("mistral", None), ("qwen2", "bias"), ("cohere", None)])
def test_keys_of_8_bits_are_cached_as_plain_rounding_does(name: str, offset: str | None) -> None:
    """What the mean of some text takes away there is chance."""
    model = tiny_family(name)
    arch = arch_of(model.config)
    plans = [
        make_plan(made, arch, Geometry.of(model.config), model.model.layers)
        for made in (quick("kv8"), rtn("kv8"), with_offset(quick("kv8"), "mean"))
    ]
    assert plans[0].blocks[0].key_offset == plans[1].blocks[0].key_offset
    assert (plans[0].blocks[0].key_offset is None) == (offset is None)
    assert plans[2].blocks[0].key_offset is not None
    if offset:
        fitted, _, _ = calibrated(model, quick("kv4,1.k8"))
        rounded, _, _ = calibrated(model, rtn("kv4"))
        first, second = (offset_of(block) for block in fitted.model.layers)
        assert not torch.equal(first, offset_of(rounded.model.layers[0]))
        assert torch.equal(second, offset_of(rounded.model.layers[1]))


@pytest.mark.parametrize("name", ["smollm3", "cohere2", "exaone4"])
def test_blocks_without_rotary_embedding_do_not_turn_it(name: str) -> None:
    model = tiny_family(name)
    recipe = with_offset(rtn("kv4"), "mean")
    plan = make_plan(recipe, arch_of(model.config), Geometry.of(model.config), model.model.layers)
    turned = arch_of(model.config).rotary
    assert [block.key_offset.pairing for block in plan.blocks if block.key_offset] == [turned, "none"]


@pytest.mark.parametrize(
    "name, scheme, choice, message",
    [
        ("mistral", "kv4", "bias", "keys have no bias"),
        ("cohere", "kv4", "bias", "keys pass a norm after their bias"),
        ("deepseek_v3", "kv4", "bias", "keys have no bias of their own"),
        ("deepseek_v2", "kv4", "mean", "cannot follow how this family turns keys"),
        ("qwen2", "w4", "mean", "keys are not quantised"),
        ("hunyuan_v1_dense", "kv4", "mean", "cannot follow how this family turns keys"),
    ],
)
def test_an_offset_that_cannot_be(name: str, scheme: str, choice, message: str) -> None:
    model = tiny_family(name)
    recipe = with_offset(rtn(scheme), choice)
    with pytest.raises(SpecError, match=message):
        make_plan(recipe, arch_of(model.config), Geometry.of(model.config), model.model.layers)


# ------------------------------------------------------------------------------- kept


@pytest.mark.parametrize("name", ["qwen2", "glm4", "smollm3", "cohere", "deepseek_v3"])
@torch.no_grad()
def test_saved_and_loaded(name: str, tmp_path: Path) -> None:
    recipe = quick("kv4")
    with torch.enable_grad():
        model, plan, _ = calibrated(tiny_family(name), recipe)
    assert all(block.key_offset is not None for block in plan.blocks)
    save(model, plan, tmp_path / "model", recipe=spec.to_dict(recipe), report={})
    loaded, tokens = load(tmp_path / "model"), tokens_for(model, 2, 9)
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    for ours, theirs in zip(loaded.model.layers, model.model.layers, strict=True):
        assert torch.equal(offset_of(ours), offset_of(theirs))


def test_plans_from_before_there_were_offsets_are_read() -> None:
    model = tiny_family("mistral")
    plan = make_plan(rtn("kv4"), arch_of(model.config), Geometry.of(model.config), model.model.layers)
    data = plan_to_json(plan)
    for kind in data["kinds"]:
        assert kind.pop("key_offset") is None
    assert plan_from_json(data) == plan


@torch.no_grad()
def test_a_packed_cache_keeps_angles_once_for_all_layers() -> None:
    """gemma3 has two kinds of rotary embedding, one layer each; four layers here share two sets of angles."""
    grid = QuantSpec(bits=4, symmetric=False)
    for name, kinds in (("qwen2", 1), ("gemma3_text", 2)):
        recipe = with_offset(rtn("kv4"), "mean")
        model, _, _ = calibrated(tiny_family(name), recipe)
        cache, tokens = QuantizedCache(model), tokens_for(model, 3, 8)
        for part in tokens.split([5, 1, 2], dim=1):
            model(part, **{CACHE: cache})
        a_layer = 2 * 2 * token_bytes(6, grid)
        assert cache.nbytes() == tokens.numel() * (2 * a_layer + kinds * 6 * 4)
