"""Keys and values that blocks lend to later ones (Gemma 4 E2B): they travel behind the hidden states between blocks.

A block that runs alone has to find what an earlier one wrote for the same windows in the same model, the original or
the quantised one. So keys and values are further channels of the stream of hidden states, (N, T, h + numbers). Every
stage that keeps hidden states, moves them or takes gradients through them does the same with these.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from flatquant import seams


@dataclass(frozen=True, kw_only=True)
class Lent:
    """The channels of a stream behind the hidden states.

    Attributes:
        width: of the hidden states, h.
        parts: by number of every lending block, the name under which others ask for what it lends, heads and head_dim.
    """

    width: int
    parts: dict[int, tuple[str, int, int]]

    @classmethod
    def of(cls, blocks: Iterable[nn.Module], width: int) -> Lent:
        """What a model's blocks lend, original or quantised."""
        parts = {}
        for index, block in enumerate(blocks):
            for attention in cast(Iterable[Any], filter(seams.lends, block.modules())):
                heads = attention.config.num_attention_heads // attention.num_key_value_groups
                parts[index] = attention.layer_type, heads, attention.head_dim
        return cls(width=width, parts=parts)

    @property
    def numbers(self) -> int:
        """Of a token, behind its hidden states."""
        return sum(2 * heads * size for _, heads, size in self.parts.values())

    def states(self, stream: Tensor) -> Tensor:
        """The hidden states.  # (.., h + numbers) -> (.., h)"""
        return stream[..., : self.width]

    def lent(self, stream: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Keys and values by name; what nothing was written to yet is 0.  # (B, heads, T, head_dim)"""
        found, at = {}, self.width
        for name, heads, size in self.parts.values():
            found[name] = _pair(stream[..., at : at + 2 * heads * size], heads)
            at += 2 * heads * size
        return found

    def joined(self, hidden: Tensor, lent: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
        """A stream of hidden states and of what was, and is now, lent.  # (B, T, h + numbers)"""
        if not self.parts:
            return hidden
        pairs = (torch.cat(lent[name], 1).transpose(1, 2).flatten(2) for name, _, _ in self.parts.values())
        return torch.cat([hidden, *(pair.to(hidden.dtype) for pair in pairs)], -1)

    def at_random(self, block: int, hidden: Tensor, generator: torch.Generator) -> dict[str, tuple[Tensor, Tensor]]:
        """What a block might lend of tokens with these hidden states, if it does; by name as `lent`."""
        if block not in self.parts:
            return {}
        name, heads, size = self.parts[block]
        matrix = torch.randn(hidden.shape[-1], 2 * heads * size, generator=generator, dtype=torch.float64)
        return {name: _pair(hidden @ matrix.to(hidden) * hidden.shape[-1] ** -0.5, heads)}


def _pair(rows: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Keys and values of tokens.  # (B, T, 2 heads head_dim) -> (B, heads, T, head_dim) each"""
    keys, values = rows.unflatten(-1, (2 * heads, -1)).transpose(1, 2).split(heads, dim=1)
    return keys, values
