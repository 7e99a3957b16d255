"""The optimiser: its learning rate, and that an interrupted run ends where an uninterrupted one does."""

import copy
import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from flatquant.calibrate.optimise import EAGER_STEPS, Optimiser
from flatquant.calibrate.rates import cosine, linear
from flatquant.modules import GROUPS


@pytest.mark.parametrize("lr, floor", [(5e-3, 5e-6), (5e-2, 5e-6), (1e-3, 0.0)])
def test_cosine_goes_from_the_rate_to_the_floor(lr: float, floor: float) -> None:
    assert cosine(0, 480, 0, lr, floor) == pytest.approx(lr)
    assert cosine(480, 480, 0, lr, floor) == pytest.approx(floor, abs=1e-12)
    assert cosine(240, 480, 0, lr, floor) == pytest.approx((lr + floor) / 2)
    rates = [cosine(i, 480, 0, lr, floor) for i in range(481)]
    assert all(a > b for a, b in itertools.pairwise(rates))
    torch_rate = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(torch_rate, T_max=480, eta_min=floor)
    for i in range(40):
        assert cosine(i, 480, 0, lr, floor) == pytest.approx(schedule.get_last_lr()[0])
        torch_rate.step()
        schedule.step()


def test_warm_up_starts_at_a_hundredth() -> None:
    assert cosine(0, 100, 16, 1.0, 0.0) == pytest.approx(0.01)
    assert cosine(8, 100, 16, 1.0, 0.0) == pytest.approx(0.505 * 0.5 * (1 + math.cos(math.pi * 0.08)))
    assert cosine(16, 100, 16, 1.0, 0.0) == cosine(16, 100, 0, 1.0, 0.0)


def problem(seed: int = 0) -> tuple[dict, Optimiser]:
    g = torch.Generator().manual_seed(seed)
    w = nn.Parameter(torch.randn(4, 4, generator=g))
    c = nn.Parameter(torch.randn(4, generator=g))

    def loss_fn(x: Tensor) -> tuple[Tensor, Tensor]:
        loss = ((x @ w).tanh() * c - 1).square().mean()
        return loss / loss.detach(), loss

    parameters = {"transform": [w], "scale": [], "clip": [c]}
    rates = {"transform": 1e-2, "scale": 1e-2, "clip": 1e-1}
    return parameters, Optimiser(
        parameters,
        rates,
        floors=dict.fromkeys(GROUPS, 1e-4),
        steps=12,
        warmup=2,
        weight_decay=0.01,
        loss_fn=loss_fn,
        graph=False,
    )


def batches() -> list[Tensor]:
    return [torch.randn(8, 4, generator=torch.Generator().manual_seed(100 + i)) for i in range(12)]


def final(parameters: dict) -> list[Tensor]:
    return [p.detach().clone() for ps in parameters.values() for p in ps]


def test_an_operation_without_a_deterministic_kernel_is_fitted_all_the_same() -> None:
    def ends(strict: bool) -> tuple[list[Tensor], Optimiser]:
        parameters, optimiser = problem()
        plain = optimiser.loss_fn

        def loss_fn(x: Tensor) -> tuple[Tensor, Tensor]:
            if strict and torch.are_deterministic_algorithms_enabled():
                plain(x)[0].backward()  # gradients that must not count
                raise RuntimeError("f does not have a deterministic implementation")
            return plain(x)

        optimiser.loss_fn = loss_fn
        for batch in batches():
            optimiser.step(batch)
        return final(parameters), optimiser

    (without, one), (with_it, other) = ends(strict=True), ends(strict=False)
    assert (one.reproducible, other.reproducible) == (False, True)
    assert all(torch.equal(a, b) for a, b in zip(without, with_it, strict=True))
    assert not torch.are_deterministic_algorithms_enabled()


def test_other_errors_of_a_step_are_raised() -> None:
    _, optimiser = problem()

    def loss_fn(x: Tensor) -> tuple[Tensor, Tensor]:
        raise RuntimeError("out of memory")

    optimiser.loss_fn = loss_fn
    with pytest.raises(RuntimeError, match="out of memory"):
        optimiser.step(batches()[0])


def test_a_resumed_run_ends_with_the_same_bytes() -> None:
    parameters, whole = problem()
    losses = [float(whole.step(b)) for b in batches()]
    want = final(parameters)
    assert losses[-1] < losses[0]
    _, first = problem()
    early = [float(first.step(b)) for b in batches()[:5]]
    assert early == losses[:5]
    state = copy.deepcopy(first.state())
    for b in batches()[5:7]:
        first.step(b)  # what comes after is not part of the state
    kept = copy.deepcopy(state)
    for _ in range(2):  # twice: going on must not change what was kept
        parameters, second = problem(seed=1)
        second.load_state(5, state)
        assert [float(second.step(b)) for b in batches()[5:]] == losses[5:]
        assert all(torch.equal(a, b) for a, b in zip(final(parameters), want, strict=True))
    assert all(torch.equal(state[k], kept[k]) for k in kept)


def test_signs_move_by_the_rate_alone_along_a_line_to_zero() -> None:
    p = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    slopes = torch.tensor([1e-9, -1e9, 0.0], dtype=torch.float64)
    optimiser = Optimiser(
        {"rounding": [p]},
        {"rounding": 0.4},
        floors={"rounding": 0.0},
        steps=4,
        schedule=linear,
        loss_fn=lambda x: ((p * slopes * x).sum(), x.sum()),
        graph=False,
    )
    for done in (0.4, 0.7, 0.9, 1.0):
        optimiser.step(torch.ones(1))
        torch.testing.assert_close(p.detach(), torch.tensor([-done, done, 0.0]).double(), rtol=1e-6, atol=1e-7)
    optimiser.step(torch.tensor([torch.inf]))  # overflows
    torch.testing.assert_close(p.detach(), torch.tensor([-1.0, 1.0, 0.0]).double(), rtol=1e-6, atol=1e-7)


def test_it_is_adamw_with_a_rate_for_each_group() -> None:
    parameters, ours = problem()
    other, reference = problem()
    ((w,), (c,)) = other["transform"], other["clip"]
    adamw = torch.optim.AdamW([{"params": [w], "lr": 1e-2}, {"params": [c], "lr": 1e-1}], weight_decay=0.01)
    for i, batch in enumerate(batches()):
        ours.step(batch)
        for group, rate in zip(adamw.param_groups, (1e-2, 1e-1), strict=True):
            group["lr"] = cosine(i, 12, 2, rate, 1e-4)
        adamw.zero_grad()
        reference.loss_fn(batch)[0].backward()
        adamw.step()
    for a, b in zip(final(parameters), final(other), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@given(exponent=st.integers(-12, 12))
def test_a_weight_moves_in_proportion_to_its_matrix(exponent: int) -> None:
    """So that one rate serves models whose weights differ in size."""

    def moved(scale: float) -> list[Tensor]:
        g = torch.Generator().manual_seed(0)
        ws = [nn.Parameter(torch.randn(4, 4, generator=g) * scale), nn.Parameter(torch.randn(4, 4, generator=g))]

        def loss_fn(x: Tensor) -> tuple[Tensor, Tensor]:
            loss = ((x @ ws[0] / scale @ ws[1]).tanh() - 1).square().mean()
            return loss, loss

        optimiser = Optimiser(
            {"weight": ws}, {"weight": 1e-2}, floors={"weight": 0.0}, steps=3, loss_fn=loss_fn, graph=False, eps=0.0
        )
        for _ in range(3):
            optimiser.step(torch.ones(2, 4))
        return [ws[0].detach() / scale, ws[1].detach()]

    for a, b in zip(moved(1.0), moved(2.0**exponent), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("splits", [2, 4, 8])
@pytest.mark.parametrize("relative", [True, False])
def test_gradients_of_parts_add_up_to_those_of_the_batch(splits: int, relative: bool) -> None:
    def gradients(splits: int) -> tuple[list[Tensor], float]:
        _, optimiser = problem()
        w, c = (p.data.double() for p in optimiser.parameters)
        w, c = nn.Parameter(w), nn.Parameter(c)

        def loss_fn(x: Tensor) -> tuple[Tensor, Tensor]:
            loss = ((x @ w).tanh() * c - 1).square().mean()
            return (loss / loss.detach() if relative else loss * len(x)), loss

        optimiser.parameters, optimiser.loss_fn = [w, c], loss_fn
        optimiser.splits, optimiser.relative = splits, relative
        loss = optimiser._gradients(batches()[0].double() * torch.arange(1, 9)[:, None])  # parts of different losses
        return [p.grad for p in (w, c)], float(loss)  # type: ignore[misc]

    (whole, loss), (parts, mean) = gradients(1), gradients(splits)
    assert mean == pytest.approx(loss, rel=1e-12)
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


# ------------------------------------------------------------------------------------------- recorded steps


class Recorded:
    """Stands for CUDA graphs on a CPU: a record does what its function does, or something else."""

    def __init__(self, optimiser: Optimiser, fault: Callable[[Optimiser], None] | None = None) -> None:
        self.optimiser, self.fault, self.replays = optimiser, fault, 0

    def __call__(self, function: Callable[[], None]) -> Callable[[], None]:
        def replay() -> None:
            self.replays += 1
            function()
            if self.fault is not None:
                self.fault(self.optimiser)

        return replay


def recorded(fault: Callable[[Optimiser], None] | None = None) -> tuple[list[Tensor], list[float], Recorded]:
    parameters, optimiser = problem()
    optimiser.recorder = record = Recorded(optimiser, fault)
    losses = [float(optimiser.step(b)) for b in batches()]
    return final(parameters), losses, record


def test_a_recorded_step_is_compared_with_its_eager_one_and_changes_nothing() -> None:
    parameters, eager = problem()
    want = [float(eager.step(b)) for b in batches()]
    ends, losses, record = recorded()
    assert losses == want
    assert all(torch.equal(a, b) for a, b in zip(ends, final(parameters), strict=True))
    assert record.replays == 1 + 2 * (12 - EAGER_STEPS)  # one more than steps: the comparison


def scale_gradients(optimiser: Optimiser) -> None:
    for p in optimiser.parameters:
        if p.grad is not None:
            p.grad.mul_(1.2)


def lose_a_gradient(optimiser: Optimiser) -> None:
    optimiser.parameters[1].grad = None


def another_batch(optimiser: Optimiser) -> None:
    optimiser.static_loss.copy_(optimiser._backward(batches()[0]))


FAULTS = {
    "its loss is": another_batch,
    "a gradient's norm is off": scale_gradients,
    "it has 1 gradients, not 2": lose_a_gradient,
    "its loss is nan": lambda optimiser: optimiser.static_loss.fill_(math.nan),
}


@pytest.mark.parametrize("message", FAULTS)
def test_a_record_that_differs_is_dropped_before_it_moves_anything(message: str) -> None:
    parameters, eager = problem()
    want = [float(eager.step(b)) for b in batches()]
    with pytest.warns(UserWarning, match=message) as caught:
        ends, losses, record = recorded(FAULTS[message])
    assert len(caught) == record.replays == 1
    assert losses == want
    assert all(torch.equal(a, b) for a, b in zip(ends, final(parameters), strict=True))


def test_a_replay_that_does_nothing_is_noticed() -> None:
    _, optimiser = problem()
    optimiser.recorder = lambda function: lambda: None
    with pytest.warns(UserWarning, match="its loss is nan"):
        losses = [float(optimiser.step(batch)) for batch in batches()]
    assert not any(map(math.isnan, losses))


def test_numbers_that_are_not_finite_are_no_fault_of_the_record() -> None:
    _, optimiser = problem()
    optimiser.recorder = Recorded(optimiser)
    assert all(math.isnan(optimiser.step(b * math.inf)) for b in batches())
    assert optimiser.recorder is not None


# ------------------------------------------------------------------------------------------- overflow


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("record", [False, True])
def test_a_step_that_overflows_changes_nothing_and_says_nan(what: str, record: bool) -> None:
    def run(broken: int | None) -> tuple[list[Tensor], list[float]]:
        parameters, optimiser = problem()
        plain = optimiser.loss_fn

        def loss_fn(x: Tensor) -> tuple[Tensor, Tensor]:
            objective, loss = plain(x)
            bad = bool(x.isnan().any())
            if bad and what == "gradient":
                w = optimiser.parameters[0]
                return (w * math.inf).sum() * 0 + w.sum(), torch.ones(())  # a loss that is finite
            return objective, loss

        optimiser.loss_fn = loss_fn
        if record:
            optimiser.recorder = Recorded(optimiser)
        losses = []
        for i, batch in enumerate(batches()):
            if i == broken:
                before = copy.deepcopy(optimiser.state())
                losses.append(float(optimiser.step(batch * math.nan)))
                after = optimiser.state()
                assert all(torch.equal(before[k], after[k]) for k in before)
                optimiser.restart(i)
            losses.append(float(optimiser.step(batch)))
        return final(parameters), losses

    (ends, losses), (want, good) = run(7), run(None)
    assert math.isnan(losses.pop(7))
    assert losses == good
    assert all(torch.equal(a, b) for a, b in zip(ends, want, strict=True))


@pytest.mark.parametrize("losses", [(0.0, 0.0), (0.0, 1.0), (1.0, 0.0)])
def test_a_part_without_loss_has_no_gradients(losses: tuple[float, float]) -> None:
    """A batch in two parts, one of them already right: gradients are those of the other, relative to the whole."""
    p = nn.Parameter(torch.ones(3))
    _, optimiser = problem()

    def loss_fn(x: Tensor) -> tuple[Tensor, Tensor]:
        loss = (x * p).square().sum()
        return loss / loss.detach().clamp(min=torch.finfo(loss.dtype).tiny), loss

    optimiser.parameters, optimiser.loss_fn = [p], loss_fn
    optimiser.splits, optimiser.relative = 2, True
    total = float(optimiser._gradients(torch.tensor(losses)[:, None].expand(2, 3)))
    assert total == sum(losses) * 3 / 2
    assert p.grad is not None
    assert torch.equal(p.grad, torch.full((3,), 2 / 3) if sum(losses) else torch.zeros(3))
