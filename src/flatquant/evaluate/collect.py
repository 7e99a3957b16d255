"""What a report shows beyond losses and scores: both models run side by side on a little text, and looked into.

Everything comes back as plain numbers, ready for JSON; `flatquant.report` draws them without torch. A few hundred
tokens suffice: nothing here is a score.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flatquant import seams
from flatquant.errors import DataError, ModelError
from flatquant.evaluate.perplexity import Progress
from flatquant.models import check_ids
from flatquant.ops.divergence.reference import kl_rows
from flatquant.quantizers import Dynamic
from flatquant.runtime.branch import BranchedLinear
from flatquant.runtime.experts import open_experts
from flatquant.runtime.keyvalue import FrozenKeyValue
from flatquant.runtime.linear import FrozenSite, SiteLinear
from flatquant.spec import BlockPlan, Plan, SitePlan
from flatquant.transforms.start import random_hadamard

VERSION = 1
POINTS = 64  # of a sorted curve
TOKENS = 96  # columns of the error surface
ROWS = 512  # tokens that channel norms are taken over


@torch.no_grad()
def collect(
    model: PreTrainedModel,
    original: PreTrainedModel,
    plan: Plan,
    windows: Tensor,
    *,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compare a quantised model with its original.

    Args:
        model: as `load` gives it.
        original: what it was made from, on the same device; the two share nothing.
        plan: of the quantised model.
        windows: int64, (N, T); a few hundred tokens in all.
        progress: called with (passes done, passes).

    Returns:
        A JSON-ready dictionary: `flatness` and `transforms` by block and site, `surface` (relative error of each
        block's output, by token), `alone` (KL divergence with one block quantised and the others not), `kl` (with all),
        `clips`. `surface` and `alone` are empty for a model whose residual stream was rotated.

    Raises:
        DataError: no tokens. ModelError: the two models do not have the same blocks.
    """
    if windows.ndim != 2 or windows.numel() == 0:
        raise DataError("collecting needs at least one window of text")
    kinds: list[str] = [m.config.model_type for m in (model, original)]
    if kinds[0] != kinds[1]:
        raise ModelError(f"the original is a {kinds[1]}, the quantised model a {kinds[0]}; give what it was made of")
    ours, theirs = model.get_submodule(plan.blocks_path), original.get_submodule(plan.blocks_path)
    if not isinstance(ours, nn.ModuleList) or not isinstance(theirs, nn.ModuleList) or len(ours) != len(theirs):
        raise ModelError("the original has other blocks than the quantised model; give the model it was made from")
    if _embedding(model).shape != _embedding(original).shape:
        raise ModelError("the original has other embeddings than the quantised model; give the model it was made from")
    if any(isinstance(module, SiteLinear) for module in theirs.modules()):
        raise ModelError("the original is itself quantised; give the model it was made from")
    check_ids(windows, original, "windows")
    open_experts(theirs)
    passes, done = len(ours) + 2, 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, passes)

    windows = windows.to(next(model.parameters()).device)
    with _seen(theirs, plan, quantised=False) as plain:
        want = original(windows, use_cache=False).logits
    step()
    with _seen(ours, plan, quantised=True) as seen:
        got = model(windows, use_cache=False).logits
    step()
    # Block by block, outputs compare only where the residual stream has kept its basis.
    difference = (_embedding(model) - _embedding(original)).norm()  # rounding's is far smaller than a rotation's
    comparable = bool(difference < 0.5 * _embedding(original).norm())
    generator = torch.Generator().manual_seed(0)
    flatness, surface = [], []
    for index, block in enumerate(plan.blocks):
        for site, at in block.sites.items():
            if site in plain[index].inputs:
                weights = [theirs[index].get_parameter(f"{path}.weight").detach().float() for path in at.readers]
                before = plain[index].inputs[site], torch.cat(weights)
                after = seen[index].inputs[site], _served_weights(ours[index], at)
                flatness.append({"block": index, "site": site, **_flatness(before, after, generator)})
        if comparable:
            surface.append(_surface(seen[index].output, plain[index].output))
    return {
        "version": VERSION,
        "tokens": windows.numel(),
        "kl": _kl(want, got),
        "flatness": flatness,
        "surface": surface,
        "alone": _alone(original, ours, theirs, plan.attention, windows, want, step) if comparable else [],
        "transforms": [t for i, block in enumerate(plan.blocks) for t in _transforms(i, block, ours[i], plan)],
        "clips": [c for i, block in enumerate(plan.blocks) for c in _clips(i, block, ours[i], plan)],
    }


def _embedding(model: PreTrainedModel) -> Tensor:
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight.float()


# --------------------------------------------------------------------------------------------- looking on


class _Seen:
    """What one block received and gave."""

    def __init__(self) -> None:
        self.inputs: dict[str, Tensor] = {}  # of every site, as its readers multiply it.  # (tokens, n)
        self.output = torch.empty(0)  # of the first window.  # (T, h)


@contextmanager
def _seen(blocks: nn.ModuleList, plan: Plan, *, quantised: bool) -> Iterator[list[_Seen]]:
    """Note the inputs of every site and the outputs of every block during a forward pass."""
    notes, handles = [_Seen() for _ in blocks], []

    def watch(note: _Seen, site: str):
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = module.transformed(args[0]) if isinstance(module, FrozenSite) else args[0]  # before rounding
            x = x.detach().flatten(0, -2).float()
            if site not in note.inputs:
                note.inputs[site] = x[:ROWS]
            elif not isinstance(module, FrozenSite):  # an expert that sees other rows than the one before
                note.inputs[site] = torch.cat([note.inputs[site], x])[:ROWS]

        return hook

    def keep(note: _Seen):
        def hook(module: nn.Module, args: tuple, out: Any) -> None:
            note.output = (out if isinstance(out, Tensor) else out[0])[0].detach().float()

        return hook

    for block, block_plan, note in zip(blocks, plan.blocks, notes, strict=True):
        handles.append(block.register_forward_hook(keep(note)))
        for site, at in block_plan.sites.items():
            for path in [f"flatquant.{site}"] if quantised else [path for path, *_ in at.groups]:
                handles.append(block.get_submodule(path).register_forward_pre_hook(watch(note, site)))
    try:
        yield notes
    finally:
        for handle in handles:
            handle.remove()


def _served_weights(block: nn.Module, site: SitePlan) -> Tensor:
    """The weights that a site's readers multiply with.  # (sum of rows, n)"""
    rows = []
    for path in site.readers:
        linear = block.get_submodule(path)
        assert isinstance(linear, SiteLinear | BranchedLinear)
        rows.append(linear.plain())
    return torch.cat(rows)


# --------------------------------------------------------------------------------------------- numbers


def _flatness(
    before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor], generator: torch.Generator
) -> dict[str, dict[str, Any]]:
    """Sorted channel norms of activations and weights, in four bases (FlatQuant, figures 1 and 6)."""
    x, w = before
    scale = (x.abs().amax(0).clamp_min(1e-5) / w.abs().amax(0).clamp_min(1e-5)).sqrt()  # SmoothQuant, alpha 1/2
    hadamard = random_hadamard(x.shape[-1], generator).to(x)
    bases = {"none": (x, w), "scaling": (x / scale, w * scale), "hadamard": (x @ hadamard, w @ hadamard)}
    bases["quantised"] = after
    return {
        kind: {name: _norms(pair[which]) for name, pair in bases.items()}
        for which, kind in enumerate(("activations", "weights"))
    }


def _norms(x: Tensor) -> dict[str, Any]:
    """The channels' norms over their mean, largest first (a few of them), and the largest.  # of (rows, n)"""
    norms = x.square().mean(0).sqrt()
    norms = (norms / norms.mean().clamp_min(1e-30)).sort(descending=True).values
    places = torch.linspace(0, len(norms) - 1, min(POINTS, len(norms))).round().long()
    return {"curve": _round(norms[places]), "peak": _round(norms[:1])[0]}


def _surface(got: Tensor, want: Tensor) -> list[float]:
    """Relative error of a block's output, token by token.  # of (T, h)"""
    error = (got - want).square().sum(-1) / want.square().sum(-1).clamp_min(1e-30)
    return _round(error[:TOKENS].sqrt())


def _kl(want: Tensor, got: Tensor) -> float:
    return float(kl_rows(want, got).mean())


def _alone(
    original: PreTrainedModel,
    ours: nn.ModuleList,
    theirs: nn.ModuleList,
    path: str,
    windows: Tensor,
    want: Tensor,
    step: Any,
) -> list[float]:
    """The divergence that each block causes when all others stay as they were."""
    config = original.config.get_text_config()
    attention = config._attn_implementation
    out = []
    try:
        # A quantised block calls it; the others see plain attention in it.
        seams.use_attention(original, path)
        for index in range(len(theirs)):
            kept, theirs[index] = theirs[index], ours[index]
            try:
                out.append(_kl(want, original(windows, use_cache=False).logits))
            finally:
                theirs[index] = kept
            step()
    finally:
        config._attn_implementation = attention
    return out


def _transforms(index: int, plan: BlockPlan, block: nn.Module, model: Plan) -> Iterator[dict[str, Any]]:
    """Condition numbers: how much a transform and its inverse stretch."""
    for site in plan.sites:
        frozen = block.get_submodule(f"flatquant.{site}")
        assert isinstance(frozen, FrozenSite)
        for side in ("left", "right"):
            if (factor := getattr(frozen, side)) is not None:
                yield {"block": index, "where": f"{site} {side}", "condition": _condition(factor)}
    kv = seams.attached(block.get_submodule(model.attention)) if plan.attended else None
    if isinstance(kv, FrozenKeyValue):
        for where, factor in (("keys", kv.key_matrix), ("latent left", kv.left), ("latent right", kv.right)):
            if factor is not None:
                yield {"block": index, "where": where, "condition": _condition(factor)}


def _condition(factor: Tensor) -> float:
    values = torch.linalg.svdvals(factor.double())
    return float(values[0] / values[-1].clamp_min(1e-300))


def _clips(index: int, plan: BlockPlan, block: nn.Module, model: Plan) -> Iterator[dict[str, Any]]:
    """The share of their range that learned clips keep: (low, high)."""
    grids: dict[str, nn.Module | None] = {}
    for site in plan.sites:
        frozen = block.get_submodule(f"flatquant.{site}")
        assert isinstance(frozen, FrozenSite)
        grids[site] = frozen.activations
    kv = seams.attached(block.get_submodule(model.attention)) if plan.attended else None
    if isinstance(kv, FrozenKeyValue):
        grids |= {"keys": kv.keys, "values": kv.values}
    for where, grid in grids.items():
        ratios = grid.clip.ratios() if isinstance(grid, Dynamic) else None
        if ratios is not None:
            yield {"block": index, "where": where, "keeps": _round(torch.stack([r.reshape(()) for r in ratios]))}


def _round(x: Tensor) -> list[float]:
    """Five digits: a report is read by eyes."""
    return [float(f"{v:.5g}") if math.isfinite(v) else 0.0 for v in x.tolist()]
