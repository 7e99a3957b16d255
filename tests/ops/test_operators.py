"""The kernels as operators of torch: their fake versions are right, and torch.compile takes them whole."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flatquant.ops import int4_linear
from flatquant.ops.int4_linear import reference as product
from flatquant.ops.int8_linear import reference as head
from flatquant.ops.kron_quantize import Form, Site, plain
from flatquant.ops.kron_quantize import reference as site_reference
from flatquant.ops.kron_quantize.reference import FEW, of_rows
from flatquant.ops.pack.reference import pack_bits
from flatquant.runtime.kernels import KernelLinear, Product

CUDA = torch.cuda.is_available()
pytestmark = [pytest.mark.gpu] if CUDA else []
DEVICE = torch.device("cuda" if CUDA else "cpu")
FORMS = ("planes", "float8", "packed", "either")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = ((4, 8), (9, 32), (1, 64), (11, 6), (8, 20))


def site_of(shape: tuple[int, int], transform: str, g: torch.Generator) -> Site:
    left, right = (torch.linalg.qr(torch.randn(n, n, generator=g)).Q.to(DEVICE) for n in shape)
    ratios = (torch.rand(2, generator=g) * 0.4 + 0.6).to(DEVICE)
    return Site(shape, left if transform != "none" else None, right if transform == "both" else None, ratios, 4)


def inputs(source: str, tokens: int, n: int, dtype: torch.dtype, g: torch.Generator) -> tuple[Tensor, Tensor | None]:
    """What a source is made of: a tensor, and a gain, a gate or log-sum-exps."""
    x = torch.randn(tokens, n, generator=g).to(DEVICE, dtype)
    match source:
        case "norm":
            return x, (torch.rand(n, generator=g) + 0.5).to(DEVICE, dtype)
        case "gate":
            return x, torch.randn(tokens, n, generator=g).to(DEVICE, dtype)
        case "merge":
            parts = torch.randn(tokens, n // 2, 3, 2, generator=g).to(DEVICE)
            return parts, torch.randn(tokens, n // 2, 3, generator=g).to(DEVICE)
        case _:
            return x, None


def weights(tokens: int, o: int, n: int, bias: bool, residual: bool, dtype: torch.dtype, form: Form, g):
    x = torch.randint(-8, 8, (tokens, n), generator=g, dtype=torch.int8)
    return (
        (x.float().to(torch.float8_e4m3fn).view(torch.int8) if of_rows(form, tokens) == "float8" else x).to(DEVICE),
        (torch.rand(tokens, 1, generator=g) + 0.1).to(DEVICE),
        pack_bits(torch.randint(0, 16, (o, n), generator=g).to(torch.uint8), 4).to(DEVICE),
        (torch.rand(o, generator=g) + 0.1).to(DEVICE),
        torch.randn(o, generator=g).to(DEVICE) if bias else None,
        torch.randn(tokens, o, generator=g).to(DEVICE, dtype) if residual else None,
        dtype,
        int4_linear.scratch(int4_linear.scratch_bytes(o, n), DEVICE),
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("source", ["plain", "norm", "gate", "merge"])
@settings(deadline=None, max_examples=3)
@given(
    shape=st.sampled_from(SHAPES),
    transform=st.sampled_from(("both", "left", "none")),
    tokens=st.integers(1, 6),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_kron_quantize_is_an_operator(
    form: Form, source: str, shape: tuple[int, int], transform: str, tokens: int, dtype: torch.dtype, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    site = site_of(shape, transform, g)
    x, other = inputs(source, tokens, shape[0] * shape[1], dtype, g)
    args = (x, other, *site.operands, site.ratios, *shape, 4, source, form, 1e-5)
    torch.library.opcheck(torch.ops.flatquant.kron_quantize, args)
    if not CUDA:
        made = {"plain": lambda: x, "norm": lambda: site_reference.rms_norm(x, other, 1e-5)}
        made |= {"gate": lambda: site_reference.gated(x, other), "merge": lambda: site_reference.merged(x, other)}
        want = site_reference.kron_quantize(made[source](), site.left, site.right, site.ratios, 4, form)
        got = torch.ops.flatquant.kron_quantize(*args)
        assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(got, want, strict=True))


@settings(deadline=None, max_examples=12)
@given(
    tokens=st.sampled_from((1, 2, 5, 65)),
    o=st.sampled_from((16, 48)),
    n=st.sampled_from((32, 96)),
    bias=st.booleans(),
    residual=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_int4_linear_is_an_operator(
    tokens: int, o: int, n: int, bias: bool, residual: bool, dtype: torch.dtype, seed: int
) -> None:
    form = int4_linear.form(DEVICE, dtype)
    args = weights(tokens, o, n, bias, residual, dtype, form, torch.Generator().manual_seed(seed))
    torch.library.opcheck(torch.ops.flatquant.int4_linear, args)
    if not CUDA:
        assert torch.equal(torch.ops.flatquant.int4_linear(*args), product.int4_linear(*args[:-1]))


@settings(deadline=None, max_examples=6)
@given(tokens=st.sampled_from((1, 2, 65)), bias=st.booleans(), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99))
def test_int8_linear_is_an_operator(tokens: int, bias: bool, dtype: torch.dtype, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x, b = torch.randn(tokens, 32, generator=g).to(DEVICE, dtype), torch.randn(48, generator=g).to(DEVICE)
    packed = torch.randint(0, 256, (48, 32), generator=g).to(DEVICE, torch.uint8)
    args = (x, packed, (torch.rand(48, generator=g) + 0.1).to(DEVICE), b if bias else None)
    torch.library.opcheck(torch.ops.flatquant.int8_linear, args)
    if not CUDA:
        assert torch.equal(torch.ops.flatquant.int8_linear(*args), head.int8_linear(*args))


def test_the_operator_says_which_inputs_go_together() -> None:
    site = site_of((4, 8), "both", torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="kron_quantize: 'norm' without a second tensor"):
        site(torch.randn(2, 32, device=DEVICE), None, "norm", "planes")


# What inductor says of its own imports, and of products in float32.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:TensorFloat32")
@pytest.mark.parametrize("tokens", [1, 5, 65])
@pytest.mark.parametrize("source", ["norm", "gate", "merge"])
def test_torch_compile_takes_a_site_and_its_product_whole(source: str, tokens: int) -> None:
    """Without a graph break, and with the same bits."""
    g = torch.Generator().manual_seed(tokens)
    shape, o = (4, 24), 32
    site = site_of(shape, "both", g)
    x, other = inputs(source, tokens, 96, torch.float32, g)
    form = int4_linear.form(DEVICE, torch.float32)
    _, _, packed, scale, bias, residual, dtype, scratch = weights(tokens, o, 96, True, True, torch.float32, form, g)

    def call(x: Tensor, other: Tensor | None) -> Tensor:
        values, x_scale = site(x, other, source, form, 1e-5)
        return int4_linear.int4_linear(values, x_scale, packed, scale, bias, residual, dtype, scratch) + 1

    want = call(x, other)
    torch._dynamo.reset()
    got = torch.compile(call, fullgraph=True, backend="aot_eager" if not CUDA else "inductor")(x, other)
    assert torch.equal(got, want)


@pytest.mark.skipif(CUDA, reason="counts the references' calls")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_traced_number_of_rows_does_not_choose_the_form(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph, as on a GPU with float8 units: few rows are planes, many are float8, with the bits of eager."""
    forms: list[str] = []
    products: list[torch.dtype] = []
    graphs: list[torch.fx.GraphModule] = []

    def on_grid(y, ends, ratios, bits, form):
        forms.append(of_rows(form, len(y)))
        return grid(y, ends, ratios, bits, form)

    def multiply(x, *args):
        products.append(x.dtype)
        return product_of(x, *args)

    def backend(graph: torch.fx.GraphModule, inputs):
        graphs.append(graph)
        return graph.forward

    grid, product_of = site_reference.on_grid, product.int4_linear
    monkeypatch.setattr(int4_linear, "_has_float8", lambda device: True)
    monkeypatch.setattr(site_reference, "on_grid", on_grid)
    monkeypatch.setattr(product, "int4_linear", multiply)
    g = torch.Generator().manual_seed(0)
    site = site_of((4, 24), "both", g)
    _, _, packed, scale, bias, *_ = weights(1, 32, 96, True, False, dtype, "planes", g)
    linear = KernelLinear(lambda x, form: plain(x, site, form), Product(packed, scale, bias), None)
    torch._dynamo.reset()
    compiled = torch.compile(linear, fullgraph=True, backend=backend)
    for rows in (FEW + 36, 1, FEW, FEW + 1):
        forms.clear(), products.clear()
        x = torch.randn(rows, 96, generator=g).to(dtype)
        torch._dynamo.decorators.mark_unbacked(x, 0)
        got = compiled(x)
        many = rows > FEW and dtype == torch.bfloat16
        assert forms == ["float8" if many else "planes"]
        assert products == [torch.float8_e4m3fn if many else torch.int8]
        assert torch.equal(got, linear(x))
        with monkeypatch.context() as m:  # the same integers in another order
            m.setattr(int4_linear, "_has_float8", lambda device: False)
            assert torch.equal(got, linear(x))
    assert len(graphs) == 1
