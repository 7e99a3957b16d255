"""Rounding a folded block's weights, site by site, each on inputs that earlier rounding has already changed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flatquant.calibrate.activations import Kept
from flatquant.calibrate.capture import BlockCall
from flatquant.calibrate.rounding import RoundingLinear
from flatquant.codebook import CodebookTensor
from flatquant.formats.base import Codes
from flatquant.modules import joined, widened
from flatquant.qtensor import QTensor
from flatquant.quantizers import BlockWeights, VectorGrid, WeightGrid
from flatquant.runtime.branch import BranchedLinear
from flatquant.runtime.codebook import CodebookLinear
from flatquant.runtime.codes import FrozenCodes
from flatquant.runtime.linear import DenseLinear, FrozenLinear, FrozenSite, SiteLinear
from flatquant.solvers import GPTQ, RTN, InputGram, Solver, VectorSolver, blended
from flatquant.solvers.lowrank import split
from flatquant.spec import BlockPlan, SitePlan, SolverSpec
from flatquant.wiring.arch import replace_submodule, submodule

GRAMS = 1 << 29  # elements of Gram matrices held at a time, two GiB


def make_solver(spec: SolverSpec) -> Solver[Any, QTensor | Codes | CodebookTensor]:
    """The solver a spec names."""
    match spec.kind:
        case "rtn":
            return RTN()
        case "gptq":
            return GPTQ(
                damping=spec.damping, block_size=spec.block_size, act_order=spec.act_order, updated=spec.updates_scales
            )
        case "codebook":
            return VectorSolver(damping=spec.damping, block_size=spec.block_size)


@torch.no_grad()
def solve_block(
    block: nn.Module,
    plan: BlockPlan,
    solver: Solver[Any, QTensor | Codes | CodebookTensor],
    call: BlockCall,
    inputs: Kept | None,
    batch_size: int,
    hessians: Mapping[str, Tensor] | None = None,
    rounds: int = 1,
    learns: bool = False,
) -> None:
    """Replace the dense linears of a folded block by `FrozenLinear`s, or `CodebookLinear`s, where the plan has bits.

    Sites are solved in the order data meets them, so that the Gram matrix of a later site sees the rounding of an
    earlier one, and the activations' grid, as serving will (GPTQ's sequential groups: qkv, o, gate/up, down).

    Args:
        inputs: the block's inputs in the quantised (or the original) model, (N, T, h); needed by solvers that use a
            Hessian.
        hessians: by reader, where they are not the Gram matrices of those inputs.
        rounds: of low-rank branches; see `BranchSpec`.
        learns: leave `RoundingLinear`s instead of `FrozenLinear`s, for `learn_rounding`.
    """
    for site in plan.sites.values():
        if site.weights is None or site.weights.is_fitted:
            continue
        gram = None
        if hessians is None and solver.needs_hessian and inputs is not None:
            gram = _gram(block, site, call, inputs, batch_size)  # readers share inputs, hence the Hessian
        ups = _branch_off(block, site, rounds, gram.hessian() if gram else None) if site.rank else {}
        if hessians is not None:
            jobs = (((path,), hessians[path]) for path in site.readers)
        elif gram is None:
            jobs = iter([(site.readers, None)])  # rows are independent: one solve for all of them
        elif len(site.groups) == 1:
            jobs = iter([(site.readers, gram.hessian())])
        else:
            jobs = _by_expert(block, site, call, inputs, batch_size, gram)
        grid = _grid(block, site)
        for together, hessian in jobs:
            for paths in [together] if site.codebook is None else [(path,) for path in together]:
                linears = [_folded(block, path) for path in paths]
                solved = solver.solve(joined([linear.weight for linear in linears]), grid, hessian)
                for path, served in zip(paths, _served(linears, solved, learns), strict=True):
                    replace_submodule(block, path, BranchedLinear(served, ups[path]) if ups else served)


def _grid(block: nn.Module, plan: SitePlan) -> WeightGrid | BlockWeights | VectorGrid:
    """What the weights of a site are rounded to; a scale of the tensor is one for all its readers."""
    assert plan.weights is not None
    if plan.codebook is not None:
        return VectorGrid(plan.codebook, plan.weights.bits)
    if plan.weights.format is not None:
        return BlockWeights.covering(plan.weights, (_folded(block, path).weight for path in plan.readers))
    return WeightGrid(plan.weights)


def _served(linears: list[DenseLinear], solved: QTensor | Codes | CodebookTensor, learns: bool) -> list[SiteLinear]:
    """The serving stages of linears that were solved together, or what trains to be one."""
    if isinstance(solved, CodebookTensor):
        (linear,) = linears
        return [CodebookLinear.of(linear.site, solved, linear.bias)]
    if isinstance(solved, Codes):
        codes = solved.split([linear.weight.shape[0] for linear in linears])
        return [FrozenCodes(linear.site, weight, linear.bias) for linear, weight in zip(linears, codes, strict=True)]
    rows = solved.split([linear.weight.shape[0] for linear in linears])
    frozen = [FrozenLinear(linear.site, weight, linear.bias) for linear, weight in zip(linears, rows, strict=True)]
    if not learns:
        return list(frozen)
    return [RoundingLinear.of(f, linear.weight) for f, linear in zip(frozen, linears, strict=True)]


def _branch_off(block: nn.Module, plan: SitePlan, rounds: int, hessian: Tensor | None) -> dict[str, Tensor]:
    """Move a low-rank part of a site's weights into a branch; the readers' halves of it, (o, r) by path."""
    assert plan.weights is not None
    linears = [_folded(block, path) for path in plan.readers]
    w = joined([linear.weight for linear in linears])
    grid = BlockWeights(plan.weights) if plan.weights.format else WeightGrid(plan.weights)

    def rounded(rest: Tensor) -> Tensor:
        return RTN().solve(rest, grid, None).dequantize(rest.dtype)

    branch = split(w, plan.rank, rounds=rounds, rounded=rounded, hessian=hessian)
    linears[0].site.register_buffer("down", branch.down)
    sizes = [linear.weight.shape[0] for linear in linears]
    for linear, rest in zip(linears, (w - branch.weight(w)).split(sizes), strict=True):
        linear.weight = rest.contiguous()
    return {path: up.contiguous() for path, up in zip(plan.readers, branch.up.split(sizes), strict=True)}


def _folded(block: nn.Module, path: str) -> DenseLinear:
    linear = submodule(block, path)
    assert isinstance(linear, DenseLinear), f"{path} is not folded"
    return linear


class _Reached(Exception):
    """The site has been seen; the rest of the block need not run."""


def _gram(block: nn.Module, plan: SitePlan, call: BlockCall, inputs: Kept, batch_size: int) -> InputGram:
    """The Gram matrix of what a site's readers multiply: transformed, on its grid."""
    reader = _folded(block, plan.readers[0])
    gram = InputGram(reader.weight.shape[1], reader.weight.device)

    def see(module: FrozenSite, args: tuple, out: Tensor | QTensor) -> None:
        gram.add(out.dequantize() if isinstance(out, QTensor) else out)
        raise _Reached

    handle = reader.site.register_forward_hook(see)
    run = call.in_order(block)
    try:
        # The calls of a batch's windows follow one another where they differ: the first to reach the site ends them.
        with widened(block, inputs.dtype) as work:
            for x in inputs.split(1 if call.windows else batch_size):
                with contextlib.suppress(_Reached):
                    run(x.to(work))
    finally:
        handle.remove()
    return gram


def _by_expert(
    block: nn.Module, plan: SitePlan, call: BlockCall, inputs: Kept | None, batch_size: int, shared: InputGram
) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    """The readers of every expert, and the Hessian of the rows that it sees, blended with that of all rows."""
    assert inputs is not None
    n = shared.sum.shape[0]
    mean = shared.sum / max(shared.tokens, 1)
    site = _folded(block, plan.readers[0]).site
    at_once = max(1, GRAMS // n**2)
    for start in range(0, len(plan.groups), at_once):
        some = plan.groups[start : start + at_once]
        grams = [InputGram(n, shared.sum.device) for _ in some]
        handles = []
        for (path, *_), gram in zip(some, grams, strict=True):

            def see(module: nn.Module, args: tuple[Tensor], gram: InputGram = gram) -> None:
                out = site(args[0])
                gram.add(out.dequantize() if isinstance(out, QTensor) else out)

            handles.append(_folded(block, path).register_forward_pre_hook(see))
        run = call.in_order(block)
        try:
            with widened(block, inputs.dtype) as work:
                for x in inputs.split(batch_size):
                    run(x.to(work))
        finally:
            for handle in handles:
                handle.remove()
        for group, gram in zip(some, grams, strict=True):
            yield group, blended(gram, mean)
