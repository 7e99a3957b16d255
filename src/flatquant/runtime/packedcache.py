"""A cache of fixed places for the fused runtime: packed keys and values, addresses that never change.

A CUDA graph replays kernels on the addresses that it was recorded with. So places are allocated once, and how many are
in use is a number on the device, which the graph itself counts up; the number on the host follows it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from flatquant.errors import ModelError
from flatquant.ops.kv_cache import Store


class PackedLayer(DynamicLayer):
    """One layer of a `PackedCache`. transformers asks it for its length; the fused runtime alone fills it."""

    def __init__(self, cache: PackedCache, stores: tuple[Store, Store]) -> None:
        super().__init__()
        self._cache = cache
        self.is_initialized = True
        self.stores = stores  # keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise ModelError("a PackedCache belongs to the fused runtime; give other forward passes a QuantizedCache")

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to prepare."""

    def get_seq_length(self) -> int:
        return self._cache.length

    def map(self, f: Callable[[Tensor], Tensor]) -> None:
        """Replace the contents of every tensor, in place."""
        for store in self.stores:
            for t in store:
                t.copy_(f(t))

    def reset(self) -> None:
        self._cache.rewind(0)

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last `-n` tokens for n < 0; for n > 0 (as older versions of transformers call it) keep n."""
        n = tokens_to_remove
        length = self._cache.length
        self._cache.rewind(max(length + n, 0) if n < 0 else min(n, length))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.map(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        raise ModelError("a PackedCache has a fixed number of sequences; give a QuantizedCache")

    def batch_select_indices(self, indices: Tensor) -> None:
        raise ModelError("a PackedCache has a fixed number of sequences; give a QuantizedCache")

    def offload(self) -> None:
        """Stays where it is."""

    def prefetch(self) -> None:
        """Stays where it is."""


class PackedCache(Cache):
    """Room for `places` tokens of `batch` sequences.

    Attributes:
        length: places in use, the same for all sequences.
        used: the same number on the device, int64, (1,).
        start: each sequence's first place that is not padding, int64, (batch,).
        padded: whether any sequence has padding.
    """

    def __init__(
        self, *, blocks: int, batch: int, heads: int, places: int, head_dim: int, device: torch.device
    ) -> None:
        """Everything is allocated here.  # (batch, heads, places, ..) a block"""
        self.batch, self.places = batch, places
        self.length = 0
        self.used = torch.zeros(1, dtype=torch.int64, device=device)
        self.start = torch.zeros(batch, dtype=torch.int64, device=device)
        self.padded = False

        def store() -> Store:
            shape = (batch, heads, places)
            packed = torch.zeros((*shape, head_dim // 2), dtype=torch.uint8, device=device)
            return Store(packed, torch.ones(shape, device=device), torch.zeros(shape, dtype=torch.uint8, device=device))

        self.packed = [PackedLayer(self, (store(), store())) for _ in range(blocks)]
        super().__init__(layers=list(self.packed))

    def reserve(self, places: int) -> None:
        """Make room for more tokens; addresses change."""
        more = places - self.places
        if more > 0:
            for layer in self.packed:
                keys, values = (_longer(store, more) for store in layer.stores)
                layer.stores = keys, values
            self.places = places

    def rewind(self, length: int) -> None:
        """Keep the first `length` places."""
        self.length = length
        self.used.fill_(length)
        if length == 0:
            self.start.zero_()
            self.padded = False

    def advance(self, tokens: int) -> None:
        """Note on both sides that places were filled."""
        self.length += tokens
        self.used += tokens

    def nbytes(self) -> int:
        """Bytes of the places in use."""
        return sum(t.nbytes for layer in self.packed for s in layer.stores for t in s) * self.length // self.places


def _longer(store: Store, more: int) -> Store:
    """Room for `more` further places."""
    packed, scale, zero = store
    return Store(F.pad(packed, (0, 0, 0, more)), F.pad(scale, (0, more), value=1.0), F.pad(zero, (0, more)))
