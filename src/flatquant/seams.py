"""The only places where we touch transformers' forward passes: the attention function and the cache.

Keys, values and queries are reached after RoPE without copying any modeling file:

- every attention module hands its keys and values to `past_key_values.update(...)`. A forward pre-hook puts
  `_CacheSeam` there (around the caller's cache, or alone if there is none), which transforms and quantises them, so
  that a cache only ever holds quantised keys and values;
- every attention module calls the attention function named in its config. Ours, registered as "flatquant", maps the
  queries into the keys' basis and calls scaled-dot-product attention.

What was given up: attention implementations other than ours (eager, flash) on a quantised model; asking for one fails
loudly instead of reading keys in the wrong basis.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel

from flatquant.errors import ModelError

ATTENTION = "flatquant"
_SLOT = "flatquant_kv"


class KeyValue(nn.Module, ABC):
    """What happens to queries, keys and values of one attention module, after RoPE.  # all (B, heads, T, head_dim)"""

    @abstractmethod
    def query(self, q: Tensor) -> Tensor:
        """Queries in the basis of the cached keys."""

    @abstractmethod
    def key(self, k: Tensor) -> Tensor:
        """Keys in their own basis, on their grid."""

    @abstractmethod
    def value(self, v: Tensor) -> Tensor:
        """Values on their grid."""

    def store(self, cache: Any, k: Tensor, v: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Put new keys and values into `cache` and return all it holds."""
        return cache.update(self.key(k), self.value(v), layer, *args, **kwargs)


class _CacheSeam:
    """Stands where an attention module expects its cache; quantises what goes in, forwards the rest."""

    def __init__(self, kv: KeyValue, cache: Any) -> None:
        self._kv = kv
        self._cache = cache

    def update(self, k: Tensor, v: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self._cache is None:
            return self._kv.key(k), self._kv.value(v)
        return self._kv.store(self._cache, k, v, layer, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def _hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    implementation = getattr(module.config, "_attn_implementation", None)
    if implementation != ATTENTION:
        raise ModelError(
            f"this model's keys and values are quantised for attention implementation {ATTENTION!r}, "
            f"but {implementation!r} is set; leave attn_implementation alone"
        )
    cache = kwargs.get("past_key_values")
    if isinstance(cache, _CacheSeam):
        return args, kwargs
    return args, {**kwargs, "past_key_values": _CacheSeam(getattr(module, _SLOT), cache)}


def attach(attention: nn.Module, kv: KeyValue) -> None:
    """Route one attention module's queries, keys and values through `kv`, replacing what was attached before."""
    detach(attention)
    setattr(attention, _SLOT, kv)
    handle = attention.register_forward_pre_hook(_hook, with_kwargs=True)
    attention._flatquant_hook = handle  # type: ignore[assignment]


def detach(attention: nn.Module) -> None:
    """Undo `attach`; nothing happens if nothing is attached."""
    if hasattr(attention, _SLOT):
        attention._flatquant_hook.remove()  # type: ignore[union-attr]
        delattr(attention, _SLOT)
        del attention._flatquant_hook


def attached(attention: nn.Module) -> KeyValue | None:
    """What `attach` put there."""
    return getattr(attention, _SLOT, None)


def use_attention(model: PreTrainedModel) -> None:
    """Make the model call our attention function; unattached modules keep plain scaled-dot-product attention."""
    model.config._attn_implementation = ATTENTION


def _attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs):
    kv = attached(module)
    if kv is not None:
        query = kv.query(query)
    if kwargs.get("softcap") is not None:
        return _capped(query, key, value, attention_mask, kwargs["scaling"], kwargs["softcap"]), None
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)


def _capped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, cap: float) -> Tensor:
    """Attention with scores c tanh(s / c) (Gemma 2); the fused kernel has no such thing.  # (B, T, heads, head_dim)"""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = cap * torch.tanh(q @ k.mT * (scaling / cap))  # (B, heads, T, S)
    if mask is None:  # transformers leaves out a mask that is merely causal
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril(k.shape[-2] - q.shape[-2])
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if mask.dtype == torch.bool else scores + mask
    work = torch.promote_types(scores.dtype, torch.float32)
    return (scores.softmax(-1, dtype=work).to(q.dtype) @ v).transpose(1, 2).contiguous()


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
