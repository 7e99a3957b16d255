"""The shapes that are measured, by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import CONFIG_MAPPING

from flatquant.errors import SpecError

SCHEME = "w4a4kv4"
HEAD = f"{SCHEME},lm_head=w8a16"
ENDS = f"{HEAD},embed_tokens=w8"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a family's model, and the scheme that it is packed in."""

    sizes: Mapping[str, Any]
    family: str = "llama"
    scheme: str = SCHEME
    tiny: bool = False  # for a machine without a GPU


def _sizes(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocabulary: int, **others: Any) -> dict:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        **others,
    }


_LLAMA_3_8B = _sizes(4096, 14336, 32, 32, 8, 128256)
_QWEN3_8B = _sizes(4096, 12288, 36, 32, 8, 151936, head_dim=128)
_GEMMA = {"sliding_window": 512, "query_pre_attn_scalar": 256}
_TINY = _sizes(64, 96, 2, 4, 2, 128)
SHAPES: dict[str, Shape] = {
    "llama-2-7b": Shape(sizes=_sizes(4096, 11008, 32, 32, 32, 32000)),
    "llama-3-8b": Shape(sizes=_LLAMA_3_8B),
    "llama-3-8b-head8": Shape(sizes=_LLAMA_3_8B, scheme=HEAD),
    "llama-3-8b-ends8": Shape(sizes=_LLAMA_3_8B, scheme=ENDS),
    "qwen3-8b": Shape(sizes=_QWEN3_8B, family="qwen3"),
    "qwen3-8b-head8": Shape(sizes=_QWEN3_8B, family="qwen3", scheme=HEAD),
    "qwen3-8b-ends8": Shape(sizes=_QWEN3_8B, family="qwen3", scheme=ENDS),
    "gemma-3-1b": Shape(sizes=_sizes(1152, 6912, 26, 4, 1, 262144, head_dim=256, **_GEMMA), family="gemma3_text"),
    "tiny": Shape(sizes=_TINY, tiny=True),
    "tiny-head8": Shape(sizes=_TINY, scheme=HEAD, tiny=True),
    "tiny-ends8": Shape(sizes=_TINY, scheme=ENDS, tiny=True),
    "tiny-qwen3": Shape(sizes={**_TINY, "head_dim": 16}, family="qwen3", tiny=True),
    "tiny-gemma3": Shape(
        sizes={**_TINY, "num_key_value_heads": 1, "head_dim": 24, **_GEMMA, "sliding_window": 8},
        family="gemma3_text",
        tiny=True,
    ),
}


def shape_of(name: str) -> Shape:
    """A shape by its name.

    Raises:
        SpecError: there is none.
    """
    if name not in SHAPES:
        raise SpecError(f"unknown shape {name!r}; known: {', '.join(SHAPES)}")
    return SHAPES[name]


def config_of(name: str, layers: int | None = None) -> Any:
    """The configuration of a model of a shape, with so many blocks.

    Raises:
        SpecError: an unknown shape.
    """
    shape = shape_of(name)
    sizes = dict(shape.sizes) | ({} if layers is None else {"num_hidden_layers": layers})
    kind: Any = CONFIG_MAPPING[shape.family]
    return kind(**sizes, max_position_embeddings=8192)
