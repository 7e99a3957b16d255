"""Weights that move in the backward pass: no two gradients at once, nothing half-done, the same bits when resumed; and
end-to-end fits that hold weights so."""

import copy
import dataclasses
import gc
import math
import weakref
from itertools import groupby

import pytest
import torch
from torch import Tensor, nn

from flatquant import distributed
from flatquant.calibrate import end2end
from flatquant.calibrate.consuming import ConsumingAdam
from flatquant.calibrate.memory import Limits, WeightBytes
from flatquant.calibrate.optimise import Optimiser
from flatquant.calibrate.pipeline import calibrate
from flatquant.calibrate.state import RunState
from flatquant.cli.options import recipe_of
from flatquant.errors import CalibrationError, SpecError
from flatquant.modules import GROUPS
from flatquant.recipes import flatquant
from flatquant.spec import DataSpec, EndToEndSpec, FitMemory, Recipe, SolverSpec
from tests.calibrate.test_memory import counted
from tests.calibrate.test_optimise import Recorded
from tests.laws import CPU, calibrated, family, quick, same_bytes, tokens_for, varied
from tests.tensor_bytes import TensorBytes
from tests.tiny_models import tiny_llama

MEMORIES: tuple[FitMemory, ...] = ("full", "compact", "transforms")  # of one rank


class Problem:
    """Three weights in bfloat16 one after another, and a scale that has its gradient as usual."""

    def __init__(self, *, splits: int = 1, seed: int = 0, share: float | None = None) -> None:
        g = torch.Generator().manual_seed(0)
        self.weights = [nn.Parameter(torch.randn(16, 16, generator=g).div(4).to(torch.bfloat16)) for _ in range(3)]
        self.scale = nn.Parameter(torch.ones(16))
        self.target = torch.randn(16, 16, generator=g)
        self.optimiser = Optimiser(
            {"weight": self.weights, "scale": [self.scale]},
            {"weight": 2e-2, "scale": 1e-2},
            floors=dict.fromkeys(GROUPS, 0.0),
            steps=24,
            loss_fn=self.loss,
            graph=False,
            splits=splits,
            share=share,
            consumes=True,
            seed=seed,
        )

    def loss(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = x
        for weight in self.weights:
            y = y @ weight.float()
        loss = (y * self.scale - x @ self.target).square().mean()
        return loss * len(x), loss

    def parameters(self) -> list[Tensor]:
        return [p.detach().clone() for p in (*self.weights, self.scale)]

    def run(self, first: int = 0, last: int = 24) -> list[float]:
        return [float(self.optimiser.step(batch(i))) for i in range(first, last)]


def batch(i: int) -> Tensor:
    return torch.randn(8, 16, generator=torch.Generator().manual_seed(i))


def same(a: Problem, b: Problem) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_gradients_of_earlier_parts_alone_and_of_earlier_steps() -> None:
    """A weight that only the first part of a batch uses moves; one whose gradient was NaN holds up no later step."""
    first, second = (nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16)) for _ in range(2))
    used: list[bool] = []

    def loss(x: Tensor) -> tuple[Tensor, Tensor]:
        y = x @ first.float()
        if used.pop(0):
            y = y @ second.float()
        value = y.square().mean()
        return value * len(x), value

    optimiser = Optimiser(
        {"weight": [first, second]},
        {"weight": 1e-1},
        floors=dict.fromkeys(GROUPS, 0.0),
        steps=4,
        loss_fn=loss,
        graph=False,
        splits=2,
        consumes=True,
    )
    used[:] = [True, False] * 2  # and the pass that looks for kernels
    assert math.isfinite(optimiser.step(torch.ones(4, 4)))
    assert bool((second != 1).all())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimiser, "loss_fn", lambda x: (second.float().mul(torch.nan).sum(), x.sum()))
        assert math.isnan(optimiser.step(torch.ones(4, 4)))
    used[:] = [False, False]
    assert math.isfinite(optimiser.step(torch.ones(4, 4)))


def test_the_loss_falls_and_one_gradient_exists_at_a_time() -> None:
    problem, alive = Problem(), []
    for weight in problem.weights:  # before ours, which free the gradient
        weight.register_hook(lambda _: alive.append(sum(p.grad is not None for p in problem.weights)))
    losses = problem.run()
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    assert not any(alive)
    assert len(alive) == 3 * (24 + 1)  # and a rehearsal
    assert not any(p.grad is not None for p in problem.weights)


@pytest.mark.parametrize("splits", [1, 4])
def test_a_resumed_fit_has_the_same_bits(splits: int) -> None:
    whole, first, second = (Problem(splits=splits) for _ in range(3))
    losses = whole.run()
    assert first.run(last=9) == losses[:9]
    state = copy.deepcopy(first.optimiser.state())
    first.run(9, 12)
    assert sum(t.numel() * t.itemsize for name, t in state.items() if name[0] in "012") == 3 * (5 * 256 + 8 + 4)
    second.optimiser.load_state(9, state)
    assert second.run(9) == losses[9:]
    assert same(whole, second)


def test_another_seed_rounds_otherwise() -> None:
    a, b, c = Problem(), Problem(), Problem(seed=1)
    for problem in (a, b, c):
        problem.run(last=3)
    assert same(a, b)
    assert not same(a, c)


def test_gradients_of_parts_add_up() -> None:
    whole, parts = Problem(), Problem(splits=4)
    for problem in (whole, parts):
        problem.loss_of = problem.run(last=6)  # type: ignore[attr-defined]
    assert parts.loss_of == pytest.approx(whole.loss_of, rel=0.02)  # type: ignore[attr-defined]
    assert all(p.grad is None for p in parts.weights)


@pytest.mark.parametrize("splits", [1, 2])
def test_a_loss_that_is_not_finite_moves_nothing(splits: int) -> None:
    problem = Problem(splits=splits)
    problem.run(last=2)
    before = copy.deepcopy(problem.optimiser.state())
    bad = batch(2)
    bad[1] = math.inf  # of the first part
    assert math.isnan(float(problem.optimiser.step(bad)))
    after = problem.optimiser.state()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_gradient_that_is_not_finite_moves_neither_its_weight_nor_those_that_come_after_it() -> None:
    problem = Problem()
    problem.run(last=2)
    handle = problem.weights[1].register_hook(lambda g: g * math.nan)
    before = problem.parameters()
    assert math.isnan(float(problem.optimiser.step(batch(2))))
    moved = [not torch.equal(a, b) for a, b in zip(before, problem.parameters(), strict=True)]
    assert moved == [False, False, True, False]  # the last weight's gradient came first
    handle.remove()
    assert math.isfinite(float(problem.optimiser.step(batch(3))))


def test_a_recorded_step_is_the_eager_one() -> None:
    eager, recorded = Problem(), Problem()
    recorded.optimiser.recorder = recorder = Recorded(recorded.optimiser)
    assert recorded.run() == eager.run()
    assert same(eager, recorded)
    assert recorder.replays > 24


def test_a_record_that_differs_has_moved_nothing() -> None:
    def fault(optimiser: Optimiser) -> None:
        assert optimiser.consuming is not None
        optimiser.consuming.norms.mul_(1.2)

    eager, recorded = Problem(), Problem()
    recorded.optimiser.recorder = Recorded(recorded.optimiser, fault)
    with pytest.warns(UserWarning, match="a gradient's norm is off"):
        losses = recorded.run()
    assert losses == eager.run()
    assert same(eager, recorded)


def test_a_step_without_a_deterministic_kernel_moves_once() -> None:
    plain, strict = Problem(), Problem()
    loss = strict.loss

    def refuse(g: Tensor) -> None:
        if torch.are_deterministic_algorithms_enabled():  # after two weights have their gradients
            raise RuntimeError("f does not have a deterministic implementation")

    strict.weights[0].register_hook(refuse)
    strict.optimiser.loss_fn = loss
    assert strict.run() == plain.run()
    assert not strict.optimiser.reproducible
    assert same(plain, strict)


def test_moments_go_with_their_fit() -> None:
    """Weights outlive it."""
    weight = nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    adam = ConsumingAdam([{"params": [weight], "lr": torch.tensor(1e-2)}], eps=1e-8, seed=0)
    gone = weakref.ref(adam.state[weight]["exp_avg"])
    del adam
    gc.collect()
    assert gone() is None
    weight.float().sum().backward()
    assert weight.grad is not None


# ------------------------------------------------------------------------------------------- whole fits


def held(memory: FitMemory, *, steps: int = 24, **changes: object) -> Recipe:
    end = EndToEndSpec(steps=steps, batch_size=2, weight_lr=5e-4, lr=2e-3, clip_lr=2e-2, memory=memory)
    recipe = dataclasses.replace(quick("w3a4kv4", samples=8, seqlen=24), end_to_end=end)
    return dataclasses.replace(recipe, **changes)


@pytest.fixture(scope="module")
def model():
    return family("llama", dtype=torch.float32)


def test_a_compact_fit_gets_nearly_as_far(model) -> None:
    """As a full one, on the windows of every step; a fit of transforms alone gets less far."""
    gain: dict[str, float] = {}
    for seed in range(3):
        start = varied(copy.deepcopy(model), seed)
        for memory in MEMORIES:
            end = EndToEndSpec(steps=24, batch_size=4, lr=1e-3, clip_lr=1e-2, weight_lr=2e-3, memory=memory)
            recipe = quick("w2a16", samples=4, seqlen=24, end_to_end=end)
            losses = calibrated(start, recipe)[2].end_to_end.losses
            gain[memory] = gain.get(memory, 0) + losses[0] - sum(losses[-3:]) / 3
    assert gain["compact"] > 0.85 * gain["full"]
    assert gain["transforms"] < 0.7 * gain["full"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("memory", ["compact", "transforms"])
def test_every_dtype_of_products_and_models(memory: FitMemory, dtype: torch.dtype) -> None:
    model = family("llama", dtype=dtype)
    quantised, _, report = calibrated(model, held(memory, steps=6), dtype=dtype)
    assert len(report.end_to_end.losses) == 6
    assert all(map(math.isfinite, report.end_to_end.losses))
    assert torch.isfinite(quantised(tokens_for(model, 1, 8)).logits).all()


def test_frozen_weights_in_16_bits_are_those_in_32() -> None:
    model = family("llama", dtype=torch.bfloat16)
    frozen = EndToEndSpec(steps=4, batch_size=2)
    full, less = (
        calibrated(model, held("full", end_to_end=dataclasses.replace(frozen, memory=memory)))
        for memory in ("full", "transforms")
    )
    assert full[2].end_to_end.losses == less[2].end_to_end.losses
    assert same_bytes(full[0], less[0])


class Killed(Exception):
    pass


def kill(at: int):
    def progress(stage: str, done: float, total: float) -> None:
        if (stage, done) == ("end to end", at):
            raise Killed

    return progress


@pytest.mark.parametrize("memory", ["compact", "transforms"])
def test_a_killed_run_ends_with_the_same_bytes(model, memory: FitMemory, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(end2end, "SAVE_EVERY", 2)
    recipe = held(memory, steps=9)
    whole, _, report = calibrated(model, recipe)
    with pytest.raises(Killed):
        calibrated(model, recipe, state=RunState(tmp_path, {}, resume=False), progress=kill(8))
    assert (tmp_path / "end-to-end.safetensors").exists()
    resumed, _, again = calibrated(model, recipe, state=RunState(tmp_path, {}, resume=True))
    assert again.end_to_end == report.end_to_end
    assert same_bytes(resumed, whole)


def test_a_fit_that_made_the_model_worse_is_undone(model) -> None:
    end = EndToEndSpec(steps=3, batch_size=2, weight_lr=0.5, lr=0.3, memory="compact")
    recipe = held("compact", end_to_end=end, data=DataSpec(samples=8, seqlen=256))
    with pytest.warns(UserWarning, match="was undone"):
        _, _, report = calibrated(model, recipe)
    assert report.end_to_end.undone


# ------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize(
    "memory, windows, dtype",
    [
        ("compact", 2, torch.float32),
        ("compact", 1, torch.bfloat16),
        ("transforms", 2, torch.bfloat16),
    ],
)
def test_the_estimate_is_within_a_quarter(memory: FitMemory, windows: int, dtype: torch.dtype) -> None:
    model = tiny_llama(hidden=128, intermediate=352, layers=6, dtype=dtype)
    spec = EndToEndSpec(steps=1, batch_size=2, weight_lr=1e-4, memory=memory)
    data = DataSpec(samples=2, seqlen=32)
    recipe = dataclasses.replace(flatquant("w4a4kv4"), fit=None, end_to_end=spec, data=data)
    want = counted(model, recipe, windows=windows)
    want = counted(model, recipe, windows=windows, limits=Limits(host=want.host - 1))
    assert want.recompute
    tokens = tokens_for(model, 2, recipe.data.seqlen)
    with TensorBytes() as tensors:
        calibrate(model, recipe, tokens, device=CPU, dtype=torch.float32, layout=want)
    assert want.device == pytest.approx(tensors.peak, rel=0.25)


def test_bytes_of_a_weight() -> None:
    spec = EndToEndSpec(weight_lr=1e-4)

    def total(memory: FitMemory, model: torch.dtype = torch.bfloat16) -> float:
        found = WeightBytes.of(spec, memory, model)
        return found.stored + found.moments + found.gradient

    assert total("full") == 16
    assert total("compact") == 5 + 8 / 256
    assert total("transforms") == 2
    shared = WeightBytes.of(spec, "sharded", torch.bfloat16, 4)
    assert shared.stored + shared.moments + shared.gradient == 4
    assert total("transforms", torch.float32) == 4


def laid_out_as(model, memory: str, limit: int, **changes: object):
    end = EndToEndSpec(steps=2, batch_size=2, weight_lr=1e-4, memory=memory)  # type: ignore[arg-type]
    recipe = held("full", fit=None, end_to_end=end, **changes)
    return counted(model, recipe, "cuda", torch.float16, limits=Limits(device=limit, host=1 << 60))


def test_auto_takes_the_full_fit_where_it_fits_and_then_the_compact_one() -> None:
    model = tiny_llama(hidden=256, intermediate=704, layers=8)

    def laid_out(memory: str, limit: int):
        return laid_out_as(model, memory, limit)

    roomy = laid_out("full", 1 << 60)
    chosen: list[str] = []

    def shrink() -> None:
        for share in range(24, 0, -1):
            chosen.append(str(laid_out("auto", roomy.device * share // 24).memory))

    with pytest.raises(CalibrationError, match="more than was allowed"):
        shrink()
    assert chosen[0] == "full"
    assert chosen[-1] == "compact"
    assert chosen == sorted(chosen, reverse=True)  # never back
    assert laid_out("auto", roomy.device).device == roomy.device
    assert "weights trained in 5 bytes each" in str(laid_out("compact", roomy.device))


def test_auto_divides_weights_among_ranks_where_nothing_else_fits(monkeypatch) -> None:
    model = tiny_llama(hidden=256, intermediate=704, layers=24)
    roomy = laid_out_as(model, "full", 1 << 60).device
    monkeypatch.setattr(distributed, "size", lambda: 8)
    chosen = []

    def shrink() -> None:
        for share in range(48, 0, -1):
            chosen.append(laid_out_as(model, "auto", roomy * share // 48))

    with pytest.raises(CalibrationError, match="more than was allowed"):
        shrink()
    assert [memory for memory, _ in groupby(layout.memory for layout in chosen)] == ["full", "compact", "sharded"]
    assert "of each of 8 ranks" in str(chosen[-1])
    assert "weights trained in float32, divided among ranks" in str(chosen[-1])


def test_where_ranks_cannot_divide_weights(monkeypatch) -> None:
    model = tiny_llama()
    with pytest.raises(CalibrationError, match=r"^sharded weights are divided among ranks, and there is one: [^\n]*$"):
        laid_out_as(model, "sharded", 1 << 60)
    monkeypatch.setattr(distributed, "size", lambda: 2)
    adaptive = SolverSpec(kind="gptq", hessian="output_adaptive")
    with pytest.raises(CalibrationError, match=r"^output-adaptive Hessians need all weights on every rank[^\n]*$"):
        laid_out_as(model, "sharded", 1 << 60, solver=adaptive)
    assert laid_out_as(model, "auto", 1 << 60, solver=adaptive).memory == "full"


# ------------------------------------------------------------------------------------------- the option


def test_the_option_changes_how_weights_are_held() -> None:
    arguments = ("w4a4kv4", "best", None, None, None, None, None, None, None)
    assert recipe_of("flatquant", *arguments, weight_memory=None) == flatquant("w4a4kv4", "best")
    made = recipe_of("flatquant", *arguments, weight_memory="compact")
    assert made.end_to_end is not None
    assert made.end_to_end.memory == "compact"
    for preset in ("best", "reference"):  # the word is looked at first
        with pytest.raises(SpecError, match="'small' is not one of 'full', 'compact', 'transforms', 'sharded', 'auto'"):
            recipe_of("flatquant", "w4a4kv4", preset, *arguments[2:], weight_memory="small")
    for preset, hint in (("reference", ", or take --preset best"), ("quick", ", or take --preset best")):
        with pytest.raises(SpecError, match=f"trains no weights end to end: leave out --weight-memory{hint}$"):
            recipe_of("flatquant", "w4a4", preset, *arguments[2:], weight_memory="compact")
    with pytest.raises(SpecError, match=r"of rtn trains no weights end to end: leave out --weight-memory$"):
        recipe_of("rtn", "w4a4", "best", *arguments[2:], weight_memory="compact")
