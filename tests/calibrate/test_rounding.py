"""Learned rounding in whole models: where it starts, that it never ends worse, what it combines with."""

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flatquant import load, quantize
from flatquant.calibrate.memory import Estimate
from flatquant.calibrate.pipeline import calibrate, solved_name
from flatquant.calibrate.rounding import RoundingLinear
from flatquant.calibrate.state import RunState
from flatquant.errors import CalibrationError
from flatquant.recipes import flatquant, gptq, quarot, rtn, svdquant
from flatquant.runtime.linear import FrozenLinear
from flatquant.spec import SITES, DataSpec, Recipe, RoundingSpec, SolverSpec
from tests.laws import CPU, tokens_for
from tests.tiny_models import FAMILIES, tiny_family, tiny_llama

DATA = DataSpec(samples=4, seqlen=12)
SHORT = RoundingSpec(steps=12, batch_size=2, checks=3)


def learning(recipe: Recipe, learned: RoundingSpec = SHORT, **changes: Any) -> Recipe:
    """The recipe on little text, with rounding that is learned."""
    solver = dataclasses.replace(recipe.solver, learned=learned, **changes)
    fit = recipe.fit and dataclasses.replace(recipe.fit, epochs=2, batch_size=2)
    end = recipe.end_to_end and dataclasses.replace(recipe.end_to_end, steps=2, batch_size=2)
    return dataclasses.replace(recipe, solver=solver, fit=fit, end_to_end=end, data=DATA)


def run(model: torch.nn.Module, recipe: Recipe, **options: Any) -> tuple[Any, list[dict[str, Any]]]:
    """A quantised copy of a model, and what the report says of its blocks."""
    ours = copy.deepcopy(model)
    _, report = calibrate(
        ours, recipe, tokens_for(model, DATA.samples, DATA.seqlen), device=CPU, dtype=torch.float32, **options
    )
    return ours, report.blocks


def integers(model: torch.nn.Module) -> dict[str, Tensor]:
    """All that rounding chose."""
    return {n: t for n, t in model.state_dict().items() if n.endswith((".values", ".scale", ".zero"))}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


BASES: dict[str, Callable[[], Recipe]] = {
    "rtn": lambda: rtn("w2g8a16"),
    "gptq": lambda: gptq("w2g8a16"),
    "rotated, all on grids": lambda: quarot("w4a4kv4"),
    "fitted Kronecker": lambda: flatquant("w3a4kv4"),
    "fitted end to end": lambda: flatquant("w4a4kv4", "quick"),
    "branched": lambda: svdquant("w3a8", rank=2),
}


@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_it_combines_and_never_ends_worse(base: Callable[[], Recipe]) -> None:
    ours, blocks = run(tiny_llama(), learning(base()))
    errors = [block["learned_rounding"] for block in blocks]
    assert len(errors) == 2
    assert all(0 < e["after"] <= e["before"] for e in errors)
    assert any(e["after"] < e["before"] for e in errors)
    kinds = [type(module) for module in ours.modules()]
    assert FrozenLinear in kinds
    assert RoundingLinear not in kinds
    assert not any(p.requires_grad for p in ours.model.layers.parameters())


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_family_learns(kind: str) -> None:
    _, blocks = run(tiny_family(kind, dtype=torch.float32), learning(rtn("w2a16")))
    assert all(b["learned_rounding"]["after"] < b["learned_rounding"]["before"] for b in blocks)


@pytest.mark.parametrize("base", [BASES["rtn"], BASES["gptq"], BASES["fitted Kronecker"]], ids=["rtn", "gptq", "fit"])
def test_no_steps_leave_the_solvers_rounding(base: Callable[[], Recipe]) -> None:
    model = tiny_llama()
    none, _ = run(model, learning(base(), dataclasses.replace(SHORT, steps=0)))
    plain = learning(base())
    want, _ = run(model, dataclasses.replace(plain, solver=dataclasses.replace(plain.solver, learned=None)))
    assert equal(integers(none), integers(want))
    some, _ = run(model, plain)
    assert not equal(integers(some), integers(want))


def test_a_block_that_gains_nothing_keeps_the_solvers_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever training does to offsets and scales: the start is one of those that the best is chosen from."""
    model = tiny_llama()
    want, _ = run(model, dataclasses.replace(rtn("w4g8a16"), data=DATA))
    errors = iter(range(1000))
    monkeypatch.setattr("flatquant.calibrate.rounding._error", lambda *_: float(next(errors) + 1))
    got, _ = run(model, learning(rtn("w4g8a16")))
    assert equal(integers(got), integers(want))


def test_the_same_run_gives_the_same_integers_and_goes_on_after_a_stop(tmp_path: Path) -> None:
    model, recipe = tiny_llama(layers=3), learning(gptq("w3a16"))
    want, notes = run(model, recipe)

    class Stopped(Exception):
        pass

    def stop(stage: str, done: float, total: int) -> None:
        if stage == "solve" and 1 < done < 2:
            raise Stopped

    with pytest.raises(Stopped):
        run(model, recipe, state=RunState(tmp_path / "run", {}, resume=False), progress=stop)
    state = RunState(tmp_path / "run", {}, resume=True)
    assert [state.has(solved_name(i)) for i in range(3)] == [True, False, False]
    got, again = run(model, recipe, state=state)
    assert equal(integers(got), integers(want))
    assert [n["learned_rounding"] for n in again] == [n["learned_rounding"] for n in notes]


def test_gram_matrices_of_the_original_model_differ_after_the_first_block() -> None:
    model = tiny_llama()
    recipe = dataclasses.replace(gptq("w2a16"), data=DATA)
    quantised, _ = run(model, recipe)
    original, _ = run(model, dataclasses.replace(recipe, solver=dataclasses.replace(recipe.solver, inputs="original")))
    first, second = ([equal_block(quantised, original, i)] for i in range(2))
    assert first == [True]
    assert second == [False]


def equal_block(a: Any, b: Any, index: int) -> bool:
    return equal(integers(a.model.layers[index]), integers(b.model.layers[index]))


def test_a_block_without_grids_has_nothing_to_learn() -> None:
    sixteen = ",".join(f"0.{site}=w16" for site in SITES)
    _, blocks = run(tiny_llama(), learning(rtn(f"w2a16,{sixteen}")))
    assert blocks[0]["learned_rounding"] == {"before": 0.0, "after": 0.0}
    assert blocks[1]["learned_rounding"]["after"] < blocks[1]["learned_rounding"]["before"]


def test_an_error_that_is_not_finite_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flatquant.calibrate.rounding._error", lambda *_: float("nan"))
    with pytest.raises(CalibrationError, match="block 0: the error of its rounded weights is not finite"):
        run(tiny_llama(), learning(rtn("w4a16")))


def test_steps_that_overflow_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flatquant.calibrate.optimise.Optimiser._norms", lambda _: torch.tensor([torch.inf]))
    model = tiny_llama(layers=1)
    want, _ = run(model, dataclasses.replace(rtn("w4a16"), data=DATA))
    with pytest.warns(UserWarning, match="12 of 12 steps of learned rounding overflowed"):
        got, _ = run(model, learning(rtn("w4a16")))
    assert equal(integers(got), integers(want))


def test_splits_of_a_batch_give_the_same_rounding_but_for_ties() -> None:
    model = tiny_llama(layers=1)
    layout = Estimate(device=0, host=0, disk=0, place="device", windows=1, side_by_side=1, streamed=False, shared=True)
    whole, _ = run(model, learning(rtn("w3a16")))
    parts, _ = run(model, learning(rtn("w3a16")), layout=layout)
    for name, values in integers(whole).items():
        if name.endswith(".values"):
            assert (values == parts.state_dict()[name]).float().mean() > 0.99


def test_what_is_saved_is_read_back_and_its_report_tells_the_errors(tmp_path: Path) -> None:
    model = tiny_llama(layers=1)
    made = quantize(model, learning(rtn("w2a16")), tokens_for(model, 4, 12), output=tmp_path / "out", device="cpu")
    told = json.loads((tmp_path / "out" / "flatquant_report.json").read_text())["blocks"][0]["learned_rounding"]
    assert told == made.report["blocks"][0]["learned_rounding"]
    assert 0 < told["after"] < told["before"]
    tokens = tokens_for(model, 2, 9)
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "out")(tokens).logits, made.model(tokens).logits)


def test_solver_of_a_scheme_without_weights_reads_nothing() -> None:
    recipe = dataclasses.replace(rtn("w16a16"), solver=SolverSpec(learned=SHORT), data=DATA)
    assert not recipe.needs_data
