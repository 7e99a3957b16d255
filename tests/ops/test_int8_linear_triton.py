"""Products with weights of 8 bits: kernels, numbers and the operator are the reference."""

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

CUDA = torch.cuda.is_available()
pytest.importorskip("triton", reason="Triton has no build for this platform")

from flatquant.ops import int8_linear as op  # noqa: E402
from flatquant.ops.int8_linear import reference  # noqa: E402
from flatquant.ops.int8_linear import triton as fused  # noqa: E402
from flatquant.qtensor import QTensor  # noqa: E402
from flatquant.spec import QuantSpec  # noqa: E402

pytestmark = [pytest.mark.gpu] if CUDA else []
DEVICE = "cuda" if CUDA else "cpu"
# Triton's interpreter multiplies the bits of bfloat16 as if they were integers.
DTYPES = (torch.float32, torch.float16, *([torch.bfloat16] if CUDA else []))


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh tensors hold NaN, so that an element that is not written shows."""

    def full(size: tuple[int, ...], dtype: torch.dtype, **kwargs: Any) -> torch.Tensor:
        return torch.full(size, float("nan"), dtype=dtype, **kwargs)

    monkeypatch.setattr(fused.torch, "empty", full)


def make(tokens: int, o: int, n: int, bias: bool, dtype: torch.dtype, g: torch.Generator) -> list[Any]:
    x = torch.randn(tokens, n, generator=g).to(dtype)
    packed = torch.randint(0, 256, (o, n), generator=g).to(torch.uint8)
    scale = torch.rand(o, generator=g) * 0.01 + 0.001
    b = torch.randn(o, generator=g).to(dtype) if bias else None
    return [None if t is None else t.to(DEVICE) for t in (x, packed, scale, b)]


@settings(deadline=None, max_examples=1000 if CUDA else 12)
@given(
    tokens=st.integers(1, 20),
    o=st.sampled_from((1, 7, 64, 77)),
    n=st.sampled_from((16, 48, 80, 528)),
    bias=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_kernels_are_the_reference(tokens: int, o: int, n: int, bias: bool, dtype: torch.dtype, seed: int) -> None:
    args = make(tokens, o, n, bias, dtype, torch.Generator().manual_seed(seed))
    want = reference.int8_linear(*args)
    size = float((args[0].float().abs() @ (args[1].float() - 128).abs().mT * args[2]).max())
    # Sums of n products in float32 grow apart with the root of n (Higham and Mary, 2019); then they are rounded.
    apart = (n**0.5 * torch.finfo(torch.float32).eps + torch.finfo(dtype).eps) * size
    for kernel in (fused.few, partial(fused.few, rows=64, columns=32), partial(op.many, rows=5)):
        y = kernel(*args)
        assert y.dtype == dtype
        torch.testing.assert_close(y, want, rtol=2 * torch.finfo(dtype).eps, atol=apart)


def test_the_last_tokens_of_several_texts() -> None:
    x, *rest = make(3 * 5, 7, 48, False, torch.float32, torch.Generator().manual_seed(0))
    last = x.view(3, 5, 48)[:, -1:].reshape(-1, 48)
    assert not last.is_contiguous()
    torch.testing.assert_close(fused.few(last, *rest), reference.int8_linear(last, *rest), rtol=1e-5, atol=1e-3)


@given(o=st.integers(1, 9), n=st.integers(1, 40), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=20)
def test_bytes_are_those_of_packed_integers(o: int, n: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    values = torch.randint(-128, 128, (o, n), generator=g, dtype=torch.int8)
    w = QTensor(values=values, scale=torch.rand(o, 1, generator=g) + 0.1, zero=None, spec=QuantSpec(bits=8))
    assert torch.equal(reference.numbers(w.packed(), w.scale[:, 0], torch.float32), w.dequantize())


def test_a_cpu_takes_any_shape() -> None:
    assert op.unsupported(3, 7, torch.device("cpu")) is None
