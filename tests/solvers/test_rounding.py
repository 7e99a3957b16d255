"""Rounding with offsets and factors: its start, its bounds, its gradients."""

import pytest
import torch
from torch import Tensor

from flatquant.quantizers import WeightGrid
from flatquant.solvers import GPTQ, RTN
from flatquant.solvers.rounding import FACTOR, OFFSET, LearnedRounding
from flatquant.spec import QuantSpec
from tests.solvers.test_solvers import correlated, random

SPECS = {
    "symmetric": QuantSpec(bits=4),
    "searched groups": QuantSpec(bits=3, group_size=4, clip="search"),
    "signed scale": QuantSpec(bits=4, group_size=4, signed_scale=True),
    "signed scale, searched": QuantSpec(bits=2, signed_scale=True, clip="search"),
    "asymmetric": QuantSpec(bits=3, symmetric=False),
    "asymmetric, searched groups": QuantSpec(bits=2, symmetric=False, group_size=4, clip="search"),
}


def one_sided(seed: int = 0) -> Tensor:
    """Weights of which some rows are all positive, some all negative: zero points at both ends."""
    w = random(7, 24, seed=seed)
    w[0].abs_()
    w[1].abs_().neg_()
    w[2] = 0
    return w


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("solver", [RTN(), GPTQ(act_order=True)], ids=["rtn", "gptq"])
def test_it_starts_at_the_solvers_rounding(solver, dtype: torch.dtype, spec: QuantSpec) -> None:
    for seed in range(5):
        w = one_sided(seed).to(dtype)
        start = solver.solve(w, WeightGrid(spec), correlated(24).to(dtype))
        rounding = LearnedRounding(w, start)
        got = rounding.frozen()
        assert torch.equal(got.values, start.values)
        assert torch.equal(got.scale, start.scale)
        assert start.zero is None or torch.equal(got.zero, start.zero)  # type: ignore[arg-type]
        torch.testing.assert_close(rounding(), start.dequantize(dtype), rtol=1e-6, atol=1e-7)
        moved, error = (rounding.weight.flatten(-2) - w).abs(), (start.dequantize(dtype) - w).abs()
        assert bool((moved <= error).all())  # it starts between the weight and what that is rounded to
    nearest = LearnedRounding(w, RTN().solve(w, WeightGrid(spec), None))
    assert torch.equal(nearest.weight.flatten(-2), w)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_what_trains_is_what_is_frozen_and_stays_on_the_grid(spec: QuantSpec) -> None:
    w = one_sided()
    rounding = LearnedRounding(w, RTN().solve(w, WeightGrid(spec), None))
    with torch.no_grad():
        for seed, p in enumerate(rounding.parameters()):
            p.add_(random(*p.shape, seed=seed))
    rounding.settle()
    q = rounding.frozen()
    q.check_range()
    torch.testing.assert_close(q.dequantize(torch.float64), rounding().detach(), rtol=1e-6, atol=1e-7)
    assert rounding.offset.abs().max() == OFFSET
    assert rounding.top.min() == 1 - FACTOR
    assert rounding.top.max() == 1 + FACTOR


def test_offsets_and_factors_have_the_straight_through_gradient() -> None:
    """Of y = s (q - z): dy/dV = s and dy/ds = q - z - W / s inside the grid, dy/ds = q - z where it is cut."""
    spec = QuantSpec(bits=3)
    w = torch.tensor([[0.9, -0.35, 0.2, 2.0]], dtype=torch.float64)
    start = RTN().solve(w, WeightGrid(spec), None)
    start = type(start)(values=start.values, scale=start.scale / 2, zero=None, spec=spec)
    start = type(start)(
        values=(w / start.scale.double()).round().clamp(-4, 3).to(torch.int8), scale=start.scale, zero=None, spec=spec
    )
    rounding = LearnedRounding(w, start)
    s = float(start.scale)
    for i in range(4):
        rounding.zero_grad()
        rounding()[0, i].backward()
        ratio, q, cut = float(w[0, i]) / s, float(start.values[0, i]), round(float(w[0, i]) / s) > 3
        assert float(rounding.offset.grad.flatten()[i]) == pytest.approx(0.0 if cut else s)  # type: ignore[union-attr]
        assert float(rounding.top.grad) == pytest.approx(s * (q if cut else q - ratio))  # type: ignore[arg-type]
    assert round(2.0 / s) > 3
