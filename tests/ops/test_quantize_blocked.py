"""The blocked fake quantiser of the CPU equals its reference, values to the last bit, and its gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flatquant.ops import quantize
from flatquant.ops.quantize import blocked, reference


def run(function, x, low_ratio, high_ratio, top, gradient):
    inputs = [t.clone().requires_grad_() for t in (x, low_ratio, high_ratio)]
    y = function(*inputs, -top - 1, top)
    y.backward(gradient)
    return y.detach(), [t.grad for t in inputs]


@settings(deadline=None)
@given(
    groups=st.integers(1, 3),
    rows=st.integers(1, 12),
    n=st.sampled_from((1, 2, 24, 90)),
    bits=st.integers(2, 8),
    per_row=st.booleans(),
    whole=st.booleans(),
    shift=st.sampled_from((0.0, 0.0, 3.0, -3.0)),
    ties=st.booleans(),
    block=st.sampled_from((1, 100, 1 << 17)),
    seed=st.integers(0, 99),
)
def test_it_equals_the_reference(
    groups: int,
    rows: int,
    n: int,
    bits: int,
    per_row: bool,
    whole: bool,
    shift: float,
    ties: bool,
    block: int,
    seed: int,
) -> None:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, groups, n, generator=g) + shift  # shifted, ranges lie away from 0 and may cross
    if ties:
        x = x.round()
    x[0] = 0
    x[-1] *= 1e-7  # below the least half-range
    ratio_shape = (rows, groups, 1) if per_row else (1, 1, 1)
    low, high = (torch.rand(ratio_shape, generator=g) * 0.6 + 0.4 for _ in range(2))
    if whole:
        low, high = torch.ones_like(low), torch.ones_like(high)
    gradient = torch.randn(x.shape, generator=g)
    top = 2 ** (bits - 1) - 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocked, "_BLOCK", block)
        y, grads = run(blocked.fake_quantize_clamped, x, low, high, top, gradient)
    want, want_grads = run(reference.fake_quantize_clamped, x, low, high, top, gradient)
    assert torch.equal(y, want)
    # Where both ends are as far from 0, the reference halves the scale's gradient between them; that is a choice.
    even = (x.amin(-1) * low[..., 0] == -x.amax(-1) * high[..., 0]) & (x[..., 0] != 0)
    if not even.any():
        # A share of 1 that cuts nothing gets no gradient from torch.clamp; nor does anyone ask for it.
        for got, wanted in list(zip(grads, want_grads, strict=True))[: 1 if whole else 3]:
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_a_cpu_takes_it_for_float32_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    one, seen = torch.ones(1), []
    monkeypatch.setattr(blocked, "fake_quantize_clamped", lambda x, *_: seen.append(x.dtype) or x)
    for dtype in (torch.float32, torch.float64, torch.float16):
        quantize.fake_quantize_clamped(torch.randn(2, 4, dtype=dtype), one, one, -8, 7)
    quantize.fake_quantize_clamped(torch.randn(2, 4), one, one, 0, 15)
    assert seen == [torch.float32]


def test_strided_inputs_and_gradients_are_read_right() -> None:
    x = torch.randn(24, 6).mT
    gradient = torch.randn(24, 6).mT
    one = torch.ones(1)
    y, grads = run(blocked.fake_quantize_clamped, x, one, one, 7, gradient)
    want, want_grads = run(reference.fake_quantize_clamped, x, one, one, 7, gradient)
    assert torch.equal(y, want)
    torch.testing.assert_close(grads[0], want_grads[0])
