"""How a model family is wired, as data: which linears read which tensor, and who wrote it.

A transform is a basis change on an edge: readers absorb its inverse, writers absorb what they can, the rest runs
online. Module paths are relative to a block; `*` in one stands for every expert of a mixture.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flatquant.errors import ModelError
from flatquant.runtime.experts import Experts
from flatquant.spec import Pairing, Transforms


@dataclass(frozen=True)
class Writes:
    """The rows of a linear that write one tensor: all, or a part of a fused one."""

    path: str
    part: str | None

    def first(self, rows: int, n: int) -> int:
        """Where the rows begin that write a tensor, of which readers see n channels.

        A fused q, k and v has as many rows for k as for v, and n for q; a fused gate and up has n for each.
        """
        match self.part:
            case "v":
                return (rows + n) // 2
            case "up":
                return rows - n
            case _:
                return 0


@dataclass(frozen=True, kw_only=True)
class Edge:
    """One tensor that linears read.

    Attributes:
        site: its name, one of `spec.SITES`.
        readers: the linears that read it. They share one online transform and one activation grid.
        norm: the norm that writes it, whose gain (and shift) absorbs a diagonal.
        writer: the linear whose output rows absorb part of the transform; of a fused one, the part:
            `self_attn.qkv_proj[v]`, `mlp.gate_up_proj[up]`.
        routers: modules whose one weight multiplies it too, in 16 bit and in the basis that it is written in: of a
            mixture of experts, what chooses them.
        passes: what survives between the writer and the readers: a per-channel scale (`diagonal`: an elementwise
            product), or one matrix per head shared by all heads (`per_head`: softmax attention).
    """

    site: str
    readers: tuple[str, ...]
    norm: str | None = None
    writer: str | None = None
    routers: tuple[str, ...] = ()
    passes: Literal["nothing", "diagonal", "per_head"] = "nothing"

    @property
    def writes(self) -> Writes:
        """`writer`, taken apart."""
        match = re.fullmatch(r"([\w.*]+)(?:\[(v|up)\])?", self.writer or "")
        if match is None:
            raise ModelError(f"{self.site}: {self.writer!r} is no writer's path; of a fused one, path[v] or path[up]")
        return Writes(match[1], match[2])

    def bearable(self, parts: Transforms) -> Transforms:
        """A recipe's transforms less the diagonal, if nothing wrote this tensor that could absorb one.

        Blocks without a norm in front (olmo2) read the residual stream itself.
        """
        if self.norm is None and self.writer is None:
            return tuple(part for part in parts if part.kind != "diagonal")
        return parts


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

    Attributes:
        residual: None where something else than a norm reads the stream, or a norm stands between a writer and it.
        scores: None where RoPE pairs other channels, or queries and keys pass a norm.
        keys: the linear that writes keys; of a fused one, between queries and values.
        rotary: how channels of keys are turned, where a block turns them at all.
        dense: how blocks without experts are wired, in a family that has both kinds.
        when: config fields that choose between descriptions of one model type.
        norm_offset: a norm multiplies by this plus its weight (Gemma: 1).
    """

    model_types: tuple[str, ...]
    edges: tuple[Edge, ...]
    residual: Residual | None = None
    scores: Scores | None = None
    keys: str = "self_attn.k_proj"
    rotary: Pairing = "halves"
    dense: Arch | None = None
    when: Mapping[str, Any] = field(default_factory=dict)
    norm_offset: float = 0.0
    blocks: str = "model.layers"
    attention: str = "self_attn"
    final_norm: str = "model.norm"

    def of(self, block: nn.Module) -> Arch:
        """The description of one block, with all that reads or adds to the residual stream named one by one.

        Raises:
            ModelError: there are no experts where the description has some.
        """
        roots = {path.partition(".*")[0] for edge in self.edges for path in edge.readers if "*" in path}
        if self.dense is not None and any(find(block, root) is None for root in roots):
            return self.dense.of(block)
        edges = tuple(replace(edge, readers=expanded(block, edge.readers)) for edge in self.edges)
        residual = self.residual and replace(self.residual, writers=expanded(block, self.residual.writers))
        return replace(self, edges=edges, residual=residual, dense=None)


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Head counts and sizes of a model."""

    heads: int
    kv_heads: int
    head_dim: int
    experts: int = 1  # that a token passes through, where there are several

    @classmethod
    def of(cls, config) -> Geometry:
        """Read a transformers config; `head_dim` is its own field where it exists."""
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        return cls(
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=head_dim,
            experts=getattr(config, "num_experts_per_tok", None) or 1,
        )


def key_bias(block: nn.Module, arch: Arch, heads: int, head_dim: int) -> Tensor | None:
    """The bias of a block's keys, if they have one.  # (heads, head_dim)"""
    bias, size = linear_at(block, arch.keys).bias, heads * head_dim
    if bias is None:
        return None
    first = 0 if len(bias) == size else len(bias) - 2 * size  # of a fused one, behind the queries and before the values
    return bias[first : first + size].unflatten(0, (heads, head_dim))


def logits(config, products: Tensor) -> Tensor:
    """What a model says, from what its output embedding gives: some families scale that, or cap it.  # (.., V)"""
    scale = getattr(config, "logit_scale", 1.0) / getattr(config, "logits_scaling", 1.0)
    if scale != 1:
        products = products * scale
    if cap := getattr(config, "final_logit_softcapping", None):
        return cap * torch.tanh(products / cap)
    return products


def find(root: nn.Module, path: str) -> nn.Module | None:
    """The module at a dotted path, if there is one."""
    try:
        return root.get_submodule(path)
    except AttributeError:
        return None


def submodule(root: nn.Module, path: str) -> nn.Module:
    """The module at a dotted path.

    Raises:
        ModelError: nothing is there; an edge that matches nothing is an error, not a no-op.
    """
    module = find(root, path)
    if module is None:
        raise ModelError(
            f"{type(root).__name__} has no module {path!r}: the architecture description does not fit this model"
        )
    return module


def expanded(block: nn.Module, paths: Sequence[str]) -> tuple[str, ...]:
    """Paths with their `*` replaced by the number of every expert, all of one expert's together.

    Raises:
        ModelError: there are no opened experts at such a path.
    """
    out = [path for path in paths if "*" not in path]
    for root in dict.fromkeys(path.partition(".*")[0] for path in paths if "*" in path):
        experts = submodule(block, root)
        if not isinstance(experts, Experts):
            raise ModelError(f"{root} is a {type(experts).__name__}: its experts have not been opened")
        out += [p.replace("*", str(i)) for i in range(len(experts)) for p in paths if p.startswith(f"{root}.*")]
    return tuple(out)


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
