"""OmniQuant: learned clips and scales that pass RoPE and grouped heads, fitted on the quantised stream (2308.13137)."""

import dataclasses

import pytest
import torch

from flatquant.calibrate.pipeline import fit as stage
from flatquant.calibrate.state import RunState
from flatquant.errors import ModelError, SpecError
from flatquant.interchange import export_compressed, export_dense
from flatquant.quantizers import Dynamic
from flatquant.recipes import omniquant, rtn, spinquant
from flatquant.runtime import artifact
from flatquant.spec import DataSpec, EndToEndSpec, FitSpec, QuantSpec, Recipe, Scheme, TransformSpec, to_dict
from flatquant.transforms import HeadDiagonal, Identity, Shift
from flatquant.wiring.arch import Geometry
from flatquant.wiring.archs import LLAMA
from flatquant.wiring.fold import fold_block
from flatquant.wiring.linear import FitSite
from flatquant.wiring.plan import make_plan
from tests.laws import SHAPES, calibrated, family, hidden, inputs_of, relative, same_bytes, tokens_for, varied, wrap_all


def small(scheme: str = "w4a4kv4", *, epochs: int = 6, samples: int = 16, seqlen: int = 24) -> Recipe:
    made = omniquant(scheme)
    assert made.fit is not None
    fit = dataclasses.replace(made.fit, epochs=epochs, batch_size=2)
    return dataclasses.replace(made, fit=fit, data=DataSpec(samples=samples, seqlen=seqlen))


# ------------------------------------------------------------------------------------------------- scales


def rotary(x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """RoPE on (.., d): channel j and j + d / 2 turned by angle j."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def test_only_paired_scales_pass_rope() -> None:
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 7, 8, generator=g, dtype=torch.float64)
    angles = [torch.rand(4, generator=g, dtype=torch.float64) * 6 for _ in range(2)]
    want = rotary(q, angles[0]) @ rotary(k, angles[1]).mT
    for paired in (True, False):
        diagonal = HeadDiagonal(torch.ones(8), 8, 1, paired=paired).double()
        with torch.no_grad():
            diagonal.log_scale.copy_(torch.randn(diagonal.log_scale.shape, generator=g))
        got = rotary(diagonal.inverse_t(q), angles[0]) @ rotary(k * diagonal.scale, angles[1]).mT
        assert (relative(got, want) < 1e-12) == paired


def test_query_heads_share_the_scale_of_the_head_they_read() -> None:
    diagonal = HeadDiagonal(torch.arange(1.0, 7.0), 3, 2)
    torch.testing.assert_close(diagonal.scale, torch.arange(1.0, 7.0))
    torch.testing.assert_close(diagonal.spread, torch.tensor([1.0, 2, 3, 1, 2, 3, 4, 5, 6, 4, 5, 6]))
    x, w = torch.randn(2, 12, generator=torch.Generator().manual_seed(0)).split(1)
    torch.testing.assert_close(diagonal(x) @ diagonal.inverse_t(w).mT, x @ w.mT)


@pytest.mark.parametrize("shape", ["mqa", "odd"])
def test_folded_scales_sit_in_value_key_and_query_rows(shape: str) -> None:
    model = family("llama", **SHAPES[shape])
    before = family("llama", **SHAPES[shape]).model.layers[0].self_attn
    bare = dataclasses.replace(small(), scheme=Scheme())
    _, fits, _ = wrap_all(model, bare, force=True)
    attn_in = fits[0].sites["attn_in"]
    (values,) = [m.heads for m in attn_in.outputs[2]]
    (keys,) = [m.heads for m in attn_in.outputs[1]]
    (queries,) = [m.diagonal for m in attn_in.outputs[0]]
    assert keys is queries
    c, s, out = values.scale.detach(), keys.scale.detach(), values.spread.detach()
    fold_block(fits[0], dtype=torch.float64)
    after = model.model.layers[0].self_attn
    norm = (
        model.model.layers[0].input_layernorm.weight
        / family("llama", **SHAPES[shape]).model.layers[0].input_layernorm.weight
    )
    torch.testing.assert_close(after.v_proj.weight, before.v_proj.weight.data / norm * c[:, None])
    torch.testing.assert_close(after.k_proj.weight, before.k_proj.weight.data / norm * s[:, None])
    torch.testing.assert_close(after.o_proj.weight, before.o_proj.weight.data / out)
    if shape == "odd":
        torch.testing.assert_close(after.v_proj.bias, before.v_proj.bias.data * c)
        torch.testing.assert_close(after.q_proj.bias, before.q_proj.bias.data / queries.spread.detach())
    assert all(site.left is site.right is None for site in model.model.layers[0].flatquant.values())  # nothing online


def test_weight_only_models_learn_clips_alone() -> None:
    assert omniquant("w3a16").transforms == {}
    assert set(omniquant("w4a4").transforms) == {"attn_in", "attn_out", "mlp_in", "qk"}
    fit = omniquant("w2a16").fit
    assert fit is not None
    assert fit.epochs == 40
    scheme = omniquant("w4a4kv4").scheme
    assert [g.clip for g in (scheme.weights, scheme.activations, scheme.keys) if g] == ["learned", "none", "none"]


# ------------------------------------------------------------------------------------------------- the fit


@pytest.mark.parametrize(("scheme", "models"), [("w3a16", 1), ("w4a4kv4", 8)])
def test_the_loss_falls_and_the_result_beats_rounding(scheme: str, models: int) -> None:
    """At 4 bits everywhere, on average over models."""
    first = last = fitted_error = rounded_error = 0.0
    for seed in range(models):
        original = family("llama", dtype=torch.float32, **SHAPES["gqa"])
        original = original if models == 1 else varied(original, seed)
        fitted, _, report = calibrated(original, small(scheme))
        rounded, _, _ = calibrated(original, rtn(scheme))
        losses = report.blocks[0]["losses"]
        first, last = first + losses[0], last + losses[-1]
        unseen = tokens_for(original, 4, 16, seed=9)
        want = hidden(original, unseen)
        fitted_error += relative(hidden(fitted, unseen), want)
        rounded_error += relative(hidden(rounded, unseen), want)
    assert last < first
    assert fitted_error < rounded_error


def test_blocks_are_fitted_on_what_quantised_blocks_give(monkeypatch: pytest.MonkeyPatch) -> None:
    original = family("llama", dtype=torch.float32, **SHAPES["gqa"])
    seen = []
    fit_blocks = stage.fit_blocks

    def record(blocks, *args, **kwargs):
        seen.extend((b.inputs.clone(), b.targets.clone()) for b in blocks)
        return fit_blocks(blocks, *args, **kwargs)

    monkeypatch.setattr(stage, "fit_blocks", record)
    recipe = small(epochs=1, samples=4, seqlen=12)
    model, _, _ = calibrated(original, recipe)
    tokens = tokens_for(original, 4, 12, seed=1)
    with torch.no_grad():
        with inputs_of(model.model.layers[1]) as ours:
            model(tokens, use_cache=False)
        with inputs_of(original.model.layers[1]) as theirs:
            original(tokens, use_cache=False)
    torch.testing.assert_close(seen[1][0], ours[0], rtol=1e-4, atol=1e-4)
    assert relative(seen[1][0], theirs[0]) > 1e-2
    torch.testing.assert_close(seen[0][1], theirs[0], rtol=1e-4, atol=1e-4)  # targets stay the original's
    torch.testing.assert_close(seen[1][1], hidden(original, tokens), rtol=1e-4, atol=1e-4)


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path) -> None:
    original = family("llama", dtype=torch.float32, **SHAPES["gqa"])
    recipe = small(epochs=2, samples=4, seqlen=12)
    whole, _, _ = calibrated(original, recipe)

    class Killed(Exception):
        pass

    def kill(stage: str, done: int, total: int) -> None:
        if stage == "solve" and done == 1:
            raise Killed

    with pytest.raises(Killed):
        calibrated(original, recipe, state=RunState(tmp_path, {"run": 1}, resume=False), progress=kill)
    resumed, _, _ = calibrated(original, recipe, state=RunState(tmp_path, {"run": 1}, resume=True))
    assert same_bytes(resumed, whole)


# ------------------------------------------------------------------------------------------ shifts, two targets


@pytest.mark.parametrize("shape", ["biased", "odd"])
def test_a_model_with_shifts_is_served_as_it_was_calibrated(shape: str, tmp_path) -> None:
    original = family("llama", dtype=torch.float32, **SHAPES[shape])
    made = omniquant("w4a4kv4", shift=True)
    assert [t.kind for t in made.transforms["mlp_in"]] == ["shift", "diagonal"]
    recipe = dataclasses.replace(small(epochs=2, samples=4, seqlen=12), transforms=made.transforms)
    model, plan, _ = calibrated(original, recipe)
    block = model.model.layers[0]
    assert block.flatquant.attn_in.shift.abs().max() > 0
    assert block.flatquant.mlp_mid.shift is None
    assert block.self_attn.q_proj.bias is not None
    artifact.save(model, plan, tmp_path / "out", recipe=to_dict(recipe), report={})
    tokens = tokens_for(original, 2, 9)
    with torch.no_grad():
        assert torch.equal(artifact.load(tmp_path / "out")(tokens).logits, model(tokens).logits)
    assert artifact.inspect(tmp_path / "out").damaged == ()
    for export in (export_dense, export_compressed):
        with pytest.raises(ModelError):
            export(model, plan, tmp_path / "export", **({"weights_only": True} if export is export_dense else {}))


def test_a_shift_helps_where_channels_lie_to_one_side() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(200, 32, generator=g) + 6 * torch.randn(32, generator=g)
    linear = torch.nn.Linear(32, 16)
    low, high = x.amin(0), x.amax(0)

    def error(shift: Shift | None) -> float:
        site = FitSite(Identity(), Dynamic(QuantSpec(bits=4)), None, [linear], [[]], shift)
        with torch.no_grad():
            return float((site(x)[0] - linear(x)).square().mean())

    assert error(Shift((low + high) / 2)) < 0.2 * error(None)


def test_where_a_shift_cannot_be_is_said() -> None:
    shift, turned = TransformSpec(kind="shift"), spinquant().transforms["residual"]
    model = family("llama")
    at_heads = Recipe(name="x", scheme=Scheme.parse("a4", clip="none"), transforms={"attn_out": (shift,)})
    with pytest.raises(SpecError, match="what heads write cannot be shifted"):
        make_plan(at_heads, LLAMA, Geometry.of(model.config), model.model.layers)
    for transforms, why in (
        ({"residual": turned, "attn_in": (shift,)}, "leave out shifts"),
        ({"attn_in": (TransformSpec(kind="diagonal"), shift)}, "in this order"),
        ({"qk": (shift,)}, "qk takes one"),
    ):
        with pytest.raises(SpecError, match=why):
            Recipe(name="x", scheme=Scheme(), transforms=transforms)
    with pytest.raises(SpecError, match="no absmax start"):
        TransformSpec(kind="shift", init="absmax")
    with pytest.raises(SpecError, match="no center start"):
        TransformSpec(kind="diagonal", init="center")


def test_two_bit_weights_also_mind_the_original_on_quantised_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    made = omniquant("w2a16")
    assert made.fit is not None
    assert (made.fit.epochs, made.fit.both_targets) == (40, True)
    assert not small("w3a16").fit.both_targets  # type: ignore[union-attr]
    original = family("llama", dtype=torch.float32, **SHAPES["gqa"])
    seen = []
    fit_blocks = stage.fit_blocks

    def record(blocks, *args, **kwargs):
        seen.extend((b.inputs.clone(), b.targets.clone(), b.second.clone()) for b in blocks)
        return fit_blocks(blocks, *args, **kwargs)

    monkeypatch.setattr(stage, "fit_blocks", record)
    recipe = small("w2a16", epochs=2, samples=4, seqlen=12)
    _, _, report = calibrated(original, recipe)
    inputs, targets, second = seen[0]
    torch.testing.assert_close(second, targets)  # the first block has the original's inputs
    inputs, targets, second = seen[1]
    assert relative(second, targets) > 1e-3
    call = {"position_embeddings": original.model.rotary_emb(inputs, torch.arange(12)[None])}
    with torch.no_grad():
        want = original.model.layers[1](inputs, attention_mask=None, **call)
    torch.testing.assert_close(second, want, rtol=1e-4, atol=1e-4)
    monkeypatch.undo()
    assert recipe.fit is not None
    one = dataclasses.replace(recipe, fit=dataclasses.replace(recipe.fit, both_targets=False))
    _, _, alone = calibrated(original, one)
    assert report.blocks[0]["losses"][0] == pytest.approx(2 * alone.blocks[0]["losses"][0], rel=0.2)
    with pytest.raises(SpecError, match="both targets"):
        FitSpec(both_targets=True)


# ------------------------------------------------------------------------------------------------- combinations


def test_scales_and_rotations_of_heads_compose() -> None:
    head = TransformSpec(kind="diagonal")
    transforms = {**spinquant().transforms, "attn_out": (head, *spinquant().transforms["attn_out"])}
    bare = Recipe(name="x", scheme=Scheme(), transforms=transforms)
    model = family("llama", **SHAPES["odd"])
    tokens = tokens_for(model, 2, 9)
    with torch.no_grad():
        want = model(tokens).logits
        _, fits, _ = wrap_all(model, bare, force=True)
        assert relative(model(tokens).logits, want) < 1e-5  # transformers' norms compute in float32
        for fit in fits:
            fold_block(fit, dtype=torch.float64)
        assert relative(model(tokens).logits, want) < 1e-5


def test_quantised_inputs_cannot_come_before_an_end_to_end_fit() -> None:
    with pytest.raises(SpecError, match="end-to-end"):
        dataclasses.replace(small(), end_to_end=EndToEndSpec(steps=2, batch_size=1))
    assert dataclasses.replace(small(), end_to_end=EndToEndSpec(steps=0)).fit is not None


@pytest.mark.parametrize(
    "parts", [(TransformSpec(kind="diagonal", init="absmax"),), (TransformSpec(kind="kronecker", init="orthogonal"),)]
)
def test_queries_and_keys_take_a_matrix_or_a_scale_that_starts_at_one(parts: tuple) -> None:
    with pytest.raises(SpecError, match="qk takes one"):
        Recipe(name="x", scheme=Scheme(), transforms={"qk": parts}, fit=FitSpec())


def test_a_family_whose_rope_pairs_others_says_so() -> None:
    model = family("llama")
    arch = dataclasses.replace(LLAMA, scores=None)
    with pytest.raises(SpecError, match="no scale passes"):
        make_plan(omniquant(), arch, Geometry.of(model.config), model.model.layers)
