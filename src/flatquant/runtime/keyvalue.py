"""The serving stage of keys, values and queries."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from flatquant.modules import ExactBuffers
from flatquant.qtensor import QTensor
from flatquant.quantizers import Dynamic
from flatquant.seams import KeyValue


class IntegerStore(ABC):
    """A cache that keeps integers instead of the numbers they stand for."""

    @abstractmethod
    def append(self, k: Tensor | QTensor, v: Tensor | QTensor, layer: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Put new keys and values into a layer; all it holds, in `dtype`.  # (B, heads, T, head_dim)"""


class FrozenKeyValue(ExactBuffers, KeyValue):
    """k -> Q(k P_h), q -> q P_h^-T, v -> Q(v), with fixed matrices and clips.

    Buffers: `key_matrix` P_h and `query_matrix` P_h^-T, float32, (head_dim, head_dim), both or neither.
    """

    key_matrix: Tensor | None
    query_matrix: Tensor | None

    def __init__(
        self,
        key_matrix: Tensor | None,
        query_matrix: Tensor | None,
        keys: Dynamic | None,
        values: Dynamic | None,
    ) -> None:
        super().__init__()
        self.register_buffer("key_matrix", key_matrix)
        self.register_buffer("query_matrix", query_matrix)
        self.keys = keys
        self.values = values

    def query(self, q: Tensor) -> Tensor:
        if self.query_matrix is None:
            return q
        return (q.to(self.query_matrix.dtype) @ self.query_matrix).to(q.dtype)

    def rotate_key(self, k: Tensor) -> Tensor:
        """k P_h, not yet on its grid, in the matrix's dtype.  # (B, heads, T, head_dim)"""
        return k if self.key_matrix is None else k.to(self.key_matrix.dtype) @ self.key_matrix

    def quantize_key(self, k: Tensor) -> QTensor:
        """Integers of k P_h; only where keys are quantised."""
        assert self.keys is not None
        return self.keys.quantize(self.rotate_key(k))

    def quantize_value(self, v: Tensor) -> QTensor:
        """Integers of v; only where values are quantised."""
        assert self.values is not None
        return self.values.quantize(v)

    def key(self, k: Tensor) -> Tensor:
        if self.keys is None:
            return self.rotate_key(k).to(k.dtype)
        if k.requires_grad:  # integers carry no gradient
            return self.keys(self.rotate_key(k)).to(k.dtype)
        return self.quantize_key(k).dequantize(k.dtype)

    def value(self, v: Tensor) -> Tensor:
        if self.values is None:
            return v
        return self.values(v) if v.requires_grad else self.quantize_value(v).dequantize(v.dtype)

    def store(self, cache: Any, k: Tensor, v: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not isinstance(cache, IntegerStore):
            return super().store(cache, k, v, layer, *args, **kwargs)
        keys = self.key(k) if self.keys is None else self.quantize_key(k)
        values = v if self.values is None else self.quantize_value(v)
        return cache.append(keys, values, layer, k.dtype)
