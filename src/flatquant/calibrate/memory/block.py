"""What is counted of a block, of the output layer, and of a weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from flatquant.ops.adam import BLOCK
from flatquant.runtime.artifact import is_tied
from flatquant.spec import BlockPlan, EndToEndSpec, FitMemory, Plan
from flatquant.wiring.arch import submodule
from flatquant.wiring.residual import ROWS


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Numbers of a block: elements, but for `stored`, which are bytes."""

    weights: int  # of linears that are fitted
    largest: int  # of these, at one site
    widest: int  # inputs of a site
    inputs: int  # of all sites, a token
    outputs: int  # of all sites, a token
    dense: int  # n^2 of the sites whose transform becomes one matrix on a GPU
    stored: int  # as a model's tensors
    packed: int  # as it is saved
    rounded: int  # as the state has it: an integer a byte

    @classmethod
    def of(cls, block: nn.Module, plan: BlockPlan) -> Sizes:
        widths = [site.shape[0] * site.shape[1] for site in plan.sites.values()]
        weights = linear_weights(block, plan)
        rows = [w // n for w, n in zip(weights, widths, strict=True)]
        stored = sum(p.nbytes for p in block.parameters())
        item = min(p.element_size() for p in block.parameters())  # routers may be in float32
        grids = [
            o * (n // (site.weights.group_size or n)) * 4 if site.weights else 0
            for o, n, site in zip(rows, widths, plan.sites.values(), strict=True)
        ]
        rest = stored - item * sum(weights)
        bits = [site.weights.bits if site.weights else 8 * item for site in plan.sites.values()]
        whole = [8 if site.weights else b for b, site in zip(bits, plan.sites.values(), strict=True)]
        factors = sum(4 * (s.shape[0] ** 2 * s.left + s.shape[1] ** 2 * s.right) for s in plan.sites.values())
        return cls(
            weights=sum(weights),
            largest=max(weights),
            widest=max(widths),
            inputs=sum(widths),
            outputs=sum(rows),
            dense=sum(n * n for n in widths if n <= 2048),
            stored=stored,
            packed=rest + factors + sum(grids) + sum(w * b // 8 for w, b in zip(weights, bits, strict=True)),
            rounded=rest + factors + sum(grids) + sum(w * b // 8 for w, b in zip(weights, whole, strict=True)),
        )


@dataclass(frozen=True, kw_only=True)
class RoundedEnds:
    """Bytes of a rounded output layer and embedding."""

    rounded: int = 0  # an integer a byte
    packed: int = 0
    replaced: int = 0  # of matrices that are gone then
    made: int = 0  # while `ROWS` rows are rounded, on the device that does it: four numbers in float32 a weight

    @classmethod
    def of(cls, model: PreTrainedModel, plan: Plan) -> RoundedEnds:
        ends = [end for end in (plan.head, plan.embedding) if end is not None]
        weights = [submodule(model, end.path).get_parameter("weight") for end in ends]
        matrices = {id(weight): weight.nbytes for weight in weights}
        kept = is_tied(model) and len(ends) == 1  # the other one has it still
        shared = plan.embedding is not None and plan.embedding.shared
        counts = [(w.numel(), w.shape[1], end.weights) for w, end in zip(weights, ends, strict=True)]
        counts = counts[:1] if shared else counts  # the embedding's are the output layer's
        grids = sum(4 * count // (spec.group_size or n) for count, n, spec in counts)
        return cls(
            rounded=sum(count for count, *_ in counts) + grids,
            packed=sum(count * spec.bits // 8 for count, _, spec in counts) + grids,
            replaced=0 if kept else sum(matrices.values()),
            made=max((16 * min(len(weight), ROWS) * weight.shape[1] for weight in weights), default=0),
        )


def linear_weights(block: nn.Module, plan: BlockPlan) -> list[int]:
    """Weights of the linears at every site of a block."""
    rows = [
        sum(int(getattr(submodule(block, path), "out_features")) for path in site.readers)  # noqa: B009
        for site in plan.sites.values()
    ]
    return [o * site.shape[0] * site.shape[1] for o, site in zip(rows, plan.sites.values(), strict=True)]


@dataclass(frozen=True, kw_only=True)
class WeightBytes:
    """What an end-to-end fit keeps of each weight on the device, in bytes."""

    stored: float
    moments: float = 0.0  # and what else its optimiser keeps
    gradient: float = 0.0  # of all weights at once

    @classmethod
    def of(cls, spec: EndToEndSpec, memory: FitMemory, model: torch.dtype, ranks: int = 1) -> WeightBytes:
        """Of weights that are held so by each of some ranks; `model` is the dtype of its tensors."""
        moves = spec.moves_weights(memory)
        if memory == "sharded":
            return cls(stored=4 / ranks, moments=8 * moves / ranks, gradient=4 * moves / ranks)
        if memory == "full":
            return cls(stored=4, moments=8 * moves, gradient=4 * moves)
        if moves:
            return cls(stored=2, moments=3 + 8 / BLOCK)
        return cls(stored=min(4, model.itemsize))
