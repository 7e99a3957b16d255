"""GPTQ's recursion in one kernel equals the columns walked one by one, on odd shapes, with poisoned outputs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

CUDA = torch.cuda.is_available()
pytest.importorskip("triton", reason="Triton has no build for this platform")

from flatquant.ops.gptq import reference  # noqa: E402
from flatquant.ops.gptq import triton as fused  # noqa: E402

pytestmark = [pytest.mark.gpu] if CUDA else []
DEVICE = "cuda" if CUDA else "cpu"


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh tensors hold NaN, so that an element that is not written shows."""
    monkeypatch.setattr(fused.torch, "empty", lambda *size, **kwargs: torch.full(size, float("nan"), **kwargs))


@settings(deadline=None, max_examples=25)
@given(
    rows=st.integers(1, 40),
    b=st.sampled_from((1, 2, 5, 24, 33)),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    grouped=st.booleans(),
    by_columns=st.booleans(),
    seed=st.integers(0, 99),
)
def test_it_equals_the_reference(
    rows: int, b: int, bits: int, symmetric: bool, grouped: bool, by_columns: bool, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    wide = torch.randn(rows, b + 3, generator=g).to(DEVICE)
    w = wide[:, 1 : b + 1]  # a view, as the solver passes
    u = (torch.randn(b, b, generator=g).triu(1) * 0.2 + torch.diag(torch.rand(b, generator=g) + 0.5)).to(DEVICE)
    if by_columns:  # as Cholesky leaves it on CUDA
        u = u.mT.contiguous().mT
    scale = (torch.rand(rows, b if grouped else 1, generator=g) * 0.2 + 0.05).expand(-1, b).to(DEVICE)
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if symmetric else (0, (1 << bits) - 1)
    zero = None if symmetric else torch.randint(0, high + 1, scale.shape, generator=g).float().to(DEVICE)
    before = wide.clone()
    q, errors = fused.round_columns(w, u, scale, zero, low, high)
    assert torch.equal(wide, before)
    # The kernel may fuse a multiplication and an addition: given its own errors, every column is rounded right.
    start = w.double() - (errors.double() @ u.double().triu(1))
    wanted = torch.round(start / scale) + (0 if zero is None else zero)
    near_tie = ((start / scale).frac().abs() - 0.5).abs() < 1e-3
    assert torch.equal(q.double()[~near_tie], wanted.clamp(low, high)[~near_tie])
    rounded = scale * (q if zero is None else q - zero)
    torch.testing.assert_close(errors.double(), (start - rounded) / u.diagonal(), rtol=1e-3, atol=1e-4)
    want_q, want_errors = reference.round_columns(w, u, scale, zero, low, high)
    if torch.equal(q, want_q):
        torch.testing.assert_close(errors, want_errors, rtol=1e-3, atol=1e-3)
    assert (q == want_q).float().mean() > 0.9
