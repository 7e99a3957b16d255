"""A site's readers joined: each gets what it would compute alone, by structured or dense transforms."""

import pytest
import torch
from torch import nn

from flatquant.quantizers import Dynamic
from flatquant.spec import QuantSpec, TransformSpec
from flatquant.transforms import Compose, Diagonal, Identity, Kronecker, make_factor, shared_inverses
from flatquant.wiring.linear import FitLinear, FitSite, HeadOutput
from tests.laws import in_a_pass


def _site(*, grids: bool, bias: tuple[bool, bool] = (True, False)) -> tuple[FitSite, list[nn.Linear]]:
    torch.manual_seed(0)
    linears = [nn.Linear(12, o, bias=b, dtype=torch.float64) for o, b in zip((5, 7), bias, strict=True)]
    generator = torch.Generator().manual_seed(1)
    spec = TransformSpec(kind="kronecker", init="orthogonal")
    kron = Kronecker(make_factor(spec, 3, generator), make_factor(spec, 4, generator))
    transform = Compose([Diagonal(torch.rand(12) + 0.5), kron]).double()
    grid = QuantSpec(bits=4, clip="learned") if grids else None
    site = FitSite(transform, Dynamic(grid) if grid else None, grid, linears, [(), ()])
    return site.double(), linears


def test_readers_get_their_own_outputs() -> None:
    site, linears = _site(grids=False)
    x = torch.randn(3, 12, dtype=torch.float64)
    for index, linear in enumerate(linears):
        torch.testing.assert_close(FitLinear(site, index)(x), linear(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("grids", [False, True])
def test_a_dense_transform_is_the_same_function(grids: bool) -> None:
    """On a GPU small transforms are applied as one matrix: the same values and gradients."""
    results = []
    for dense in (False, True):
        site, _ = _site(grids=grids)
        site.eye = torch.eye(12, dtype=torch.float64) if dense else None
        x = torch.randn(3, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        out = torch.cat(site(x), -1)
        out.square().sum().backward()
        results.append([out.detach(), *(p.grad for p in site.parameters())])
    for structured, dense_result in zip(*results, strict=True):
        torch.testing.assert_close(structured, dense_result, rtol=1e-9, atol=1e-9)


def test_shared_inverses_change_nothing() -> None:
    """Batched and padded, every factor gets its own inverse, and its own gradient."""
    grads = []
    for shared in (False, True):
        site, _ = _site(grids=False)
        if shared:
            with shared_inverses([site]):
                w = site.transformed_weight()
        else:
            w = site.transformed_weight()
        w.square().sum().backward()
        grads.append([w.detach(), *(p.grad for p in site.transform.parameters())])
    for one_by_one, together in zip(*grads, strict=True):
        torch.testing.assert_close(one_by_one, together, rtol=1e-10, atol=1e-10)


def test_shared_inverses_end_with_the_context() -> None:
    site, _ = _site(grids=False)
    with shared_inverses([site]):
        before = site.transformed_weight()
    with torch.no_grad():
        for p in site.transform.parameters():
            p.add_(0.01)
    assert not torch.allclose(site.transformed_weight(), before)


def test_an_output_is_computed_once_for_all_readers() -> None:
    site, _ = _site(grids=True)
    x = torch.randn(3, 12, dtype=torch.float64)
    first, again = in_a_pass(lambda: [site(x), site(x)])
    assert first is again
    assert site(x) is not site(x)


def test_a_result_without_gradients_serves_no_pass_with_them() -> None:
    site, _ = _site(grids=True)
    x = torch.randn(3, 12, dtype=torch.float64)

    def passes() -> tuple[bool, bool]:
        with torch.no_grad():
            without = site(x)[0].requires_grad
        return without, site(x)[0].requires_grad

    assert in_a_pass(passes) == (False, True)


def test_gradients_of_a_rotated_writer_fit_into_half_precision() -> None:
    """The scale of a row of weights gathers what all of them get, which float16 cannot hold, and passes it on."""
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(2048, 8, bias=False)
    factor = make_factor(TransformSpec(kind="matrix", parameters="rotation", init="hadamard"), 8, generator)
    site = FitSite(Identity(), None, QuantSpec(bits=2), [linear], [(HeadOutput(factor),)])
    with torch.autocast("cpu", dtype=torch.float16):
        (y,) = site(torch.full((1, 2048), 100.0))
    (300 * y.float().abs().sum()).backward()
    grads = [p.grad for p in site.parameters() if p.grad is not None]
    assert grads
    assert all(g.isfinite().all() for g in grads)
