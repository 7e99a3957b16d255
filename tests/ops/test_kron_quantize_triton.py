"""The fused kernel of a site gives the reference's integers, but where a value lies on the edge between two."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

CUDA = torch.cuda.is_available()
pytest.importorskip("triton", reason="Triton has no build for this platform")

from flatquant.ops.kron.reference import kron_matmul  # noqa: E402
from flatquant.ops.kron_quantize import Form, Site, reference  # noqa: E402
from flatquant.ops.kron_quantize import triton as fused  # noqa: E402
from flatquant.ops.pack.reference import unpack_bits  # noqa: E402

pytestmark = [pytest.mark.gpu] if CUDA else []
DEVICE = "cuda" if CUDA else "cpu"
# Triton's interpreter multiplies the bits of bfloat16 as if they were integers, and cuts instead of rounding.
DTYPES = (torch.float32, torch.float16, *([torch.bfloat16] if CUDA else []))
EPS = 1e-5
# Of an operand: to bfloat16, or to float32 in the interpreter, and of its sums.
ROUNDING = 2.0**-9 if CUDA else 2.0**-18

# Of the last two, columns are cut into tiles, or rows and columns.
SHAPES = ((24, 24), (9, 32), (1, 64), (8, 20), (11, 6), (4, 144), (66, 36))
SOURCES = ("plain", "norm", "gate", "merge", "gelu")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh tensors hold the worst there is, so that an element that is not written shows."""

    def full(size, dtype, device):
        bad = float("nan") if dtype.is_floating_point and dtype.itemsize > 1 else 0x77
        return torch.full(size, bad, dtype=torch.uint8 if dtype.itemsize == 1 else dtype, device=device).view(dtype)

    monkeypatch.setattr(fused.torch, "empty", full)


def make(shape: tuple[int, int], transform: str, g: torch.Generator) -> Site:
    left, right = (torch.linalg.qr(torch.randn(n, n, generator=g)).Q.to(DEVICE) for n in shape)
    ratios = (torch.rand(2, generator=g) * 0.4 + 0.6).to(DEVICE)
    return Site(shape, left if transform != "none" else None, right if transform == "both" else None, ratios, 4)


def inputs(
    source: str, tokens: int, shape: tuple[int, int], dtype: torch.dtype, g: torch.Generator, across: bool = False
):
    """`across`: heads are not the rows of the transform."""
    n1, n2 = shape[::-1] if across else shape
    n = n1 * n2
    spread = torch.randn(n, generator=g).mul(1.5).exp()  # outlier channels, as activations have
    x = torch.randn(tokens, n, generator=g) * spread
    match source:
        case "norm":
            return x.to(DEVICE, dtype), (torch.rand(n, generator=g) + 0.5).to(DEVICE, dtype)
        case "gate" | "gelu":
            return x.to(DEVICE, dtype), torch.randn(tokens, n, generator=g).mul(3).to(DEVICE, dtype)
        case "merge":
            parts = torch.randn(tokens, n1, 3, n2, generator=g).to(DEVICE)
            lse = torch.randn(tokens, n1, 3, generator=g).mul(4)
            lse[..., 2] = -torch.inf  # a part without tokens
            return parts, lse.to(DEVICE)
        case _:
            return x.to(DEVICE, dtype), None


def wanted(source: str, x: Tensor, other: Tensor | None) -> Tensor:
    match source:
        case "norm":
            assert other is not None
            return reference.rms_norm(x, other, EPS)
        case "gate":
            assert other is not None
            return reference.gated(x, other)
        case "gelu":
            assert other is not None
            return reference.gated(x, other, "gelu")
        case "merge":
            assert other is not None
            return reference.merged(x, other)
        case _:
            return x.float()


def integers(values: Tensor, form: Form, n: int) -> Tensor:
    """As float32, in order.  # (T, n)"""
    match form:
        case "packed":
            return unpack_bits(values, 4, n).float() - 8
        case "planes":
            return values.float().unflatten(-1, (2, -1)).mT.flatten(-2)
        case _:
            return values.float()


def reach(y: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """How far a transform may be off whose operands are rounded, four to a product of three.  # float64, (T, n)

    All roundings may add up, where few terms make a sum; of many, ten standard deviations are more than ever happen.
    """
    worst = kron_matmul(y.abs(), *(None if p is None else p.abs() for p in (left, right)))
    spread = kron_matmul(y.square(), *(None if p is None else p.square() for p in (left, right))).sqrt()
    return ROUNDING * torch.minimum(4 * worst, 10 * spread) + 1e-30


# Source and form are parameters, not draws: kernels of all kinds are compiled, side by side where there are many cores.
@pytest.mark.parametrize("form", ["planes", "float8", "packed"])
@pytest.mark.parametrize("source", SOURCES)
@settings(deadline=None, max_examples=250 if CUDA else 2)
@given(
    shape=st.sampled_from(SHAPES),
    transform=st.sampled_from(("both", "left", "none")),
    tokens=st.integers(1, 6),
    across=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_it_equals_the_reference(
    shape: tuple[int, int],
    source: str,
    transform: str,
    form: Form,
    tokens: int,
    across: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    g = torch.Generator().manual_seed(seed)
    site = make(shape, transform, g)
    x, other = inputs(source, tokens, shape, dtype, g, across)
    assert site.unsupported() is None
    values, scale = fused.launch(
        x, other, source, shape, *site.factors, site.ratios, 4, form, EPS if source == "norm" else 0.0
    )
    y = wanted(source, x, other).double()
    factors = [None if p is None else p.double() for p in (site.left, site.right)]
    want, want_scale = reference.kron_quantize(y, *factors, site.ratios.double(), 4, "planes")
    near = reach(y, *factors)
    most = near.amax(-1, keepdim=True) / 7  # a scale is a share of the largest magnitude
    assert ((scale.double() - want_scale).abs() <= most).all()
    # On the edge between two integers, a product's rounding decides; further away from it, it may not.
    exact = kron_matmul(y, *factors) / want_scale
    got = integers(values, form, y.shape[-1]).double()
    assert ((got - exact.clamp(-8, 7)).abs() <= 0.5 + (near + 8 * most) / want_scale).all()
    assert ((got - integers(want, "planes", y.shape[-1]).double()).abs() <= 1).all()


@pytest.mark.parametrize("source", ["plain", "gate"])
@pytest.mark.parametrize("form", ["planes", "float8", "packed"])
def test_a_row_of_zeros_is_zero(source: str, form: Form) -> None:
    g = torch.Generator().manual_seed(0)
    site = make((8, 16), "both", g)
    x = torch.zeros(3, 128, device=DEVICE)
    values, scale = fused.launch(x, x, source, (8, 16), *site.factors, site.ratios, 4, form)
    assert not integers(values, form, 128).any()
    assert (scale == 1).all()


def test_huge_and_tiny_rows_keep_their_integers() -> None:
    """No operand has float16's range."""
    g = torch.Generator().manual_seed(1)
    site = make((16, 24), "both", g)
    size = torch.tensor([[2.0**-40], [1.0], [2.0**40]], device=DEVICE)
    x = torch.randn(1, 384, generator=g).repeat(3, 1).to(DEVICE) * size
    values, scale = fused.launch(x, None, "plain", (16, 24), *site.factors, site.ratios, 4, "planes")
    assert torch.equal(values[0], values[1])
    assert torch.equal(values[2], values[1])
    torch.testing.assert_close(scale[2] / scale[1], torch.full((1,), 2.0**40, device=DEVICE), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "how",
    [
        fused.Settings(warps=4, programs=2, ahead=True, registers=128),
        fused.Settings(warps=8, stages=2),
        fused.Settings(grain=64),
    ],
)
def test_settings_change_no_integer(how: fused.Settings) -> None:
    g = torch.Generator().manual_seed(3)
    shape = (66, 36)
    site = make(shape, "both", g)
    x, other = inputs("gate", 6, shape, torch.float16, g)  # more than the four programs of a CPU
    want, want_scale = fused.launch(x, other, "gate", shape, *site.factors, site.ratios, 4, "packed")
    got, scale = fused.launch(x, other, "gate", shape, *site.factors, site.ratios, 4, "packed", how=how)
    # Sums over other tiles are rounded elsewhere.
    assert (integers(got, "packed", 66 * 36) - integers(want, "packed", 66 * 36)).abs().max() <= (how.grain > 16)
    torch.testing.assert_close(scale, want_scale, rtol=1e-3, atol=0)


@given(n=st.integers(1, 256), grain=st.sampled_from((16, 32, 64)))
def test_pieces_are_powers_of_two_that_cover(n: int, grain: int) -> None:
    cut = fused.pieces(n, grain)
    assert [begin for begin, _ in cut] == [sum(size for _, size in cut[:i]) for i in range(len(cut))]
    assert all(size >= grain and size & (size - 1) == 0 for _, size in cut)
    assert n <= sum(size for _, size in cut) < n + grain


def test_what_it_cannot_do_has_a_reason() -> None:
    square = torch.eye(512)
    ratios = torch.ones(2)
    assert "factors" in str(Site((512, 512), square, square, ratios, 4).unsupported())
    assert fused.supports((112, 128), True, True, 4, 99 << 10) is None
    assert "factors" in str(fused.supports((128, 148), True, True, 4, 99 << 10))
    assert "full matrix" in str(Site((1, 64), None, torch.eye(64), ratios, 4).unsupported())
    assert "8-bit" in str(Site((4, 4), None, None, ratios, 8).unsupported())
    assert "bytes" in str(Site((4, 5), None, None, ratios, 4).unsupported())


def test_halves_of_a_fused_projection_need_no_copy() -> None:
    g = torch.Generator().manual_seed(2)
    site = make((8, 16), "both", g)
    both = torch.randn(5, 256, generator=g).to(DEVICE)
    gate, up = both.chunk(2, dim=-1)
    got = fused.launch(up, gate, "gate", (8, 16), *site.factors, site.ratios, 4, "packed")
    want = fused.launch(up.contiguous(), gate.contiguous(), "gate", (8, 16), *site.factors, site.ratios, 4, "packed")
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


@pytest.mark.parametrize("shape", [(64, 64), (86, 128), (112, 128), (128, 148), (128, 224)])
@pytest.mark.parametrize("tokens", [1, 2048])
def test_without_factors_no_thread_has_more_channels_than_registers(shape: tuple[int, int], tokens: int) -> None:
    how = fused.settings("gate", shape, tokens, 132, transformed=False)
    channels = fused._padded(shape[0]) * fused._padded(shape[1])
    assert channels <= 64 * 32 * how.warps
    assert how.programs * how.warps * 32 * (how.registers or 255) <= 1 << 16


@pytest.mark.parametrize("rows", [2, reference.FEW + 1])
def test_either_form_is_that_of_the_number_of_rows(rows: int) -> None:
    g = torch.Generator().manual_seed(2)
    site = make((8, 16), "both", g)
    x = torch.randn(rows, 128, generator=g).to(DEVICE)
    got, want = (
        fused.launch(x, None, "plain", (8, 16), *site.factors, site.ratios, 4, form)
        for form in ("either", "planes" if rows == 2 else "float8")
    )
    assert got[0].dtype == torch.int8
    assert torch.equal(got[0], want[0].view(torch.int8))
    assert torch.equal(got[1], want[1])
