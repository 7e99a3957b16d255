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
from flatquant.models import CacheShape, head_dim
from flatquant.runtime.experts import Experts
from flatquant.spec import Pairing, Transforms


@dataclass(frozen=True)
class Rows:
    """Rows of a linear: all, or those of one part of a fused one.

    A fused q, k and v has them in this order, `path[v]`, or so for every head of keys, `path[*.v]`: its queries, its
    key, its value. A fused gate and up has gate first, `path[up]`. What writes latent vectors has them first,
    `path[latent]`, before the rotary part of keys, `path[rotary]`; what reads them has the value last in every head,
    `path[*.last]`.
    """

    path: str
    part: str | None

    @classmethod
    def parse(cls, text: str) -> Rows:
        """Read a path, with its part in brackets.

        Raises:
            ModelError: something else.
        """
        match = re.fullmatch(r"([\w.*]+)(?:\[(v|up|k|latent|rotary|\*\.v|\*\.k|\*\.last)\])?", text)
        if match is None:
            raise ModelError(f"{text!r} is no path of a linear; of a part of a fused one, write path[v] or path[up]")
        return cls(match[1], match[2])

    def place(self, rows: int, n: int, head_dim: int) -> tuple[int, int, int]:
        """Where they are: `size` rows from `first` on, in each of as many `groups` of rows.

        Args:
            rows: of the linear.
            n: channels that its heads write after attention, or that up or the latent part has.

        Returns:
            groups, first, size.
        """
        both = (rows - n) // 2  # of keys, or of values
        match self.part:
            case "v":
                return 1, rows - both, both
            case "k":
                return 1, n, both
            case "*.v":
                return both // head_dim, rows * head_dim // both - head_dim, head_dim
            case "*.k":
                return both // head_dim, rows * head_dim // both - 2 * head_dim, head_dim
            case "*.last":
                return n // head_dim, rows * head_dim // n - head_dim, head_dim
            case "up":
                return 1, rows - n, n
            case "latent":
                return 1, 0, n
            case "rotary":
                return 1, n, rows - n
            case _:
                return 1, 0, rows


@dataclass(frozen=True, kw_only=True)
class Edge:
    """One tensor that linears read.

    Attributes:
        site: its name.
        like: the one of `spec.SITES` that schemes and recipes take it for, if its name is none of these: a block may
            have several tensors of a kind.
        readers: the linears that read it. They share one online transform and one activation grid.
        norm: the norm that writes it, whose gain (and shift) absorbs a diagonal.
        writer: the linear whose output rows absorb part of the transform; of a fused one, the part:
            `self_attn.qkv_proj[v]`, `mlp.gate_up_proj[up]`; see `Rows`.
        routers: modules whose one weight multiplies it too, in 16 bit and in the basis that it is written in: of a
            mixture of experts, what chooses them; gates of a few channels.
        passes: what survives between the writer and the readers: a per-channel scale (`diagonal`: an elementwise
            product), one matrix per head shared by all heads (`per_head`: softmax attention), or a rotation
            (`rotation`: an RMSNorm, which is then `norm`, and whose gain goes to the readers).
    """

    site: str
    readers: tuple[str, ...]
    norm: str | None = None
    writer: str | None = None
    routers: tuple[str, ...] = ()
    passes: Literal["nothing", "diagonal", "per_head", "rotation"] = "nothing"
    like: str | None = None

    @property
    def role(self) -> str:
        """The one of `spec.SITES` that this site is, or is like."""
        return self.like or self.site

    @property
    def streams(self) -> bool:
        """Whether its norm reads the residual stream, not what another linear of the block wrote."""
        return self.norm is not None and self.writer is None

    @property
    def writes(self) -> Rows:
        """`writer`, taken apart."""
        return Rows.parse(self.writer or "")

    def bearable(self, parts: Transforms) -> Transforms:
        """A recipe's transforms less those that only a norm or a writer could absorb, where there is none.

        Blocks without a norm in front (olmo2) read the residual stream itself; a gate behind attention (qwen3_next)
        lets no matrix of a head pass. Latent vectors are not shifted: a cache holds them.
        """
        lost = {"diagonal", "head", "heads"} if self.norm is None and self.writer is None else set()
        if self.passes == "rotation":
            lost.add("shift")
        return tuple(part for part in parts if part.kind not in lost)


@dataclass(frozen=True, kw_only=True)
class Residual:
    """The edge that runs through all blocks: the embedding writes it, blocks read it through their norms and add to it,
    the head reads it through the final norm. A rotation passes: an RMSNorm without its gain commutes with it.

    Attributes:
        writers: the linears of a block whose outputs are added to it. Its readers are those of the edges whose norm
            reads the stream.
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
        keys: the linear that writes keys; see `Rows`.
        latent: the site whose input a cache holds in the place of keys and values (latent attention); beside it, as
            one head for all, the part of keys that the rotary embedding turns.
        rotary: how channels of keys are turned, where a block turns them at all; None if in another way than those
            that `Pairing` has.
        unturned: attributes of an attention module that turns nothing; a type stands for all its values.
        others: how blocks of other kinds are wired. A block is of the first kind whose modules it has.
        kept: linears that stay in 16 bit, and read none of these tensors.
        example: config fields of a small model that has all kinds of block, where the defaults leave out some.
        repeated: keyword arguments of a block that have rows for every window of a batch.
        own: positional arguments of a block, behind the hidden states, that each window has its own of.
        when: config fields that choose between descriptions of one model type.
        norm_offset: a norm multiplies by this plus its weight (Gemma: 1).
        attention: the module that calls transformers' attention function; None if there is none, as in a block of
            linear attention. Its keys and values stay as they are.
    """

    model_types: tuple[str, ...]
    edges: tuple[Edge, ...]
    residual: Residual | None = None
    scores: Scores | None = None
    keys: str = "self_attn.k_proj"
    latent: str | None = None
    rotary: Pairing | None = "halves"
    unturned: Mapping[str, Any] = field(default_factory=lambda: {"use_rope": 0})
    others: tuple[Arch, ...] = ()
    kept: tuple[str, ...] = ()
    example: Mapping[str, Any] = field(default_factory=dict)
    repeated: tuple[str, ...] = ()
    own: tuple[int, ...] = ()
    when: Mapping[str, Any] = field(default_factory=dict)
    norm_offset: float = 0.0
    blocks: str = "model.layers"
    attention: str | None = "self_attn"
    final_norm: str = "model.norm"

    @property
    def kinds(self) -> tuple[Arch, ...]:
        """The descriptions of all kinds of block."""
        return (self, *self.others)

    @property
    def reached(self) -> str:
        """The attention module of the first kind of block that has one; empty if none has."""
        return next((kind.attention for kind in self.kinds if kind.attention is not None), "")

    def of(self, block: nn.Module) -> Arch:
        """The description of one block, with all that reads or adds to the residual stream named one by one.

        Raises:
            ModelError: the block is of no kind that is described.
        """
        kind = next((kind for kind in self.kinds if kind._fits(block)), self)
        edges = tuple(replace(edge, readers=expanded(block, edge.readers)) for edge in kind.edges)
        residual = kind.residual and replace(kind.residual, writers=expanded(block, kind.residual.writers))
        return replace(kind, edges=edges, residual=residual, others=())

    def _fits(self, block: nn.Module) -> bool:
        paths = {path.partition(".*")[0] for edge in self.edges for path in (*edge.readers, edge.norm) if path}
        return all(find(block, path) is not None for path in paths)

    def turns(self, attention: nn.Module) -> bool:
        """Whether a block's attention module turns its keys."""

        def says(name: str, value: Any) -> bool:
            found = getattr(attention, name, attention)
            return isinstance(found, value) if isinstance(value, type) else found == value

        return not self.unturned or not all(says(name, value) for name, value in self.unturned.items())


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Head counts and sizes of a model.

    Attributes:
        kv_heads: of keys and values, or of what a cache holds in their place.
        head_dim: of values, and of keys in a cache but for latent attention.
        rotary: with latent attention, the channels of keys that the rotary embedding turns, which a cache holds.
        latent: with latent attention, the channels of a latent vector.
    """

    heads: int
    kv_heads: int
    head_dim: int
    rotary: int = 0
    latent: int = 0
    experts: int = 1  # that a token passes through, where there are several

    @classmethod
    def of(cls, config) -> Geometry:
        """Read a transformers config; `head_dim` is its own field where it exists. Where layers differ, the first's."""
        text = config.get_text_config()
        return cls(
            heads=text.num_attention_heads,
            kv_heads=CacheShape.of(config).heads,
            head_dim=head_dim(config),
            experts=getattr(text, "num_experts_per_tok", None) or 1,
        )

    def at(self, block: nn.Module, arch: Arch) -> Geometry:
        """Those of one block, whose attention may have heads of its own."""
        if arch.attention is None:
            return self
        if arch.latent is not None:
            (out,) = (linear_at(block, edge.readers[0]) for edge in arch.edges if edge.passes == "per_head")
            rotary = rotary_channels(block, arch)
            assert rotary is not None
            latent = linear_at(block, Rows.parse(arch.keys).path).out_features - rotary
            size = out.in_features // self.heads
            return replace(self, kv_heads=1, head_dim=size, rotary=rotary, latent=latent)
        size, keys = getattr(submodule(block, arch.attention), "head_dim", self.head_dim), Rows.parse(arch.keys)
        (out,) = (linear_at(block, edge.readers[0]) for edge in arch.edges if edge.site == "attn_out")
        heads, rows = out.in_features // size, linear_at(block, keys.path).out_features
        rows = rows if keys.part is None else (rows - heads * size) // 2
        return replace(self, heads=heads, head_dim=size, kv_heads=rows // size)

    @property
    def key_dim(self) -> int:
        """Channels of a key in a cache."""
        return self.rotary or self.head_dim

    @property
    def cached(self) -> int:
        """Numbers that a cache holds of one token and block."""
        return CacheShape(heads=self.kv_heads, key_dim=self.key_dim, value_dim=self.latent or self.head_dim).numbers


def rotary_channels(block: nn.Module, arch: Arch) -> int | None:
    """Of latent attention, the channels of keys that the rotary embedding turns."""
    if arch.latent is None:
        return None
    (up,) = (linear_at(block, edge.readers[0]) for edge in arch.edges if edge.site == arch.latent)
    return linear_at(block, Rows.parse(arch.keys).path).out_features - up.in_features


def key_bias(block: nn.Module, arch: Arch, heads: int, head_dim: int) -> Tensor | None:
    """The bias of a block's keys, if they have one.  # (heads, head_dim)"""
    keys = Rows.parse(arch.keys)
    bias = linear_at(block, keys.path).bias
    if bias is None:
        return None
    groups, first, size = keys.place(len(bias), len(bias) - 2 * heads * head_dim, head_dim)
    return bias.unflatten(0, (groups, -1))[:, first : first + size].reshape(heads, head_dim)


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


def gain_of(block: nn.Module, norm: str) -> Tensor:
    """The gain of a block's norm.  # (n,)"""
    gain = submodule(block, norm).weight
    assert isinstance(gain, Tensor)
    return gain


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


def blocks_at(model: nn.Module, path: str) -> nn.ModuleList:
    """The decoder blocks at a dotted path.

    Raises:
        ModelError: nothing is there, or something else.
    """
    blocks = submodule(model, path)
    if not isinstance(blocks, nn.ModuleList):
        raise ModelError(f"{path} is a {type(blocks).__name__}, not a list of blocks")
    return blocks


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
