"""Fold a fitted block into plain weights and serving modules."""

from __future__ import annotations

import copy
from typing import overload

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from flatquant import seams
from flatquant.formats.base import Codes
from flatquant.modules import joined
from flatquant.quantizers import (
    ActivationLevels,
    Dynamic,
    FixedClip,
    FrozenBlocks,
    LiveBlocks,
    NoClip,
    SplitGrid,
    WeightLevels,
)
from flatquant.runtime.build import SITES_SLOT
from flatquant.runtime.codes import FrozenCodes
from flatquant.runtime.keyvalue import FrozenKeyValue
from flatquant.runtime.linear import DenseLinear, FrozenSite
from flatquant.spec import LatentPlan, SitePlan, by_expert
from flatquant.transforms import Diagonal, Factor, Kronecker, Matrix, Transform
from flatquant.wiring.arch import Arch, Edge, expanded, gain_of, replace_submodule, submodule
from flatquant.wiring.fitted import FitBlock
from flatquant.wiring.keyvalue import FitKeyValue
from flatquant.wiring.site_transform import parts_of, written_parts


@torch.no_grad()
def fold_block(fit: FitBlock, *, dtype: torch.dtype = torch.float32, dense: torch.dtype | None = None) -> None:
    """Replace a fitted block's parts by serving modules with dense, transformed weights; solvers come after.

    All arithmetic is float64: W P^-T, the clip, the writers' output transforms, the diagonals into norm gains and
    writer rows (FlatQuant, section 3.3 and appendix; the order matters and is that of `FitLinear`).

    Args:
        dtype: of the online factors, and of weights that a solver will round.
        dense: dtype of weights that stay in 16 bit; `None` keeps `dtype`.
    """
    block, arch, plan = fit.block, fit.arch, fit.plan
    folded: dict[str, tuple[Tensor, Tensor | None]] = {}
    transforms: dict[str, Transform] = {}
    shifts: dict[str, Tensor | None] = {}
    levels: dict[str, Codes] = {}
    for edge in arch.edges:
        site = copy.deepcopy(fit.sites[edge.site]).double()  # one at a time: of a large model, these are gigabytes
        transforms[edge.site] = site.transform
        shifts[edge.site] = None if site.shift is None else site.shift.d
        weights = site.transformed_weight().split(site.sizes)
        bias = site.transformed_bias()
        biases = [None] * len(weights) if bias is None else bias.split(site.sizes)
        for path, w, b, has in zip(edge.readers, weights, biases, site.has_bias, strict=True):
            folded[path] = (w, b if has else None)
        if isinstance(site.grid, WeightLevels):
            levels |= zip(edge.readers, site.grid.frozen().split(site.sizes), strict=True)
    frozen = nn.ModuleDict()
    cached: tuple[Tensor | None, Tensor | None] = None, None
    for edge in arch.edges:
        diagonal, left, right = _online_parts(transforms[edge.site], plan.sites[edge.site])
        if plan.latent and plan.latent.site == edge.site and fit.key_value is not None and fit.key_value.latent:
            diagonal, *factors = _online_parts(copy.deepcopy(fit.key_value.latent).double(), plan.latent)
            cached = factors[0], factors[1]
        shift = _remaining_shift(edge, block, shifts[edge.site], plan.sites[edge.site])
        if diagonal is not None:
            _absorb(edge, arch, block, diagonal, folded)
            shift = None if shift is None else shift * diagonal  # it comes after the scale now
        for path in edge.routers:
            rebase_router(submodule(block, path), written_parts(transforms[edge.site], diagonals=True))
        activations = fit.sites[edge.site].activations
        frozen[edge.site] = FrozenSite(
            None if left is None else left.to(dtype),
            None if right is None else right.to(dtype),
            None if activations is None else freeze_grid(activations),
            shift=None if shift is None else shift.to(dtype),
        )
    for edge in arch.edges:
        target = dtype if plan.sites[edge.site].weights else dense or dtype
        frozen_site = frozen[edge.site]
        assert isinstance(frozen_site, FrozenSite)
        for group in by_expert(edge.readers):
            weights = [folded[path][0] for path in group]
            rows = joined(weights).to(target).split([len(w) for w in weights])  # still one tensor
            for path, weight in zip(group, rows, strict=True):
                bias = folded[path][1]
                bias = None if bias is None else bias.to(dtype)
                codes = levels.get(path)
                linear = FrozenCodes(frozen_site, codes, bias) if codes else DenseLinear(frozen_site, weight, bias)
                replace_submodule(block, path, linear)
    setattr(block, SITES_SLOT, frozen)
    if fit.key_value is not None:
        assert arch.attention is not None
        seams.attach(submodule(block, arch.attention), _freeze_key_value(fit.key_value, *cached, dtype))


def _online_parts(
    transform: Transform, plan: SitePlan | LatentPlan
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(diagonal, P1, P2) of a folded site, or of what runs before a cache; factors only if they run there."""
    diagonal = left = right = None
    for part in parts_of(transform):
        match part:
            case Diagonal():
                diagonal = part.scale
            case Matrix():
                right = part.factor.matrix()
            case Kronecker():
                left = part.left.matrix() if part.left is not None else None
                right = part.right.matrix() if part.right is not None else None
    assert (left is not None, right is not None) == (plan.left, plan.right)
    return diagonal, left, right


def rebase_router(router: nn.Module, transform: Transform) -> None:
    """Put a router's weight into the basis of its input, for good."""
    if parametrize.is_parametrized(router, "weight"):
        parametrize.remove_parametrizations(router, "weight", leave_parametrized=False)
    weight = router.get_parameter("weight")
    weight.copy_(transform.inverse_t(weight.double()))


def _remaining_shift(edge: Edge, block: nn.Module, shift: Tensor | None, plan: SitePlan) -> Tensor | None:
    """What is to be subtracted online: nothing where the norm's bias takes it.  # (n,)"""
    if shift is None or plan.shift == "none":
        return None
    if plan.shift == "online":
        return shift
    assert edge.norm is not None
    bias = submodule(block, edge.norm).bias
    assert isinstance(bias, Tensor)
    bias.copy_((bias.double() - shift).to(bias.dtype))
    return None


def _absorb(
    edge: Edge, arch: Arch, block: nn.Module, diagonal: Tensor, folded: dict[str, tuple[Tensor, Tensor | None]]
) -> None:
    """Multiply the channels an edge carries where they are written: a norm's gain, or a linear's rows and bias."""
    if edge.norm is not None:
        gain, shift = gain_of(block, edge.norm), getattr(submodule(block, edge.norm), "bias", None)
        gain.copy_(((gain.double() + arch.norm_offset) * diagonal - arch.norm_offset).to(gain.dtype))
        if isinstance(shift, Tensor):
            shift.copy_((shift.double() * diagonal).to(shift.dtype))
        return
    for path in expanded(block, (edge.writes.path,)):
        weight, bias = folded[path]
        scale = torch.ones_like(weight[:, 0])
        _, first, _ = edge.writes.place(len(scale), len(diagonal), 1)
        scale[first : first + len(diagonal)] = diagonal
        weight.mul_(scale[:, None])
        if bias is not None:
            bias.mul_(scale)


@overload
def freeze_grid(grid: Dynamic) -> Dynamic: ...
@overload
def freeze_grid(grid: SplitGrid) -> SplitGrid: ...
@overload
def freeze_grid(grid: ActivationLevels) -> ActivationLevels: ...
@overload
def freeze_grid(grid: LiveBlocks) -> FrozenBlocks: ...
def freeze_grid(
    grid: Dynamic | SplitGrid | ActivationLevels | LiveBlocks,
) -> Dynamic | SplitGrid | ActivationLevels | FrozenBlocks:
    """The same grid with its clip, or its scale of the tensor, fixed."""
    if isinstance(grid, LiveBlocks):
        return grid.frozen()
    if not isinstance(grid, Dynamic):
        return grid
    ratios = grid.clip.ratios()
    return Dynamic(grid.spec, NoClip() if ratios is None else FixedClip(torch.stack([r.reshape(()) for r in ratios])))


def _freeze_key_value(
    fit: FitKeyValue, left: Tensor | None, right: Tensor | None, dtype: torch.dtype
) -> FrozenKeyValue:
    key_matrix = query_matrix = None
    if fit.factor is not None:
        wide: Factor = copy.deepcopy(fit.factor).double()
        key_matrix, query_matrix = wide.matrix().to(dtype), wide.inverse_t().to(dtype)
    constant = fit.constant()
    return FrozenKeyValue(
        key_matrix,
        query_matrix,
        None if fit.keys is None else freeze_grid(fit.keys),
        None if fit.values is None else freeze_grid(fit.values),
        None if constant is None else constant.to(dtype),
        fit.pairing,
        None if left is None else left.to(dtype),
        None if right is None else right.to(dtype),
        fit.rotary,
    )
