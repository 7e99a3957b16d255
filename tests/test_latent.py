"""Latent attention: what a cache holds, in which basis and how many bytes, and which blocks and routers are left alone.

That changes of basis change nothing is asked of these families in tests/test_families.py, as of all others.
"""

import copy
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

import flatquant
from flatquant import recipes, seams
from flatquant.calibrate.capture import BlockCall
from flatquant.calibrate.solve import make_solver, solve_block
from flatquant.engines.vllm.support import open_folder
from flatquant.errors import FamilyError, ModelError
from flatquant.interchange import export_dense
from flatquant.recipes import RECIPES
from flatquant.runtime import fused
from flatquant.runtime.artifact import inspect, load, save
from flatquant.runtime.experts import open_experts
from flatquant.runtime.keyvalue import FrozenKeyValue
from flatquant.runtime.kvcache import QuantizedCache, token_bytes
from flatquant.seams import CACHE
from flatquant.spec import DataSpec, QuantSpec, Scheme, SolverSpec, to_dict
from flatquant.wiring.arch import Geometry, submodule
from flatquant.wiring.archs import arch_of
from flatquant.wiring.fold import fold_block
from flatquant.wiring.plan import make_plan
from tests.laws import BASES, bare, basis, blocks_of, calibrated, quick, relative, rtn_by_hand, tokens_for, wrap
from tests.test_streaming import contents
from tests.tiny_models import tiny_family, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::flatquant.errors.QualityWarning")

LATENT, ROTARY = 20, 4  # channels, as tests/tiny_models.py has them
NAMES = ["deepseek_v3", "deepseek_v3 lite", "deepseek_v2", "glm4_moe_lite", "minicpm3"]


def attended(block: torch.nn.Module) -> FrozenKeyValue:
    (kv,) = filter(None, map(seams.attached, block.modules()))
    assert isinstance(kv, FrozenKeyValue)
    return kv


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_has_a_site_for_every_projection(name: str) -> None:
    model = tiny_family(name)
    open_experts(model)
    plan = make_plan(quick("w4a4kv4"), arch_of(model.config), Geometry.of(model.config), blocks_of(model))
    for block in plan.blocks:
        readers = {site: tuple(p.rpartition(".")[2] for p in at.readers) for site, at in block.sites.items()}
        down = "q_proj" if "lite" in name.split() else "q_a_proj"
        assert readers["attn_in"] == (down, "kv_a_proj_with_mqa")
        assert readers.get("q_latent", ()) == (() if down == "q_proj" else ("q_b_proj",))
        assert readers["kv_latent"] == ("kv_b_proj",)
        assert block.sites["attn_out"].shape == (4, 8)  # heads x channels of their values
        assert block.latent is not None
        assert (block.key_dim, block.value_dim, block.head_dim) == (ROTARY, LATENT, 8)
        # The latent's factors run before the cache, not again behind it.
        assert block.latent.left
        assert block.latent.right
        assert not block.sites["kv_latent"].left
        assert not block.sites["kv_latent"].right
    without = make_plan(quick("w4a4"), arch_of(model.config), Geometry.of(model.config), blocks_of(model))
    for block in without.blocks:
        assert block.latent is not None
        assert not block.attended
        assert block.sites["kv_latent"].left
        assert not block.latent.left


@pytest.mark.parametrize("scheme", ["kv4", "k4", "v4", "k8v4", "w4kv4", "kvnvfp4", "w4"])
@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v2"])
@torch.no_grad()
def test_a_cache_changes_nothing(name: str, scheme: str) -> None:
    """In pieces with a plain cache and one of codes, against all at once without."""
    wide = {"kv_lora_rank": 32, "qk_rope_head_dim": 16, "head_dim": 16} if "fp4" in scheme else {}  # blocks of 16
    recipe = dataclasses.replace(recipes.rtn(scheme), data=DataSpec(samples=4, seqlen=12))  # for a static scale
    model, plan, _ = calibrated(tiny_family(name, **wide), recipe)
    tokens = tokens_for(model, 3, 9)
    want = model(tokens, use_cache=False).logits
    caches = [DynamicCache(config=model.config)]
    caches += [QuantizedCache(model)] if any(block.attended for block in plan.blocks) else []
    found = []
    for cache in caches:
        pieces = [model(part, **{CACHE: cache}).logits for part in tokens.split([5, 1, 3], dim=1)]
        found.append(torch.cat(pieces, 1))
        assert relative(found[-1], want) < 1e-5
    assert all(torch.equal(found[0], other) for other in found)


@torch.no_grad()
def test_a_cache_holds_latent_vectors_and_one_rotary_part() -> None:
    model, _, _ = calibrated(tiny_family("deepseek_v3"), recipes.rtn("kv4"))
    tokens = tokens_for(model, 3, 9)
    plain, packed = DynamicCache(config=model.config), QuantizedCache(model)
    for cache in (plain, packed):
        model(tokens, **{CACHE: cache})
    for layer in plain.layers:
        shapes = sorted(t.shape for t in (layer.keys, layer.values))
        assert shapes == [(3, 1, 9, ROTARY), (3, 1, 9, LATENT)]
    grid = QuantSpec(bits=4, symmetric=False)
    a_token = token_bytes(LATENT, grid) + token_bytes(ROTARY, grid)
    assert packed.nbytes() == 2 * 3 * 9 * a_token
    assert token_bytes(512, grid) + token_bytes(64, grid) == 298  # of DeepSeek V3, as docs/families.md has it


def test_inspect_counts_what_a_cache_holds(tmp_path: Path) -> None:
    for scheme in ("kv4", "w4"):
        recipe = recipes.rtn(scheme)
        model, plan, _ = calibrated(tiny_family("deepseek_v2"), recipe)
        save(model, plan, tmp_path / scheme, recipe=to_dict(recipe), report={})
        found = inspect(tmp_path / scheme)
        assert found.kv_bytes_per_token_16bit == 2 * 2 * (LATENT + ROTARY)
        grid = QuantSpec(bits=4, symmetric=False) if scheme == "kv4" else None
        assert found.kv_bytes_per_token == 2 * (token_bytes(LATENT, grid) + token_bytes(ROTARY, grid))


@torch.no_grad()
def test_latent_vectors_are_cached_in_the_basis_of_their_readers() -> None:
    """A cache holds c P; read in the original basis, it holds the original's latent vectors, but for their scale."""
    model = tiny_family("deepseek_v3", dtype=torch.float64)
    wrapped, tokens = tiny_family("deepseek_v3", dtype=torch.float64), tokens_for(model, 2, 9)
    _, fits = wrap(wrapped, bare(BASES["svd orthogonal"]), force=True)
    norms = [block.self_attn.kv_a_layernorm.weight.clone() for block in blocks_of(wrapped)]
    for fit in fits:
        fold_block(fit, dtype=torch.float64)
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    for m, cache in zip((model, wrapped), caches, strict=True):
        m(tokens, **{CACHE: cache})
    want, got = (cache.layers for cache in caches)
    for i, block in enumerate(blocks_of(wrapped)):
        kv, latent = attended(block), want[i].keys if want[i].keys.shape[-1] == LATENT else want[i].values
        assert kv.left is not None
        assert kv.right is not None
        scale = block.self_attn.kv_a_layernorm.weight / norms[i]
        assert (scale - 1).abs().max() > 1e-2
        matrix = torch.kron(kv.left, kv.right)
        held = got[i].values if got[i].values.shape[-1] == LATENT else got[i].keys
        assert relative(held, latent * scale @ matrix) < 1e-9


@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v2 lite"])
@torch.no_grad()
def test_identity_without_clip_is_plain_rtn_bit_for_bit(name: str) -> None:
    model = tiny_family(name)
    open_experts(model)
    originals = [copy.deepcopy(block) for block in blocks_of(model)]
    plan, fits = wrap(model, bare(basis("inverse", "identity"), Scheme.parse("w4", clip="none")), noise=0.0)
    for fit, at, original in zip(fits, plan.blocks, originals, strict=True):
        fold_block(fit)
        solve_block(fit.block, at, make_solver(SolverSpec()), BlockCall(args=(), kwargs={}), None, 1)
        for path in (path for site in at.sites.values() for path in site.readers):
            values, scale = rtn_by_hand(submodule(original, path).weight, 4)
            assert np.array_equal(submodule(fit.block, path).values.numpy(), values), path
            assert np.array_equal(submodule(fit.block, path).scale.numpy()[:, 0], scale), path


@pytest.mark.parametrize("scheme", ["w4a4kv4", "w4a4", "w16a16kv4"])
@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v2"])
@torch.no_grad()
def test_integers_compute_what_the_fit_saw(name: str, scheme: str) -> None:
    """In float64 no value rounds otherwise, which would show as 1e-3; scales and their products are float32."""
    model = tiny_family(name, dtype=torch.float64)
    plan, fits = wrap(model, bare(BASES["svd orthogonal"], Scheme.parse(scheme)), noise=0.05)
    fit, at, seen = fits[1], plan.blocks[1], {}
    paths = [path for site in at.sites.values() for path in site.readers if path.startswith("self_attn.")]
    assert len(paths) == 5
    for path in paths:
        submodule(fit.block, path).register_forward_hook(
            lambda _, args, out, path=path: seen.__setitem__(path, (args[0], out))
        )
    latent = torch.randn(2, 1, 9, LATENT, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    before = None if fit.key_value is None else fit.key_value.value(latent)
    norms = {edge.site: submodule(fit.block, edge.norm).weight.clone() for edge in fit.arch.edges if edge.norm}
    model(tokens_for(model, 2, 9), use_cache=False)
    fold_block(fit, dtype=torch.float64)
    if at.sites["kv_latent"].weights:
        solve_block(fit.block, at, make_solver(SolverSpec()), BlockCall(args=(), kwargs={}), None, 1)
    scales = {e.site: submodule(fit.block, e.norm).weight / norms[e.site] for e in fit.arch.edges if e.norm}
    if before is not None:  # the norm has applied the scale
        assert scales["kv_latent"].std() > 1e-2
        assert relative(attended(fit.block).value(latent * scales["kv_latent"]), before) < 1e-6
    for site, path in ((name, path) for name, plan in at.sites.items() for path in plan.readers if path in paths):
        x, y = seen[path]
        ahead = site == "kv_latent" and at.attended
        assert relative(submodule(fit.block, path)(x if ahead else x * scales.get(site, 1)), y) < 2e-6, path


def test_rotations_pass_the_norms_of_latent_vectors() -> None:
    """QuaRot turns what a cache holds without work online: nothing runs before the cache."""
    recipe = dataclasses.replace(RECIPES["quarot"]("w4a4kv4"), data=DataSpec(samples=4, seqlen=12))
    for name in ("deepseek_v3", "deepseek_v2 lite"):
        model, plan, _ = calibrated(tiny_family(name), recipe)
        for block, at in zip(blocks_of(model), plan.blocks, strict=True):
            assert at.latent is not None
            assert not at.latent.left
            assert not at.latent.right
            assert torch.equal(block.self_attn.kv_a_layernorm.weight, torch.ones(LATENT))


@pytest.mark.parametrize("method", ["rtn", "gptq", "quarot", "spinquant", "flatquant", "svdquant", "autoround"])
def test_methods_run_from_a_folder_to_new_tokens(method: str, tmp_path: Path) -> None:
    model = tiny_family("deepseek_v3", tied=False)
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    recipe = RECIPES[method]("w4a4kv4") if method == "rtn" else RECIPES[method]("w4a4kv4", "quick")
    if recipe.end_to_end is not None:
        recipe = dataclasses.replace(recipe, end_to_end=dataclasses.replace(recipe.end_to_end, steps=2))
    tokens = tokens_for(model, 4, 12, seed=1)
    made = flatquant.quantize(
        tmp_path / "model", recipe, tokens if recipe.needs_data else None, output=tmp_path / "out", device="cpu"
    )
    loaded, ids = load(tmp_path / "out"), tokens_for(model, 2, 5)
    with torch.no_grad():
        assert torch.equal(made.model(ids).logits, loaded(ids).logits)
    written = [
        loaded.generate(ids, max_new_tokens=6, do_sample=False, **{CACHE: cache})
        for cache in (DynamicCache(config=loaded.config), QuantizedCache(loaded))
    ]
    assert written[0].shape == (2, 11)
    assert torch.equal(*written)


@torch.no_grad()
def test_a_scheme_leaves_the_last_block_and_every_router_in_16_bit() -> None:
    sixteen = ",".join(f"1.{site}=w16a16" for site in ("attn_in", "attn_out", "mlp_in", "mlp_mid"))
    original = tiny_family("deepseek_v3", dtype=torch.bfloat16)
    open_experts(original)
    g = torch.Generator().manual_seed(0)
    for block in blocks_of(original)[1:]:
        router = block.mlp.gate
        router.weight.data, router.e_score_correction_bias.data = (  # as transformers keeps them
            torch.randn(t.shape, generator=g) for t in (router.weight, router.e_score_correction_bias)
        )
    with torch.enable_grad():
        model, plan, _ = calibrated(original, quick(f"w4a4kv4,{sixteen},1.k16v16"))
    last = plan.blocks[1]
    assert not any(site.weights or site.activations or site.left or site.right for site in last.sites.values())
    assert not last.attended
    before, after = blocks_of(original)[1].state_dict(), blocks_of(model)[1].state_dict()
    assert not [name for name, t in before.items() if not torch.equal(t.float(), after[name].float())]
    assert after["mlp.gate.weight"].dtype == after["mlp.gate.e_score_correction_bias"].dtype == torch.float32
    # A quantised block's router undoes what its norm took, and its correction bias is what it was.
    with torch.enable_grad():
        model, _, _ = calibrated(original, quick("w4a4kv4"))
    ours, theirs = (blocks_of(m)[1].mlp.gate for m in (model, original))
    assert torch.equal(ours.e_score_correction_bias, theirs.e_score_correction_bias)
    assert ours.weight.dtype == torch.float32
    gains = [blocks_of(m)[1].post_attention_layernorm.weight.float() for m in (model, original)]
    torch.testing.assert_close(ours.weight * gains[0], theirs.weight * gains[1], rtol=2e-2, atol=2e-2)


@torch.no_grad()
def test_an_ordinary_checkpoint_has_the_factors_that_run_before_the_cache(tmp_path: Path) -> None:
    recipe = quick("w4a16kv4")
    with torch.enable_grad():
        model, plan, _ = calibrated(tiny_family("deepseek_v3", tied=False), recipe)
    export_dense(model, plan, tmp_path / "dense", weights_only=True)
    for block in blocks_of(model):
        attended(block).keys = attended(block).values = None
    plain, tokens = AutoModelForCausalLM.from_pretrained(tmp_path / "dense"), tokens_for(model, 2, 9)
    assert relative(plain(tokens).logits, model(tokens).logits) < 1e-4


@torch.no_grad()
def test_routers_have_the_dtype_that_transformers_loads_them_in(tmp_path: Path) -> None:
    """Float32 from transformers 5.24 on, whatever the rest of the model is in."""

    def router(model: PreTrainedModel) -> torch.Tensor:
        return blocks_of(model)[1].mlp.gate.weight

    tiny_family("deepseek_v3", tied=False).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    done = flatquant.quantize(tmp_path / "model", recipes.rtn("w4"), output=tmp_path / "out", device="cpu")
    export_dense(done.model, done.plan, tmp_path / "dense")
    for dtype in (torch.bfloat16, torch.float16):
        want = router(AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=dtype))
        found = router(load(tmp_path / "out", dtype=dtype))
        assert found.dtype == want.dtype
        assert torch.equal(found, want)
    want = router(AutoModelForCausalLM.from_pretrained(tmp_path / "model"))
    for model in (done.model, AutoModelForCausalLM.from_pretrained(tmp_path / "dense")):
        assert router(model).dtype == want.dtype
        assert torch.equal(router(model), want)


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def kill(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("solve", 1):
            raise Killed

    model = tiny_family("deepseek_v3", tied=False)
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    tokens = tokens_for(model, 4, 12, seed=1).clamp(max=119)
    options = {"device": "cpu", "stream": True}
    flatquant.quantize(tmp_path / "model", quick("w4a4kv4"), tokens, output=tmp_path / "whole", **options)
    with pytest.raises(Killed):
        flatquant.quantize(
            tmp_path / "model", quick("w4a4kv4"), tokens, output=tmp_path / "out", progress=kill, **options
        )
    flatquant.quantize(tmp_path / "model", quick("w4a4kv4"), tokens, output=tmp_path / "out", resume=True, **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_what_cannot_be_is_one_line(tmp_path: Path) -> None:
    model = tiny_family("deepseek_v3")
    open_experts(model)
    with pytest.raises(FamilyError, match=r"deepseek_v3.*no scale passes from its keys") as caught:
        make_plan(RECIPES["omniquant"]("w4a4kv4"), arch_of(model.config), Geometry.of(model.config), blocks_of(model))
    assert "\n" not in str(caught.value)
    recipe = recipes.rtn("w4a4kv4")
    model, plan, _ = calibrated(tiny_family("deepseek_v3"), recipe)
    save(model, plan, tmp_path / "model", recipe=to_dict(recipe), report={})
    with pytest.raises(ModelError, match="is a deepseek_v3, which is not served by vLLM") as caught:
        open_folder(tmp_path / "model")
    assert "\n" not in str(caught.value)
    with pytest.raises(fused.Unsupported, match="blocks of deepseek_v3 have no fused form") as unsupported:
        fused.Fused(load(tmp_path / "model"))
    assert "\n" not in str(unsupported.value)
