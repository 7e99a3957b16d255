"""The serving stages of a linear layer compute one function of the same integers."""

import pytest
import torch

from flatquant.qtensor import QTensor
from flatquant.quantizers import Dynamic, FixedClip, WeightGrid
from flatquant.runtime.linear import DenseLinear, FrozenLinear, FrozenSite, PackedLinear
from flatquant.solvers import RTN
from flatquant.spec import QuantSpec
from tests.laws import in_a_pass

N, O = 24, 7


def make_site(activations: int | None, symmetric: bool = True) -> FrozenSite:
    generator = torch.Generator().manual_seed(0)
    grid = None
    if activations is not None:
        grid = Dynamic(QuantSpec(bits=activations, symmetric=symmetric), FixedClip(torch.tensor([0.9, 0.95])))
    return FrozenSite(torch.randn(4, 4, generator=generator), torch.randn(6, 6, generator=generator), grid)


def make_linear(site: FrozenSite, bits: int = 4, group: int | None = None, symmetric: bool = True) -> FrozenLinear:
    generator = torch.Generator().manual_seed(1)
    weight, bias = torch.randn(O, N, generator=generator), torch.randn(O, generator=generator)
    grid = WeightGrid(QuantSpec(bits=bits, group_size=group, symmetric=symmetric))
    return FrozenLinear(site, RTN().solve(weight, grid, None), bias)


@pytest.mark.parametrize("activations", [None, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [None, 6])
@pytest.mark.parametrize("bits", range(2, 9))
def test_all_stages_agree(bits: int, group: int | None, symmetric: bool, activations: int | None) -> None:
    site = make_site(activations, symmetric)
    frozen = make_linear(site, bits, group, symmetric)
    packed = PackedLinear.of(frozen)
    x = torch.randn(2, 3, N, generator=torch.Generator().manual_seed(2))
    assert torch.equal(packed.qweight().values, frozen.qweight().values)
    assert torch.equal(packed(x), frozen(x))  # to the last bit
    # The integer path equals fake quantisation: weights and activations rounded, then multiplied in float64.
    y = site(x)
    y = y.dequantize(torch.float64) if isinstance(y, QTensor) else y.double()
    want = y @ frozen.qweight().dequantize(torch.float64).mT + frozen.bias.double()
    torch.testing.assert_close(frozen(x).double(), want, rtol=1e-4, atol=1e-4)


def test_dense_linear_reads_the_same_grid() -> None:
    site = make_site(4)
    weight = torch.randn(O, N)
    x = torch.randn(3, N)
    torch.testing.assert_close(DenseLinear(site, weight, None)(x), site(x).dequantize() @ weight.mT)


def test_a_site_works_once_for_all_its_readers() -> None:
    site = make_site(4)
    x = torch.randn(3, N)
    assert site(x) is not site(x)  # nobody said how long a result may be kept
    first, again, copied, later = in_a_pass(lambda: [site(x), site(x), site(x.clone()), site(x)])
    assert first is again
    assert first is not copied
    assert later is not first  # a site keeps its last result


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casting_a_model_keeps_scales_and_transforms(dtype: torch.dtype) -> None:
    site = make_site(4, symmetric=False)
    linear = PackedLinear.of(make_linear(site, symmetric=False))
    root = torch.nn.ModuleDict({"site": site, "linear": linear, "norm": torch.nn.LayerNorm(N)})
    before = {k: v.clone() for k, v in root.state_dict().items()}
    root.to(dtype)
    for name, tensor in root.state_dict().items():
        if name.startswith("norm"):
            assert tensor.dtype == dtype
        else:
            assert torch.equal(tensor, before[name]), name
            assert tensor.dtype == before[name].dtype, name
    assert linear(torch.randn(3, N, dtype=dtype)).dtype == dtype


def test_buffers_are_contiguous_whatever_they_are_made_of() -> None:
    left = torch.randn(4, 4).mT
    site = FrozenSite(left, None, None)
    assert site.left is not None
    assert site.left.is_contiguous()
    assert torch.equal(site.left, left)


def test_integers_that_are_kept_follow_what_is_stored() -> None:
    site = make_site(4)
    linear, other = PackedLinear.of(make_linear(site)), PackedLinear.of(make_linear(site))
    other.packed = other.packed ^ 0xFF
    x = torch.randn(2, N)
    before, want = linear(x), other(x)
    linear.load_state_dict(other.state_dict(), assign=True)
    assert torch.equal(linear(x), want)
    assert not torch.equal(before, want)
    linear.scale = 2 * linear.scale
    assert torch.equal(linear.qweight().scale, linear.scale)
    assert "_loose" not in "".join(linear.state_dict())
