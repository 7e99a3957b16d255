"""Recipe + architecture + model -> which transform and grid sits on which edge of which block."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from torch import nn

from flatquant import seams
from flatquant.errors import FamilyError, ModelError, SpecError
from flatquant.spec import BlockPlan, CodebookSpec, KeyOffset, LatentPlan, Plan, QuantSpec, Recipe, SitePlan, Transforms
from flatquant.transforms import hadamard_split, kronecker_split
from flatquant.wiring.arch import Arch, Edge, Geometry, key_bias, linear_at, submodule


def make_plan(recipe: Recipe, arch: Arch, geometry: Geometry, blocks: nn.ModuleList, *, force: bool = False) -> Plan:
    """Decide, for every block, what sits where.

    A site is transformed where something there is quantised (values count for the value heads); `force` transforms
    everywhere, which is how the laws check function preservation without grids.

    Raises:
        SpecError: a group size that does not divide a layer's inputs, an override for a block that does not exist,
            or a transform that cannot sit where the recipe puts it.
        FamilyError: a transform that this family has no place for.
        ModelError: an edge that names a module the model lacks, or a linear that no edge names: it would stay as it is.
    """
    known = [edge.role for kind in arch.kinds for edge in kind.edges]
    for key in recipe.scheme.overrides:
        block, _, site = key.rpartition(".")
        if site not in known:
            raise SpecError(f"override {key!r}: in this family's blocks, {site} is part of {known[0]}")
        if block and int(block) >= len(blocks):
            raise SpecError(f"override {key!r}: the model has blocks 0 to {len(blocks) - 1}")
    for block, bits in recipe.scheme.cache_overrides.items():
        if int(block) >= len(blocks):
            raise SpecError(f"override '{block}.{bits}': the model has blocks 0 to {len(blocks) - 1}")
    plan = Plan(
        blocks_path=arch.blocks,
        attention=arch.reached,
        blocks=tuple(_block(i, block, recipe, arch.of(block), geometry, force) for i, block in enumerate(blocks)),
    )
    name = ", ".join(arch.model_types)
    caches = [recipe.scheme.cache_at(index) for index in range(len(blocks))]
    if not arch.reached and any(grid is not None for cache in caches for grid in cache):
        raise FamilyError(f"{name}: its attention gives no access to keys and values; use a scheme without kv bits")
    keyed, wanted = force or any(block.keys is not None for block in plan.blocks), recipe.scheme.key_offset
    if wanted in ("bias", "mean") and not keyed:
        raise SpecError(f"key offset {wanted}: keys are not quantised; leave it out, or name their bits, as in w4a4kv4")
    if arch.residual is None and rotates_residual(recipe, plan, force):
        raise FamilyError(f"{name}: no rotation can pass through its residual stream")
    scaled = any(t.kind == "diagonal" for t in recipe.transforms.get("qk", ()))
    if arch.scores is None and scaled and keyed:
        raise FamilyError(f"{name}: no scale passes from its keys to its queries")
    return plan


def rotates_residual(recipe: Recipe, plan: Plan, force: bool = False) -> bool:
    """Whether the residual stream is rotated: where the recipe says so and weights or activations are quantised."""
    sites = (site for block in plan.blocks for site in block.sites.values())
    quantised = force or any(site.weights or site.activations for site in sites)
    return quantised and bool(recipe.transforms.get("residual"))


def _block(index: int, block: nn.Module, recipe: Recipe, arch: Arch, geometry: Geometry, force: bool) -> BlockPlan:
    keys, values = recipe.scheme.cache_at(index) if arch.attention is not None else (None, None)
    geometry = geometry.at(block, arch)
    for spec, size in ((keys, geometry.key_dim), (values, geometry.latent or geometry.head_dim)):
        if spec is not None and spec.format is not None and size % spec.format.block:
            raise SpecError(f"{spec.kind}: blocks of {spec.format.block} do not divide heads of {size}")
    cached = {arch.latent} if values else set()
    sites = {e.site: _site(e, index, block, recipe, geometry, force or e.site in cached) for e in arch.edges}
    _check_all_read(index, block, arch)
    online = any(t.kind == "matrix" for t in recipe.transforms.get("qk", ()))  # a diagonal goes into the weights
    keyed = arch.attention is not None and (keys is not None or force)
    # Blocks that read another's keys do not turn their queries into a basis of these.
    qk = online and keyed and not seams.lends(submodule(block, arch.attention or ""))
    offset = _key_offset(block, recipe, arch, geometry, keys) if keyed else None
    latent = None
    if arch.latent is not None:
        latent = LatentPlan(site=arch.latent, rotary=geometry.key_dim)
        if qk or keys or values or offset:  # what is cached is attended to: the site's factors run before the cache
            own = sites[arch.latent]
            latent = replace(latent, left=own.left, right=own.right)
            sites[arch.latent] = replace(own, left=False, right=False, ranks=1)
    return BlockPlan(
        sites=sites,
        head_dim=geometry.head_dim,
        qk=qk,
        keys=keys,
        values=values,
        key_offset=offset,
        latent=latent,
    )


def takes_mean(recipe: Recipe, keys: QuantSpec | None) -> bool:
    """Whether keys on this grid are cached less their mean over calibration text.

    At 8 bits it takes nothing away that can be measured (docs/experiments.md, "A fit that ends worse than it began").
    """
    wanted = recipe.scheme.key_offset
    fine = keys is not None and keys.bits >= 8
    return wanted == "mean" or (wanted == "auto" and recipe.needs_data and not fine)


def _key_offset(
    block: nn.Module, recipe: Recipe, arch: Arch, geometry: Geometry, keys: QuantSpec | None
) -> KeyOffset | None:
    """Whether keys are cached less a constant, and how that turns."""
    assert arch.attention is not None
    attention = submodule(block, arch.attention)
    normed = any(name.startswith("k") and "norm" in name for name, _ in attention.named_children())
    biased = arch.latent is None and key_bias(block, arch, geometry.kv_heads, geometry.head_dim) is not None
    if arch.rotary is None and recipe.scheme.key_offset in ("bias", "mean"):
        raise SpecError(f"key offset {recipe.scheme.key_offset}: it cannot follow how this family turns keys; use none")
    match recipe.scheme.key_offset:
        case "none":
            return None
        case "auto" if arch.rotary is None:
            return None
        case "auto" if not takes_mean(recipe, keys) and (normed or not biased):
            return None
        case "bias" if not biased or normed:
            where = "keys pass a norm after their bias" if biased else "keys have no bias of their own"
            raise SpecError(f"key offset bias: {where}; use the mean of calibration text")
    assert arch.rotary is not None
    pairing = arch.rotary if arch.turns(attention) else "none"
    return KeyOffset(heads=geometry.kv_heads, pairing=pairing)


def _check_all_read(index: int, block: nn.Module, arch: Arch) -> None:
    """Raise ModelError for a linear that no edge names."""
    read = {path for edge in arch.edges for path in (*edge.readers, *edge.routers)} | set(arch.kept)
    for path, module in block.named_modules():
        if isinstance(module, nn.Linear) and path not in read:
            raise ModelError(
                f"{path} of block {index} is a Linear that the description of this family does not name: it would stay "
                "in 16 bit; add it to an edge in flatquant/wiring/archs (docs/families.md)"
            )


def _site(
    edge: Edge,
    index: int,
    block: nn.Module,
    recipe: Recipe,
    geometry: Geometry,
    force: bool,
) -> SitePlan:
    weights, activations = recipe.scheme.at(index, edge.role)
    parts = edge.bearable(recipe.transforms.get(edge.role, ()))
    n = _input_size(block, edge)
    if weights and weights.group_size and n % weights.group_size:
        raise SpecError(f"group size {weights.group_size} does not divide the {n} inputs of {edge.readers[0]}")
    for spec in (weights, activations):
        if spec is not None and spec.format is not None and n % spec.format.block:
            raise SpecError(
                f"{spec.kind}: blocks of {spec.format.block} do not divide the {n} inputs of {edge.readers[0]}"
            )
    codebook = recipe.solver.codebook if weights else None
    if codebook is not None:
        _check_lengths(block, edge, codebook)
    quantised = weights is not None or activations is not None or force
    if activations is not None and activations.scope == "tensor":
        rotated = edge.norm is not None and bool(recipe.transforms.get("residual"))
        if rotated or any(part.kind != "diagonal" for part in parts):
            raise SpecError(f"{edge.site}: only a diagonal may come before a static scale")
    left, right = _online(edge, parts, quantised)
    ranks = _ranks(edge, parts, n, geometry)
    return SitePlan(
        readers=edge.readers,
        shape=_shape(edge, parts, n, geometry),
        left=left,
        right=right,
        weights=weights,
        activations=activations,
        codebook=codebook,
        rank=_rank(block, edge, recipe, n) if weights else 0,
        shift=_shift(block, edge, parts) if quantised else "none",
        ranks=ranks if left else 1,
    )


def _ranks(edge: Edge, parts: Transforms, n: int, geometry: Geometry) -> int:
    """How many blocks the left factor has."""
    ranks = max((part.ranks for part in parts), default=1)
    heads = edge.passes == "per_head"
    rows = geometry.heads if heads else n
    if rows % ranks:
        raise SpecError(f"{edge.site}: {rows} {'heads' if heads else 'channels'} do not divide over {ranks} ranks")
    return ranks


def _shift(block: nn.Module, edge: Edge, parts: Transforms) -> Literal["none", "norm", "online"]:
    """Where a shift of the edge's channels goes."""
    if not any(part.kind == "shift" for part in parts):
        return "none"
    if edge.passes == "per_head":
        raise SpecError(f"{edge.site}: what heads write cannot be shifted here; shift attn_in, mlp_in or mlp_mid")
    if edge.norm is None or edge.routers:  # a router has no bias to undo it in
        return "online"
    return "norm" if getattr(submodule(block, edge.norm), "bias", None) is not None else "online"


def _rank(block: nn.Module, edge: Edge, recipe: Recipe, n: int) -> int:
    outputs = sum(linear_at(block, path).out_features for path in edge.readers)
    return min(recipe.branch.rank, n, outputs) if recipe.branch else 0


def _check_lengths(block: nn.Module, edge: Edge, codebook: CodebookSpec) -> None:
    lengths = {codebook.length, *([codebook.outlier_length] if codebook.outliers else [])}
    for path in edge.readers:
        o = linear_at(block, path).out_features
        for length in sorted(lengths):
            if o % length:
                raise SpecError(f"codebook vectors of {length} do not divide the {o} outputs of {path}")


def _shape(edge: Edge, parts: Transforms, n: int, geometry: Geometry) -> tuple[int, int]:
    """(n1, n2): heads x head_dim where heads write, blocks x their size, else the cheapest Kronecker split."""
    if edge.passes == "per_head":
        if n != geometry.heads * geometry.head_dim:
            raise SpecError(f"{edge.readers[0]} has {n} inputs, not {geometry.heads} heads x {geometry.head_dim}")
        return geometry.heads, geometry.head_dim
    for part in parts:
        if part.kind == "kronecker":
            split = hadamard_split if part.init == "hadamard" else kronecker_split
            return split(n, part.ranks)
        if part.kind == "blocks":
            if n % part.size:
                raise SpecError(
                    f"{edge.site}: blocks of {part.size} do not divide the {n} inputs of {edge.readers[0]}; the "
                    f"largest power of two that does is {n & -n}"
                )
            return n // part.size, part.size
    return 1, n


def _online(edge: Edge, parts: Transforms, quantised: bool) -> tuple[bool, bool]:
    """Whether P1 and P2 run online at this edge."""
    kinds = {p.kind for p in parts}
    if "diagonal" in kinds and edge.norm is None and edge.passes == "nothing":
        raise SpecError(f"{edge.site}: a diagonal has neither a norm nor a writer to absorb it here")
    if kinds & {"head", "heads"} and edge.passes != "per_head":
        raise SpecError(f"{edge.site}: is not made of heads")
    if edge.passes == "per_head":
        if "matrix" in kinds:
            raise SpecError(f"{edge.site}: a full matrix mixes heads and cannot be absorbed; use a kronecker")
        return "kronecker" in kinds and quantised, False  # the writer absorbs P2
    return "kronecker" in kinds and quantised, bool(kinds & {"kronecker", "matrix", "blocks"}) and quantised


def _input_size(block: nn.Module, edge: Edge) -> int:
    sizes = {linear_at(block, path).in_features for path in edge.readers}
    if len(sizes) != 1:
        raise SpecError(f"{edge.site}: its readers have different input sizes {sorted(sizes)}")
    return sizes.pop()
