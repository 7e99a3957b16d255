"""Blocks that read keys and values of earlier ones, and are given an embedding for every layer: Gemma 4 E2B, E4B."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import flatquant
from flatquant import recipes, seams
from flatquant.calibrate.capture import capture
from flatquant.recipes import RECIPES
from flatquant.runtime.artifact import inspect, save
from flatquant.runtime.kvcache import QuantizedCache
from flatquant.seams import CACHE
from flatquant.spec import DataSpec, Recipe, to_dict
from flatquant.wiring.arch import Geometry
from flatquant.wiring.archs import arch_of
from flatquant.wiring.plan import make_plan
from tests.laws import blocks_of, calibrated, inputs_of, quick, relative, tokens_for
from tests.test_streaming import both, saved
from tests.tiny_models import tiny_family

NAME = "gemma4_text small"
LENDERS, BORROWERS = [1, 2], [3, 4, 5]


def small(**sizes) -> PreTrainedModel:
    return tiny_family(NAME, **sizes)


@torch.no_grad()
def said(model: PreTrainedModel, tokens: Tensor, **options: Any) -> Tensor:
    return model(tokens, **options).logits


@torch.no_grad()
def stepwise(model: PreTrainedModel, tokens: Tensor, cache: object) -> Tensor:
    """Logits of a prefill and of one token at a time."""
    pieces = tokens[:, :6], *tokens[:, 6:].split(1, dim=1)
    return torch.cat([model(piece, **{CACHE: cache}, use_cache=True).logits for piece in pieces], 1)


def test_each_key_is_quantised_once_by_the_block_that_makes_it() -> None:
    model, plan, _ = calibrated(small(), quick("w4a4kv4"))
    for index, (block, planned) in enumerate(zip(blocks_of(model), plan.blocks, strict=True)):
        assert seams.lends(block.self_attn) == (index in LENDERS)
        assert planned.attended == (index not in BORROWERS)
        assert (planned.keys is not None) == (planned.values is not None) == (index not in BORROWERS)
        assert planned.qk == (index == 0)  # what others read is in no basis of its own
        assert (planned.key_offset is not None) == (index not in BORROWERS)
    assert {"layer_in", "layer_mid"} <= plan.blocks[0].sites.keys()
    assert plan.blocks[5].sites["mlp_mid"].shape == (8, 10)  # twice as wide
    assert plan.blocks[0].sites["mlp_mid"].shape == (5, 8)


def test_borrowers_read_the_same_keys_with_and_without_a_cache() -> None:
    model, _, _ = calibrated(small(), quick("w4a16kv4"))
    tokens = tokens_for(model, 2, 12)  # longer than the windows of attention
    whole = said(model, tokens, use_cache=False)
    lent: list[Tensor] = []
    blocks_of(model)[5].self_attn.register_forward_pre_hook(
        lambda _, args, kwargs: lent.append(kwargs[seams.LENT]["full_attention"][0]), with_kwargs=True
    )
    for cache in (None, DynamicCache(config=model.config), QuantizedCache(model)):
        torch.testing.assert_close(said(model, tokens, **{CACHE: cache}), whole, rtol=1e-4, atol=1e-4)
    assert torch.equal(lent[0], lent[1])
    assert torch.equal(lent[0], lent[2])
    assert relative(whole, said(small(), tokens, use_cache=False)) > 1e-3
    caches = DynamicCache(config=model.config), QuantizedCache(model)
    for cache in caches:
        torch.testing.assert_close(stepwise(model, tokens, cache), whole, rtol=1e-4, atol=1e-4)


def test_the_bytes_of_a_cache_are_those_of_the_blocks_that_have_keys(tmp_path: Path) -> None:
    recipe = quick("w4a16kv4")
    model, plan, _ = calibrated(
        small(attention_k_eq_v=False, num_global_key_value_heads=None, global_head_dim=6), recipe
    )
    save(model, plan, tmp_path / "model", recipe=to_dict(recipe), report={})
    cache, tokens = QuantizedCache(model), tokens_for(model, 2, 9)
    said(model, tokens, **{CACHE: cache})
    found = inspect(tmp_path / "model")
    angles = 2 * 9 * 6 * 4  # of the second kind of attention: `inspect` counts one for all layers, in float32
    assert (found.kv_bytes_per_token * 2 * 9) == cache.nbytes() - angles
    assert found.kv_bytes_per_token_16bit == 3 * 2 * (2 * 6 + 2 * 6)


@pytest.mark.parametrize("count", [1, 3])
def test_the_last_logits_alone_are_those_of_all(count: int) -> None:
    """transformers then computes no more of the tokens in blocks that have no keys of their own."""
    model, _, _ = calibrated(small(), quick("w4a16kv4"))
    tokens = tokens_for(model, 2, 12)
    some = said(model, tokens, logits_to_keep=count, use_cache=False)
    assert some.shape[1] == count
    torch.testing.assert_close(some, said(model, tokens, use_cache=False)[:, -count:], rtol=1e-4, atol=1e-4)


def every(method: str) -> Recipe:
    """A recipe with little to do."""
    recipe = RECIPES[method](
        "w3" if method == "vptq" else "w4a16" if method in ("omniquant", "affinequant") else "w8a8"
    )
    recipe = dataclasses.replace(recipe, data=DataSpec(samples=4, seqlen=12))
    if recipe.fit is not None:
        recipe = dataclasses.replace(recipe, fit=dataclasses.replace(recipe.fit, epochs=1, batch_size=2))
    if recipe.end_to_end is not None:
        recipe = dataclasses.replace(recipe, end_to_end=dataclasses.replace(recipe.end_to_end, steps=2, batch_size=2))
    if recipe.solver.learned is not None:
        learned = dataclasses.replace(recipe.solver.learned, steps=6, batch_size=2)
        recipe = dataclasses.replace(recipe, solver=dataclasses.replace(recipe.solver, learned=learned))
    return recipe


@pytest.mark.parametrize("method", sorted(RECIPES.keys() - {"quarot", "spinquant"}))
def test_every_method_runs_and_what_it_saves_is_what_it_made(method: str, tmp_path: Path) -> None:
    model = small()
    tokens = tokens_for(model, 4, 12, seed=1)
    done = flatquant.quantize(model, every(method), tokens, output=tmp_path / "out", device="cpu")
    assert done.verdict is not None
    assert done.verdict["packed"]["equal"]
    errors = done.verdict["blocks"]
    assert len(errors) == 6
    assert all(0 < error < 1.2 for error in errors)
    loaded = flatquant.load(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, done.model(tokens).logits)


@pytest.mark.parametrize("recipe", [quick("w4a4kv4", samples=2), dataclasses.replace(recipes.gptq("w4a4kv4"))])
def test_a_streamed_run_writes_the_bytes_of_a_plain_one(recipe: Recipe, tmp_path: Path) -> None:
    folder = saved(small(dtype=torch.bfloat16, tied=False), tmp_path / "model")
    recipe = dataclasses.replace(recipe, data=DataSpec(samples=2, seqlen=12))
    plain, streamed = both(folder, recipe, tmp_path)
    assert plain.keys() == streamed.keys()
    assert not [name for name in plain if plain[name] != streamed[name]]


def test_gradients_go_through_what_blocks_lend() -> None:
    """From the last block's output to the keys and values of those that lend them: as in the model itself."""
    model = small(dtype=torch.float64).requires_grad_(False)
    seams.use_attention(model, "self_attn")
    tokens = tokens_for(model, 2, 9)
    weights = [blocks_of(model)[i].self_attn.k_proj.weight.requires_grad_() for i in LENDERS]
    with inputs_of(model.model.norm) as last:
        model(tokens, use_cache=False)
    want = torch.autograd.grad(last[0].square().sum(), weights)
    hidden, calls = capture(model, arch_of(model.config), tokens)
    for block, call in zip(blocks_of(model), calls, strict=True):
        hidden = call(block, hidden)
    for ours, theirs in zip(torch.autograd.grad(calls[-1].states(hidden).square().sum(), weights), want, strict=True):
        assert relative(ours, theirs) < 1e-9


def test_a_model_without_sharing_or_without_embeddings_for_layers_is_one_too() -> None:
    for fields in (
        {"num_kv_shared_layers": 0},
        {"hidden_size_per_layer_input": 0},
        {"attention_k_eq_v": False, "num_global_key_value_heads": None},
    ):
        model = small(**fields)
        plan = make_plan(recipes.rtn("w4a4kv4"), arch_of(model.config), Geometry.of(model.config), blocks_of(model))
        assert ("layer_in" in plan.blocks[0].sites) == bool(model.config.hidden_size_per_layer_input)
        borrowing = [not block.attended for block in plan.blocks]
        assert borrowing == [bool(model.config.num_kv_shared_layers) and index in BORROWERS for index in range(6)]
