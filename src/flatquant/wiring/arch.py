"""How a model family is wired, as data: which linears read which tensor, and who wrote it.

A transform is a basis change on an edge: readers absorb its inverse, writers absorb what they can, the rest runs
online. Module paths are relative to a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from flatquant.errors import ModelError


@dataclass(frozen=True, kw_only=True)
class Edge:
    """One tensor that linears read.

    Attributes:
        site: its name, one of `spec.SITES`.
        readers: the linears that read it. They share one online transform and one activation grid.
        norm: the RMSNorm that writes it, whose gain absorbs a diagonal.
        writer: the linear whose output rows absorb part of the transform.
        passes: what survives between the writer and the readers: a per-channel scale (`diagonal`: an elementwise
            product), or one matrix per head shared by all heads (`per_head`: softmax attention).
    """

    site: str
    readers: tuple[str, ...]
    norm: str | None = None
    writer: str | None = None
    passes: Literal["nothing", "diagonal", "per_head"] = "nothing"


@dataclass(frozen=True, kw_only=True)
class Residual:
    """The edge that runs through all blocks: the embedding writes it, blocks read it through their norms and add to it,
    the head reads it through the final norm. A rotation passes: an RMSNorm without its gain commutes with it.

    Attributes:
        writers: the linears of a block whose outputs are added to it. Its readers are those of the edges with a norm.
    """

    writers: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The edge from keys to queries, before RoPE.

    RoPE turns channels j and j + head_dim / 2 into one another: a scale that the two share passes, from rows of `keys`
    to rows of `queries`.
    """

    queries: str
    keys: str


@dataclass(frozen=True, kw_only=True)
class Arch:
    """One family (or several that are wired alike).

    `residual` is None where something else than a norm reads the stream, or a norm stands between a writer and it;
    `scores` where RoPE pairs other channels, or queries and keys pass a norm.
    """

    model_types: tuple[str, ...]
    edges: tuple[Edge, ...]
    residual: Residual | None = None
    scores: Scores | None = None
    blocks: str = "model.layers"
    attention: str = "self_attn"
    final_norm: str = "model.norm"


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Head counts and sizes of a model."""

    heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, config) -> Geometry:
        """Read a transformers config; `head_dim` is its own field where it exists."""
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        return cls(heads=heads, kv_heads=getattr(config, "num_key_value_heads", None) or heads, head_dim=head_dim)


def submodule(root: nn.Module, path: str) -> nn.Module:
    """The module at a dotted path.

    Raises:
        ModelError: nothing is there; an edge that matches nothing is an error, not a no-op.
    """
    try:
        return root.get_submodule(path)
    except AttributeError:
        raise ModelError(
            f"{type(root).__name__} has no module {path!r}: the architecture description does not fit this model"
        ) from None


def linear_at(root: nn.Module, path: str) -> nn.Linear:
    """The linear layer at a dotted path.

    Raises:
        ModelError: nothing is there, or something else.
    """
    module = submodule(root, path)
    if not isinstance(module, nn.Linear):
        raise ModelError(f"{path} is a {type(module).__name__}, not a Linear: quantise the original model")
    return module


def replace_submodule(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` at a dotted path."""
    parent, _, name = path.rpartition(".")
    setattr(submodule(root, parent) if parent else root, name, module)
