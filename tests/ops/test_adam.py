"""Adam in 5 bytes a weight: rounding is right on average, moments are known to a share of themselves, and steps are
nearly those of Adam in float32."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flatquant.ops.adam import BLOCK, reference
from flatquant.ops.adam.reference import (
    FIRST_GAP,
    FIRST_LEVELS,
    SECOND_GAP,
    SECOND_LEVELS,
    decoded_first,
    decoded_second,
    encoded_first,
    encoded_second,
    fresh_state,
    joined,
    noise,
    rounded,
)

try:
    from flatquant.ops.adam import triton as fused
except ImportError:
    fused = None

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ALL = torch.arange(1 << 8)  # every chance there is
SHARES = (torch.arange(1 << 12).float() + 0.5) / (1 << 12)


@settings(deadline=None, max_examples=30)
@given(x=st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False))
def test_weights_are_rounded_to_a_neighbour_and_right_on_average(x: float) -> None:
    p, rest = rounded(torch.full((len(ALL),), x), ALL)
    whole = joined(p, rest)
    assert torch.equal(p, whole.to(torch.bfloat16)) or (rest == -128).any()  # of two as near, any
    found = whole.double()
    ends = found.amin(), found.amax()
    assert ends[0] <= x <= ends[1]
    assert float(ends[1] - ends[0]) <= 2**-15 * abs(x)
    assert float(found.mean()) == pytest.approx(x, rel=1e-12)


def largest(gap: float) -> float:
    """How far a value may be from either of its levels, as a share of it."""
    return 2**gap - 1 + 1e-4


@settings(deadline=None)
@given(exponent=st.floats(-20, 0), scale=st.sampled_from((1e-12, 1.0, 3e7)), sign=st.sampled_from((-1, 1)))
def test_first_moments_are_near_and_right_on_average(exponent: float, scale: float, sign: int) -> None:
    x = sign * scale * 2**exponent
    n = len(SHARES)
    scales = torch.full((n,), scale)
    found = decoded_first(encoded_first(torch.full((n,), x), scales, SHARES), scales[::BLOCK]).double()
    least = scale * 2 ** (-FIRST_LEVELS * FIRST_GAP)
    assert ((found - x).abs() <= max(largest(FIRST_GAP) * abs(x), least)).all()
    # The chances are 2^12 even steps between two levels.
    assert float(found.mean()) == pytest.approx(x, rel=3e-5, abs=3e-4 * least)


@settings(deadline=None)
@given(exponent=st.floats(-30, 0), scale=st.sampled_from((1e-12, 1.0, 3e7)))
def test_second_moments_are_near_and_right_on_average_and_never_below_the_least_level(
    exponent: float, scale: float
) -> None:
    n, x = len(SHARES), scale * 2**exponent
    scales = torch.full((n,), scale)
    found = decoded_second(encoded_second(torch.full((n,), x), scales, SHARES), scales[::BLOCK]).double()
    least = scale * 2 ** (-SECOND_LEVELS * SECOND_GAP)
    if x < least:
        assert found.tolist() == pytest.approx([least] * n, rel=1e-5)
    else:
        assert ((found - x).abs() <= largest(SECOND_GAP) * x).all()
        assert float(found.mean()) == pytest.approx(x, rel=3e-5)


@settings(deadline=None)
@given(code=st.integers(0, 255), scale=st.sampled_from((1e-9, 1.0, 5.0)), share=st.floats(0.01, 0.99))
def test_a_level_is_its_own_code(code: int, scale: float, share: float) -> None:
    """But for the last bits of a logarithm, which may make it the level below and, nearly always, up to it."""
    one = torch.tensor([scale])
    x = decoded_second(torch.tensor([code], dtype=torch.uint8), one)
    assert int(encoded_second(x, one, torch.tensor([share]))) == code
    signed = torch.tensor([code - 127 if code < 255 else 127], dtype=torch.int8)
    assert torch.equal(encoded_first(decoded_first(signed, one), one, torch.tensor([share])), signed)


def test_chance_is_even_and_differs_from_step_to_step() -> None:
    index = torch.arange(1 << 16)
    seen = [noise(index, torch.tensor(float(step)), key) for step, key in ((1, 0), (2, 0), (1, 1))]
    assert all(torch.equal(a, b) for a, b in zip(noise(index, torch.tensor(1.0), 0), seen[0], strict=True))
    flat = torch.stack([part for pair in seen for part in pair]).double() / 2**32
    assert ((flat.mean(1) - 0.5).abs() < 5 / math.sqrt(12 * len(index))).all()
    correlation = torch.corrcoef(torch.cat([flat, flat * 2**16 % 1]))
    assert (correlation - torch.eye(len(correlation)).double()).abs().max() < 6 / math.sqrt(len(index))


def weights(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight, and a gradient whose sizes differ a hundredfold."""
    g = torch.Generator().manual_seed(seed)
    p = torch.randn(n, generator=g).to(torch.bfloat16)
    return p.to(DEVICE), (torch.randn(n, generator=g) * 10 ** (2 * torch.rand(n, generator=g) - 1)).to(DEVICE)


def scalars(lr: float = 1e-2, hold: float = 0.0) -> dict[str, Tensor]:
    return {"lr": torch.tensor(lr, device=DEVICE), "hold": torch.tensor(hold, device=DEVICE)}


def test_steps_are_nearly_those_of_adam() -> None:
    """On average over many weights: what rounding adds is chance, and averages out."""
    n = 1 << 13
    p, direction = weights(n)
    exact = torch.nn.Parameter(p.float())
    adam, state = torch.optim.Adam([exact], lr=2e-3), fresh_state(p)
    start = p.float()
    g = torch.Generator().manual_seed(1)
    for _ in range(60):
        grad = direction + direction.abs() * torch.randn(n, generator=g).to(DEVICE)
        exact.grad = grad
        adam.step()
        reference.adam_step(p, grad, state, eps=1e-8, key=7, **scalars(2e-3))
    ours, want = p.float() - start, exact.detach() - start
    assert float((ours @ want) / ours.norm() / want.norm()) > 0.97
    assert float((ours @ want) / want.square().sum()) == pytest.approx(1, abs=0.02)
    assert float((ours - want).mean()) == pytest.approx(0, abs=5 * float((ours - want).std()) / math.sqrt(n))


@pytest.mark.parametrize("n", [1, 255, 256, 1000, (1 << 16) + 300])
def test_it_holds_four_bytes_a_weight_and_changes_nothing_when_held(n: int) -> None:
    p, grad = weights(n)
    state = fresh_state(p)
    size = p.nbytes + sum(t.nbytes for t in state.values())
    assert size == 5 * n + 8 * -(-n // BLOCK) + 4
    reference.adam_step(p, grad, state, eps=1e-8, key=0, **scalars())
    before = [t.clone() for t in (p, *state.values())]
    reference.adam_step(p, grad.fill_(torch.nan), state, eps=1e-8, key=0, **scalars(hold=1.0))
    assert all(torch.equal(a, b) for a, b in zip(before, (p, *state.values()), strict=True))


def test_no_gradient_moves_nothing() -> None:
    p, grad = weights(512)
    state, before = fresh_state(p), p.clone()
    reference.adam_step(p, torch.zeros_like(grad), state, eps=1e-8, key=0, **scalars())
    assert torch.equal(p, before)
    assert not state["exp_avg"].any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_kernel_takes_billions() -> None:
    """Offsets beyond 2^31."""
    n = (1 << 31) + 512
    p = torch.zeros(n, dtype=torch.bfloat16, device=DEVICE)
    state = fresh_state(p)
    assert fused is not None
    fused.adam_step(p, torch.ones_like(p), state, eps=1e-8, key=0, **scalars())
    assert float(p[-1]) == pytest.approx(-1e-2, rel=1e-2)


@pytest.mark.skipif(fused is None, reason="Triton has no build for this platform")
@settings(deadline=None, max_examples=12)
@given(
    n=st.sampled_from((1, 255, 256, 1000, 4096, 5000)),
    key=st.sampled_from((0, 1, 16, 2**31 + 5, 2**32 - 1)),
    dtype=st.sampled_from((torch.bfloat16, torch.float32)),
    seed=st.integers(0, 99),
)
def test_the_kernel_is_the_reference(n: int, key: int, dtype: torch.dtype, seed: int) -> None:
    """The same chance, and arithmetic to the last bits: next to all codes and weights are the same."""
    p, grad = weights(n, seed)
    grad = grad.to(dtype)
    assert fused is not None
    results: list[list[Tensor]] = []
    for run in (reference.adam_step, fused.adam_step):
        own, state = p.clone(), fresh_state(p)
        arguments: dict[str, Any] = {"eps": 1e-8, "key": key, **scalars()}
        for _ in range(3):
            run(own, grad, state, **arguments)
        results.append([own, *state.values()])
    names = ("p", *fresh_state(p))
    for name, want, got in zip(names, *results, strict=True):
        want, got = want.double(), got.double()
        if name in ("exp_avg", "exp_avg_sq"):
            assert (want - got).abs().max() <= 2, name
            assert (want != got).sum() <= 1 + 0.002 * n, name
        elif name == "p":
            assert (want != got).sum() <= 1 + 0.01 * n
            torch.testing.assert_close(got, want, rtol=2**-6, atol=1e-3)
        elif name == "rest":  # the last place of a difference in float32 that was rounded otherwise
            assert ((want - got).abs() > 1).sum() <= 1 + 0.01 * n
        else:
            torch.testing.assert_close(got, want, rtol=1e-5, atol=0)
    (own, *state), before = results[1], [t.clone() for t in results[1]]
    fused.adam_step(own, grad, dict(zip(names[1:], state, strict=True)), eps=1e-8, key=key, **scalars(hold=1.0))
    assert all(torch.equal(a, b) for a, b in zip(before, results[1], strict=True))
