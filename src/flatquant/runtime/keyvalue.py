"""The serving stage of keys, values and queries."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flatquant.modules import ExactBuffers
from flatquant.ops.kron.reference import kron_matmul
from flatquant.qtensor import QTensor
from flatquant.quantizers import BlockRows, Dynamic, FrozenBlocks
from flatquant.rotary import Angles, constant_at
from flatquant.seams import KeyValue, position_angles
from flatquant.spec import Pairing


class Offset(NamedTuple):
    """What cached keys are short of: `at` of their angles, (B or 1, T, r) -> (B or 1, heads, T or 1, head_dim)."""

    angles: Angles | None  # of the new keys; None without rotary embedding, and then for all of them
    pairing: Pairing
    at: Callable[[Tensor | None], Tensor]


class IntegerStore(ABC):
    """A cache that keeps integers, or codes of a format, instead of the numbers they stand for."""

    @abstractmethod
    def append(
        self,
        k: Tensor | QTensor | BlockRows,
        v: Tensor | QTensor | BlockRows,
        layer: int,
        dtype: torch.dtype,
        offset: Offset | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Put new keys and values into a layer; all it holds, in `dtype`, keys plus their offset.

        Shapes are (B, heads, T, head_dim).
        """


class FrozenKeyValue(ExactBuffers, KeyValue):
    """k -> Q((k - o) P_h) + o P_h, q -> q P_h^-T, v -> Q(v), with fixed matrices and clips.

    o = R_j m is a constant m per channel, turned by the rotary embedding of the key's position j; 0 without an offset.
    A cache of integers holds Q((k - o) P_h), and is given what it takes to add o P_h.

    Buffers: `key_matrix` P_h and `query_matrix` P_h^-T, float32, (head_dim, head_dim), both or neither; `key_offset` m,
    float32, (heads, head_dim), or none. With latent attention, `left` P1 (n1, n1) and `right` P2 (n2, n2), float32, of
    v -> Q(v (P1 (x) P2)), each or none.
    """

    key_matrix: Tensor | None
    query_matrix: Tensor | None
    key_offset: Tensor | None
    left: Tensor | None
    right: Tensor | None

    def __init__(
        self,
        key_matrix: Tensor | None,
        query_matrix: Tensor | None,
        keys: Dynamic | FrozenBlocks | None,
        values: Dynamic | FrozenBlocks | None,
        key_offset: Tensor | None = None,
        pairing: Pairing = "halves",
        left: Tensor | None = None,
        right: Tensor | None = None,
        rotary: int | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("key_matrix", key_matrix)
        self.register_buffer("query_matrix", query_matrix)
        self.register_buffer("key_offset", key_offset)
        self.register_buffer("left", left)
        self.register_buffer("right", right)
        self.rotary = rotary
        self.pairing: Pairing = pairing
        self.keys = keys
        self.values = values

    def query(self, q: Tensor) -> Tensor:
        if self.query_matrix is None:
            return q
        return (q.to(self.query_matrix.dtype) @ self.query_matrix).to(q.dtype)

    def key(self, k: Tensor, angles: Angles | None = None) -> Tensor:
        pairs = self._pairs(angles)
        x = self._transformed(k, pairs)
        if self.keys is not None:
            x = self.keys.rounded(x, self._dtype(k.dtype))
        return x.to(k.dtype) if self.key_offset is None else (x + self._given_back(pairs)).to(k.dtype)

    def _pairs(self, angles: Angles | None) -> Tensor | None:
        return None if self.key_offset is None else position_angles(angles, self.pairing)

    def _transformed(self, k: Tensor, pairs: Tensor | None) -> Tensor:
        """(k - o) P_h, not yet on its grid, in the buffers' dtype.  # (B, heads, T, head_dim)"""
        if self.key_offset is not None:
            k = k - constant_at(self.key_offset, pairs, self.pairing)
        return k if self.key_matrix is None else k.to(self.key_matrix.dtype) @ self.key_matrix

    def _given_back(self, pairs: Tensor | None) -> Tensor:
        """o P_h, in the buffers' dtype.  # (B or 1, heads, T or 1, head_dim)

        In float64 until it is rounded: how a product sums depends on the number of its rows, and a cache of integers
        computes all places at once that a plain one was given one by one.
        """
        assert self.key_offset is not None
        o = constant_at(self.key_offset, pairs, self.pairing)
        return o if self.key_matrix is None else (o.double() @ self.key_matrix.double()).to(o.dtype)

    def _dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Of what keys stand for on their grid: a sum is still to come, or not."""
        return dtype if self.key_offset is None else torch.promote_types(dtype, torch.float32)

    def value(self, v: Tensor) -> Tensor:
        x = self._before_cache(v)
        return x.to(v.dtype) if self.values is None else self.values.rounded(x, v.dtype)

    def _before_cache(self, v: Tensor) -> Tensor:
        """v (P1 (x) P2), not yet on its grid, in the factors' dtype.  # (B, heads, T, n)"""
        factor = self.left if self.left is not None else self.right
        return v if factor is None else kron_matmul(v.to(factor.dtype), self.left, self.right)

    def store(
        self, cache: Any, k: Tensor, v: Tensor, angles: Angles | None, layer: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not isinstance(cache, IntegerStore):
            return super().store(cache, k, v, angles, layer, *args, **kwargs)
        values = self.value(v) if self.values is None else self.value_codes(v)
        if self.keys is None:
            return cache.append(self.key(k, angles), values, layer, k.dtype)
        offset = None
        if self.key_offset is not None:
            offset = Offset(None if self.pairing == "none" else angles, self.pairing, self._given_back)
        return cache.append(self.key_codes(k, angles), values, layer, k.dtype, offset)

    def key_codes(self, k: Tensor, angles: Angles | None = None) -> QTensor | BlockRows:
        """(k - o) P_h on the grid of keys: what a cache of integers holds.  # (B, heads, T, head_dim)"""
        assert self.keys is not None
        return self.keys.quantize(self._transformed(k, self._pairs(angles)))

    def value_codes(self, v: Tensor) -> QTensor | BlockRows:
        """v on the grid of values: what a cache of integers holds.  # (B, heads, T, head_dim)"""
        assert self.values is not None
        return self.values.quantize(self._before_cache(v))

    def given_back(self, angles: Angles | None) -> Tensor:
        """o P_h, which `key_codes` are short of, in the buffers' dtype.  # (B or 1, heads, T or 1, head_dim)"""
        return self._given_back(self._pairs(angles))
