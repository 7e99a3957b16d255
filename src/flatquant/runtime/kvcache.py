"""A cache that holds keys and values as packed integers, or as codes of a format.

`QuantizedCache(model)` goes where transformers takes `past_key_values`. What it returns to attention are exactly the
values that a plain cache would hold (those were rounded to the same grid on their way in), so that both generate the
same tokens; it only costs less memory: for a head of d channels at b bits, d b / 8 bytes, a float32 scale and a
one-byte zero point per token, or the scales of a format's blocks, instead of 2 d. Where keys are stored less an offset,
which depends on their positions, the positions' cosines and sines are kept too, once for all layers that share them.

Given up here: speed. All of a layer's history is unpacked for every new token; a kernel that reads integers directly
will not need that. Sliding-window layers keep their whole history (the mask cuts it).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from flatquant.errors import ModelError
from flatquant.formats import kinds
from flatquant.ops.pack.reference import packed_width
from flatquant.qtensor import QTensor
from flatquant.quantizers import BlockRows
from flatquant.rotary import Angles
from flatquant.runtime.keyvalue import FrozenKeyValue, IntegerStore, Offset
from flatquant.seams import broken
from flatquant.spec import QuantSpec


def token_bytes(head_dim: int, spec: QuantSpec | None) -> int:
    """Bytes that a key or value of one head and token takes; 16 bit without a grid."""
    if spec is None:
        return 2 * head_dim
    if spec.format is not None:
        parts = kinds.blocks(spec).layout(1, head_dim)
        return sum(part.dtype.itemsize * part.shape[1] for part in parts.values() if len(part.shape) == 2)
    return packed_width(head_dim, spec.bits) + 4 + (0 if spec.symmetric else 1)


class _History:
    """Keys, or values, of one layer: one tensor as it came, or packed parts.  # (B, heads, T, ..)"""

    def __init__(self, first: Tensor | QTensor | BlockRows) -> None:
        self.spec = first.spec if isinstance(first, QTensor) else None
        self.blocks = (first.whole, first.format) if isinstance(first, BlockRows) else None
        self.head_dim = first.shape[-1]
        self.parts = self._split(first)

    def _split(self, new: Tensor | QTensor | BlockRows) -> list[Tensor]:
        """Each part keeps the dimensions (B, heads, T); zero points are integers of at most 8 bits, hence bytes."""
        if isinstance(new, Tensor):
            return [new]
        if isinstance(new, BlockRows):
            return [new.packed, new.scale]
        return [new.packed(), new.scale] + ([] if new.zero is None else [new.zero.to(torch.uint8)])

    def append(self, new: Tensor | QTensor | BlockRows) -> None:
        assert (new.spec if isinstance(new, QTensor) else None) == self.spec, "one layer, two grids"
        self.parts = [torch.cat(pair, dim=-2) for pair in zip(self.parts, self._split(new), strict=True)]

    def read(self, dtype: torch.dtype) -> Tensor:
        """All of it.  # (B, heads, T, head_dim)"""
        if self.blocks is not None:
            packed, scale = self.parts
            return BlockRows(packed, scale, *self.blocks).dequantize(dtype)
        if self.spec is None:
            return self.parts[0]
        packed, scale, *zero = self.parts
        zeros = zero[0].to(scale.dtype) if zero else None
        return QTensor.from_packed(packed, scale, zeros, self.spec, self.head_dim).dequantize(dtype)

    def map(self, f: Callable[[Tensor], Tensor]) -> None:
        self.parts = [f(part) for part in self.parts]

    @property
    def tokens(self) -> int:
        return self.parts[0].shape[-2]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


class _Turns:
    """Angles of all places, for the layers that are given the same ones. The first of them owns and changes them."""

    def __init__(self, owner: IntegerLayer) -> None:
        self.owner = owner
        self.newest: Tensor | None = None
        self.history: _History | None = None

    def append(self, layer: IntegerLayer, offset: Offset, batch: int) -> Tensor:
        """Add those of new tokens, once for all layers; all of them.  # (batch, T, r)"""
        assert offset.angles is not None
        if layer is self.owner:
            new = offset.angles.of_pairs(offset.pairing)
            new = new.expand(batch, -1, -1)
            if self.history is None:
                self.history = _History(new)
            else:
                self.history.append(new)
            self.newest = offset.angles.cos
        elif self.newest is not offset.angles.cos:
            raise broken("layers that turned keys by the same cosines and sines no longer do")
        assert self.history is not None
        return self.history.read(torch.float32)


class IntegerLayer(DynamicLayer):
    """One layer of a `QuantizedCache`: grows with every token, whatever form that has."""

    def __init__(self, turns: list[_Turns]) -> None:
        """`turns` are the cache's, of all its layers."""
        super().__init__()
        self._histories: tuple[_History, _History] | None = None  # keys, values
        self._all_turns, self._turns = turns, None

    def append(
        self,
        k: Tensor | QTensor | BlockRows,
        v: Tensor | QTensor | BlockRows,
        dtype: torch.dtype,
        offset: Offset | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Add tokens; all keys and values in `dtype`."""
        if self._histories is None:
            self._histories = _History(k), _History(v)
            self.is_initialized = True
        else:
            for history, new in zip(self._histories, (k, v), strict=True):
                history.append(new)
        keys, values = self._histories
        if offset is None:
            return keys.read(dtype), values.read(dtype)
        angles = None if offset.angles is None else self._turned_by(offset.angles).append(self, offset, k.shape[0])
        short = keys.read(torch.promote_types(dtype, torch.float32))
        return (short + offset.at(angles)).to(dtype), values.read(dtype)

    def _turned_by(self, angles: Angles) -> _Turns:
        """At the first tokens, those of an earlier layer that has just been given the same angles."""
        if self._turns is None:
            self._turns = next((t for t in self._all_turns if t.newest is angles.cos), None)
        if self._turns is None:
            self._turns = _Turns(self)
            self._all_turns.append(self._turns)
        return self._turns

    @property
    def _kept(self) -> list[_History]:
        """All that this layer holds."""
        turns = self._turns.history if self._turns is not None and self._turns.owner is self else None
        return [*(self._histories or ()), *([] if turns is None else [turns])]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.append(key_states, value_states, key_states.dtype)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to prepare: the first tokens say what is kept."""

    def get_seq_length(self) -> int:
        return 0 if self._histories is None else self._histories[0].tokens

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors kept."""
        return sum(h.nbytes for h in self._kept)

    def _map(self, f: Callable[[Tensor], Tensor]) -> None:
        for history in self._kept:
            history.map(f)

    def reset(self) -> None:
        self._histories = self._turns = None
        self._all_turns.clear()
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last `-n` tokens for n < 0; for n > 0 (as older versions of transformers call it) keep n."""
        n = tokens_to_remove
        if n != 0:
            keep = max(self.get_seq_length() + n, 0) if n < 0 else n
            self._map(lambda t: t[..., :keep, :].clone())

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda t: t[indices, ...])

    def offload(self) -> None:
        """Stays where it is."""

    def prefetch(self) -> None:
        """Stays where it is."""


class QuantizedCache(Cache, IntegerStore):
    """Packed keys and values for `model`; layers, or sides of a layer, without a grid are kept as they come."""

    def __init__(self, model: PreTrainedModel) -> None:
        """An empty cache.

        Raises:
            ModelError: neither keys nor values of the model are quantised.
        """
        attached = [m for m in model.modules() if isinstance(m, FrozenKeyValue)]
        if not any(m.keys is not None or m.values is not None for m in attached):
            raise ModelError("this model's keys and values are not quantised; use a DynamicCache")
        turns: list[_Turns] = []
        layers: list[Any] = list(DynamicCache(config=model.config).layers)
        # Layers of linear attention keep their states, and those without attention nothing.
        keyed = [isinstance(layer, DynamicLayer) for layer in layers]
        self._integers = {i: IntegerLayer(turns) for i, has_keys in enumerate(keyed) if has_keys}
        super().__init__(layers=[self._integers[i] if keyed[i] else layer for i, layer in enumerate(layers)])

    def append(
        self,
        k: Tensor | QTensor | BlockRows,
        v: Tensor | QTensor | BlockRows,
        layer: int,
        dtype: torch.dtype,
        offset: Offset | None = None,
    ) -> tuple[Tensor, Tensor]:
        return self._integers[layer].append(k, v, dtype, offset)

    def nbytes(self) -> int:
        """Bytes of all tensors kept."""
        return sum(layer.nbytes for layer in self._integers.values())
