"""The fused fake quantisers equal their references, values and gradients, on odd shapes, with poisoned outputs.

Without a CUDA device the kernels run in Triton's interpreter (see conftest.py); with one they run there, and carry the
`gpu` marker.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

CUDA = torch.cuda.is_available()
pytest.importorskip("triton", reason="Triton has no build for this platform")

from flatquant.ops.quantize import reference  # noqa: E402
from flatquant.ops.quantize import triton as fused  # noqa: E402

pytestmark = [pytest.mark.gpu] if CUDA else []
DEVICE = "cuda" if CUDA else "cpu"
SIZES = (1, 2, 3, 24, 64, 90, 154, 577)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh tensors hold NaN, so that an element that is not written shows."""

    def nan_like(x: Tensor) -> Tensor:
        return torch.full_like(x, float("nan"))

    def nan(*size: int, **kwargs) -> Tensor:
        return torch.full(size, float("nan"), **kwargs)

    monkeypatch.setattr(fused.torch, "empty_like", nan_like)
    monkeypatch.setattr(fused.torch, "empty", nan)


def _data(rows: int, n: int, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, n, generator=generator) * torch.rand(rows, 1, generator=generator) * 10
    x[0] = 0  # an empty range
    if rows > 1:
        x[1] = x[1].abs()  # all of one sign
    gradient = torch.randn(rows, n, generator=generator)
    return x.to(DEVICE, dtype), gradient.to(DEVICE, dtype)


def _run(function, x: Tensor, low_ratio: Tensor, high_ratio: Tensor, grid: tuple[int, int], gradient: Tensor):
    inputs = [t.clone().requires_grad_() for t in (x, low_ratio, high_ratio)]
    y = function(*inputs, *grid)
    y.backward(gradient)
    return [y.detach(), *(t.grad for t in inputs)]


def _close(got: list[Tensor], want: list[Tensor]) -> None:
    for g, w in zip(got, want, strict=True):
        assert g.dtype == w.dtype
        torch.testing.assert_close(g.float(), w.float(), rtol=1e-5, atol=1e-4)


@settings(deadline=None, max_examples=25)
@given(
    rows=st.integers(1, 9),
    n=st.sampled_from(SIZES),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    low_ratio=st.floats(0.3, 1.0),
    high_ratio=st.floats(0.3, 1.0),
    seed=st.integers(0, 99),
)
def test_rows_equal_the_reference(
    rows: int, n: int, bits: int, symmetric: bool, low_ratio: float, high_ratio: float, seed: int
) -> None:
    grid = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if symmetric else (0, (1 << bits) - 1)
    x, gradient = _data(rows, n, seed, torch.float32)
    ratios = torch.tensor([low_ratio], device=DEVICE), torch.tensor([high_ratio], device=DEVICE)
    got = _run(fused.fake_quantize_rows, x, *ratios, grid, gradient)
    want = _run(reference.fake_quantize_rows, x, *ratios, grid, gradient)
    _close(got, want)


@settings(deadline=None, max_examples=25)
@given(
    rows=st.integers(1, 9),
    n=st.sampled_from(SIZES),
    bits=st.integers(2, 8),
    per_row=st.booleans(),
    seed=st.integers(0, 99),
)
def test_clamped_equals_the_reference(rows: int, n: int, bits: int, per_row: bool, seed: int) -> None:
    grid = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1)
    x, gradient = _data(rows, n, seed, torch.float32)
    generator = torch.Generator().manual_seed(seed + 1)
    low, high = (torch.rand(rows if per_row else 1, 1, generator=generator) * 0.6 + 0.4 for _ in range(2))
    ratios = low.to(DEVICE), high.to(DEVICE)
    got = _run(fused.fake_quantize_clamped, x, *ratios, grid, gradient)
    want = _run(reference.fake_quantize_clamped, x, *ratios, grid, gradient)
    _close(got, want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16] if CUDA else [torch.float16])
def test_half_precision_values_lie_on_the_same_grid(dtype: torch.dtype) -> None:
    x, gradient = _data(5, 90, 0, dtype)
    one = torch.ones(1, device=DEVICE)
    got = _run(fused.fake_quantize_rows, x, one, one, (-8, 7), gradient)
    want = _run(reference.fake_quantize_rows, x, one, one, (-8, 7), gradient)
    assert torch.equal(got[0], want[0])
    torch.testing.assert_close(got[1].float(), want[1].float(), rtol=2e-2, atol=2e-2)


def test_strided_inputs_are_read_right() -> None:
    x, _ = _data(6, 48, 3, torch.float32)
    one = torch.ones(1, device=DEVICE)
    strided = x.view(6, 2, 24).transpose(0, 1)  # (2, 6, 24), not contiguous
    got = fused.fake_quantize_rows(strided, one, one, -8, 7)
    assert torch.equal(got, reference.fake_quantize_rows(strided, one, one, -8, 7))
