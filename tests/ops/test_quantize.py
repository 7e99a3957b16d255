"""Rounding to grids, and its gradient against plain autograd."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flatquant.ops.quantize.reference import asymmetric_grid, fake_quantize, quantize, round_ste, symmetric_grid


def straight_through(x: Tensor, scale: Tensor, zero: Tensor | None, low: int, high: int) -> Tensor:
    """The same function, left to autograd: rounding has the identity as gradient, the clamp masks."""
    offset = 0 if zero is None else zero
    return scale * (torch.clamp(round_ste(x / scale) + offset, low, high) - offset)


shapes = st.sampled_from(
    [
        ((3, 8), (3, 1)),  # per token
        ((2, 3, 8), (2, 3, 1)),
        ((4, 2, 5), (4, 2, 1)),  # per group
        ((2, 3, 8), (1,)),  # one for all: the gradient is summed over everything
        ((2, 3, 8), (3, 1)),  # fewer dimensions than x
    ]
)


@settings(deadline=None)
@given(shape=shapes, bits=st.integers(2, 8), symmetric=st.booleans(), wide=st.floats(0.3, 2.0), seed=st.integers(0, 99))
def test_gradients_equal_straight_through_autograd(
    shape: tuple, bits: int, symmetric: bool, wide: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape[0], generator=generator, dtype=torch.float64)
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if symmetric else (0, (1 << bits) - 1)
    # `wide` below 1 makes the clamp active at some values.
    scale = (0.5 + torch.rand(shape[1], generator=generator, dtype=torch.float64)) * wide * 4 / 2**bits
    zero = None if symmetric else torch.randint(0, high, shape[1], generator=generator).double()
    weight = torch.randn(shape[0], generator=generator, dtype=torch.float64)
    results = []
    for function in (fake_quantize, straight_through):
        leaves = [t.clone().requires_grad_() for t in (x, scale, zero) if t is not None]
        y = function(*leaves, *([None] if symmetric else []), low, high)
        grads = torch.autograd.grad((y * weight).sum(), leaves)
        results.append((y.detach(), *grads))
    for ours, autograd in zip(*results, strict=True):
        torch.testing.assert_close(ours, autograd, rtol=1e-9, atol=1e-9)


@settings(deadline=None)
@given(bits=st.integers(2, 8), symmetric=st.booleans(), seed=st.integers(0, 99), scale=st.floats(1e-6, 1e4))
def test_forward_is_dequantised_integers(bits: int, symmetric: bool, seed: int, scale: float) -> None:
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(seed)) * scale
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    if symmetric:
        s, z, lo, hi = symmetric_grid(low, high, bits), None, -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    else:
        (s, z), lo, hi = asymmetric_grid(low, high, bits), 0, (1 << bits) - 1
    q = quantize(x, s, z, lo, hi)
    assert torch.equal(q, q.round())
    assert lo <= q.min()
    assert q.max() <= hi
    y = fake_quantize(x, s, z, lo, hi)
    assert torch.equal(y, (q if z is None else q - z) * s)
    # Nothing is clipped, so that no value moves by more than half a step (one where the zero point was rounded too).
    assert ((y - x).abs() <= (0.5 if symmetric else 1.0) * s * (1 + 1e-4)).all()


@pytest.mark.parametrize("value", [0.0, -3.0, 3.0])
def test_grids_of_constant_rows_are_usable(value: float) -> None:
    low, high = torch.full((1,), min(value, 0.0)), torch.full((1,), max(value, 0.0))
    scale = symmetric_grid(low, high, 4)
    wide, zero = asymmetric_grid(low, high, 4)
    for s in (scale, wide):
        assert torch.isfinite(s).all()
        assert (s > 0).all()
    x = torch.tensor([value])
    assert fake_quantize(x, scale, None, -8, 7).item() == pytest.approx(value)
    assert fake_quantize(x, wide, zero, 0, 15).item() == pytest.approx(value, abs=0.11)
