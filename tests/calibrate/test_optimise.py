"""The optimiser: its learning rate, and that an interrupted run ends where an uninterrupted one does."""

import copy
import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from flatquant.calibrate.optimise import Optimiser, cosine
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
    state = first.state()
    for b in batches()[5:7]:
        first.step(b)  # what comes after is not part of the state
    kept = copy.deepcopy(state)
    for _ in range(2):  # twice: going on must not change what was kept
        parameters, second = problem(seed=1)
        second.load_state(5, state)
        assert [float(second.step(b)) for b in batches()[5:]] == losses[5:]
        assert all(torch.equal(a, b) for a, b in zip(final(parameters), want, strict=True))
    assert all(torch.equal(state[k], kept[k]) for k in kept)


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
