"""QuaRot: what its rotations do to the stream, to heads and to outliers (arXiv 2404.00456)."""

import copy
import dataclasses

import pytest
import torch
from torch import Tensor

from flatquant.errors import SpecError
from flatquant.recipes import flatquant, quarot, rtn
from flatquant.spec import FitSpec, Recipe, Scheme, SolverSpec, TransformSpec
from flatquant.wiring.arch import Geometry
from flatquant.wiring.archs import LLAMA
from flatquant.wiring.fold import fold_block
from flatquant.wiring.plan import make_plan
from tests.laws import SHAPES, calibrated, family, inputs_of, relative, tokens_for, wrap_all

BARE = dataclasses.replace(quarot(), scheme=Scheme(), solver=SolverSpec())
FIXED = TransformSpec(kind="matrix", parameters="fixed", init="hadamard")
STATIC = {"data": dataclasses.replace(quarot().data, samples=4, seqlen=12), "solver": SolverSpec()}


@torch.no_grad()
def streams(model: torch.nn.Module, tokens: Tensor) -> list[Tensor]:
    """The residual stream before every block and after the last.  # each (B, T, h)"""
    kept: list[Tensor] = []
    handles = [
        m.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
        for m in (*model.model.layers, model.model.norm)
    ]
    model(tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return kept


@pytest.mark.parametrize("shape", ["biased", "untied", "odd"])
def test_the_whole_stream_is_rotated_by_one_matrix(shape: str) -> None:
    model = family("llama", **SHAPES[shape])
    tokens, rotated = tokens_for(model, 2, 9), copy.deepcopy(model)
    _, fits, residual = wrap_all(rotated, BARE, force=True)
    for fit in fits:
        fold_block(fit, dtype=torch.float64)
    assert residual is not None
    r = copy.deepcopy(residual).double().matrix()
    assert float((r @ r.mT - torch.eye(len(r))).abs().max()) < 1e-12
    for ours, want in zip(streams(rotated, tokens), streams(model, tokens), strict=True):
        assert relative(ours @ r.mT, want) < 1e-5  # transformers' norms compute in float32
        assert relative(ours, want) > 0.1
    for norm in [
        rotated.model.norm,
        *(n for b in rotated.model.layers for n in b.children() if "Norm" in str(type(n))),
    ]:
        assert torch.equal(norm.weight, torch.ones_like(norm.weight))
    assert rotated.lm_head.weight is not rotated.model.embed_tokens.weight
    assert not rotated.config.tie_word_embeddings


def test_across_and_inside_heads_together_are_the_full_product() -> None:
    """(H_nh (x) I), online, of heads that v_proj has turned by H_dh, against o_proj's W (H_nh (x) H_dh)."""
    model = family("llama", **SHAPES["wide heads"])
    original = copy.deepcopy(model)
    _, fits, residual = wrap_all(model, BARE, force=True)
    assert residual is not None
    r = copy.deepcopy(residual).double().matrix()
    site = copy.deepcopy(fits[0].sites["attn_out"]).double().transform
    across, inside = site.parts[0].left.matrix(), site.parts[1].inner.right.matrix()
    fold_block(fits[0], dtype=torch.float64)
    want = r.mT @ original.model.layers[0].self_attn.o_proj.weight @ torch.kron(across, inside)
    torch.testing.assert_close(model.model.layers[0].self_attn.o_proj.weight, want, rtol=0, atol=1e-12)
    v = original.model.layers[0].self_attn.v_proj
    gain = original.model.layers[0].input_layernorm.weight
    rows = (v.weight * gain) @ r
    want = torch.cat([inside.mT @ head for head in rows.split(10)])
    torch.testing.assert_close(model.model.layers[0].self_attn.v_proj.weight, want, rtol=0, atol=1e-12)
    want = torch.cat([head @ inside for head in v.bias.split(10)])
    torch.testing.assert_close(model.model.layers[0].self_attn.v_proj.bias, want, rtol=0, atol=1e-12)


def test_every_site_gets_flatter() -> None:
    """Largest value over root mean square, of what each site's readers multiply."""
    model = family("llama", hidden=64, heads=4, kv_heads=2, intermediate=96)
    tokens = tokens_for(model, 4, 32)

    def peaks(model: torch.nn.Module) -> dict[str, float]:
        out = {}
        for path in ("self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj"):
            linear = model.model.layers[0].get_submodule(path)
            with inputs_of(linear) as seen, torch.no_grad():
                model(tokens, use_cache=False)
            x = linear.site(seen[0]) if hasattr(linear, "site") else seen[0]
            out[path] = float((x.abs().amax(-1) / x.square().mean(-1).sqrt()).mean())
        return out

    before = peaks(model)
    _, fits, _ = wrap_all(model, BARE, force=True)
    for fit in fits:
        fold_block(fit, dtype=torch.float64)
    after = peaks(model)
    for path in before:
        assert after[path] < 0.75 * before[path], (path, before, after)


def test_hadamard_factors_are_of_ones_where_they_exist() -> None:
    model = family("llama", hidden=80, heads=20, kv_heads=4, head_dim=4, intermediate=172 * 4)
    plan, fits, _ = wrap_all(model, BARE, force=True)
    assert plan.blocks[0].sites["mlp_mid"].shape == (4, 172)
    for fit in fits:
        fold_block(fit)
        for site, side, n in (("attn_out", "left", 20), ("mlp_mid", "left", 4), ("mlp_mid", "right", 172)):
            factor = getattr(fit.block.flatquant[site], side)
            torch.testing.assert_close(factor.abs(), torch.full((n, n), n**-0.5), rtol=0, atol=1e-6)
        assert fit.block.flatquant["attn_in"].right is None  # rotated offline


def test_gptq_beats_rounding_and_both_beat_it_unrotated() -> None:
    original = family("llama", dtype=torch.float32, hidden=64, heads=4, kv_heads=2, intermediate=96)
    tokens = tokens_for(original, 4, 32, seed=9)
    used = dataclasses.replace(quarot("w4a16"), data=dataclasses.replace(quarot().data, samples=32, seqlen=32))
    errors = []
    for recipe in (used, dataclasses.replace(used, solver=SolverSpec()), rtn("w4a16")):
        model, _, _ = calibrated(original, recipe)
        with torch.no_grad():
            want, got = original(tokens).logits, model(tokens).logits
        errors.append(float((got - want).square().mean() / want.square().mean()))
    assert errors[0] < errors[1] < errors[2]


# ------------------------------------------------------------------------------- combinations


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"fit": FitSpec(epochs=2, batch_size=2)}, id="nothing to fit"),
        pytest.param(
            {
                "transforms": {**quarot().transforms, "attn_in": flatquant().transforms["attn_in"][1:]},
                "fit": FitSpec(epochs=2, batch_size=2),
            },
            id="kronecker fitted in rotated coordinates",
        ),
        pytest.param(
            {"transforms": {**quarot().transforms, "mlp_mid": (TransformSpec(kind="diagonal", init="absmax"),)}},
            id="diagonal from data off the stream",
        ),
    ],
)
def test_combinations_work(change: dict) -> None:
    original = family("llama", dtype=torch.float32, **SHAPES["gqa"])
    recipe = dataclasses.replace(dataclasses.replace(quarot("w8a8"), **STATIC), **change)
    model, _, _ = calibrated(original, recipe)
    tokens = tokens_for(original, 2, 9)
    with torch.no_grad():
        got, want = model(tokens).logits, original(tokens).logits
    assert float((got - want).square().mean() / want.square().mean()) < 0.02


@pytest.mark.parametrize(
    "transforms, message",
    [
        ({"residual": (TransformSpec(kind="matrix", init="orthogonal"),)}, "fixed or a rotation"),
        ({"residual": (TransformSpec(kind="kronecker", parameters="fixed", init="hadamard"),)}, "takes one matrix"),
        ({"residual": (FIXED, FIXED)}, "at most one diagonal|takes one matrix"),
        ({"residual": (FIXED,), "attn_in": (TransformSpec(kind="diagonal", init="absmax"),)}, "unrotated stream"),
        ({"stream": (FIXED,)}, "no site stream.*residual"),
    ],
)
def test_wrong_combinations_are_one_clear_error(transforms: dict, message: str) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        Recipe(name="x", scheme=Scheme.parse("w4", clip="none"), transforms=transforms)
    assert "\n" not in str(caught.value)


def test_a_shared_rotation_is_not_trained_block_by_block() -> None:
    shared = {"residual": (TransformSpec(kind="matrix", parameters="rotation", init="hadamard"),)}
    with pytest.raises(SpecError, match="end to end"):
        Recipe(name="x", scheme=Scheme(), transforms=shared, fit=FitSpec(batch_size=2))


def test_a_family_whose_stream_cannot_be_rotated_says_so() -> None:
    model = family("llama")
    arch = dataclasses.replace(LLAMA, residual=None)
    with pytest.raises(SpecError, match=r"llama.*no rotation can pass"):
        make_plan(quarot(), arch, Geometry.of(model.config), model.model.layers)


@pytest.mark.parametrize("site", ["attn_in", "mlp_mid"])
def test_a_head_matrix_needs_heads(site: str) -> None:
    model = family("llama")
    head = TransformSpec(kind="head", parameters="fixed", init="hadamard")
    recipe = Recipe(name="x", scheme=Scheme(), transforms={site: (head,)})
    with pytest.raises(SpecError, match=f"{site}: is not made of heads"):
        make_plan(recipe, LLAMA, Geometry.of(model.config), model.model.layers)
