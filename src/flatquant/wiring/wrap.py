"""Wrap a block so that it can be fitted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from flatquant import seams
from flatquant.modules import share_inputs
from flatquant.quantizers import ActivationLevels, Dynamic, LiveBlocks, SplitGrid, WeightLevels
from flatquant.quantizers.choose import live
from flatquant.spec import BlockPlan, QuantSpec, Recipe, SitePlan, Transforms, TransformSpec, by_expert
from flatquant.transforms import (
    Diagonal,
    Factor,
    HeadDiagonal,
    HeadMatrices,
    Kronecker,
    Matrix,
    MovedGain,
    Shift,
    Transform,
    Written,
    make_factor,
)
from flatquant.wiring.arch import Arch, Edge, expanded, gain_of, key_bias, linear_at, replace_submodule, submodule
from flatquant.wiring.fitted import FitBlock, InputStatistics
from flatquant.wiring.keyvalue import FitKeyValue
from flatquant.wiring.linear import (
    FitLinear,
    FitSite,
    Followed,
    HeadOutput,
    HeadsOutput,
    PartRows,
    ReaderScale,
    RowScale,
)
from flatquant.wiring.site_transform import composed, make_transforms, parts_of, written_parts


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
        made = make_transforms(edge, parts, plan.sites[edge.site], linears, statistics.get(edge.site), generator, heads)
        if edge.norm is None and _minds_scales(plan, writers) and edge.site not in shifts:
            made = [Written(part) if isinstance(part, Diagonal) else part for part in made]
        for part in made:
            if isinstance(part, Written):
                output = _written_output(part.inner, place, rows, n)
                for path in writers:
                    outputs[path].append(output)
        if edge.site == ahead:
            latent, made = composed(made), [Written(part) for part in made]
        if residual is not None and edge.norm is not None:
            rotation = residual
            if not edge.streams:  # a rotation of its own passes its norm
                rotation = make_factor(recipe.transforms["residual"][0], n, generator)
                for path in writers:
                    outputs[path].append(_on_rows(HeadOutput(rotation), place, rows))
            made = [MovedGain(gain_of(block, edge.norm) + arch.norm_offset), Written(Matrix(rotation)), *made]
        transforms[edge.site] = composed(made)
    if residual is not None:
        assert arch.residual is not None
        for path in arch.residual.writers:
            outputs[path].append(HeadOutput(residual))
        for edge in arch.edges:
            for path in edge.routers:
                follow = Followed(written_parts(transforms[edge.site]))
                parametrize.register_parametrization(submodule(block, path), "weight", follow)
        with torch.no_grad():
            for norm in {edge.norm for edge in arch.edges if edge.norm is not None}:
                gain_of(block, norm).fill_(1 - arch.norm_offset)
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
    for part in parts_of(transform):
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
