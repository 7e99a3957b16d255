"""Which grids a model gets: `Scheme`, and how it is written."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Self

from flatquant import formats
from flatquant.spec.convert import check
from flatquant.spec.grids import (
    CLIP_STARTS,
    EMBEDDING,
    HEAD,
    SITES,
    CacheBits,
    Clip,
    HeadGrids,
    QuantSpec,
    SiteBits,
    check_plain,
    plain_weights,
)


def _cache() -> str:
    """What a scheme says of keys and values, as a pattern: bits or a format, for both or for each."""
    name = "|".join(formats.names())
    return rf"(?:kv(?P<kv>\d+|{name})|(?:k(?P<k>\d+|{name}))?(?:v(?P<v>\d+|{name}))?)"


def _linear(group: str = "") -> str:
    """What a scheme says of weights and activations, as a pattern: a format for both, or bits or a format for each."""
    name = "|".join(formats.names())
    return rf"(?:(?P<both>{name})|(?:w(?P<w>\d+|{name}){group})?(?:a(?P<a>\d+|{name}))?)"


def _head() -> re.Pattern[str]:
    """A scheme up to its first comma."""
    return re.compile(_linear(r"(?:g(?P<g>\d+))?") + _cache())


def _override() -> re.Pattern[str]:
    """What follows a comma, of a site."""
    return re.compile(rf"(?:(?P<block>\d+)\.)?(?P<site>{'|'.join(SITES)})={_linear()}")


_OUTPUT = re.compile(rf"{HEAD}=(?:w(?P<w>\d+)(?:g(?P<g>\d+))?)?(?:a(?P<a>\d+))?")
_LOOKED_UP = re.compile(rf"{EMBEDDING}=w(?P<w>\d+)(?:g(?P<g>\d+))?(?:a16)?")


def _read_embedding(text: str, part: str, m: re.Match[str]) -> QuantSpec:
    """What a part of a scheme's text says of the embedding.

    Raises:
        SpecError: it has no grid.
    """
    check(m["w"] != "16", f"scheme {text!r}: {part!r} gives no bits; use {EMBEDDING}=w8")
    return QuantSpec(bits=int(m["w"]), group_size=int(m["g"]) if m["g"] else None)


def _read_head(text: str, part: str, m: re.Match[str]) -> HeadGrids:
    """What a part of a scheme's text says of the output layer.

    Raises:
        SpecError: its weights have no grid.
    """
    bits = {name: None if m[name] in (None, "16") else int(m[name]) for name in "wa"}
    check(bits["w"] is not None, f"scheme {text!r}: {part!r} gives no bits of weights; use {HEAD}=w8a16 or {HEAD}=w8a8")
    assert bits["w"] is not None
    return HeadGrids(
        weights=QuantSpec(bits=bits["w"], group_size=int(m["g"]) if m["g"] else None),
        activations=QuantSpec(bits=bits["a"]) if bits["a"] else None,
    )


def _storage(m: re.Match[str], both: str, letter: str) -> int | str | None:
    """What a part of a scheme's text says of one of two tensors: bits, or the name of a format."""
    found = m[both] or m[letter]
    return int(found) if found and found.isdecimal() else found or None


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """Which tensors of a model get which grid; `None` leaves them in 16 bit.

    `overrides` maps `site` or `block.site` (`mlp_mid`, `11.mlp_mid`) to other bits; the more specific key wins.
    `cache_overrides` maps a block (`11`) to other bits of its keys and values.
    `head` are the grids of the output layer, `embedding` is that of the embedding's rows: symmetric integers without a
    clip. Both otherwise stay in 16 bit.
    `clip` is that of grids which only an override switches on. `clip_starts` are those of learned clips by their bits,
    2 to 8 (see `QuantSpec.clip_start`).

    `key_offset` is a constant per key channel, before RoPE, that the key grids leave out and attention gets back: the
    keys' `bias`, their `mean` over calibration text, or `none`. `auto` is the mean where the recipe reads text and keys
    have fewer than 8 bits, else the bias where keys have one.
    """

    weights: QuantSpec | None = None
    activations: QuantSpec | None = None
    keys: QuantSpec | None = None
    values: QuantSpec | None = None
    overrides: Mapping[str, SiteBits] = field(default_factory=dict)
    cache_overrides: Mapping[str, CacheBits] = field(default_factory=dict)
    clip: Literal["none", "learned"] = "none"
    clip_starts: tuple[float, ...] = CLIP_STARTS
    key_offset: Literal["auto", "none", "bias", "mean"] = "auto"
    head: HeadGrids | None = field(default=None, metadata={"later": True})
    embedding: QuantSpec | None = field(default=None, metadata={"later": True})

    def __post_init__(self) -> None:
        check(
            len(self.clip_starts) == len(CLIP_STARTS), f"{len(self.clip_starts)} starts of clips: one for 2 to 8 bits"
        )
        for name in ("activations", "keys", "values"):
            spec = getattr(self, name)
            check(spec is None or spec.group_size is None, f"{name}: group_size is for weights only")
            integers = spec is None or spec.clip != "search" or spec.format is not None
            check(integers, f"{name}: a searched clip of integers is for weights only")
            check(spec is None or not spec.signed_scale, f"{name}: a signed scale is for weights only")
            leveled = spec is not None and spec.kind == "levels" and name != "activations"
            check(not leveled, f"{name}: levels are for weights and activations only")
            static = spec is not None and spec.scope == "tensor"
            check(not static or name == "activations", f"{name}: one scale per token and head, not for a tensor")
        check(self.weights is None or self.weights.width == 1, "weights: only channels of activations are split")
        check(self.weights is None or self.weights.clip != "fixed", "weights: a fixed clip is for activations only")
        if self.embedding is not None:
            check_plain(self.embedding, EMBEDDING)
        for key in self.overrides:
            block, dot, site = key.rpartition(".")
            check(site in SITES and (_is_number(block) or not dot), f"override {key!r}: not [block.]site")
        for key in self.cache_overrides:
            check(_is_number(key), f"override of keys and values {key!r}: not the number of a block")

    @property
    def weights_only(self) -> bool:
        """Whether activations, keys and values stay in 16 bit (overrides aside)."""
        return self.activations is self.keys is self.values is None

    @classmethod
    def parse(
        cls, text: str, *, clip: Literal["none", "learned"] = "learned", clip_starts: tuple[float, ...] = CLIP_STARTS
    ) -> Self:
        """Read `w4a4kv4`, `w3a16`, `w4g128a8`, `k4v2`, `w4a4kv4,mlp_mid=w8a8,11.attn_in=a8,0.k8,1.kv16,lm_head=w8a16,
        embed_tokens=w8`.

        Left-out parts and 16 stay in 16 bit. Weights and activations are symmetric, keys and values asymmetric.
        A format's name may stand for bits, and alone for those of weights and activations: with a format F, `F`,
        `Fkv4`, `wFa16`, `w4aF`, `FkvF`, `w4a4kv4,mlp_mid=F,0.kF`. Its scales are its own: it has no group size, and
        searches them in the place of a clip.

        Raises:
            SpecError: text that is not of this form, a tensor named twice, or bits that no grid has.
        """
        head, *rest = (part.strip() for part in text.lower().split(","))
        m = _head().fullmatch(head)
        known = ", ".join(formats.names())
        expected = f"w4a4kv4, w4a16, w4g128a8kv4 or k4v2, or bits replaced by a format ({known})"
        check(bool(m and head), f"scheme {text!r}: expected something like {expected}")
        assert m is not None

        def grid(storage: int | str | None, *, symmetric: bool, group: str | None = None) -> QuantSpec | None:
            if storage is None or storage == 16:
                check(group is None, f"scheme {text!r}: a group size without weight bits")
                return None
            spec = QuantSpec.of(storage, symmetric=symmetric)
            if group:
                spec = dataclasses.replace(spec, group_size=int(group))
            return _with_clip(spec, clip, clip_starts)

        overrides, cache_overrides, output, embedding = _read_overrides(text, rest)
        return cls(
            weights=grid(_storage(m, "both", "w"), symmetric=True, group=m["g"]),
            activations=grid(_storage(m, "both", "a"), symmetric=True),
            keys=grid(_storage(m, "kv", "k"), symmetric=False),
            values=grid(_storage(m, "kv", "v"), symmetric=False),
            overrides=overrides,
            cache_overrides=cache_overrides,
            clip=clip,
            clip_starts=clip_starts,
            head=output,
            embedding=embedding,
        )

    def with_clips(self, *, weights: Clip, activations: float = 1.0, cache: float = 1.0, up_to: int = 8) -> Self:
        """The same grids with this clip for weights, and fixed ratios for others of at most `up_to` bits.

        Args:
            activations, cache: of the inputs of linears, and of keys and values.
            up_to: where there are more bits, a cut costs more than the finer grid gains.
        """

        def fixed(spec: QuantSpec | None, ratio: float) -> QuantSpec | None:
            if spec is None or ratio == 1 or spec.bits > up_to:
                return spec
            if spec.format:
                return _with_clip(spec, "search", self.clip_starts)
            return dataclasses.replace(spec, clip="fixed", clip_ratio=ratio)

        return dataclasses.replace(
            self,
            weights=None if self.weights is None else _with_clip(self.weights, weights, self.clip_starts),
            activations=fixed(self.activations, activations),
            keys=fixed(self.keys, cache),
            values=fixed(self.values, cache),
        )

    def __str__(self) -> str:
        def bits(spec: QuantSpec | None) -> str:
            return "16" if spec is None else spec.kind if spec.format else str(spec.bits)

        group = f"g{self.weights.group_size}" if self.weights and self.weights.group_size else ""
        k, v = bits(self.keys), bits(self.values)
        w, a = bits(self.weights), bits(self.activations)
        pair = w if w == a and self.weights and self.weights.format else f"w{w}{group}a{a}"
        text = pair + (f"kv{k}" if k == v else f"k{k}v{v}")
        text += "".join(f",{key}={bits}" for key, bits in self.overrides.items())
        text += "".join(f",{block}.{bits}" for block, bits in self.cache_overrides.items())
        if self.head is not None:
            text += f",{HEAD}={self.head}"
        if self.embedding is not None:
            text += f",{EMBEDDING}={plain_weights(self.embedding)}"
        return text

    def named(self, tensors: Literal["weights", "activations", "keys", "values"]) -> set[str]:
        """The names of all formats that these tensors have somewhere."""
        overrides = self.overrides if tensors in ("weights", "activations") else self.cache_overrides
        spec, others = getattr(self, tensors), (getattr(o, tensors) for o in overrides.values())
        return {o for o in others if isinstance(o, str)} | ({spec.kind} if spec is not None and spec.format else set())

    def at(self, block: int, site: str) -> tuple[QuantSpec | None, QuantSpec | None]:
        """The weight and the activation grid of one site, overrides applied."""
        bits: dict[str, int | str | None] = {"weights": None, "activations": None}
        for key in (site, f"{block}.{site}"):
            if key in self.overrides:
                o = self.overrides[key]
                bits = {n: getattr(o, n) if getattr(o, n) is not None else b for n, b in bits.items()}

        return (
            self._other_bits(self.weights, bits["weights"], symmetric=True),
            self._other_bits(self.activations, bits["activations"], symmetric=True),
        )

    def cache_at(self, block: int) -> tuple[QuantSpec | None, QuantSpec | None]:
        """The grids of one block's keys and values, overrides applied."""
        bits = self.cache_overrides.get(str(block))
        if bits is None:
            return self.keys, self.values
        return (
            self._other_bits(self.keys, bits.keys, symmetric=False),
            self._other_bits(self.values, bits.values, symmetric=False),
        )

    def _other_bits(self, spec: QuantSpec | None, bits: int | str | None, *, symmetric: bool) -> QuantSpec | None:
        """A grid of the scheme with an override's bits: switched on or off, or of another width.

        A learned clip starts where it does for these bits. A fixed one is for the scheme's bits and fewer: with more, a
        cut costs more than the finer grid gains.
        """
        if bits is None or (spec is not None and bits == (spec.kind if spec.format else spec.bits)):
            return spec
        if bits == 16:
            return None
        if spec is None or spec.format or isinstance(bits, str):
            return _with_clip(QuantSpec.of(bits, symmetric=symmetric), self.clip, self.clip_starts)
        if spec.clip == "fixed" and bits > spec.bits:
            return dataclasses.replace(spec, bits=bits, clip="none", clip_ratio=1.0)
        return _with_clip(dataclasses.replace(spec, bits=bits), spec.clip, self.clip_starts)


def _with_clip(spec: QuantSpec, clip: Clip, starts: Sequence[float]) -> QuantSpec:
    """The same grid with another clip; a learned one starts where it does for the grid's bits.

    A format's scales are searched in the place of any clip.
    """
    if spec.format is not None:
        return dataclasses.replace(spec, clip="none" if clip == "none" else "search")
    return dataclasses.replace(spec, clip=clip, clip_start=starts[spec.bits - 2] if clip == "learned" else 4.0)


def _is_number(text: str) -> bool:
    """Whether this is how an integer of at least 0 is written."""
    return text.isdecimal() and text == str(int(text))


def _read_overrides(
    text: str, parts: Sequence[str]
) -> tuple[dict[str, SiteBits], dict[str, CacheBits], HeadGrids | None, QuantSpec | None]:
    """What follows the first comma of a scheme's text: bits of sites, of blocks' keys and values, of both ends.

    Raises:
        SpecError: a part of no such form or without bits, or a tensor named twice.
    """
    sites: dict[str, SiteBits] = {}
    caches: dict[str, dict[str, int | str]] = {}
    head: HeadGrids | None = None
    embedding: QuantSpec | None = None
    cached = re.compile(rf"(?P<block>\d+)\.{_cache()}")
    for part in parts:
        site, cache = _override().fullmatch(part), cached.fullmatch(part)
        if site is not None:
            key = f"{int(site['block'])}.{site['site']}" if site["block"] else site["site"]
            weights, activations = (_storage(site, "both", letter) for letter in "wa")
            check(bool(weights or activations), f"scheme {text!r}: {part!r} gives no bits; use {part}w<bits>a<bits>")
            check(key not in sites, f"scheme {text!r}: {key} is given twice")
            sites[key] = SiteBits(weights=weights, activations=activations)
        elif cache is not None and (cache["kv"] or cache["k"] or cache["v"]):
            given = caches.setdefault(str(int(cache["block"])), {})
            for name, letter in (("keys", "k"), ("values", "v")):
                if bits := _storage(cache, "kv", letter):
                    check(name not in given, f"scheme {text!r}: {name} of block {int(cache['block'])} are given twice")
                    given[name] = bits
        elif (output := _OUTPUT.fullmatch(part)) is not None:
            check(head is None, f"scheme {text!r}: {HEAD} is given twice")
            head = _read_head(text, part, output)
        elif (looked_up := _LOOKED_UP.fullmatch(part)) is not None:
            check(embedding is None, f"scheme {text!r}: {EMBEDDING} is given twice")
            embedding = _read_embedding(text, part, looked_up)
        else:
            check(
                False,
                f"scheme {text!r}: {part!r} is neither [block.]site=w<bits>a<bits> with one of the sites "
                f"{', '.join(SITES)}, nor block.k<bits>v<bits> for the keys and values of one block, "
                f"nor {HEAD}=w<bits>a<bits> or {EMBEDDING}=w<bits> with integers",
            )
    return sites, {block: CacheBits(**given) for block, given in caches.items()}, head, embedding
