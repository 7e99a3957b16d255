"""What a cache holds of a model's tokens, by its config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class CacheShape:
    """What a cache holds of one token and block: keys and values of some heads, or what stands in their place.

    With latent attention that is one head: the rotary part of keys, and a latent vector (DeepSeek-V2, section 2.1).
    """

    heads: int
    key_dim: int
    value_dim: int

    @classmethod
    def of(cls, config: Any) -> CacheShape:
        """Read a transformers config. Where layers differ, the first's."""
        first = first_layer(config)
        if latent := getattr(first, "kv_lora_rank", None):
            return cls(heads=1, key_dim=first.qk_rope_head_dim, value_dim=latent)
        queries = config.get_text_config().num_attention_heads
        size = head_dim(config)
        return cls(heads=getattr(first, "num_key_value_heads", None) or queries, key_dim=size, value_dim=size)

    @property
    def numbers(self) -> int:
        """Numbers in the cache, of one token and block."""
        return self.heads * (self.key_dim + self.value_dim)


def first_layer(config: Any) -> Any:
    """The config of the first layer, of a wrapper's text part."""
    config = config.get_text_config()
    layers = getattr(config, "per_layer_config", None)
    return layers[0] if layers else config


def head_dim(config: Any) -> int:
    """Channels of a head: a field of its own where it exists. Where layers differ, the first's."""
    text = config.get_text_config()
    return getattr(first_layer(config), "head_dim", None) or text.hidden_size // text.num_attention_heads
