"""A site's weights are one tensor on their way from the wrapped block to the kernel; readers have rows of it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from flatquant.calibrate.capture import BlockCall
from flatquant.calibrate.solve import make_solver, solve_block
from flatquant.recipes import rtn
from flatquant.runtime.kernels import Product
from flatquant.runtime.linear import FrozenLinear, PackedLinear
from flatquant.spec import BlockPlan
from flatquant.wiring.arch import submodule
from flatquant.wiring.fitted import FitBlock
from flatquant.wiring.fold import fold_block
from tests.laws import BASES, bare, wrap
from tests.tiny_models import FAMILIES, tiny_family

NAMES = ("llama", "mixtral", "phi3", "cohere", "qwen2_moe")


def _wrapped(name: str) -> tuple[FitBlock, BlockPlan]:
    assert name in FAMILIES
    plan, fits = wrap(tiny_family(name, dtype=torch.float32), bare(BASES["svd orthogonal"], rtn("w4a4").scheme))
    return fits[0], plan.blocks[0]


def _are_rows_of_one(block: nn.Module, plan: BlockPlan, held: Callable[[nn.Module], Tensor]) -> None:
    for site in plan.sites.values():
        for group in site.groups:
            tensors = [held(submodule(block, path)) for path in group]
            ends = [t.data_ptr() + t.nbytes for t in tensors]
            assert len({t.untyped_storage().data_ptr() for t in tensors}) == 1, group
            assert [t.data_ptr() for t in tensors[1:]] == ends[:-1], group


@pytest.mark.parametrize("name", NAMES)
def test_readers_hold_rows_of_one_weight(name: str) -> None:
    fit, plan = _wrapped(name)
    fold_block(fit)
    _are_rows_of_one(fit.block, plan, lambda linear: linear.get_buffer("weight"))
    solve_block(fit.block, plan, make_solver(rtn("w4").solver), BlockCall(args=(), kwargs={}), None, 1)
    for leaf in ("values", "scale"):
        _are_rows_of_one(fit.block, plan, lambda linear, leaf=leaf: linear.get_buffer(leaf))


def test_a_product_joins_once() -> None:
    fit, plan = _wrapped("llama")
    fold_block(fit)
    solve_block(fit.block, plan, make_solver(rtn("w4").solver), BlockCall(args=(), kwargs={}), None, 1)
    linears = []
    for path in plan.sites["attn_in"].readers:
        frozen = submodule(fit.block, path)
        assert isinstance(frozen, FrozenLinear)
        linears.append(PackedLinear.of(frozen))
    before = [linear.packed.clone() for linear in linears]
    first = Product.of(linears)
    assert all(torch.equal(linear.packed, old) for linear, old in zip(linears, before, strict=True))
    assert Product.of(linears).packed.data_ptr() == first.packed.data_ptr()
