"""Codebooks: entries found by weighted k-means, and the nearest of them."""

from __future__ import annotations

import torch
from torch import Tensor

from flatquant.spec import CodebookSpec

_SAMPLE = 128  # vectors that k-means sees for every entry
_LARGEST_SAMPLE = 1 << 22
_ROUNDS = 30
_TOLERANCE = 1e-3  # relative gain of a round below which k-means stops
_CELLS = 1 << 24  # distances that exist at once


class VectorGrid:
    """The codebooks that one matrix may use: how large they are and how their entries are chosen."""

    def __init__(self, spec: CodebookSpec, bits: int) -> None:
        """`bits` for each weight, without the entries."""
        self.spec = spec
        self.bits = bits

    def fit(self, vectors: Tensor, weights: Tensor, bits: int) -> Tensor:
        """Entries that stand for these vectors with the least weighted squared error k-means finds.

        Weighted k-means++ (Arthur and Vassilvitskii, SODA 2007), then Lloyd's rounds; an entry that nobody chose moves
        to the vector that is worst off. Same input, same entries: what is random has a seed of its own, and sums are
        taken in a fixed order.

        Args:
            vectors: (N, v).
            weights: how much an error in each costs, at least 0, (N,).
            bits: of an index; there are 2^bits entries unless vectors are few (`CodebookSpec.entries`).

        Returns:
            float32 with float16's values, (k, v).
        """
        k = self.spec.entries(bits, vectors.shape[0])
        vectors, weights = vectors.float(), weights.float()
        if not bool(weights.any()):
            weights = torch.ones_like(weights)
        generator = torch.Generator(vectors.device).manual_seed(0)
        limit = min(_SAMPLE * k, _LARGEST_SAMPLE)
        if vectors.shape[0] > limit:
            chosen = torch.randperm(vectors.shape[0], generator=generator, device=vectors.device)[:limit]
            vectors, weights = vectors[chosen], weights[chosen]
        entries = _start(vectors, weights, k, generator)
        before = float("inf")
        for _ in range(_ROUNDS):
            choice, distance = _assign(vectors, entries)
            cost = weights * distance
            entries = _means(vectors, weights, choice, entries, cost)
            total = float(cost.double().sum())
            if total >= (1 - _TOLERANCE) * before:
                break
            before = total
        return entries.half().float()

    def nearest(self, vectors: Tensor, entries: Tensor) -> Tensor:
        """The index of the entry nearest to each vector.  # (N, v), (k, v) -> int64, (N,)"""
        return _nearest(vectors, entries)


def _nearest(vectors: Tensor, entries: Tensor) -> Tensor:
    return (entries.square().sum(-1) - 2 * vectors @ entries.mT).argmin(-1)


def _assign(vectors: Tensor, entries: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest entry and the squared distance to it, in pieces.  # (N,), (N,)"""
    pieces = vectors.split(max(1, _CELLS // entries.shape[0]))
    choice = torch.cat([_nearest(piece, entries) for piece in pieces])
    return choice, (vectors - entries[choice]).square().sum(-1)


def _start(vectors: Tensor, weights: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """k-means++: each entry is a vector drawn by how badly those before stand for it."""
    chosen = torch.multinomial(weights, 1, generator=generator)
    distance = torch.full_like(weights, torch.inf)
    entries = [vectors[chosen[0]]]
    for _ in range(k - 1):
        distance = torch.minimum(distance, (vectors - entries[-1]).square().sum(-1))
        badness = weights * distance
        if not bool(badness.any()):  # fewer different vectors than entries
            badness = torch.ones_like(badness)
        entries.append(vectors[torch.multinomial(badness, 1, generator=generator)[0]])
    return torch.stack(entries)  # (k, v)


def _means(vectors: Tensor, weights: Tensor, choice: Tensor, entries: Tensor, cost: Tensor) -> Tensor:
    """The weighted mean of the vectors that chose each entry."""
    order = torch.argsort(choice, stable=True)
    counts = torch.bincount(choice, minlength=entries.shape[0])
    data = torch.cat([vectors * weights[:, None], weights[:, None]], 1)[order]  # (N, v + 1)
    sums = torch.segment_reduce(data, "sum", lengths=counts, axis=0)  # adds in order, on a GPU too
    total = sums[:, -1:]
    means = torch.where(total > 0, sums[:, :-1] / total.clamp(min=1e-30), entries)
    empty = (counts == 0).nonzero()[:, 0]
    if len(empty):
        worst = torch.argsort(cost, descending=True, stable=True)[: len(empty)]
        means[empty[: len(worst)]] = vectors[worst]
    return means
