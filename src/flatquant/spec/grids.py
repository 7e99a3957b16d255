"""What one grid looks like, and which grids a model gets: `QuantSpec`, `Scheme`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Self

from flatquant import formats
from flatquant.spec.convert import check

# The quantised inputs of a transformer block, in the order data meets them.
SITES = ("attn_in", "attn_out", "mlp_in", "mlp_mid")
# Of which each rank of tensor parallelism holds a part: their linears are cut by columns.
CUT_SITES = ("attn_out", "mlp_mid")
HEAD = "lm_head"  # what schemes call the output layer, whatever a family calls it

Clip = Literal["none", "learned", "fixed", "search"]
# Where learned clips start, at 2, 3, .. 8 bits: 4.0 is the papers', of which 6 bits and more would be worse than plain
# rounding. Of 64 normal numbers, the best share of the range is .95 at 5 bits, .99 at 6, and 1 from 7 on; of more
# numbers it is less.
CLIP_STARTS = (4.0, 4.0, 4.0, 4.0, 4.5, 6.0, 7.0)


@dataclass(frozen=True, kw_only=True)
class QuantSpec:
    """One grid.

    Weights get one scale per output row, or per `group_size` consecutive inputs of a row; activations one per token;
    keys and values one per token and head.

    Attributes:
        bits: 2 to 8. (16 bits means "no grid", which the schemes write as `None`.)
        symmetric: zero point 0 and integers in [-2^(b-1), 2^(b-1)-1]; otherwise a zero point and [0, 2^b-1].
        group_size: weights only; `None` is the whole row.
        clip: `learned` fits how far the range is cut in; `fixed` cuts it to `clip_ratio`; `search` tries ratios from 1
            to 0.21 for every scale and keeps the one with the least |error|^2.4 (weights only); `none` keeps all. Of a
            format: `search`, the scales that it names for a block, by squared error, or `none`, the one that covers it.
        clip_start: where a learned clip starts: the range times sigmoid(clip_start). 4.0 is the paper's.
        clip_ratio: of a fixed clip.
        scope: `row` as above, or `tensor`: weights get one scale for all readers of a site, activations a static one,
            from calibration text.
        width: of activations with one static scale: channels are split into pieces, so that the scale may be finer, up
            to this many pieces a channel on average.
        kind: `uniform`, or `levels`: the sums of `bits` numbers with signs. Weights have numbers of their own in every
            row or group, trained together with the codes that choose the signs; activations share a site's, found from
            calibration text, and have a scale per token. Or the name of a format of `flatquant.formats`, which says
            what its blocks and scales are: `bits` repeats its bits, and all else stays as it is by default.
        signed_scale: of symmetric weights: the scale has the sign that puts the weight of largest magnitude on the end
            -2^(b-1), which nothing takes otherwise: steps are (2^(b-1) - 1) / 2^(b-1) as wide.
        weigh: of levels of activations: what they minimise, the errors of all `channels` relative to the channels'
            power, or the `total` error.
    """

    bits: int
    symmetric: bool = True
    group_size: int | None = None
    clip: Clip = "none"
    clip_start: float = 4.0
    clip_ratio: float = 1.0
    scope: Literal["row", "tensor"] = "row"
    width: float = 1.0
    kind: str = "uniform"
    weigh: Literal["channels", "total"] = "channels"
    signed_scale: bool = False

    def __post_init__(self) -> None:
        plain = self.symmetric and self.clip == "none" and self.scope == "row"
        form = self.format
        if form is not None:
            blocks = self.symmetric and self.scope == "row" and self.group_size is None and not self.signed_scale
            check(
                blocks and self.clip in ("none", "search"),
                f"{self.kind} has scales of its own: no zero point, no group size, no clip but a search",
            )
            check(self.bits == form.bits, f"{self.kind} has {form.bits} bits, not {self.bits}")
        check(self.kind != "levels" or plain, "levels have no zero point, no clip, and scales by row or token")
        check(self.kind == "levels" or self.weigh == "channels", "only levels weigh errors in two ways")
        signed = self.symmetric and (self.kind, self.scope) == ("uniform", "row")
        check(not self.signed_scale or signed, "a signed scale is of symmetric weights by row or group")
        whole = self.symmetric and self.group_size is None and self.clip == "none"
        check(self.scope == "row" or whole, "one scale for a tensor is symmetric, without groups and without a clip")
        check(self.width == 1 or self.scope == "tensor", "only a grid with one scale for a tensor splits channels")
        check(1 <= self.width <= 16, f"width {self.width}: 1 to 16")
        check(0 < self.clip_ratio <= 1, f"clip ratio {self.clip_ratio}: above 0, at most 1")
        check(2 <= self.bits <= 8, f"{self.bits} bits: a grid has 2 to 8 bits (16 means unquantised)")
        check(self.group_size is None or self.group_size >= 2, f"group size {self.group_size}: at least 2")

    @property
    def format(self) -> formats.Facts | None:
        """The format of `flatquant.formats` that numbers are stored in; None for integers and for levels."""
        return None if self.kind in ("uniform", "levels") else formats.facts(self.kind)

    @classmethod
    def of(cls, storage: int | str, *, symmetric: bool) -> Self:
        """A grid of so many bits, or the format of this name."""
        if isinstance(storage, str):
            return cls(bits=formats.facts(storage).bits, kind=storage)
        return cls(bits=storage, symmetric=symmetric)

    def with_bits(self, bits: int) -> Self:
        """The same grid with other bits; integers in the place of a format."""
        return type(self)(bits=bits) if self.format else dataclasses.replace(self, bits=bits)

    @property
    def is_fitted(self) -> bool:
        """Of weights: whether a fit chooses the codes themselves, so that no solver rounds them."""
        return self.kind == "levels"

    @property
    def needs_rows(self) -> bool:
        """Of activations: whether the grid is found from those of some tokens."""
        return self.kind == "levels"

    @property
    def has_ratios(self) -> bool:
        """Whether a grid of activations, keys or values stores the ratios that its ranges are cut to."""
        return self.clip in ("learned", "fixed")

    @property
    def low(self) -> int:
        """Smallest integer of the grid."""
        return -(1 << (self.bits - 1)) if self.symmetric else 0

    @property
    def high(self) -> int:
        """Largest integer of the grid."""
        return (1 << (self.bits - 1)) - 1 if self.symmetric else (1 << self.bits) - 1


@dataclass(frozen=True, kw_only=True)
class SiteBits:
    """Bits of one site, or a format's name, where they differ from the scheme's.

    `None` keeps the scheme's, 16 switches the grid off.
    """

    weights: int | str | None = None
    activations: int | str | None = None

    def __post_init__(self) -> None:
        _check_bits(self.weights, self.activations)

    def __str__(self) -> str:
        if isinstance(self.weights, str) and self.weights == self.activations:
            return self.weights
        return (f"w{self.weights}" if self.weights else "") + (f"a{self.activations}" if self.activations else "")


def _check_bits(*given: int | str | None) -> None:
    """Raise SpecError unless these are bits of an override, or formats. It names at least one of two tensors."""
    check(any(bits is not None for bits in given), "an override without bits")
    for bits in given:
        if isinstance(bits, str):
            formats.facts(bits)
            continue
        check(bits is None or bits == 16 or 2 <= bits <= 8, f"{bits} bits: a grid has 2 to 8, or 16 for none")


@dataclass(frozen=True, kw_only=True)
class CacheBits:
    """Bits or formats of one block's keys and values where they differ from the scheme's; see `SiteBits`."""

    keys: int | str | None = None
    values: int | str | None = None

    def __post_init__(self) -> None:
        _check_bits(self.keys, self.values)

    def __str__(self) -> str:
        if self.keys == self.values:
            return f"kv{self.keys}"
        return (f"k{self.keys}" if self.keys else "") + (f"v{self.values}" if self.values else "")


@dataclass(frozen=True, kw_only=True)
class HeadGrids:
    """Grids of the output layer, whose weights are rounded to the nearest and whose input has no transform.

    Integers, symmetric, without a clip: one scale a row or group, and one a token.
    """

    weights: QuantSpec
    activations: QuantSpec | None = None

    def __post_init__(self) -> None:
        for spec in (self.weights, self.activations):
            if spec is not None:
                plain = QuantSpec(bits=spec.bits, group_size=spec.group_size)
                check(spec == plain, f"{HEAD}: symmetric integers without a clip, one scale a row, group or token")
        check(self.activations is None or self.activations.group_size is None, f"{HEAD}: groups are for weights only")

    def __str__(self) -> str:
        group = f"g{self.weights.group_size}" if self.weights.group_size else ""
        return f"w{self.weights.bits}{group}a{self.activations.bits if self.activations else 16}"


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
    `head` are the grids of the output layer, which otherwise stays in 16 bit. Embeddings always do.
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
        """Read `w4a4kv4`, `w3a16`, `w4g128a8`, `k4v2`, `w4a4kv4,mlp_mid=w8a8,11.attn_in=a8,0.k8,1.kv16,lm_head=w8a16`.

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

        overrides, cache_overrides, output = _read_overrides(text, rest)
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
        return text + (f",{HEAD}={self.head}" if self.head else "")

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
) -> tuple[dict[str, SiteBits], dict[str, CacheBits], HeadGrids | None]:
    """What follows the first comma of a scheme's text: bits of sites, of blocks' keys and values, and of the head.

    Raises:
        SpecError: a part of no such form or without bits, or a tensor named twice.
    """
    sites: dict[str, SiteBits] = {}
    caches: dict[str, dict[str, int | str]] = {}
    head: HeadGrids | None = None
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
        else:
            check(
                False,
                f"scheme {text!r}: {part!r} is neither [block.]site=w<bits>a<bits> with one of the sites "
                f"{', '.join(SITES)}, nor block.k<bits>v<bits> for the keys and values of one block, "
                f"nor {HEAD}=w<bits>a<bits> with integers",
            )
    return sites, {block: CacheBits(**given) for block, given in caches.items()}, head
