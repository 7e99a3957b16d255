"""Wrap a block so that it can be fitted, and fold a fitted block into plain weights and serving modules."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from flatquant import seams
from flatquant.formats.base import Codes
from flatquant.modules import Group, Neutral, Trainable, share_inputs, trainable_parameters
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
from flatquant.quantizers.choose import live
from flatquant.runtime.build import SITES_SLOT
from flatquant.runtime.codes import FrozenCodes
from flatquant.runtime.keyvalue import FrozenKeyValue
from flatquant.runtime.linear import DenseLinear, FrozenSite
from flatquant.spec import BlockPlan, LatentPlan, QuantSpec, Recipe, SitePlan, Transforms, TransformSpec, by_expert
from flatquant.transforms import (
    Compose,
    Diagonal,
    Factor,
    HeadDiagonal,
    HeadMatrices,
    Identity,
    Kronecker,
    Matrix,
    MovedGain,
    Shift,
    Transform,
    Written,
    make_factor,
    make_masked,
)
from flatquant.transforms.diagonal import absmax_scale, second_moment_scale
from flatquant.wiring.arch import Arch, Edge, expanded, key_bias, linear_at, replace_submodule, submodule
from flatquant.wiring.keyvalue import FitKeyValue
from flatquant.wiring.linear import (
    FitLinear,
    FitSite,
    Followed,
    HeadOutput,
    HeadsOutput,
    JoinedWeight,
    PartRows,
    ReaderScale,
    RowScale,
)


@dataclass(frozen=True, kw_only=True)
class InputStatistics:
    """Statistics of one site's input over calibration tokens; or of keys before RoPE, for the site `qk`."""

    absmax: Tensor  # (n,)
    square: Tensor  # mean of x^2, (n,)
    mean: Tensor | None = None  # (n,)
    center: Tensor | None = None  # between the least and the largest x, (n,)
    rows: Tensor | None = None  # x of some tokens, (tokens, n)
    tokens: tuple[int, ...] = ()  # that each group of readers saw: those of one expert, or all


@dataclass(kw_only=True)
class FitBlock:
    """A wrapped block and the parts that are fitted in it."""

    block: nn.Module
    arch: Arch
    plan: BlockPlan
    sites: dict[str, FitSite]
    key_value: FitKeyValue | None

    def roots(self) -> list[nn.Module]:
        """The modules that hold what is fitted."""
        return [*self.sites.values(), *([self.key_value] if self.key_value else [])]

    def parameters(self) -> dict[Group, list[nn.Parameter]]:
        """The trainable parameters by group."""
        return trainable_parameters(*self.roots())

    def static_grids(self) -> list[LiveBlocks]:
        """Grids of activations, keys and values that will have a static scale, which is found when transforms are."""
        cached = [] if self.key_value is None else [self.key_value.keys, self.key_value.values]
        grids = [*(site.activations for site in self.sites.values()), *cached]
        return [grid for grid in grids if isinstance(grid, LiveBlocks) and grid.format.facts.tensor_scale]

    def release_weights(self) -> None:
        """Make the weights trainable too."""
        for site in self.sites.values():
            site.joined.requires_grad_(True)

    def become_plain(self) -> bool:
        """Round as without a method: identities, whole ranges. False, and unchanged, where a part cannot."""
        parts = [m for root in self.roots() for m in root.modules()]
        chosen = [m for m in parts if isinstance(m, Factor | Trainable) and not isinstance(m, JoinedWeight)]
        neutral = [m for m in chosen if isinstance(m, Neutral)]
        if len(neutral) < len(chosen):
            return False
        for module in neutral:
            module.neutralise()
        return True

    def state(self) -> dict[str, Tensor]:
        """Copies of all trainable parameters, by position: `transform.0`, `clip.3`."""
        return {f"{g}.{i}": p.detach().cpu().clone() for g, ps in self.parameters().items() for i, p in enumerate(ps)}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Undo `state`."""
        for group, parameters in self.parameters().items():
            for i, p in enumerate(parameters):
                p.copy_(state[f"{group}.{i}"])


@contextmanager
def observing(grids: Sequence[LiveBlocks]) -> Iterator[None]:
    """Let grids see what they round while this lasts: their static scales are made for it."""

    def see(grid: nn.Module, args: tuple[Tensor]) -> None:
        assert isinstance(grid, LiveBlocks)
        grid.observe(args[0])

    handles = [grid.register_forward_pre_hook(see) for grid in grids]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def unrounded_weights(fits: Iterable[FitBlock]) -> Iterator[None]:
    """Leave weights off their grids: fit for a solver that will deal with the weights' errors itself."""
    grids = [(site, site.grid) for fit in fits for site in fit.sites.values()]
    for site, _ in grids:
        site.grid = None
    try:
        yield
    finally:
        for site, grid in grids:
            site.grid = grid


def wrap_block(
    block: nn.Module,
    arch: Arch,
    plan: BlockPlan,
    recipe: Recipe,
    statistics: Mapping[str, InputStatistics],
    generator: torch.Generator,
    *,
    residual: Factor | None = None,
    force: bool = False,
) -> FitBlock:
    """Replace a block's linears by `FitLinear`s, which share their site's work, and attach a `FitKeyValue` to its
    attention.

    Args:
        statistics: per site, for transforms that start from data, and of keys for an offset that is their mean; may be
            empty otherwise.
        generator: CPU generator for random starts.
        residual: rotates the residual stream that the block reads and adds to; then the block's norms lose their
            gains to their readers, and the block maps x R to y R where it mapped x to y.
        force: build transforms even where nothing is quantised (the laws do).
    """
    arch = arch.of(block)
    latent, ahead = None, plan.latent.site if plan.latent and plan.attended else None
    device = next(block.parameters()).device
    transforms: dict[str, Transform] = {}
    shifts: dict[str, Shift] = {}
    outputs: dict[str, list[nn.Module]] = {path: [] for edge in arch.edges for path in edge.readers}
    for edge in arch.edges:
        holds = edge.passes == "per_head" or edge.site == ahead  # values, or what they are made of
        parts = _parts(edge, recipe, plan.sites[edge.site], plan.values if holds else None, force)
        linears = [linear_at(block, path) for path in edge.readers]
        if parts and parts[0].kind == "shift":
            shifts[edge.site] = _shift(parts[0], linears, statistics.get(edge.site))
        heads, place, rows, n, writers = 1, (1, 0, 0), 0, linears[0].in_features, ()
        if edge.writer is not None:
            writers = expanded(block, (edge.writes.path,))
            rows = linear_at(block, writers[0]).out_features
            place = edge.writes.place(rows, n, plan.head_dim)
            if edge.passes == "per_head":
                heads = place[0] * place[2] // plan.head_dim
        made = _transforms(edge, parts, plan.sites[edge.site], linears, statistics.get(edge.site), generator, heads)
        if edge.norm is None and _minds_scales(plan, writers) and edge.site not in shifts:
            made = [Written(part) if isinstance(part, Diagonal) else part for part in made]
        for part in made:
            if isinstance(part, Written):
                output = _written_output(part.inner, place, rows, n)
                for path in writers:
                    outputs[path].append(output)
        if edge.site == ahead:
            latent, made = _joined(made), [Written(part) for part in made]
        if residual is not None and edge.norm is not None:
            rotation = residual
            if not edge.streams:  # a rotation of its own passes its norm
                rotation = make_factor(recipe.transforms["residual"][0], n, generator)
                for path in writers:
                    outputs[path].append(_on_rows(HeadOutput(rotation), place, rows))
            made = [MovedGain(_gain(block, edge.norm) + arch.norm_offset), Written(Matrix(rotation)), *made]
        transforms[edge.site] = _joined(made)
    if residual is not None:
        assert arch.residual is not None
        for path in arch.residual.writers:
            outputs[path].append(HeadOutput(residual))
        for edge in arch.edges:
            for path in edge.routers:
                follow = Followed(_written_parts(transforms[edge.site]))
                parametrize.register_parametrization(submodule(block, path), "weight", follow)
        with torch.no_grad():
            for norm in {edge.norm for edge in arch.edges if edge.norm is not None}:
                _gain(block, norm).fill_(1 - arch.norm_offset)
    key_scale = None
    if any(t.kind == "diagonal" for t in recipe.transforms.get("qk", ())) and (plan.keys or force):
        key_scale = _scale_scores(block, arch, plan.key_dim, outputs)
    offset = _key_constant(block, arch, plan, statistics.get("qk"))
    sites: dict[str, FitSite] = {}
    for edge in arch.edges:
        site_plan = plan.sites[edge.site]
        site = sites[edge.site] = FitSite(
            transforms[edge.site],
            _activations(site_plan.activations, transforms[edge.site], statistics.get(edge.site)),
            site_plan.weights,
            [linear_at(block, path) for path in edge.readers],
            [outputs[path] for path in edge.readers],
            shifts.get(edge.site),
            alone=len(by_expert(edge.readers)) > 1,
        ).to(device)
        if site_plan.weights is not None and site_plan.weights.is_fitted:
            with torch.no_grad():
                site.grid = WeightLevels(site_plan.weights, site.transformed_weight())
    for edge in arch.edges:
        for index, path in enumerate(edge.readers):
            replace_submodule(block, path, FitLinear(sites[edge.site], index))
    share_inputs(block)
    return FitBlock(
        block=block,
        arch=arch,
        plan=plan,
        sites=sites,
        key_value=_attach_key_value(block, arch, plan, recipe, generator, device, offset, key_scale, latent),
    )


def _parts(edge: Edge, recipe: Recipe, plan: SitePlan, values: QuantSpec | None, force: bool) -> Transforms:
    """The transforms a site gets: none where nothing is quantised that they could help."""
    helps = plan.weights or plan.activations or force or values
    return edge.bearable(recipe.transforms.get(edge.role, ())) if helps else ()


def _shift(spec: TransformSpec, linears: list[nn.Linear], statistics: InputStatistics | None) -> Shift:
    if spec.init == "identity":
        return Shift(torch.zeros(linears[0].in_features))
    assert statistics is not None, "a shift from the center needs input statistics"
    assert statistics.center is not None
    return Shift(statistics.center.float())


def _activations(
    spec: QuantSpec | None, transform: Transform, statistics: InputStatistics | None
) -> Dynamic | SplitGrid | ActivationLevels | LiveBlocks | None:
    """The grid of a site's transformed input."""
    if spec is None or spec.scope == "row":
        return None if spec is None else live(spec, None if statistics is None else statistics.rows)
    assert statistics is not None, "a static scale needs input statistics"
    absmax = statistics.absmax.float()
    for part in _parts_of(transform):
        match part:
            case Diagonal() as diagonal:
                absmax = absmax * diagonal.scale.detach().to(absmax)
            case Written(inner=Diagonal() as diagonal):
                absmax = absmax * diagonal.scale.detach().to(absmax)
            case Written(inner=HeadDiagonal() as heads):  # its writer has applied it
                absmax = absmax * heads.spread.detach().to(absmax)
    return SplitGrid.covering(spec, absmax)


def _cache_grid(spec: QuantSpec | None) -> Dynamic | LiveBlocks | None:
    """The grid of keys or values."""
    grid = None if spec is None else live(spec)
    assert not isinstance(grid, ActivationLevels)
    return grid


def _gain(block: nn.Module, norm: str) -> Tensor:
    gain = submodule(block, norm).weight
    assert isinstance(gain, Tensor)
    return gain


def _minds_scales(plan: BlockPlan, writers: Sequence[str]) -> bool:
    """Whether the weights of a writer round otherwise once its rows are scaled: those of a format do.

    A grid that has a scale for a row, or for groups of it, does not mind.
    """
    specs = [site.weights for site in plan.sites.values() if set(site.readers) & set(writers)]
    return any(spec is not None and spec.format is not None for spec in specs)


def _written_output(inner: Transform, place: tuple[int, int, int], rows: int, n: int) -> nn.Module:
    """What a writer absorbs of a transform that its readers undo, on the rows that `Rows.place` names.

    Args:
        rows: of the writer.
        n: channels that the readers see.
    """
    if isinstance(inner, Diagonal):
        return RowScale(inner, place[1], n)
    if isinstance(inner, HeadDiagonal | HeadMatrices):
        return _on_rows(HeadsOutput(inner), place, rows)
    assert isinstance(inner, Kronecker)
    assert inner.right is not None
    return _on_rows(HeadOutput(inner.right), place, rows)


def _on_rows(output: nn.Module, place: tuple[int, int, int], rows: int) -> nn.Module:
    """A map of outputs, on the rows that `Rows.place` names: a part of the writer's, or all."""
    return output if place == (1, 0, rows) else PartRows(output, *place)


def _scale_scores(block: nn.Module, arch: Arch, head_dim: int, outputs: dict[str, list[nn.Module]]) -> HeadDiagonal:
    """One learned scale per pair of key channels, undone by the queries' rows; it starts at 1."""
    assert arch.scores is not None
    keys = linear_at(block, arch.scores.keys).out_features
    readers = linear_at(block, arch.scores.queries).out_features // keys
    diagonal = HeadDiagonal(torch.ones(keys), head_dim, readers, paired=True)
    outputs[arch.scores.keys].append(HeadsOutput(diagonal))
    outputs[arch.scores.queries].append(ReaderScale(diagonal))
    return diagonal


def _key_constant(block: nn.Module, arch: Arch, plan: BlockPlan, keys: InputStatistics | None) -> Tensor | None:
    """What keys are cached less: their mean before RoPE, or their bias.  # float32, (heads, head_dim)"""
    if plan.key_offset is None:
        return None
    if keys is not None:
        assert keys.mean is not None
        return keys.mean.float().unflatten(0, (plan.key_offset.heads, plan.key_dim))
    bias = key_bias(block, arch, plan.key_offset.heads, plan.key_dim)
    assert bias is not None, "an offset needs a bias, or statistics of keys"
    return bias.detach().float().clone()


def _transforms(
    edge: Edge,
    parts: Transforms,
    plan: SitePlan,
    linears: list[nn.Linear],
    statistics: InputStatistics | None,
    generator: torch.Generator,
    heads: int,
) -> list[Transform]:
    """The transforms of a site, in order; `heads` is the number of heads that an edge's writer writes."""
    made: list[Transform] = []
    n1, n2 = plan.shape
    for spec in parts:
        match spec.kind:
            case "diagonal" if edge.passes == "per_head":
                scale = _start_scale(spec, linears, statistics, (heads, n1 // heads, n2))
                made.append(Written(HeadDiagonal(scale, n2, n1 // heads)))
            case "diagonal":
                made.append(Diagonal(_start_scale(spec, linears, statistics, (1, 1, n1 * n2))))
            case "matrix":
                made.append(Matrix(make_factor(spec, n1 * n2, generator)))
            case "heads":
                factor = make_masked(spec, n2, (heads,))
                made.append(Written(HeadMatrices(factor, n1 // heads)))
            case "head":
                made.append(Written(Kronecker(None, make_factor(spec, n2, generator))))
            case "kronecker" if edge.passes == "per_head":
                # P1 mixes heads, online; P2 acts inside each head, where the writer applies it.
                if plan.left:
                    made.append(Kronecker(make_factor(spec, n1, generator), None))
                made.append(Written(Kronecker(None, make_factor(spec, n2, generator))))
            case "kronecker":
                made.append(Kronecker(make_factor(spec, n1, generator), make_factor(spec, n2, generator)))
            case "blocks" if edge.passes == "per_head":
                made.append(Written(Kronecker(None, make_factor(spec, math.gcd(spec.size, n2), generator))))
            case "blocks":
                made.append(Kronecker(None, make_factor(spec, n2, generator)))
    return made


def _joined(made: Sequence[Transform]) -> Transform:
    if not made:
        return Identity()
    return made[0] if len(made) == 1 else Compose(made)


def _start_scale(
    spec: TransformSpec,
    linears: list[nn.Linear],
    statistics: InputStatistics | None,
    shape: tuple[int, int, int],
) -> Tensor:
    """Where a diagonal starts. Of inputs in `shape` (a, b, c), the b copies share a scale.  # (a * c,)"""
    weight = torch.cat([linear.weight.detach().float() for linear in linears])  # (sum o, n)
    if spec.init == "identity":
        return torch.ones_like(weight[0, : shape[0] * shape[2]])
    assert statistics is not None, f"a {spec.init} start needs input statistics"
    if spec.init == "absmax":
        x, w = (m.float().reshape(shape).amax(1).flatten() for m in (statistics.absmax, weight.abs().amax(0)))
        return absmax_scale(x, w, spec.alpha)
    x, w = (m.float().reshape(shape).mean(1).flatten() for m in (statistics.square, weight.square().mean(0)))
    return second_moment_scale(x, w)


def _attach_key_value(
    block: nn.Module,
    arch: Arch,
    plan: BlockPlan,
    recipe: Recipe,
    generator: torch.Generator,
    device: torch.device,
    offset: Tensor | None,
    scale: HeadDiagonal | None,
    latent: Transform | None,
) -> FitKeyValue | None:
    if not plan.attended:
        return None
    factor = make_factor(recipe.transforms["qk"][0], plan.key_dim, generator) if plan.qk else None
    key_value = FitKeyValue(
        factor,
        _cache_grid(plan.keys),
        _cache_grid(plan.values),
        offset,
        plan.key_offset.pairing if plan.key_offset else "none",
        scale if offset is not None else None,
        latent,
        plan.latent.rotary if plan.latent else None,
    ).to(device)
    assert arch.attention is not None
    seams.attach(submodule(block, arch.attention), key_value)
    return key_value


# --------------------------------------------------------------------------------------------- fold


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
            _turn(submodule(block, path), _written_parts(transforms[edge.site], diagonals=True))
        activations = fit.sites[edge.site].activations
        frozen[edge.site] = FrozenSite(
            None if left is None else left.to(dtype),
            None if right is None else right.to(dtype),
            None if activations is None else freeze_grid(activations),
            shift=None if shift is None else shift.to(dtype),
        )
    for edge in arch.edges:
        for path in edge.readers:
            weight, bias = folded[path]
            target = dtype if plan.sites[edge.site].weights else dense or dtype
            frozen_site = frozen[edge.site]
            assert isinstance(frozen_site, FrozenSite)
            bias = None if bias is None else bias.to(dtype)
            if path in levels:
                replace_submodule(block, path, FrozenCodes(frozen_site, levels[path], bias))
                continue
            replace_submodule(block, path, DenseLinear(frozen_site, weight.to(target), bias))
    setattr(block, SITES_SLOT, frozen)
    if fit.key_value is not None:
        assert arch.attention is not None
        seams.attach(submodule(block, arch.attention), _freeze_key_value(fit.key_value, *cached, dtype))


def _online_parts(
    transform: Transform, plan: SitePlan | LatentPlan
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(diagonal, P1, P2) of a folded site, or of what runs before a cache; factors only if they run there."""
    diagonal = left = right = None
    for part in _parts_of(transform):
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


def _parts_of(transform: Transform) -> list[Transform]:
    if not isinstance(transform, Compose):
        return [transform]
    return [part for part in transform.parts if isinstance(part, Transform)]


def _written_parts(transform: Transform, *, diagonals: bool = False) -> Transform:
    """What of a site's transform its input is written in; diagonals too, once a norm has absorbed them."""
    kinds = (Written, MovedGain, Diagonal) if diagonals else (Written, MovedGain)
    return _joined([part for part in _parts_of(transform) if isinstance(part, kinds)])


def _turn(router: nn.Module, transform: Transform) -> None:
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
        gain, shift = _gain(block, edge.norm), getattr(submodule(block, edge.norm), "bias", None)
        gain.copy_(((gain.double() + arch.norm_offset) * diagonal - arch.norm_offset).to(gain.dtype))
        if isinstance(shift, Tensor):
            shift.copy_((shift.double() * diagonal).to(shift.dtype))
        return
    for path in expanded(block, (edge.writes.path,)):
        weight, bias = folded[path]
        scale = torch.ones_like(weight[:, 0])
        _, first, _ = edge.writes.place(len(scale), len(diagonal), 1)
        scale[first : first + len(diagonal)] = diagonal
        folded[path] = (weight * scale[:, None], None if bias is None else bias * scale)


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
