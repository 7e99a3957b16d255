"""The serving skeleton of a block, made from its plan alone: what loading and resuming share.

Tensors come afterwards through `load_state_dict(assign=True)`; until then every tensor is on the meta device.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from flatquant import seams
from flatquant.codebook import Book, index_dtype
from flatquant.errors import ArtifactError
from flatquant.formats import kinds
from flatquant.formats.base import Codes
from flatquant.modules import share_inputs
from flatquant.qtensor import QTensor
from flatquant.quantizers import ActivationLevels, Dynamic, FrozenBlocks, SplitGrid
from flatquant.quantizers.choose import empty
from flatquant.runtime.branch import BranchedLinear
from flatquant.runtime.codebook import CodebookLinear, FrozenBook, PackedBook, SiteBook
from flatquant.runtime.codes import FrozenCodes, PackedCodes
from flatquant.runtime.embedding import RoundedEmbedding
from flatquant.runtime.experts import is_stacked, open_experts
from flatquant.runtime.keyvalue import FrozenKeyValue
from flatquant.runtime.linear import DenseLinear, FrozenLinear, FrozenSite, IntegerLinear, PackedLinear, SiteLinear
from flatquant.spec import BlockPlan, CodebookSpec, EmbeddingPlan, HeadPlan, Plan, QuantSpec, SitePlan

SITES_SLOT = "flatquant"  # a block's attribute that holds its `FrozenSite`s by name


def install(block: nn.Module, attention: str, plan: BlockPlan, *, packed: bool) -> None:
    """Replace a block's linears by empty serving ones and attach its keys and values.

    Args:
        attention: path of the attention module in the block.
        plan: what sits where.
        packed: `PackedLinear`s, as stored; otherwise `FrozenLinear`s.

    Raises:
        ArtifactError: the plan names modules that the block lacks.
    """
    _check_experts(block, max((site.experts for site in plan.sites.values()), default=0))
    open_experts(block)
    sites = nn.ModuleDict()
    for name, site_plan in plan.sites.items():
        site = _site(site_plan)
        sites[name] = site
        for path in site_plan.readers:
            _replace(block, path, site, site_plan, packed)
    setattr(block, SITES_SLOT, sites)
    share_inputs(block)
    if plan.attended:
        key, query = (_empty(plan.key_dim, plan.key_dim) if plan.qk else None for _ in range(2))
        offset, latent = plan.key_offset, plan.latent
        n1, n2 = plan.sites[latent.site].shape if latent else (0, 0)
        key_value = FrozenKeyValue(
            key,
            query,
            _cache_grid(plan.keys, plan.key_dim),
            _cache_grid(plan.values, plan.value_dim),
            _empty(offset.heads, plan.key_dim) if offset else None,
            offset.pairing if offset else "none",
            _empty(n1, n1) if latent and latent.left else None,
            _empty(n2, n2) if latent and latent.right else None,
            latent.rotary if latent else None,
        )
        seams.attach(_get(block, attention), key_value)


def install_ends(model: nn.Module, plan: Plan, *, packed: bool) -> None:
    """Replace a model's output layer and embedding by empty serving ones, where the plan has them.

    Raises:
        ArtifactError: the plan does not fit the model.
    """
    if plan.head is not None:
        install_head(model, plan.head, packed=packed)
    if plan.embedding is not None:
        install_embedding(model, plan.embedding, plan.head, packed=packed)


def install_head(model: nn.Module, plan: HeadPlan, *, packed: bool) -> None:
    """Replace a model's output layer by an empty serving one. Its site holds no tensor and is registered nowhere.

    Raises:
        ArtifactError: the plan names a module that the model lacks.
    """
    _replace(model, plan.path, _site(plan.site), plan.site, packed)


def install_embedding(model: nn.Module, plan: EmbeddingPlan, head: HeadPlan | None, *, packed: bool) -> None:
    """Replace a model's embedding by an empty rounded one, or by one that looks up the rows of a rounded output layer.

    Args:
        head: which is installed already, where the embedding shares its integers.

    Raises:
        ArtifactError: the plan names a module that the model lacks, or that multiplies its rows in an unknown way.
    """
    embedding = _get(model, plan.path)
    rows = getattr(embedding, "num_embeddings", 0), getattr(embedding, "embedding_dim", 0)
    if not isinstance(embedding, nn.Embedding) or rows[1] != plan.width:
        raise ArtifactError(f"the plan does not fit the model: {plan.path!r} is no embedding of {plan.width} numbers")
    multiplier = multiplier_of(embedding)
    if multiplier is None:
        raise ArtifactError(f"the plan does not fit the model: {plan.path!r} is a {type(embedding).__name__}")
    dtype = embedding.weight.dtype
    if plan.shared:
        assert head is not None
        integers = _get(model, head.path)
        if not isinstance(integers, IntegerLinear) or integers.scale.shape[0] != rows[0]:
            raise ArtifactError(f"the plan does not fit the model: {head.path!r} has other rows than {plan.path!r}")
    else:
        like = nn.Linear(rows[1], rows[0], bias=False, dtype=dtype, device="meta")
        integers = _linear(like, _site(plan.site), plan.site, packed)
        assert isinstance(integers, IntegerLinear)
    parent, _, leaf = plan.path.rpartition(".")
    rounded = RoundedEmbedding(integers, own=not plan.shared, dtype=dtype, multiplier=multiplier)
    setattr(_get(model, parent), leaf, rounded)


def multiplier_of(embedding: nn.Embedding) -> float | None:
    """What an embedding multiplies its rows by; None where it does something else with them."""
    if type(embedding) is nn.Embedding:
        return 1.0
    found = getattr(embedding, "scalar_embed_scale", None)  # of Gemma's embeddings and their like
    return float(found) if isinstance(found, int | float) else None


def _replace(root: nn.Module, path: str, site: FrozenSite, plan: SitePlan, packed: bool) -> None:
    """Put an empty serving linear in the place of one that reads a site."""
    linear = _get(root, path)
    n1, n2 = plan.shape
    if not isinstance(linear, nn.Linear) or linear.in_features != n1 * n2:
        raise ArtifactError(f"the plan does not fit the model: {path!r} is no linear layer of {n1} x {n2} inputs")
    parent, _, leaf = path.rpartition(".")
    inner = _linear(linear, site, plan, packed)
    up = _empty(linear.out_features, plan.rank, dtype=torch.float16) if plan.rank else None
    setattr(_get(root, parent), leaf, inner if up is None else BranchedLinear(inner, up))


def _check_experts(block: nn.Module, planned: int) -> None:
    """Numbers that a config names, before modules are made after them, or tokens routed."""
    stacked = [module for module in block.modules() if is_stacked(module)]
    for module in stacked:
        if (experts := len(module.get_parameter("down_proj"))) != planned:
            raise ArtifactError(f"the plan does not fit the model: {experts} experts, {planned} planned")
    for module in block.modules() if stacked else ():
        chosen = getattr(module, "top_k", 1)
        if type(chosen) is not int or not 1 <= chosen <= planned:
            raise ArtifactError(f"config.json is damaged: {chosen} experts for each token, of {planned}")


def _get(root: nn.Module, path: str) -> nn.Module:
    try:
        return root.get_submodule(path)
    except AttributeError:
        raise ArtifactError(f"the plan does not fit the model: {type(root).__name__} has no {path!r}") from None


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _grid(spec: QuantSpec | None, n: int) -> Dynamic | SplitGrid | ActivationLevels | FrozenBlocks | None:
    """The grid of rows of n numbers."""
    if spec is not None and spec.format is not None and n % spec.format.block:
        raise ArtifactError(f"the plan does not fit the model: {spec.kind} has no blocks for {n} numbers")
    return None if spec is None else empty(spec, n)


def _cache_grid(spec: QuantSpec | None, n: int) -> Dynamic | FrozenBlocks | None:
    grid = _grid(spec, n)
    assert not isinstance(grid, SplitGrid | ActivationLevels)
    return grid


def _site(plan: SitePlan) -> FrozenSite:
    n1, n2 = plan.shape
    left, right = _empty(n1, n1) if plan.left else None, _empty(n2, n2) if plan.right else None
    down = _empty(plan.rank, n1 * n2, dtype=torch.float16) if plan.rank else None
    return FrozenSite(
        left, right, _grid(plan.activations, n1 * n2), down, _empty(n1 * n2) if plan.shift == "online" else None
    )


def _linear(linear: nn.Linear, site: FrozenSite, plan: SitePlan, packed: bool) -> SiteLinear:
    o, n, spec = linear.out_features, linear.in_features, plan.weights
    bias = _empty(o) if linear.bias is not None or plan.shift != "none" else None
    if spec is None:
        return DenseLinear(site, _empty(o, n, dtype=linear.weight.dtype), bias)
    try:
        layout = kinds.layout(spec, plan.codebook, o, n)
    except ValueError as error:
        raise ArtifactError(f"the plan does not fit the model: {error}") from error
    tensors = {name: _empty(*part.shape, dtype=part.dtype) for name, part in layout.items()}
    if plan.codebook is not None:
        return _codebook_linear(site, n, spec.bits, plan.codebook, tensors, bias, packed)
    stream, form = tensors.pop("packed"), kinds.of(spec)
    if form is not None:
        if packed:
            return PackedCodes(site, stream, tensors, bias, form, n)
        return FrozenCodes(site, Codes(codes=_empty(o, n, dtype=torch.uint8), parts=tensors, format=form), bias)
    scale, zero = tensors["scale"], tensors.get("zero")
    if packed:
        return PackedLinear(site, stream, scale, zero, bias, spec, n)
    values = _empty(o, n, dtype=torch.int8 if spec.symmetric else torch.uint8)
    return FrozenLinear(site, QTensor(values=values, scale=scale, zero=zero, spec=spec), bias)


def _codebook_linear(
    site: FrozenSite,
    n: int,
    bits: int,
    spec: CodebookSpec,
    tensors: Mapping[str, Tensor],
    bias: Tensor | None,
    packed: bool,
) -> CodebookLinear:
    few = spec.outlier_columns(n)
    main_bits, residual_bits = spec.index_bits(bits)

    def book(name: str, bits: int, columns: int) -> SiteBook:
        stream, entries = tensors[f"books.{name}.packed"], tensors[f"books.{name}.entries"]
        if packed:
            return PackedBook(stream, entries, bits, columns)
        indices = _empty(stream.shape[0], columns, dtype=index_dtype(bits))
        return FrozenBook(Book(indices=indices, entries=entries, bits=bits))

    return CodebookLinear(
        site,
        book("main", main_bits, n - few),
        book("residual", residual_bits, n - few) if residual_bits else None,
        book("outliers", spec.outlier_bits, few) if few else None,
        tensors.get("columns"),
        bias,
    )
