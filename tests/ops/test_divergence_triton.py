"""KL divergence in one kernel a direction, values and gradients, beside its reference."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

CUDA = torch.cuda.is_available()
pytest.importorskip("triton", reason="Triton has no build for this platform")

from flatquant.ops.divergence import reference  # noqa: E402
from flatquant.ops.divergence import triton as fused  # noqa: E402

pytestmark = [pytest.mark.gpu] if CUDA else []
DEVICE = "cuda" if CUDA else "cpu"


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh tensors hold NaN, so that an element that is not written shows."""
    monkeypatch.setattr(fused.torch, "empty", lambda size, **kwargs: torch.full(size, float("nan"), **kwargs))
    monkeypatch.setattr(fused.torch, "empty_like", lambda x: torch.full_like(x, float("nan")))


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 5),
    v=st.sampled_from((1, 7, 300, 4096, 5000)),
    spread=st.sampled_from((0.1, 3.0, 40.0)),
    half=st.booleans(),
    seed=st.integers(0, 99),
)
def test_it_equals_the_exact_value(rows: int, v: int, spread: float, half: bool, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    dtype = torch.float16 if half else torch.float32
    teacher, student = (torch.randn(2, rows, v, generator=g).mul(spread).to(DEVICE, dtype) for _ in range(2))
    weight = torch.randn(2, rows, generator=g).to(DEVICE)
    p, q = teacher.double().log_softmax(-1), student.double().log_softmax(-1)
    exact_kl = (p.exp() * (p - q)).sum(-1)
    exact_grad = weight[..., None] * (q.exp() - p.exp())
    stored, single = torch.finfo(dtype), torch.finfo(torch.float32)
    least = single.smallest_normal + stored.smallest_normal * stored.eps  # what may be flushed to zero
    # Every term is a difference of logits and of their log-sum-exps: it is known to the rounding of the largest of
    # these, whatever it comes to; a probability, the exponential of one, to as much of itself.
    largest = teacher.double().abs().amax(-1) + student.double().abs().amax(-1) + math.log(v)
    rounding = 4 * single.eps * (1 + largest)
    for kl_rows in (fused.kl_rows, reference.kl_rows):
        s = student.clone().requires_grad_()
        kl = kl_rows(teacher, s)
        (kl * weight).sum().backward()
        assert s.grad is not None
        assert (kl.dtype, s.grad.dtype) == (torch.float32, dtype)
        assert ((kl - exact_kl).abs() <= rounding).all()
        bound = (rounding * weight.abs())[..., None] * (p.exp() + q.exp())
        bound = bound + stored.eps * exact_grad.abs() + least
        assert ((s.grad - exact_grad).abs() <= bound).all()


def test_equal_rows_have_no_divergence_and_no_gradient() -> None:
    x = torch.randn(3, 100, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    s = x.clone().requires_grad_()
    kl = fused.kl_rows(x, s)
    kl.sum().backward()
    torch.testing.assert_close(kl, torch.zeros_like(kl), rtol=0, atol=1e-6)
    assert s.grad is not None
    torch.testing.assert_close(s.grad, torch.zeros_like(x), rtol=0, atol=1e-7)
