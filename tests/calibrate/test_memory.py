"""Layouts in memory: none changes a bit but batches in parts, and the estimate is near what is measured."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.memory import Case, measured

from flatquant.calibrate.memory import Estimate, Limits, estimate, free_host_bytes, machine, parse_bytes, splits
from flatquant.calibrate.memory.run import LIBRARIES
from flatquant.calibrate.pipeline import calibrate, run
from flatquant.calibrate.state import RunState
from flatquant.errors import CalibrationError, SpecError
from flatquant.recipes import flatquant, rtn
from flatquant.spec import DataSpec, EndToEndSpec, FitSpec, Recipe, RoundingSpec, SolverSpec
from flatquant.wiring.arch import Geometry
from flatquant.wiring.archs import arch_of
from flatquant.wiring.head import with_ends
from flatquant.wiring.plan import make_plan
from tests.laws import CPU, calibrated, family, quick, same_bytes, tokens_for
from tests.tensor_bytes import TensorBytes
from tests.tiny_models import tiny_llama, tiny_tokenizer


@pytest.fixture(scope="module")
def model():
    return family("llama", dtype=torch.float32)


@pytest.fixture(autouse=True)
def no_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Estimates that this process's other tests do not change."""
    monkeypatch.setattr(machine, "resident_bytes", lambda: 0)


def counted(model, recipe: Recipe, device: str = "cpu", dtype: torch.dtype = torch.float32, **options) -> Estimate:
    arch = arch_of(model.config)
    plan = with_ends(make_plan(recipe, arch, Geometry.of(model.config), model.model.layers), recipe, model)
    shape = (recipe.data.samples, recipe.data.seqlen) if recipe.needs_data else None
    options = {"limits": Limits(device=1 << 60, host=1 << 60), **options}
    return estimate(model, plan, recipe, shape=shape, device=torch.device(device), dtype=dtype, **options)


# ------------------------------------------------------------------------------------------------ sizes


@pytest.mark.parametrize(
    "text, size",
    [("20GiB", 20 << 30), ("1.5 gib", 3 << 29), ("800MB", 800_000_000), ("64K", 64_000), ("64KiB", 1 << 16), ("7", 7)],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "many", "GiB", "-1GiB", "0", "1e9", "20 GiBs", "20i"])
def test_what_is_no_size_is_an_error(text: str) -> None:
    with pytest.raises(SpecError, match="give something like 20GiB"):
        parse_bytes(text)


def test_parts_of_a_batch_are_equal() -> None:
    assert [splits(4, w) for w in (8, 4, 3, 2, 1, 0)] == [1, 1, 2, 2, 4, 4]
    assert splits(6, 4) == 2
    assert splits(7, 4) == 7


def test_free_memory_is_known_here() -> None:
    free = free_host_bytes()
    assert free is not None
    assert 0 < free < 1 << 50


# ------------------------------------------------------------------------------------------------ layouts


def layout(model, recipe: Recipe, **changes) -> Estimate:
    return dataclasses.replace(counted(model, recipe), **changes)


@pytest.mark.parametrize("place", ["host", "disk"])
@pytest.mark.parametrize(
    "recipe",
    [
        quick("w4a4kv4", epochs=2),
        quick("w4a4kv4", solver=SolverSpec(kind="gptq")),
        quick("w3a8", solver=SolverSpec(kind="gptq", hessian="output_adaptive")),
        quick("w4a4kv4", end_to_end=EndToEndSpec(steps=3, batch_size=2)),
        quick("w3a8", solver=SolverSpec(learned=RoundingSpec(steps=3, batch_size=2))),
        quick("w3a8", solver=SolverSpec(kind="gptq", inputs="original", learned=RoundingSpec(steps=3, batch_size=2))),
    ],
)
def test_where_activations_lie_changes_no_bit(model, recipe: Recipe, place: str, tmp_path: Path) -> None:
    plain, _, report = calibrated(model, recipe)
    state = RunState(tmp_path, {"run": 1}, resume=False)
    spilled, _, other = calibrated(model, recipe, layout=layout(model, recipe, place=place), state=state)
    assert same_bytes(plain, spilled)
    assert [b["losses"] for b in report.blocks] == [b["losses"] for b in other.blocks]
    assert report.end_to_end == other.end_to_end
    assert not [p.name for p in tmp_path.iterdir() if not p.name.endswith((".safetensors", ".json"))]


PARTS = FitSpec(epochs=3, batch_size=4)


def test_a_batch_in_parts_fits_as_the_whole_does() -> None:
    # In float64 the order of sums shows in the last digits only. AdamW divides by the size of gradients, so that what
    # is nearly 0 may step either way: losses are compared, not parameters.
    model = family("llama", dtype=torch.float64)
    recipe = dataclasses.replace(quick("w4a4kv4", samples=8), fit=PARTS)
    whole, one, two, two_again = (
        calibrated(model, recipe, layout=layout(model, recipe, windows=w), dtype=torch.float64) for w in (4, 1, 2, 2)
    )
    for parts in (one, two):
        for a, b in zip(whole[2].blocks, parts[2].blocks, strict=True):
            assert a["losses"] == pytest.approx(b["losses"], rel=1e-4)
    assert same_bytes(two[0], two_again[0])
    losses = [b["losses"][0] for b in whole[2].blocks]
    assert losses != [b["losses"][-1] for b in whole[2].blocks]


def test_an_end_to_end_fit_in_parts_is_that_of_the_whole() -> None:
    # Activations stay off their grids: a value that lies between two integers falls to either side with the order of a
    # sum, and the gradients of a whole block follow it.
    model = family("llama", dtype=torch.float64)
    recipe = quick("w4", end_to_end=EndToEndSpec(steps=4, batch_size=4))
    whole, parts = (
        calibrated(model, recipe, layout=layout(model, recipe, windows=w), dtype=torch.float64)[2] for w in (4, 1)
    )
    assert whole.end_to_end.losses == pytest.approx(parts.end_to_end.losses, rel=1e-4)


@pytest.mark.parametrize("windows", [1, 2])
def test_a_killed_run_in_parts_on_disk_ends_with_the_same_bytes(model, windows: int, tmp_path: Path) -> None:
    recipe = dataclasses.replace(quick("w4a4kv4", samples=8, solver=SolverSpec(kind="gptq")), fit=PARTS)
    chosen = layout(model, recipe, windows=windows, place="disk")
    whole, _, _ = calibrated(model, recipe, layout=chosen)

    class Killed(Exception):
        pass

    def kill(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("fit", 4):
            raise Killed

    with pytest.raises(Killed):
        calibrated(model, recipe, layout=chosen, state=RunState(tmp_path, {}, resume=False), progress=kill)
    resumed, _, _ = calibrated(model, recipe, layout=chosen, state=RunState(tmp_path, {}, resume=True))
    assert same_bytes(whole, resumed)


def test_less_memory_gives_up_what_costs_least_first() -> None:
    model = family("llama", dtype=torch.float32, layers=8)
    recipe = flatquant("w4a4kv4")
    device = {"device": "cuda", "dtype": torch.float16}
    first = counted(model, recipe, **device)
    assert (first.place, first.windows, first.side_by_side, first.shared) == ("device", 4, 6, False)
    seen = [first]

    def shrink() -> None:
        while True:
            limits = Limits(device=seen[-1].device - 1, host=1 << 60)
            seen.append(counted(model, recipe, limits=limits, **device))

    with pytest.raises(CalibrationError, match="more than was allowed"):
        shrink()
    order = [(e.windows, e.place, e.side_by_side) for e in seen]
    assert order == [
        *((4, "device", k) for k in (6, 5, 4, 3, 2, 1)),
        (4, "host", 1),
        (2, "host", 1),
        (1, "host", 1),
    ]
    spilled = counted(model, recipe, limits=Limits(device=seen[6].device, host=seen[6].host - 1), **device)
    assert spilled.place == "disk"
    assert spilled.disk > seen[6].disk


def test_a_limit_on_a_cpu_is_one_of_all_memory(model) -> None:
    recipe = quick("w4a4kv4", samples=64, seqlen=64)
    free = counted(model, recipe)
    assert free.shared
    assert free.host > free.device
    for limits in (Limits(device=free.host - 1), Limits(host=free.host - 1)):
        less = counted(model, recipe, limits=limits)
        assert less.host < free.host
        assert less.place == "disk"
    with pytest.raises(CalibrationError, match=r"at least .* more than was allowed; .* or --stream"):
        counted(model, recipe, limits=Limits(device=1000))


def test_recipes_that_read_no_text_have_no_activations(model) -> None:
    assert counted(model, rtn("w4")).place == "device"


# ------------------------------------------------------------------------------------------------ the estimate


@pytest.mark.parametrize(
    "hidden, intermediate, seqlen, batch, solver",
    [
        (256, 704, 16, 1, "rtn"),  # weights are what counts
        (256, 704, 128, 4, "gptq"),
        (128, 1024, 256, 4, "rtn"),  # activations are
        (384, 704, 256, 2, "rtn"),
    ],
)
def test_the_estimate_is_within_a_quarter_of_what_a_run_takes(
    hidden: int, intermediate: int, seqlen: int, batch: int, solver: str
) -> None:
    model = tiny_llama(hidden=hidden, intermediate=intermediate)
    recipe = dataclasses.replace(
        flatquant("w4a4kv4"),
        fit=FitSpec(epochs=1, batch_size=batch),
        data=DataSpec(samples=2 * batch, seqlen=seqlen),
        solver=SolverSpec(kind=solver),  # type: ignore[arg-type]
    )
    want = counted(model, recipe)
    tokens = tokens_for(model, 2 * batch, seqlen)
    with TensorBytes() as tensors:
        calibrate(model, recipe, tokens, device=CPU, dtype=torch.float32)
    assert want.device == pytest.approx(tensors.peak, rel=0.25)


@pytest.mark.parametrize("scheme, kind", [("w4a16", "rtn"), ("w4a16", "gptq"), ("w4a4kv4", "rtn")])
@pytest.mark.parametrize("hidden, intermediate, seqlen", [(256, 704, 16), (128, 512, 256)])
def test_so_is_that_of_learned_rounding(hidden: int, intermediate: int, seqlen: int, scheme: str, kind: Any) -> None:
    model = tiny_llama(hidden=hidden, intermediate=intermediate)
    solver = SolverSpec(kind=kind, learned=RoundingSpec(steps=2, batch_size=2, checks=2))
    recipe = dataclasses.replace(rtn(scheme), solver=solver, data=DataSpec(samples=4, seqlen=seqlen))
    want = counted(model, recipe)
    with TensorBytes() as tensors:
        calibrate(model, recipe, tokens_for(model, 4, seqlen), device=CPU, dtype=torch.float32)
    assert want.device == pytest.approx(tensors.peak, rel=0.25)


@pytest.mark.parametrize(
    "recompute, weight_lr, vocab", [(False, 0.0, 128), (True, 0.0, 128), (True, 1e-4, 128), (False, 0.0, 4096)]
)
def test_so_is_that_of_an_end_to_end_fit(recompute: bool, weight_lr: float, vocab: int) -> None:
    small = vocab > 128
    model = tiny_llama(hidden=128 if small else 256, intermediate=256 if small else 704, vocab=vocab, layers=4)
    spec = EndToEndSpec(steps=2, batch_size=2, weight_lr=weight_lr)
    recipe = dataclasses.replace(
        flatquant("w4a4kv4"), fit=None, end_to_end=spec, data=DataSpec(samples=4, seqlen=128 if small else 64)
    )
    want = counted(model, recipe)
    if recompute:
        want = counted(model, recipe, limits=Limits(host=want.host - 1))
    assert want.recompute == recompute
    tokens = tokens_for(model, 4, recipe.data.seqlen)
    with TensorBytes() as tensors:
        calibrate(model, recipe, tokens, device=CPU, dtype=torch.float32, layout=want)
    assert want.device == pytest.approx(tensors.peak, rel=0.25)


@pytest.mark.parametrize("scheme, dtype", [("w8a16", torch.bfloat16), ("w4g32a16", torch.float32)])
def test_a_rounded_output_layer_is_counted(scheme: str, dtype: torch.dtype) -> None:
    """Its integers, and the rows in float32 that are rounded at a time."""
    model = tiny_llama(hidden=128, intermediate=256, vocab=65536, dtype=dtype)
    recipe = rtn(f"w4a16,lm_head={scheme}")
    want, whole = counted(model, recipe), sum(p.nbytes for p in model.parameters())
    assert want.device > 4 * counted(model, rtn("w4a16")).device
    with TensorBytes() as tensors:
        calibrate(model, recipe, None, device=CPU, dtype=torch.float32)
    assert want.host - LIBRARIES == pytest.approx(whole + tensors.peak, rel=0.1)


@pytest.mark.parametrize("tied, head", [(True, "w8"), (True, "w4"), (False, "w8")])
def test_so_is_a_rounded_embedding(tied: bool, head: str) -> None:
    model = tiny_llama(hidden=128, intermediate=256, vocab=65536, dtype=torch.bfloat16, tied=tied)
    recipe = rtn(f"w4a16,lm_head={head},embed_tokens=w8")
    want, whole = counted(model, recipe), sum(p.nbytes for p in model.parameters())
    with TensorBytes() as tensors:
        calibrate(model, recipe, None, device=CPU, dtype=torch.float32)
    assert want.host - LIBRARIES == pytest.approx(whole + tensors.peak, rel=0.1)


@pytest.mark.parametrize("tokenizer", [None, tiny_tokenizer()])
def test_the_copy_that_writes_texts_is_counted(tokenizer: Any) -> None:
    from flatquant import quantize

    told: list[Estimate] = []
    model = tiny_llama(hidden=128, intermediate=256, layers=24, dtype=torch.bfloat16)
    whole = sum(p.nbytes for p in model.parameters())
    with TensorBytes() as tensors:
        quantize(model, rtn("w4a16"), tokenizer=tokenizer, device="cpu", notice=told.append)
    want = told[0].host - LIBRARIES
    if tokenizer is None:
        assert want < 3 * whole
    else:
        assert want >= 3 * whole
        assert want == pytest.approx(whole + tensors.peak, rel=0.25)


def test_blocks_are_recomputed_where_keeping_them_takes_over_a_third_of_what_is_free(
    model, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = dataclasses.replace(quick("w4a4kv4"), end_to_end=EndToEndSpec(steps=1))
    roomy = counted(model, recipe)
    assert not roomy.recompute
    for free, recompute in ((3 * roomy.host, False), (3 * roomy.host - 3, True)):
        monkeypatch.setattr(machine, "free_host_bytes", lambda free=free: free)
        assert counted(model, recipe, limits=Limits()).recompute == recompute
    least = counted(model, recipe, limits=Limits(host=roomy.host - 1))  # a limit is there to be used
    assert least.recompute
    assert least.host < roomy.host
    never = dataclasses.replace(recipe, end_to_end=EndToEndSpec(steps=1, checkpoint=False))
    with pytest.raises(CalibrationError, match="needs at least"):
        counted(model, never, limits=Limits(host=least.host))


def test_what_is_written_is_as_estimated(tmp_path: Path) -> None:
    from flatquant import quantize

    model = tiny_llama(hidden=256, intermediate=704, dtype=torch.bfloat16)
    recipe = quick("w4a4kv4")
    want = counted(model, recipe)
    written: list[int] = []

    def look(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("solve", total):
            written.append(sum(p.stat().st_size for p in (tmp_path / "out.partial").iterdir()))

    quantize(model, recipe, tokens_for(model, 4, 12), output=tmp_path / "out", device="cpu", progress=look)
    final = sum(p.stat().st_size for p in (tmp_path / "out").iterdir())
    assert want.disk == pytest.approx(written[0] + final, rel=0.25)


def test_the_line_for_people_says_what_it_is(model) -> None:
    line = str(dataclasses.replace(counted(model, quick("w4a4kv4")), streamed=True, windows=1, place="disk"))
    assert line.startswith("estimate, counted from shapes: ")
    assert "streamed, 1 window at a time, activations in a file" in line
    assert "\n" not in line


SMALL, WORDY = (256, 704, 4, 1024), (256, 704, 4, 16384)


@pytest.mark.parametrize(
    "case",
    [
        Case(shape=(512, 1408, 2, 1024), method="rtn"),
        pytest.param(Case(shape=SMALL, samples=4, seqlen=256, epochs=1), marks=pytest.mark.slow),
        pytest.param(Case(shape=SMALL, method="gptq", samples=4, seqlen=64), marks=pytest.mark.slow),
        pytest.param(Case(shape=WORDY, method="quarot", samples=2, seqlen=32), marks=pytest.mark.slow),
        pytest.param(Case(shape=WORDY, method="rtn", scheme="w4a16,lm_head=w8a16"), marks=pytest.mark.slow),
        pytest.param(
            Case(shape=WORDY, preset="quick", samples=8, seqlen=128, steps=2, text="self"), marks=pytest.mark.slow
        ),
        pytest.param(Case(shape=SMALL, method="rtn", stream=True), marks=pytest.mark.slow),
    ],
    ids=lambda case: f"{case.method} {case.preset} {case.scheme} {case.text}{' streamed' if case.stream else ''}",
)
def test_what_a_user_is_told_is_within_a_quarter_of_what_the_process_takes(case: Case) -> None:
    """Python and its libraries, reading the model, writing text and saving included."""
    found = measured(case)
    assert 0.75 < found["host_estimate_over_measured"] < 1.25, found


def test_a_run_that_writes_its_text_is_told_the_memory_for_it() -> None:
    model = tiny_llama(hidden=64, intermediate=160, vocab=65536, dtype=torch.bfloat16)
    recipe = quick("w4a4kv4", samples=8, seqlen=64)
    plain, writes = counted(model, recipe), counted(model, recipe, written=8)
    copied = 4 * sum(p.numel() for p in model.parameters())
    assert writes.host > copied + 2 * copied // 4
    assert writes.host > plain.host
    assert writes.device == plain.device


def test_a_run_that_is_laid_out_by_a_limit_says_so_and_keeps_to_it(model, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = quick("w4a4kv4", samples=64, seqlen=64)
    made: list[str] = []
    real = run.room
    monkeypatch.setattr(run, "room", lambda *args: made.append(args[3]) or real(*args))
    limit = counted(model, recipe).host - 1
    plain, _, _ = calibrated(model, recipe)
    less, _, _ = calibrated(model, recipe, limits=Limits(host=limit))
    assert made == ["device", "disk"]
    assert same_bytes(plain, less)
