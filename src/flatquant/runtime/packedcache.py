"""A cache of fixed places for the fused runtime: packed keys and values, addresses that never change.

A CUDA graph replays kernels on the addresses that it was recorded with. So places are allocated once, and how many are
in use is a number on the device, which the graph itself counts up; the number on the host follows it.

A `Room` holds the tensors, a `PackedCache` is what callers and transformers hold. When the last reference to a cache
goes, its room can serve the next one (`Fused.cache_for`). Modules that transformers calls one by one read and write the
same integers through `PackedCache.append`, so that a text may change between them and the fused runtime at any token.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from flatquant.errors import ModelError
from flatquant.ops.kv_cache import Store
from flatquant.qtensor import QTensor
from flatquant.rotary import Angles
from flatquant.runtime.keyvalue import IntegerStore, Offset


class Room:
    """Places for tokens.

    Attributes:
        batch: number of sequences.
        places: of each sequence.
        length: places in use, the same for all sequences.
        used: the same number on the device, int64, (1,).
        start: each sequence's first place that is not padding, int64, (batch,).
        padded: whether any sequence has padding.
        stores: keys and values of each block.
        turned: every place's cosines and sines, one a pair of channels, where keys are stored less an offset,
            float32, (batch, places, head_dim); of each kind of rotary embedding.
        turns: the kind of each block.
        gaps: likewise, not 0 for a sequence whose places may not be one position apart, int32, (batch,).
        moved: how often addresses have changed.
        stream: on which the tensors were allocated, None on a CPU.
    """

    @torch.inference_mode(False)  # a later call, in another mode, could not write to inference tensors
    def __init__(
        self,
        *,
        blocks: int,
        batch: int,
        heads: int,
        places: int,
        head_dim: int,
        device: torch.device,
        angles: bool = False,
        turns: Sequence[int] = (),
    ) -> None:
        """Everything is allocated here.  # (batch, heads, places, ..) a block

        Args:
            angles: whether they are kept.
            turns: the kind of rotary embedding of each block, from 0; all are of one kind if left out.
        """
        self.batch, self.places = batch, places
        self.length = 0
        self.used = torch.zeros(1, dtype=torch.int64, device=device)
        self.start = torch.zeros(batch, dtype=torch.int64, device=device)
        self.padded = False
        self.moved = 0
        self.stream = stream_of(device)

        def store() -> Store:
            shape = (batch, heads, places)
            packed = torch.zeros((*shape, head_dim // 2), dtype=torch.uint8, device=device)
            return Store(packed, torch.ones(shape, device=device), torch.zeros(shape, dtype=torch.uint8, device=device))

        self.stores = [(store(), store()) for _ in range(blocks)]
        self.turns = tuple(turns) or (0,) * blocks
        kinds = 1 + max(self.turns) if angles else 0
        self.turned = [torch.zeros((batch, places, head_dim), device=device) for _ in range(kinds)]
        self.gaps = torch.zeros(batch, dtype=torch.int32, device=device)
        self._latest = torch.zeros(batch, dtype=torch.int64, device=device)  # position of the last place in use

    @property
    def angles(self) -> Tensor | None:
        """`turned` of the first kind, if any are kept."""
        return self.turned[0] if self.turned else None

    def angles_of(self, block: int) -> Tensor | None:
        """`turned` of a block, if any are kept."""
        return self.turned[self.turns[block]] if self.turned else None

    @torch.inference_mode(False)
    def reserve(self, places: int) -> None:
        """Make room for more tokens; addresses change."""
        more = places - self.places
        if more > 0:
            self.stores = [(_longer(keys, more), _longer(values, more)) for keys, values in self.stores]
            self.turned = [F.pad(angles, (0, 0, 0, more)) for angles in self.turned]
            self.places = places
            self.moved += 1

    @torch.inference_mode(False)
    def select(self, index: Tensor) -> None:
        """Sequences `index` instead of all; addresses change if their number does."""
        index = index.to(self.start.device)
        fixed = len(index) == self.batch

        def chosen(t: Tensor) -> Tensor:
            new = t.index_select(0, index)
            return t.copy_(new) if fixed else new

        self.stores = [
            (Store(*map(chosen, keys)), Store(*map(chosen, values)))  # one tensor at a time: memory for one more
            for keys, values in self.stores
        ]
        self.start = chosen(self.start)
        self.turned = [chosen(angles) for angles in self.turned]
        self.gaps, self._latest = chosen(self.gaps), chosen(self._latest)
        self.batch = len(index)
        self.moved += not fixed

    def rewind(self, length: int) -> None:
        """Keep the first `length` places."""
        self._latest -= self.length - length
        self.length = length
        self.used.fill_(length)
        if length == 0:
            self.pad(None)
            self.gaps.zero_()

    def advance(self, tokens: int) -> None:
        """Note on both sides that places were filled."""
        self.length += tokens
        self.used += tokens

    def pad(self, start: Tensor | None) -> None:
        """Set each sequence's first place that is not padding; None: there is no padding.  # integers, (batch,)"""
        if start is not None:
            self.start.copy_(start)
        elif self.padded:
            self.start.zero_()
        self.padded = start is not None

    def write(self, block: int, new: tuple[QTensor, QTensor]) -> None:
        """Put keys and values of one block behind the places in use.  # (batch, heads, T, head_dim)"""
        for store, q in zip(self.stores[block], new, strict=True):
            assert q.zero is not None
            at = slice(self.length, self.length + q.shape[-2])
            store.packed[:, :, at] = q.packed()
            store.scale[:, :, at] = q.scale[..., 0]
            store.zero[:, :, at] = q.zero[..., 0].to(torch.uint8)

    def turn(self, cos: Tensor, sin: Tensor, positions: Tensor | None = None, kind: int = 0) -> None:
        """Keep the angles of the tokens that are written next, if any are kept.

        Args:
            cos, sin: (batch or 1, T, head_dim).
            positions: (batch or 1, T); without them, places may be any positions apart. Looked at for kind 0.
            kind: of rotary embedding.
        """
        if not self.turned:
            return
        new = Angles(cos, sin).of_pairs("halves").to(self.turned[kind].dtype)
        at = self.used + torch.arange(new.shape[1], device=new.device)
        self.turned[kind].index_copy_(1, at, new.expand(self.batch, -1, -1))
        if positions is None:
            self.gaps.fill_(1)
        if positions is None or kind:
            return
        positions = positions.expand(self.batch, -1)
        before = torch.cat((self._latest[:, None], positions[:, :-1]), dim=1)
        counts = at > self.start[:, None]  # a sequence's first place may have any position
        self.gaps |= (counts & (positions != before + 1)).any(dim=1)
        self._latest.copy_(positions[:, -1])

    @contextmanager
    def rehearsed(self) -> Iterator[None]:
        """Steps that are taken inside leave no trace of their positions; places in use are counted outside."""
        kept = self.gaps.clone(), self._latest.clone()
        yield
        self.gaps.copy_(kept[0])
        self._latest.copy_(kept[1])

    def nbytes(self) -> int:
        """Bytes of the places in use."""
        tensors = [t for pair in self.stores for store in pair for t in store]
        tensors += self.turned
        return sum(t.nbytes for t in tensors) * self.length // self.places

    def __deepcopy__(self, memo: dict[int, Any]) -> Room:
        made = copy.copy(self)
        tensors = (self.used, self.start, self.stores, self.turned, self.gaps, self._latest)
        made.used, made.start, made.stores, made.turned, made.gaps, made._latest = copy.deepcopy(tensors, memo)
        made.stream = stream_of(self.used.device)
        return made


class PackedLayer(DynamicLayer):
    """One layer of a `PackedCache`, as transformers sees it: its length. The cache does everything else."""

    def __init__(self, room: Room, block: int) -> None:
        super().__init__()
        self._room, self._block = room, block
        self.is_initialized = True

    @property
    def angles(self) -> Tensor | None:
        """See `Room.angles_of`."""
        return self._room.angles_of(self._block)

    @property
    def stores(self) -> tuple[Store, Store]:
        """Keys, values."""
        return self._room.stores[self._block]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise ModelError("a PackedCache holds 4-bit integers of the model it was made for; give a DynamicCache")

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to prepare."""

    def get_seq_length(self) -> int:
        return self._room.length

    def reset(self) -> None:
        raise _whole("reset")

    def crop(self, tokens_to_remove: int) -> None:
        raise _whole("crop")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        raise _whole("reorder_cache")

    def batch_repeat_interleave(self, repeats: int) -> None:
        raise _whole("batch_repeat_interleave")

    def batch_select_indices(self, indices: Tensor) -> None:
        raise _whole("batch_select_indices")

    def offload(self) -> None:
        """Stays where it is."""

    def prefetch(self) -> None:
        """Stays where it is."""


class PackedCache(Cache, IntegerStore):
    """The keys and values of a `Room`.

    Attributes:
        room: where they are.
        masks_grow: whether each call's attention mask is that of the call before, and ones: then only the first is
            looked at, since a look waits for the device.
    """

    def __init__(self, room: Room) -> None:
        self.room = room
        self.masks_grow = False
        self.packed = [PackedLayer(room, block) for block in range(len(room.stores))]
        super().__init__(layers=list(self.packed))

    def append(
        self,
        k: Tensor | QTensor,
        v: Tensor | QTensor,
        layer: int,
        dtype: torch.dtype,
        offset: Offset | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See `IntegerStore.append`: what a module of the model computed. Tokens count once the last block has them.

        Raises:
            ModelError: not what the cache was made for.
        """
        room = self.room
        if not isinstance(k, QTensor) or not isinstance(v, QTensor) or k.zero is None or v.zero is None:
            raise ModelError("a PackedCache holds asymmetric 4-bit keys and values; give this model a QuantizedCache")
        self.check(k.shape[0], k.values.device)
        end = room.length + k.shape[-2]
        if end > room.places:
            room.reserve(2 * end)
        room.write(layer, (k, v))
        keys, values = (store.read(end) for store in room.stores[layer])
        if offset is not None:
            if offset.angles is not None:
                room.turn(*offset.angles, kind=room.turns[layer])
            angles = room.angles_of(layer)
            keys = keys + offset.at(None if angles is None else angles[:, :end])
        if layer == len(room.stores) - 1:
            room.advance(k.shape[-2])
        return keys.to(dtype), values.to(dtype)

    def check(self, batch: int, device: torch.device) -> None:
        """Raise a ModelError unless the cache is one for so many sequences on a device."""
        if self.room.batch != batch:
            raise ModelError(f"the cache was made for {self.room.batch} sequences, not {batch}")
        if self.room.used.device != device:
            raise ModelError(f"the cache is on {self.room.used.device}, the model on {device}; make a new cache")

    def reset(self) -> None:
        self.room.rewind(0)

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last `-n` tokens for n < 0; for n > 0 (as older versions of transformers call it) keep n."""
        n, length = tokens_to_remove, self.room.length
        if n != 0:
            self.room.rewind(max(length + n, 0) if n < 0 else min(n, length))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.room.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.room.select(torch.arange(self.room.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.room.select(torch.arange(self.room.batch)[indices.cpu()])

    def nbytes(self) -> int:
        """Bytes of the places in use."""
        return self.room.nbytes()

    def __copy__(self) -> PackedCache:
        """A copy with a room of its own: one room serves one cache."""
        return copy.deepcopy(self)


def stream_of(device: torch.device) -> Any:
    """The stream that work on a device goes to now, None on a CPU."""
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def _whole(method: str) -> ModelError:
    return ModelError(f"all layers of a PackedCache have one length: call {method}() of the cache, not of a layer")


def _longer(store: Store, more: int) -> Store:
    """Room for `more` further places."""
    packed, scale, zero = store
    return Store(F.pad(packed, (0, 0, 0, more)), F.pad(scale, (0, more), value=1.0), F.pad(zero, (0, more)))
