"""Fits that meet their limits: overflow of 16 bits, no loss at all, and windows that batches do not divide."""

import copy
import dataclasses
import itertools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import flatquant
from flatquant import recipes
from flatquant.calibrate import blockwise, end2end
from flatquant.calibrate.activations import OnHost, cyclic
from flatquant.calibrate.blockwise import safer
from flatquant.calibrate.optimise import Optimiser
from flatquant.calibrate.state import RunState
from flatquant.calibrate.witness import Witness
from flatquant.errors import CalibrationError, FitWarning
from flatquant.recipes import RECIPES
from flatquant.spec import DataSpec, EndToEndSpec, FitSpec, Scheme
from flatquant.wiring.fitted import FitBlock
from tests.laws import CPU, calibrated, family, quick, same_bytes, tokens_for
from tests.tiny_models import tiny_family, tiny_llama, tiny_tokenizer

FALLEN = "block 1: the loss or a gradient in float16 is not finite; the block is fitted in bfloat16"


def overflowing(dtype: torch.dtype = torch.float16):
    """A model whose second block's products, but for a channel that nothing reads, are beyond float16 in the middle."""
    model = tiny_llama(dtype=dtype)
    mlp = model.model.layers[1].mlp
    with torch.no_grad():
        for w in (mlp.gate_proj.weight, mlp.up_proj.weight):
            w[5] = w[5].sign() * 60
        mlp.down_proj.weight[:, 5] = 0
    return model


# -------------------------------------------------------------------------------------------------- overflow


def test_what_is_wider() -> None:
    assert safer(torch.float16, CPU) == torch.bfloat16
    assert safer(torch.bfloat16, CPU) == torch.float32
    assert safer(torch.float32, CPU) is None
    assert safer(torch.float64, CPU) is None


@pytest.mark.parametrize("side_by_side", [1, 2])
def test_a_block_that_overflows_float16_is_fitted_in_bfloat16_and_no_other(side_by_side: int) -> None:
    recipe = quick("w8a8kv8", epochs=2)
    with pytest.warns(UserWarning, match="block 1") as caught:
        model, _, report = calibrated(overflowing(), recipe, dtype=torch.float16, side_by_side=side_by_side)
    said = [str(w.message) for w in caught]
    assert FALLEN in said
    assert not [m for m in said if "block 0" in m]
    assert [b.get("dtype") for b in report.blocks] == [None, "bfloat16"]
    assert all(len(b["losses"]) == 2 and sum(b["losses"]) < float("inf") for b in report.blocks)
    assert model.dtype == torch.float16
    with torch.no_grad():
        tokens = tokens_for(model, 2, 9)
        want = overflowing(torch.bfloat16).float()(tokens).logits
        assert (model.float()(tokens).logits - want).norm() < 0.1 * want.norm()


@pytest.mark.parametrize("broken", [1, 5])
def test_a_fit_that_starts_anew_forgets_what_it_did(broken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Overflow in a later step ends with the bytes of overflow in the first."""
    recipe = quick("w4a4kv4", epochs=2, samples=8)
    step = Optimiser.step

    def fitted(broken: int):
        seen = itertools.count()

        def faulty(self: Optimiser, *batch: Tensor) -> Tensor:
            return step(self, *(b * float("inf") for b in batch) if next(seen) == broken else batch)

        monkeypatch.setattr(Optimiser, "step", faulty)
        match = "block 0: the loss or a gradient in bfloat16 is not finite; the block is fitted in float32"
        with pytest.warns(UserWarning, match=match):
            return calibrated(family("llama", dtype=torch.bfloat16), recipe, dtype=torch.bfloat16, side_by_side=1)

    (want, _, first), (got, _, later) = fitted(0), fitted(broken)
    assert [b["losses"] for b in first.blocks] == [b["losses"] for b in later.blocks]
    assert [len(b["losses"]) for b in later.blocks] == [2, 2]
    assert same_bytes(got, want)


def test_a_fit_that_overflows_float32_is_an_error_that_names_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Optimiser.step
    monkeypatch.setattr(Optimiser, "step", lambda self, *batch: step(self, *(b * float("inf") for b in batch)))
    with pytest.raises(CalibrationError, match=r"^block 0: the loss .* in float32 is not finite; try a low"):
        calibrated(family("llama", dtype=torch.float32), quick("w4a4"))


def test_where_the_fit_went_is_in_the_report_and_in_a_resumed_one(tmp_path: Path) -> None:
    recipe = quick("w8a8kv8")
    model = overflowing()
    tokens = tokens_for(model, 4, 12)
    with pytest.warns(UserWarning, match="block 1"):
        one = flatquant.quantize(model, recipe, tokens, device="cpu", dtype=torch.float16)
    assert ["dtype" in b for b in one.report["blocks"]] == [False, True]
    assert one.report["blocks"][1]["dtype"] == "bfloat16"

    states = [RunState(tmp_path, {"run": 1}, resume=resume) for resume in (False, True)]
    with pytest.warns(UserWarning, match="block 1"):
        calibrated(overflowing(), recipe, dtype=torch.float16, state=states[0])
    with pytest.warns(UserWarning, match="block 1 overflows float16; what it is fitted to"):
        _, _, again = calibrated(overflowing(), recipe, dtype=torch.float16, state=states[1])
    assert again.blocks[1]["dtype"] == "bfloat16"


def begin_early(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let an end-to-end fit begin so many steps before it reads a loss, as on a GPU."""
    made = end2end.Optimiser

    def make(*args: Any, **options: Any) -> Optimiser:
        optimiser = made(*args, **options)
        optimiser.ahead = steps
        return optimiser

    monkeypatch.setattr(end2end, "Optimiser", make)


@pytest.mark.parametrize("weight_lr, ahead", [(0.0, 0), (1e-2, 0), (1e-2, 1)])
def test_an_end_to_end_fit_takes_a_step_that_overflowed_again(
    weight_lr: float, ahead: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a kind that float16 cannot hold: it goes on in bfloat16, and a killed run ends with the same bytes."""
    begin_early(ahead, monkeypatch)
    spec = EndToEndSpec(steps=10, batch_size=2, weight_lr=weight_lr)
    recipe = dataclasses.replace(quick("w4a4kv4"), fit=None, end_to_end=spec)
    model = family("llama", dtype=torch.float16)
    loss = end2end.kl_rows

    def overflow(teacher: Tensor, student: Tensor) -> Tensor:
        factor = float("inf") if student.dtype == torch.float16 else 1.0
        return loss(teacher, student) * factor

    monkeypatch.setattr(end2end, "kl_rows", overflow)
    match = "the end-to-end divergence or a gradient in float16 is not finite at step 1; the fit goes on in bfloat16"
    with pytest.warns(UserWarning, match=match):
        whole, _, report = calibrated(model, recipe, dtype=torch.float16)
    assert len(report.end_to_end.losses) == 10
    assert sum(report.end_to_end.losses) < float("inf")

    class Killed(Exception):
        pass

    def stop(stage: str, done: int, _: int) -> None:
        if (stage, done) == ("end to end", 9):
            raise Killed

    with pytest.raises(Killed), pytest.warns(UserWarning, match=match):
        calibrated(model, recipe, dtype=torch.float16, state=RunState(tmp_path, {}, resume=False), progress=stop)
    resumed, _, again = calibrated(model, recipe, dtype=torch.float16, state=RunState(tmp_path, {}, resume=True))
    assert again.end_to_end == report.end_to_end
    assert same_bytes(resumed, whole)


def test_steps_that_begin_early_change_nothing_after_one_that_overflowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fourth of six overflows float16; the fifth, which has begun with one step ahead, would not."""
    recipe = dataclasses.replace(quick("w4a4kv4"), fit=None, end_to_end=EndToEndSpec(steps=6, batch_size=2))
    loss, real, step = end2end.kl_rows, Optimiser.step, [0]

    def counted(optimiser: Optimiser, *batch: Tensor) -> Tensor:
        step[0] = optimiser.done + 1
        return real(optimiser, *batch)

    def overflow(teacher: Tensor, student: Tensor) -> Tensor:
        return loss(teacher, student) * (float("inf") if step[0] == 4 and student.dtype == torch.float16 else 1.0)

    monkeypatch.setattr(Optimiser, "step", counted)
    monkeypatch.setattr(end2end, "kl_rows", overflow)
    found = []
    for ahead in (0, 1, 3):
        step[0] = 0
        with monkeypatch.context() as patch:
            begin_early(ahead, patch)
            with pytest.warns(UserWarning, match="not finite at step 4; the fit goes on in bfloat16"):
                found.append(calibrated(family("llama", dtype=torch.float16), recipe, dtype=torch.float16))
    for model, _, report in found[1:]:
        assert report.end_to_end == found[0][2].end_to_end
        assert same_bytes(model, found[0][0])


def test_an_end_to_end_fit_that_overflows_float32_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(end2end, "kl_rows", lambda teacher, student: student.sum(-1) * float("inf"))
    recipe = dataclasses.replace(quick("w4a4"), end_to_end=EndToEndSpec(steps=2, batch_size=2))
    with pytest.raises(CalibrationError, match="divergence or a gradient in float32 is not finite at step 1"):
        calibrated(family("llama", dtype=torch.float32), recipe)


# --------------------------------------------------------------------------------------------------- no loss


@pytest.mark.parametrize("method", ["omniquant", "affinequant", "flatquant", "spinquant"])
def test_no_loss_is_a_result(method: str) -> None:
    """Zeroed embeddings: the residual stream is 0 and stays it, whatever the weights."""
    model = tiny_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight.zero_()
    recipe = RECIPES[method]("w4a4kv4", preset="quick")
    recipe = dataclasses.replace(recipe, data=DataSpec(samples=4, seqlen=12))
    if recipe.fit is not None:
        recipe = dataclasses.replace(recipe, fit=dataclasses.replace(recipe.fit, epochs=2))
    if recipe.end_to_end is not None:
        recipe = dataclasses.replace(recipe, end_to_end=dataclasses.replace(recipe.end_to_end, steps=2))
    before = copy.deepcopy(model.model.embed_tokens.weight)
    got, _, report = calibrated(model, recipe)
    if recipe.fit is not None:
        assert [b["losses"] for b in report.blocks] == [[0.0, 0.0]] * 2
    assert torch.equal(got.model.embed_tokens.weight, before)
    assert all(torch.isfinite(t).all() for t in got.state_dict().values())


# --------------------------------------------------------------------------------------------------- windows


def batches_of(monkeypatch: pytest.MonkeyPatch, samples: int, batch: int, epochs: int, steps: int) -> list[list[int]]:
    """Which windows every step sees: those of a block-wise fit, then those of an end-to-end fit."""
    seen: list[list[int]] = []

    def watched(kept: Tensor, start: int, count: int) -> Tensor:
        if kept.shape[0] == samples:
            seen.append(cyclic(torch.arange(samples), start, count).tolist())
        return cyclic(kept, start, count)

    for module in (blockwise, end2end):
        monkeypatch.setattr(module, "cyclic", watched)
    recipe = dataclasses.replace(
        quick("w4a4"),
        fit=FitSpec(epochs=epochs, batch_size=batch),
        data=DataSpec(samples=samples, seqlen=6),
        end_to_end=EndToEndSpec(steps=steps, batch_size=batch),
    )
    model = family("llama", dtype=torch.float32)
    calibrated(model, recipe, side_by_side=1)
    return seen[::3]  # numbers, inputs, targets


def test_windows_beyond_the_last_whole_batch_are_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = batches_of(monkeypatch, samples=10, batch=4, epochs=2, steps=3)
    first, second = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 1]], [[2, 3, 4, 5], [6, 7, 8, 9], [0, 1, 2, 3]]
    assert seen == [*(first + second) * 2, *first]


def test_where_batches_divide_the_windows_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = batches_of(monkeypatch, samples=8, batch=4, epochs=2, steps=3)
    assert seen == [[0, 1, 2, 3], [4, 5, 6, 7]] * 4 + [[0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 2, 3]]


def test_rows_go_on_with_the_first_after_the_last() -> None:
    rows = torch.arange(5.0)[:, None]
    kept = OnHost((5, 1), torch.float32, CPU)
    kept[0:5] = rows
    for where in (rows, kept):
        assert cyclic(where, 3, 4).flatten().tolist() == [3, 4, 0, 1]
        assert cyclic(where, 12, 2).flatten().tolist() == [2, 3]
        assert cyclic(where, 4, 7).flatten().tolist() == [4, 0, 1, 2, 3, 4, 0]


# -------------------------------------------------------------------------------------------------- never worse


def same_tensors(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    """Whether two models hold the same; a mean over text may be summed in another order."""
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.allclose(left[k], right[k], rtol=1e-5, atol=1e-6) for k in left)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
@pytest.mark.parametrize("inputs", ["full_precision", "quantised"])
def test_a_fit_that_makes_blocks_worse_is_undone(name: str, inputs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the learning rate did: the tensors are those of a run without a fit."""
    monkeypatch.setattr(FitBlock, "become_plain", lambda self: False)
    model, recipe = family(name, dtype=torch.float32), quick("w4a4kv4", epochs=2, samples=8, seqlen=256)
    wild = dataclasses.replace(recipe, fit=FitSpec(epochs=2, batch_size=2, lr=3.0, clip_lr=30.0, inputs=inputs))
    with pytest.warns(UserWarning, match="the fit made the outputs worse on windows that it was not trained on"):
        got, _, report = calibrated(model, wild)
    want, _, _ = calibrated(model, dataclasses.replace(recipe, fit=None))
    assert all(block["undone"] for block in report.blocks)
    assert all(after is None or before < after for before, after in (block["held_out"] for block in report.blocks))
    assert same_tensors(got, want)


@pytest.mark.parametrize("weight_lr", [0.0, 10.0])
@pytest.mark.parametrize("objective", ["kl", "cross_entropy"])
def test_an_end_to_end_fit_that_makes_the_model_worse_is_undone(
    weight_lr: float, objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FitBlock, "become_plain", lambda self: False)
    model, recipe = (
        family("llama", dtype=torch.float32),
        dataclasses.replace(quick("w4a4kv4", samples=8, seqlen=256), fit=None),
    )
    spec = EndToEndSpec(steps=6, batch_size=2, lr=3.0, clip_lr=30.0, weight_lr=weight_lr, objective=objective)
    with pytest.warns(UserWarning, match="made the model worse on windows that it was not trained"):
        got, _, report = calibrated(model, dataclasses.replace(recipe, end_to_end=spec))
    want, _, _ = calibrated(model, recipe)
    assert report.end_to_end.undone
    assert not report.end_to_end.held_out[1] <= report.end_to_end.held_out[0]
    assert same_tensors(got, want)


@pytest.mark.parametrize("lr", [1e-3, 1e-2, 1e-1, 1.0])
def test_no_rate_of_learning_leaves_a_block_worse_on_what_it_did_not_see(
    lr: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the report says of held-out windows is what the model computes on them."""
    monkeypatch.setattr(FitBlock, "become_plain", lambda self: False)
    model, recipe = family("llama", dtype=torch.float32), quick("w4a4kv4", epochs=2, samples=8, seqlen=256)
    held_out = tokens_for(model, 1, 300, seed=5)
    fitted = dataclasses.replace(recipe, fit=FitSpec(epochs=2, batch_size=2, lr=lr, clip_lr=10 * lr))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got, _, report = calibrated(model, fitted, held_out=held_out)
    start, _, _ = calibrated(model, dataclasses.replace(recipe, fit=None))
    with torch.no_grad():
        before, after = (
            float((m.model(held_out, output_hidden_states=True).hidden_states[1] - want).square().mean())
            for want in [model.model(held_out, output_hidden_states=True).hidden_states[1]]
            for m in (start, got)
        )
    assert after <= before * (1 + 1e-4)
    kept = report.blocks[0]["held_out"]
    assert before == pytest.approx(kept[0], rel=1e-2)
    assert after == pytest.approx(min(kept), rel=1e-2)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
@pytest.mark.parametrize("stage", ["block-wise", "end to end"])
def test_a_fit_behind_plain_rounding_gives_way_to_it(name: str, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From starts that are far worse than rounding, at a rate that gets nowhere: the numbers are those of `rtn`."""
    monkeypatch.setattr(end2end, "NOTHING_LOST", 0.0)
    model, recipe = family(name, dtype=torch.float32), quick("w8a8kv8", epochs=1, samples=8, seqlen=256)
    cut = Scheme.parse("w8a8kv8", clip_starts=(-1.0,) * 7)  # a quarter of every range
    whole = EndToEndSpec(steps=2, batch_size=2, lr=1e-9, clip_lr=1e-9)
    block = FitSpec(epochs=1, batch_size=2, lr=1e-9, clip_lr=1e-9)
    fits = {"fit": block} if stage == "block-wise" else {"fit": None, "end_to_end": whole}
    with pytest.warns(UserWarning, match="plain rounding.* on windows that it was not trained on"):
        got, _, report = calibrated(model, dataclasses.replace(recipe, scheme=cut, **fits))
    want, _, _ = calibrated(model, recipes.rtn("w8a8kv8"))
    if stage == "block-wise":
        assert all(note["undone"] and note["plain"] < min(note["held_out"]) for note in report.blocks)
    else:
        assert report.end_to_end.undone
        assert report.end_to_end.plain < min(report.end_to_end.held_out)
    ids = tokens_for(model, 2, 40, seed=6)
    with torch.no_grad():
        a, b, exact = (m(ids).logits for m in (got, want, model))
    assert (a - b).norm() < 0.05 * (b - exact).norm()


def test_windows_held_out_of_a_text_are_not_those_of_the_verdict(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 900)
    seen: list[Tensor] = []
    begin = Witness.begin

    def noting(self: Witness, *args: object) -> None:
        seen.append(self.windows)
        begin(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Witness, "begin", noting)
        result = flatquant.quantize(
            tiny_llama(), quick("w4", seqlen=256), tmp_path / "text.txt", tokenizer=tiny_tokenizer(), device="cpu"
        )
    verdict, fits = seen
    assert len(fits) == 1
    assert not any(torch.equal(a, b) for a in verdict for b in fits)
    assert all({"held_out", "undone"} <= block.keys() for block in result.report["blocks"])


def test_nothing_is_fitted_end_to_end_where_plain_rounding_loses_nothing() -> None:
    """Chance would decide, and no transform runs faster than any."""
    model = tiny_family("mistral", dtype=torch.float32)
    recipe = dataclasses.replace(recipes.flatquant("kv8", preset="quick"), data=DataSpec(samples=8, seqlen=256))
    with pytest.warns(FitWarning, match="plain rounding loses .* nothing was fitted end to end"):
        got, _, report = calibrated(model, recipe)
    assert report.end_to_end.losses == []
    assert report.end_to_end.held_out[1] == report.end_to_end.plain < 1e-3
    want, _, _ = calibrated(model, recipes.rtn("kv8"))
    tokens = tokens_for(model, 2, 40, seed=3)
    with torch.no_grad():
        assert torch.equal(got(tokens).logits, want(tokens).logits)
