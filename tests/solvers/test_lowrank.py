"""The low-rank branch as mathematics: what it leaves, how good it is, and when refining it helps."""

import pytest
import torch
from torch import Tensor

from flatquant.quantizers import WeightGrid
from flatquant.solvers import RTN
from flatquant.solvers import lowrank as module
from flatquant.solvers.lowrank import low_rank, split
from flatquant.spec import QuantSpec
from tests.solvers.test_solvers import correlated, random


def structured(o: int, n: int, seed: int = 0) -> Tensor:
    """A weight with large singular directions on top of noise, as smoothing leaves it."""
    return random(o, 6, seed=seed) @ random(6, n, seed=seed + 1) * 3 + random(o, n, seed=seed + 2)


def rounded(r: Tensor) -> Tensor:
    return RTN().solve(r, WeightGrid(QuantSpec(bits=4, group_size=8)), None).dequantize(r.dtype)


def test_branch_and_rest_are_the_weight() -> None:
    w, x = structured(40, 32), random(7, 32, seed=9)
    branch = low_rank(w, 5)
    rest = w - branch.weight(w)
    y = x @ rest.mT + (x @ branch.down.double().mT) @ branch.up.double().mT
    torch.testing.assert_close(y, x @ w.mT, rtol=1e-12, atol=1e-12)
    assert branch.down.dtype == branch.up.dtype == torch.float16
    assert (branch.down.shape, branch.up.shape) == ((5, 32), (40, 5))


def test_it_is_the_best_of_its_rank() -> None:
    w = structured(40, 32)
    s = torch.linalg.svdvals(w)
    for rank in (1, 4, 8):
        left = (w - low_rank(w, rank).weight(w)).norm()
        assert left == pytest.approx(float(s[rank:].norm()), rel=1e-3)  # Eckart and Young, up to float16


def test_full_rank_leaves_what_float16_loses() -> None:
    w = structured(40, 32)
    assert (w - low_rank(w, 32).weight(w)).norm() < 1e-3 * w.norm()


def test_large_matrices_are_decomposed_by_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    w = structured(90, 70)
    exact = low_rank(w, 4)
    monkeypatch.setattr(module, "_EXACT", 0)
    state = torch.get_rng_state()
    fast, again = low_rank(w, 4), low_rank(w, 4)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(fast.down, again.down)
    left = [(w - branch.weight(w)).norm() for branch in (fast, exact)]
    assert left[0] == pytest.approx(float(left[1]), rel=1e-3)


def error(w: Tensor, branch, h: Tensor) -> float:
    d = w - branch.weight(w) - rounded(w - branch.weight(w))
    return float((d @ h * d).sum())


@pytest.mark.parametrize("seed", range(5))
def test_more_rank_and_more_rounds_never_cost(seed: int) -> None:
    w, h = structured(40, 32, seed=seed), correlated(32, seed=seed + 9)
    eye = torch.eye(32, dtype=torch.float64)
    errors = [error(w, low_rank(w, rank), eye) for rank in (1, 2, 4, 8, 16, 32)]
    assert errors == sorted(errors, reverse=True)
    for hessian in (None, h):
        measure = eye if hessian is None else h
        once = error(w, split(w, 4), measure)
        often = error(w, split(w, 4, rounds=10, rounded=rounded, hessian=hessian), measure)
        assert often <= once
    assert once < error(w, split(w, 1), h)


def test_outliers_go_into_the_branch() -> None:
    """A few large columns, as smoothing makes them, are directions of their own."""
    w = random(64, 48)
    w[:, [3, 17]] *= 50
    plain = rounded(w) - w
    branch = low_rank(w, 2)
    rest = w - branch.weight(w)
    assert rest.abs().max() < 0.1 * w.abs().max()
    assert (rounded(rest) - rest).norm() < 0.3 * plain.norm()


def test_refinement_needs_to_know_the_rounding() -> None:
    with pytest.raises(AssertionError, match="rounding that follows"):
        split(structured(8, 8), 2, rounds=2)
