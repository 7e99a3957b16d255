"""What sits where in one concrete model: all that serving needs besides tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from flatquant.spec.convert import check, later
from flatquant.spec.grids import QuantSpec
from flatquant.spec.parts import CodebookSpec

# Which channels rotary embedding turns together, and the order of an attention module's cosines and sines.
# `halves`: channels i and i + r / 2; angles i and i + r / 2 are alike. `neighbours`: channels 2 i and 2 i + 1; angles
# as before. `interleaved`: channels 2 i and 2 i + 1; angles 2 i and 2 i + 1 are alike. `none`: nothing is turned.
Pairing = Literal["halves", "neighbours", "interleaved", "none"]


_EXPERT = re.compile(r"(.*\.\d+)\.")


def by_expert(paths: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Paths of linears in a block, grouped by the rows they multiply: those of one expert together, all others too.

    In a block, a module with a number for its name is one expert of several.
    """
    groups: dict[str, list[str]] = {}
    for path in paths:
        match = _EXPERT.match(path)
        groups.setdefault(match[1] if match else "", []).append(path)
    return tuple(tuple(group) for group in groups.values())


def is_experts(group: Sequence[str]) -> bool:
    """Whether these paths, which multiply the same rows, are those of one expert of several."""
    return _EXPERT.match(group[0]) is not None


@dataclass(frozen=True, kw_only=True)
class SitePlan:
    """One edge of one block: who reads it, on which grids, and which factors run online.

    The online transform maps x, reshaped to [.., left, right] sizes `shape`, to P1^T X P2; `left` and `right` say
    whether P1 and P2 exist online (a factor that a writer absorbed, or that was never there, does not).
    Weights are integers on a grid, or `weights.bits` bits each in codebooks; with a `rank`, beside a branch in 16 bit.
    A `shift` is subtracted before, online or by the norm; then every reader has a bias.
    Module paths are relative to the block.
    """

    readers: tuple[str, ...]
    shape: tuple[int, int]
    left: bool = False
    right: bool = False
    weights: QuantSpec | None = None
    activations: QuantSpec | None = None
    codebook: CodebookSpec | None = None
    rank: int = 0
    shift: Literal["none", "norm", "online"] = "none"
    ranks: int = later(1)

    def __post_init__(self) -> None:
        blocks = self.ranks >= 1 and self.shape[0] % self.ranks == 0 and (self.ranks == 1 or self.left)
        check(blocks, f"a left factor of {self.shape[0]} rows in {self.ranks} blocks")
        check(self.rank >= 0 and (not self.rank or self.weights is not None), "a branch is beside rounded weights")
        check(bool(self.readers), "a site needs at least one reader")
        check(min(self.shape) >= 1, f"site shape {self.shape}: sizes must be positive")
        if self.codebook is not None:
            check(self.weights is not None, "a codebook needs the bits of its weights")
            assert self.weights is not None
            self.codebook.index_bits(self.weights.bits)

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """`readers`, by the rows of the tensor that they multiply."""
        return by_expert(self.readers)

    @property
    def experts(self) -> int:
        """How many experts read the tensor, those aside that every token passes."""
        return sum(is_experts(group) for group in self.groups)


@dataclass(frozen=True, kw_only=True)
class KeyOffset:
    """That keys are cached less a constant per channel, (heads, head_dim), which RoPE turns as `pairing` says."""

    heads: int
    pairing: Pairing = "halves"

    def __post_init__(self) -> None:
        check(self.heads >= 1, f"a key offset of {self.heads} heads")


@dataclass(frozen=True, kw_only=True)
class LatentPlan:
    """That a cache holds latent vectors, which keys and values are made of, and the rotary part of keys beside them.

    Latent vectors are on the grid of values, in the basis that their readers multiply: where anything happens to what
    is cached, the factors of their site run before the cache, once for a token. The rotary part is one for all heads,
    on the grid of keys.

    Attributes:
        site: whose input the latent vectors are.
        rotary: channels of the rotary part.
        left, right: whether the site's P1 and P2 run before the cache.
    """

    site: str
    rotary: int
    left: bool = False
    right: bool = False

    def __post_init__(self) -> None:
        check(self.rotary >= 1, f"a rotary part of {self.rotary} channels")


@dataclass(frozen=True, kw_only=True)
class BlockPlan:
    """The sites of one block, and the grids of its keys (after RoPE, times P_h if `qk`) and values.

    `head_dim` is that of values; of a block with a `latent`, keys and values are its two parts wherever a cache is
    spoken of.
    """

    sites: Mapping[str, SitePlan]
    head_dim: int
    qk: bool = False
    keys: QuantSpec | None = None
    values: QuantSpec | None = None
    key_offset: KeyOffset | None = None
    latent: LatentPlan | None = field(default=None, metadata={"later": True})

    def __post_init__(self) -> None:
        check(self.latent is None or self.latent.site in self.sites, "latent vectors are the input of no site")

    @property
    def attended(self) -> bool:
        """Whether anything happens to queries, keys or values."""
        return self.qk or any(part is not None for part in (self.keys, self.values, self.key_offset))

    @property
    def key_dim(self) -> int:
        """Channels of a key in a cache."""
        return self.head_dim if self.latent is None else self.latent.rotary

    @property
    def value_dim(self) -> int:
        """Channels of a value in a cache."""
        return self.head_dim if self.latent is None else math.prod(self.sites[self.latent.site].shape)


@dataclass(frozen=True, kw_only=True)
class HeadPlan:
    """The output layer on a grid.

    Attributes:
        site: its input, as the model gives it, on the grid of activations. The one reader's path is relative to the
            model.
        tied: the layer was the embedding's matrix. Unless an `EmbeddingPlan` shares it, the rounded one is a copy.
    """

    site: SitePlan
    tied: bool = False

    def __post_init__(self) -> None:
        plain = SitePlan(
            readers=self.site.readers,
            shape=self.site.shape,
            weights=self.site.weights,
            activations=self.site.activations,
        )
        check(plain == self.site and len(plain.readers) == 1, "an output layer is one linear without a transform")
        check(plain.weights is not None, "an output layer in 16 bit is not planned")
        for spec in (plain.weights, plain.activations):
            uniform = spec is None or (spec.kind, spec.scope, spec.clip) == ("uniform", "row", "none")
            check(uniform, "an output layer or embedding has integers with one scale a row, group or token")

    @property
    def path(self) -> str:
        """Of the linear, in the model."""
        return self.site.readers[0]

    @property
    def weights(self) -> QuantSpec:
        """Their grid."""
        assert self.site.weights is not None
        return self.site.weights


@dataclass(frozen=True, kw_only=True)
class EmbeddingPlan:
    """The embedding on a grid.

    Attributes:
        path: of the embedding, in the model.
        width: h, the numbers of a row.
        weights: their grid.
        shared: rows are those of the output layer, and are not stored again.
    """

    path: str
    width: int
    weights: QuantSpec
    shared: bool = False

    def __post_init__(self) -> None:
        check(bool(self.path), "an embedding has a path")
        HeadPlan(site=self.site)

    @property
    def site(self) -> SitePlan:
        """The table of rows, as that of a linear."""
        return SitePlan(readers=(f"{self.path}.table",), shape=(1, self.width), weights=self.weights)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What serving needs to know besides tensors.

    `blocks_path` names the module list, e.g. `model.layers`; `head` and `embedding` are None where the output layer and
    the embedding are in 16 bit.
    """

    blocks_path: str
    attention: str
    blocks: tuple[BlockPlan, ...]
    head: HeadPlan | None = field(default=None, metadata={"later": True})
    embedding: EmbeddingPlan | None = field(default=None, metadata={"later": True})

    def __post_init__(self) -> None:
        if self.embedding is not None and self.embedding.shared:
            same = self.head is not None and self.head.weights == self.embedding.weights
            check(same, "an embedding shares the integers of an output layer that has none such")
