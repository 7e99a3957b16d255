"""vLLM's cache in 4 bits: an attention backend whose pages hold the integers that were calibrated.

`--kv-cache-dtype int4_per_token_head` is vLLM's name for integers with a grid of their own for every token and head.
vLLM's own kernels for it apply a Hadamard matrix and a grid of theirs. Ours take the queries, keys and values that the
model computed, put them into their learned basis and on their calibrated grid, and store the integers; keys are stored
less their offset, which attention gives back. So attention sees what a cache of 16 bits would hold.

Pages are vLLM's: it shares, frees and counts them, and prefix caching and chunked prefill are the scheduler's matter.

On CUDA a kernel computes the attention of requests with one new token. What was given up: speed elsewhere, where a
request's places are unpacked whenever attention looks at them. That takes memory beside the pages, for one request at a
time: while vLLM measures what is left for pages, the largest batches are computed.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.attention.backends.registry import register_backend
from vllm.v1.attention.backends.utils import split_decodes_and_prefills
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout

from flatquant.engines.parts import Turning, positions
from flatquant.engines.vllm.support import PACKED
from flatquant.errors import ModelError
from flatquant.ops.kv_cache import Store, shortage
from flatquant.ops.paged_cache import Batch, Short, attend, decode, place_bytes, stores_of, write
from flatquant.qtensor import QTensor
from flatquant.runtime.keyvalue import FrozenKeyValue

KERNELS = {"cuda"}  # types of devices where one new token's attention is the operation that has a kernel
_NAME = "FLATQUANT"
_PLACES = 16  # pages hold a multiple of it: so scales lie on multiples of four bytes
_TABLE = 128  # a table has whole pages for a multiple of so many places


@dataclass
class PackedMetadata(AttentionMetadata):
    """What attention reads of a batch. Tokens of the first requests come first."""

    num_actual_tokens: int
    query_start_loc: Tensor  # (R + 1,)
    seq_lens: Tensor  # (R,)
    block_table: Tensor  # (R, M)
    slot_mapping: Tensor  # (T,)
    singles: int  # how many requests, the first ones, have one new token each


class PackedBuilder(AttentionMetadataBuilder[PackedMetadata]):
    """Keeps what vLLM computes for all backends."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> PackedMetadata:
        common = common_attn_metadata
        return PackedMetadata(
            num_actual_tokens=common.num_actual_tokens,
            query_start_loc=common.query_start_loc[: common.num_reqs + 1],
            seq_lens=common.seq_lens[: common.num_reqs],
            block_table=common.block_table_tensor[: common.num_reqs],
            slot_mapping=common.slot_mapping,
            singles=split_decodes_and_prefills(common, decode_threshold=1)[0],
        )


class PackedImpl(AttentionImpl[PackedMetadata]):
    """Attention of one layer."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = PACKED,
        logits_soft_cap: float | None = None,
        attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        """
        Raises:
            ModelError: this attention is not computed here.
        """
        shared = kv_sharing_target_layer_name is not None
        if alibi_slopes is not None or sinks is not None or shared or attn_type != "decoder":
            raise ModelError(f"attention with ALiBi, sinks or shared keys has no cache of {PACKED}: leave that out")
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads, self.kv_cache_dtype = num_kv_heads or num_heads, kv_cache_dtype
        self.window, self.cap = sliding_window, logits_soft_cap or None
        self.config = get_current_vllm_config()

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: PackedMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Store new keys and values, and attend.

        Args:
            query: (T, queries, head_dim), as the model computed them; key, value: (T, heads, head_dim).
            kv_cache: uint8, (pages, heads, N, bytes).
        """
        basis: PackedBasis = layer.flatquant
        if attn_metadata is None:  # vLLM measures its memory
            if query.device.type in KERNELS and kv_cache.numel() == 0:  # and has no pages yet
                self._rehearse(basis, query, key, value)
            return output.zero_()
        batch = attn_metadata
        new = slice(batch.num_actual_tokens)
        at = positions(batch.query_start_loc, batch.seq_lens, batch.num_actual_tokens)
        self._attend(basis, query[new], key[new], value[new], at, kv_cache, batch, output[new])
        return output

    def _attend(
        self,
        basis: PackedBasis,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        at: Tensor,
        kv_cache: Tensor,
        batch: PackedMetadata,
        output: Tensor,
    ) -> None:
        """`forward` without tokens that pad the batch.

        Args:
            at: positions, (T,).
        """
        keys, values = stores_of(kv_cache)
        q, k, v = basis(query, key, value, at)
        slots = batch.slot_mapping[: len(q)]
        write(keys, k, slots)
        write(values, v, slots)
        singles = batch.singles if self._decodes(basis, q) else 0
        if singles:
            length = batch.block_table.shape[1] * keys.scale.shape[2]
            short = basis.short(query[:singles], length)
            ones = Batch(batch.block_table[:singles], batch.seq_lens[:singles], batch.query_start_loc[: singles + 1])
            output[:singles] = decode(q[:singles], keys, values, ones, self.window, self.scale, short)
        if singles < len(batch.seq_lens):
            starts = batch.query_start_loc[singles:] - singles
            rest = Batch(batch.block_table[singles:], batch.seq_lens[singles:], starts)
            back = basis.back(key.dtype)
            output[singles:] = attend(q[singles:], keys, values, rest, self.window, self.scale, self.cap, back)

    def _decodes(self, basis: PackedBasis, q: Tensor) -> bool:
        """Whether `decode` computes the attention of one new token."""
        return q.device.type in KERNELS and self.cap is None and basis.adds_to_scores

    def _rehearse(self, basis: PackedBasis, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Compute batches that take the most memory: the longest prompt's last tokens, and one token of many requests.

        All of their places are one page.
        """
        tokens, longest = len(query), self.config.model_config.max_model_len
        places = self.config.cache_config.block_size or _PLACES
        row = math.lcm(_TABLE, places)  # of a table
        pages = -(-longest // row) * row // places
        size = (1, self.num_kv_heads, places, place_bytes(self.head_size))
        cache = torch.zeros(size, dtype=torch.uint8, device=query.device)
        slots = torch.zeros(tokens, dtype=torch.int64, device=query.device)
        output = torch.empty_like(query)
        batches = [(1, min(tokens, longest), 0)]
        if self._decodes(basis, query):
            most = min(tokens, self.config.scheduler_config.max_num_seqs)
            batches.append((most, 1, most))
        for requests, new, singles in batches:
            table = torch.zeros((requests, pages), dtype=torch.int32, device=query.device)
            lengths = torch.full_like(table[:, 0], longest)
            starts = torch.arange(requests + 1, dtype=torch.int32, device=query.device) * new
            batch = PackedMetadata(tokens, starts, lengths, table, slots, singles)
            self._attend(basis, query, key, value, slots, cache, batch, output)


class PackedBasis(torch.nn.Module):
    """`FrozenKeyValue` on vLLM's layout, before and behind a cache of integers."""

    def __init__(self, kv: FrozenKeyValue, angles: Turning | None) -> None:
        super().__init__()
        self.kv, self.angles = kv, angles

    def forward(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Store, Store]:
        """Queries in their basis, and what is stored.  # (T, heads, head_dim)"""
        at = None if self.angles is None else self.angles(positions, k.dtype)
        rows = [x.transpose(0, 1)[None] for x in (q, k, v)]  # (1, heads, T, head_dim)
        keys, values = _stored(self.kv.key_codes(rows[1], at)), _stored(self.kv.value_codes(rows[2]))
        return self.kv.query(rows[0])[0].transpose(0, 1), keys, values

    def back(self, dtype: torch.dtype) -> Callable[[Tensor], Tensor] | None:
        """What stored keys at positions (n,) are short of, (heads, n, head_dim); see `paged_cache.attend`."""
        if self.kv.key_offset is None:
            return None

        def at(positions: Tensor) -> Tensor:
            short = self.kv.given_back(None if self.angles is None else self.angles(positions, dtype))[0]
            return short.expand(-1, len(positions), -1)

        return at

    @property
    def adds_to_scores(self) -> bool:
        """Whether `short` says what keys lack: all channels of a head are turned, in halves, or none."""
        m = self.kv.key_offset
        if m is None or self.angles is None:
            return True
        width = self.angles.table(1, m.dtype, self.kv.pairing, m.device).shape[1]
        return self.kv.pairing == "halves" and width == m.shape[1]

    def short(self, q: Tensor, length: int) -> Short | None:
        """What stored keys at positions below `length` are short of in scores of queries before their basis.

        Args:
            q: (R, queries, head_dim).
        """
        m = self.kv.key_offset
        if m is None:
            return None
        amounts = shortage(q.transpose(0, 1)[None], m)[0].transpose(0, 1).contiguous()
        if self.angles is not None:
            return Short(amounts, self.angles.table(length, q.dtype, self.kv.pairing, q.device))
        half = q.shape[-1] // 2
        return Short(
            amounts, torch.tensor([1.0] * half + [0.0] * half, device=q.device).expand(length, -1).contiguous()
        )


def _stored(codes: Any) -> Store:
    """(1, heads, T, head_dim) -> as `paged_cache.write` takes it"""
    assert isinstance(codes, QTensor)
    assert codes.zero is not None
    parts = codes.packed(), codes.scale[..., 0], codes.zero[..., 0].to(torch.uint8)
    return Store(*(part[0].transpose(0, 1) for part in parts))


@register_backend(_NAME)
class PackedBackend(AttentionBackend):
    """Pages of packed integers. `take_over` gives it to a layer."""

    forward_includes_kv_cache_update = True
    supported_dtypes: ClassVar = [torch.float32, torch.bfloat16, torch.float16]
    supported_kv_cache_dtypes: ClassVar = [PACKED]

    @staticmethod
    def get_name() -> str:
        return _NAME

    @staticmethod
    def get_impl_cls() -> type[PackedImpl]:
        return PackedImpl

    @staticmethod
    def get_builder_cls() -> type[PackedBuilder]:
        return PackedBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(_PLACES)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """How many bytes a place takes."""
        return replace(spec, state_content_bytes=place_bytes(spec.head_size))


def take_over(layer: Attention) -> None:
    """Let a layer that vLLM has made keep its keys and values here.

    Raises:
        ModelError: its attention is not computed here.
    """
    made: Any = layer.impl
    layer.attn_backend = PackedBackend
    layer.impl = PackedImpl(
        layer.num_heads,
        layer.head_size,
        made.scale,
        layer.num_kv_heads,
        made.alibi_slopes,
        layer.sliding_window,
        layer.kv_cache_dtype,
        made.logits_soft_cap,
        layer.attn_type,
        layer.kv_sharing_target_layer_name,
        made.sinks,
    )
