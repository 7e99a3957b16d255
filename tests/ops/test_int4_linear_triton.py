"""Products with packed 4-bit weights are exact, whatever the number of tokens."""

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

CUDA = torch.cuda.is_available()
pytest.importorskip("triton", reason="Triton has no build for this platform")

from flatquant.ops import int4_linear as op  # noqa: E402
from flatquant.ops.int4_linear import reference  # noqa: E402
from flatquant.ops.int4_linear import triton as fused  # noqa: E402
from flatquant.ops.kron_quantize.reference import of_rows  # noqa: E402
from flatquant.ops.pack.reference import pack_bits  # noqa: E402

pytestmark = [pytest.mark.gpu] if CUDA else []
DEVICE = "cuda" if CUDA else "cpu"
# Triton's interpreter multiplies the bits of bfloat16 as if they were integers, and cuts instead of rounding.
DTYPES = (torch.float32, torch.float16, *([torch.bfloat16] if CUDA else []))


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh tensors hold NaN, or another wrong number, so that an element that is not written shows."""

    def full(size: int | tuple[int, ...], dtype: torch.dtype, **kwargs: Any) -> torch.Tensor:
        wrong = float("nan") if dtype.is_floating_point else 0x77
        return torch.full((size,) if isinstance(size, int) else size, wrong, dtype=dtype, **kwargs)

    monkeypatch.setattr(fused.torch, "empty", full)


def make(tokens: int, o: int, n: int, bias: bool, residual: bool, dtype: torch.dtype, g: torch.Generator):
    x = torch.randint(-8, 8, (tokens, n), generator=g, dtype=torch.int8)
    packed = pack_bits(torch.randint(0, 16, (o, n), generator=g).to(torch.uint8), 4)
    x_scale = torch.rand(tokens, 1, generator=g) + 0.1
    scale = torch.rand(o, generator=g) + 0.1
    b = torch.randn(o, generator=g) * 10 if bias else None
    r = torch.randn(tokens, o, generator=g).to(dtype) if residual else None
    return [None if t is None else t.to(DEVICE) for t in (x, x_scale, packed, scale, b, r)]


@settings(deadline=None, max_examples=2500 if CUDA else 12)
@given(
    tokens=st.integers(1, 20),
    o=st.sampled_from((16, 48, 80)),
    n=st.sampled_from((32, 96, 288, 1056)),
    bias=st.booleans(),
    residual=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    parts=st.sampled_from((None, 1, 2, 3, 5)),
    seed=st.integers(0, 99),
)
def test_products_are_exact(
    tokens: int, o: int, n: int, bias: bool, residual: bool, dtype: torch.dtype, parts: int | None, seed: int
) -> None:
    args = make(tokens, o, n, bias, residual, dtype, torch.Generator().manual_seed(seed))
    want = reference.int4_linear(*args, torch.float32)
    counters, room = op.cut(torch.zeros(op.scratch_bytes(o, n), dtype=torch.uint8, device=DEVICE), tokens, n, o)
    plain = partial(fused.few, scratch=(room.view(torch.int32), counters))
    few = partial(plain, bytes=32, parts=parts)
    for kernel in [few] if tokens > 1 else [few, plain, fused.vector]:
        y = kernel(*args, dtype)
        assert y.dtype == dtype
        # Sums are integers; what follows are three roundings of float32, and one of the result's type.
        least = 4 * torch.finfo(torch.float32).eps * want.abs().max().item()
        torch.testing.assert_close(y.float(), want, rtol=torch.finfo(dtype).eps, atol=least)
    assert not counters.any()  # as the next product wants them


def test_scratch_holds_all_programs_that_share_rows() -> None:
    assert fused._SLOTS * 64 * 4 * reference.FEW <= op._SUMS
    assert fused._SLOTS // 2 * 4 <= op._COUNTERS


@pytest.mark.parametrize("size", [None, 100])
def test_less_scratch_than_it_takes_is_an_error(size: int | None) -> None:
    given = None if size is None else torch.zeros(size, dtype=torch.uint8)
    with pytest.raises(ValueError, match=f"a weight of 16 x 32 take {op.scratch_bytes(16, 32)} bytes of scratch"):
        op.cut(given, 2, 32, 16)


def test_a_cpu_takes_no_scratch() -> None:
    assert op.scratch(100, torch.device("cpu")) is None


def test_extreme_integers_do_not_overflow() -> None:
    n = 2048
    for value in (-8, 7):
        x = torch.full((1, n), value, dtype=torch.int8, device=DEVICE)
        packed = torch.zeros(16, n // 2, dtype=torch.uint8, device=DEVICE)  # all -8
        one = torch.ones(16, device=DEVICE)
        scratch = tuple(torch.zeros(1 << 16, dtype=torch.int32, device=DEVICE) for _ in range(2))
        for kernel in (fused.vector, partial(fused.few, scratch=scratch)):
            y = kernel(x, one[:1, None], packed, one, None, None, torch.float32)
            assert (y == -8 * value * n).all()


@settings(deadline=None, max_examples=500 if CUDA else 8)
@given(
    o=st.integers(1, 9),
    half=st.integers(1, 700),
    dtype=st.sampled_from((torch.int8, torch.float8_e4m3fn)),
    seed=st.integers(0, 99),
)
def test_expanded_weights_are_the_integers(o: int, half: int, dtype: torch.dtype, seed: int) -> None:
    packed = torch.randint(0, 256, (o, half), generator=torch.Generator().manual_seed(seed)).to(DEVICE, torch.uint8)
    out = torch.full((o, 2 * half), 0x7F, dtype=torch.uint8, device=DEVICE).view(dtype)
    got = fused.expand(packed, out)
    assert torch.equal(got.float(), reference.expand(packed, dtype).float())
    assert {-8.0, 7.0} >= {got.float().min().item(), got.float().max().item()} or o * half < 100


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bias", "residual"), [(False, False), (True, False), (True, True)])
def test_many_tokens_without_float8_units(
    dtype: torch.dtype, bias: bool, residual: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    g = torch.Generator().manual_seed(7)
    x, x_scale, packed, *rest = make(reference.FEW + 3, 48, 96, bias, residual, dtype, g)
    assert x is not None
    assert x_scale is not None
    assert packed is not None
    want = reference.int4_linear(x, x_scale, packed, *rest, torch.float32)
    if CUDA:
        monkeypatch.setattr(op, "_has_float8", lambda device: False)
        assert op.form(x.device, dtype) == "planes"
        y = op.int4_linear(x, x_scale, packed, *rest, dtype, op.scratch(op.scratch_bytes(48, 96), x.device))
    else:
        weight = fused.expand(packed, torch.zeros(48, 96, dtype=torch.int8))
        y = fused.scaled(torch._int_mm(x, weight.mT), x_scale, *rest, dtype)
    assert y.dtype == dtype
    least = 4 * torch.finfo(torch.float32).eps * want.abs().max().item()
    torch.testing.assert_close(y.float(), want, rtol=torch.finfo(dtype).eps, atol=least)


def test_shapes_without_a_kernel_have_a_reason() -> None:
    assert fused.supports(64, 96) is None
    assert "64 x 72" in str(fused.supports(64, 72))
    assert op.unsupported(64, 72, torch.device("cpu")) is None  # the reference does all


@pytest.mark.skipif(not CUDA, reason="the CPU has one form")
@pytest.mark.parametrize("tokens", [1, 5, 64, 65, 300])
def test_every_number_of_tokens_has_a_kernel(tokens: int) -> None:
    g = torch.Generator().manual_seed(tokens)
    x, *rest = make(tokens, 96, 1056, True, True, torch.bfloat16, g)
    want = reference.int4_linear(x, *rest, torch.float32)
    if of_rows(op.form(x.device, torch.bfloat16), tokens) == "float8":  # in order, where int8 has even channels first
        x = x.unflatten(-1, (2, -1)).mT.flatten(-2).float().to(torch.float8_e4m3fn)
    y = op.int4_linear(x, *rest, torch.bfloat16, op.scratch(op.scratch_bytes(96, 1056), x.device))
    torch.testing.assert_close(y.float(), want, rtol=2**-7, atol=2**-7 * want.abs().mean().item())


def test_only_results_in_bfloat16_come_from_the_float8_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """They round to it: of 64 tokens and of 65, results in another dtype would be of two precisions."""
    monkeypatch.setattr(op, "_has_float8", lambda device: True)
    gpu = torch.device("cuda", 0)
    for dtype in DTYPES:
        found = [of_rows(op.form(gpu, dtype), tokens) for tokens in (1, 64, 65, 9000)]
        assert found == ["planes", "planes", *[("float8" if dtype == torch.bfloat16 else "planes")] * 2]
