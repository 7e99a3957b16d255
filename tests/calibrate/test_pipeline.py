"""A run as a whole: end-to-end fits help, killed runs end with the same bytes, and errors name their block."""

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from flatquant.calibrate import end2end
from flatquant.calibrate.memory import choose
from flatquant.calibrate.pipeline import calibrate, check_room, resident_bytes
from flatquant.calibrate.state import RunState
from flatquant.errors import CalibrationError, ModelError, SpecError
from flatquant.ops.divergence import kl_rows
from flatquant.recipes import flatquant, gptq, oac, rtn
from flatquant.spec import EndToEndSpec, FitSpec, Recipe, RoundingSpec, SolverSpec
from tests.laws import CPU, calibrated, family, quick, same_bytes, tokens_for
from tests.tiny_models import tiny_family

IDENTITY = {"run": 1}
LEARNED = SolverSpec(learned=RoundingSpec(steps=2))


@pytest.fixture(scope="module")
def model():
    return family("llama", dtype=torch.float32)


# ------------------------------------------------------------------------------------------- end to end


def test_kl_divergence_of_tokens() -> None:
    g = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 3, 4, 7, generator=g)
    want = F.kl_div(q.log_softmax(-1).flatten(0, 1), p.softmax(-1).flatten(0, 1), reduction="batchmean")
    torch.testing.assert_close(kl_rows(p, q).mean(), want)
    assert kl_rows(p, p).mean().abs() < 1e-6
    assert kl_rows(p, p + 3.0).mean().abs() < 1e-6  # logits are defined up to a constant


@pytest.mark.parametrize("recompute, weight_lr", [(False, 0.0), (True, 0.0), (False, 1e-2)])
def test_an_end_to_end_fit_lowers_the_divergence(
    model, recompute: bool, weight_lr: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choose, "SPENT_ON_SPEED", 1 << 60 if recompute else 1)
    spec = EndToEndSpec(steps=24, batch_size=4, lr=3e-3, clip_lr=3e-2, weight_lr=weight_lr)
    recipe = quick("w3a4kv4", samples=8, seqlen=16)
    with_it, _, report = calibrated(model, dataclasses.replace(recipe, end_to_end=spec))
    without, _, _ = calibrated(model, recipe)
    assert len(report.end_to_end.losses) == 24
    assert sum(report.end_to_end.losses[-2:]) < 0.8 * sum(report.end_to_end.losses[:2])  # two steps see all 8 windows
    seen = tokens_for(model, 8, 16, seed=1)
    with torch.no_grad():
        want = model(seen).logits
        after, before = (float(kl_rows(want, m(seen).logits).mean()) for m in (with_it, without))
    assert after < 0.8 * before
    # What was fitted is what is served.
    assert before == pytest.approx(sum(report.end_to_end.losses[:2]) / 2, rel=0.3)


def test_blocks_fitted_side_by_side_end_as_they_would_alone(model) -> None:
    recipe = quick("w4a4kv4", solver=SolverSpec(kind="gptq"))
    (alone, _, a), (together, _, b) = (calibrated(model, recipe, side_by_side=k) for k in (1, 8))
    assert [x["losses"] for x in a.blocks] == [x["losses"] for x in b.blocks]
    assert same_bytes(alone, together)


def test_an_end_to_end_fit_that_has_no_room_is_refused(model) -> None:
    blocks = list(model.model.layers)
    weights = sum(p.numel() for block in blocks for p in block.parameters())
    specs = (EndToEndSpec(steps=1, weight_lr=rate) for rate in (0.0, 1e-4))
    frozen, trained = (resident_bytes(blocks, spec, "full", torch.float32) for spec in specs)
    assert (frozen, trained) == (4 * weights, 16 * weights)
    check_room(trained, trained)
    with pytest.raises(CalibrationError, match=r"32\.0 GiB, and 8\.0 GiB are free; use --preset reference"):
        check_room(1 << 35, 1 << 33)


def test_recomputing_blocks_changes_nothing(model, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = dataclasses.replace(quick("w4a4kv4"), end_to_end=EndToEndSpec(steps=3, weight_lr=1e-2))
    calls: list[int] = []
    monkeypatch.setattr(end2end, "checkpoint", lambda *a, **k: calls.append(1) or checkpoint(*a, **k))
    models = []
    for share, recomputed in ((1, False), (1 << 60, True)):
        monkeypatch.setattr(choose, "SPENT_ON_SPEED", share)
        models.append(calibrated(model, recipe)[0])
        assert bool(calls) == recomputed
    assert same_bytes(*models)


def moving_weights(scheme: str, weight_lr: float = 3e-3, epochs: int = 2) -> Recipe:
    """A block-wise fit of weights and ranges, and of nothing else."""
    fit = FitSpec(epochs=epochs, batch_size=2, weight_lr=weight_lr)
    return dataclasses.replace(quick(scheme, samples=8, seqlen=16), transforms={}, fit=fit)


def test_a_block_wise_fit_of_weights_brings_the_blocks_nearer_to_the_original(model) -> None:
    _, _, moved = calibrated(model, moving_weights("w4a16", epochs=8))
    _, _, ranges = calibrated(model, moving_weights("w4a16", weight_lr=0.0, epochs=8))
    for with_it, without in zip(moved.blocks, ranges.blocks, strict=True):
        assert with_it["losses"][-1] < 0.8 * without["losses"][-1]


# ------------------------------------------------------------------------------------------------ resume


class Killed(Exception):
    pass


def killed_at(stage: str, done: int):
    def progress(at: str, now: int, total: int) -> None:
        assert 0 <= now <= total
        if (at, now) == (stage, done):
            raise Killed

    return progress


@pytest.mark.parametrize(
    "recipe, stage, done",
    [
        (quick("w4a4kv4", epochs=2), "fit", 1),
        (quick("w4a4kv4", epochs=2), "fit", 3),
        (quick("w4a4kv4", epochs=2), "solve", 1),
        (quick("w3a8", solver=SolverSpec(kind="gptq")), "fit", 2),
        (quick("w4a4,mlp_mid=w16a16"), "solve", 1),
        (quick("w3a8", solver=SolverSpec(kind="gptq", hessian="output_adaptive")), "solve", 1),
        (quick("w4a4kv4", end_to_end=EndToEndSpec(steps=10, batch_size=2)), "end to end", 9),
        (quick("w4a4kv4", end_to_end=EndToEndSpec(steps=3, batch_size=2)), "end to end", 2),  # before a step is kept
        (quick("w4a4kv4", end_to_end=EndToEndSpec(steps=3, batch_size=2)), "solve", 1),
        (quick("w4a4kv4", end_to_end=EndToEndSpec(steps=10, batch_size=2, weight_lr=1e-2)), "end to end", 9),
        (moving_weights("w3a16"), "fit", 1),
        (moving_weights("w3a16"), "solve", 1),
    ],
)
def test_a_killed_run_ends_with_the_same_bytes(tmp_path: Path, recipe: Recipe, stage: str, done: int) -> None:
    # In bfloat16 the model's own dtype and that of the fit differ, and a reread block must be in the right one.
    model = family("llama", dtype=torch.bfloat16 if stage == "solve" else torch.float32)
    whole, _, report = calibrated(model, recipe)
    with pytest.raises(Killed):
        calibrated(model, recipe, state=RunState(tmp_path, IDENTITY, resume=False), progress=killed_at(stage, done))
    assert not list(tmp_path.glob("*.tmp"))
    resumed, _, again = calibrated(model, recipe, state=RunState(tmp_path, IDENTITY, resume=True))
    assert same_bytes(resumed, whole)
    assert [b["losses"] for b in again.blocks] == [b["losses"] for b in report.blocks]
    assert again.end_to_end == report.end_to_end
    with torch.no_grad():
        tokens = tokens_for(model, 2, 6)
        assert torch.equal(resumed(tokens).logits, whole(tokens).logits)


def test_a_finished_run_is_read_and_not_repeated(tmp_path: Path, model) -> None:
    recipe = quick("w4a4kv4")
    first, _, _ = calibrated(model, recipe, state=RunState(tmp_path, IDENTITY, resume=False))
    stages: list[str] = []
    again, _, _ = calibrated(
        model, recipe, state=RunState(tmp_path, IDENTITY, resume=True), progress=lambda s, *_: stages.append(s)
    )
    assert same_bytes(first, again)
    assert "fit" not in stages


def test_keeping_a_state_changes_nothing(tmp_path: Path, model) -> None:
    recipe = quick("w4a4kv4")
    plain, _, _ = calibrated(model, recipe)
    kept, _, _ = calibrated(model, recipe, state=RunState(tmp_path, IDENTITY, resume=False))
    assert same_bytes(plain, kept)


# ------------------------------------------------------------------------------------------------ errors


def one_line(error: type[Exception], match: str, model, recipe: Recipe, **options) -> None:
    with pytest.raises(error, match=match) as caught:
        calibrated(model, recipe, **options)
    assert "\n" not in str(caught.value)


def test_recipes_that_do_not_fit_the_model_are_errors(model) -> None:
    one_line(SpecError, "7.mlp_mid.*0 to 1", model, rtn("w4,7.mlp_mid=w8"))
    one_line(SpecError, "group size 7 does not divide the 24 inputs", model, rtn("w4g7"))
    one_line(SpecError, "group size 3 .*40 inputs", model, rtn("w4g3"))
    transforms = {"attn_out": flatquant().transforms["qk"]}
    one_line(SpecError, "attn_out.*matrix", model, Recipe(name="r", scheme=rtn("w4").scheme, transforms=transforms))


def test_a_quantised_model_is_not_quantised_again(model) -> None:
    once, _, _ = calibrated(model, rtn("w4"))
    one_line(ModelError, "not a Linear", once, rtn("w4"))


def test_unknown_families_are_errors(model) -> None:
    other = copy.deepcopy(model)
    other.config.model_type = "mamba"
    with pytest.raises(ModelError, match="'mamba' is not supported; `flatquant methods --families` lists"):
        calibrated(other, rtn("w4"))


# A norm with a shift and small gates that stay as they are take no inputs of another dtype than their own.
@pytest.mark.parametrize("stored, dtype", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
@pytest.mark.parametrize("name", ["starcoder2", "qwen3_5_text"])
@pytest.mark.parametrize(
    "recipe",
    [
        gptq("w4a4kv4"),
        oac("w4"),
        dataclasses.replace(quick("w4a4kv4"), solver=LEARNED),
        dataclasses.replace(oac("w4"), end_to_end=EndToEndSpec(steps=2, batch_size=2)),
    ],
    ids=["gptq", "oac", "learned", "end to end"],
)
def test_products_may_be_in_another_dtype_than_the_model(
    recipe: Recipe, name: str, stored: torch.dtype, dtype: torch.dtype
) -> None:
    model = tiny_family(name, dtype=stored)
    done, _, _ = calibrated(model, dataclasses.replace(recipe, data=quick("w4").data), dtype=dtype)
    with torch.no_grad():
        assert bool(done(tokens_for(model, 2, 9)).logits.isfinite().all())
    kept = {key: t.dtype for key, t in model.named_parameters()}
    assert all(t.dtype == kept[key] for key, t in done.named_parameters() if key in kept)


@pytest.mark.parametrize("recipe", [quick("w4a4kv4"), dataclasses.replace(gptq("w4"), data=quick("w4").data)])
def test_broken_weights_are_an_error_that_names_the_block(model, recipe: Recipe) -> None:
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    one_line(CalibrationError, "^block 1: ", broken, recipe)


def test_recipes_that_need_text_say_so(model) -> None:
    with pytest.raises(CalibrationError, match="flatquant needs calibration text"):
        calibrate(model, quick("w4"), None, device=CPU, dtype=torch.float32)
