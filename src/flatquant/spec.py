"""What to quantise and how, as plain data.

Every object here is a frozen, keyword-only dataclass that validates itself once and converts to and from JSON-ready
dictionaries (`to_dict`, `from_dict`). Nothing here imports torch: a recipe can be written, read and compared on a
machine that has none. Three layers:

- *what one grid looks like*: `QuantSpec`; *which grids a model gets*: `Scheme`;
- *what a method is made of*: `TransformSpec`, `FitSpec`, `EndToEndSpec`, `SolverSpec`, `DataSpec`, joined in `Recipe`;
- *what sits where in one concrete model*: `SitePlan`, `BlockPlan`, `Plan` - all that serving needs besides tensors.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self, TypeVar

from flatquant import formats
from flatquant.errors import SpecError

# The quantised inputs of a transformer block, in the order data meets them.
SITES = ("attn_in", "attn_out", "mlp_in", "mlp_mid")
# Where transforms start that need calibration text for it.
DATA_STARTS = ("absmax", "second_moment", "center")
_RATES = ("lr", "clip_lr", "rotation_lr", "weight_lr", "code_lr")

Clip = Literal["none", "learned", "fixed", "search"]
# Where learned clips start, at 2, 3, .. 8 bits: 4.0 is the papers', of which 6 bits and more would be worse than plain
# rounding. Of 64 normal numbers, the best share of the range is .95 at 5 bits, .99 at 6, and 1 from 7 on; of more
# numbers it is less.
CLIP_STARTS = (4.0, 4.0, 4.0, 4.0, 4.5, 6.0, 7.0)
# Which channels rotary embedding turns together, and the order of an attention module's cosines and sines.
# `halves`: channels i and i + r / 2; angles i and i + r / 2 are alike. `neighbours`: channels 2 i and 2 i + 1; angles
# as before. `interleaved`: channels 2 i and 2 i + 1; angles 2 i and 2 i + 1 are alike. `none`: nothing is turned.
Pairing = Literal["halves", "neighbours", "interleaved", "none"]

T = TypeVar("T")


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise SpecError(message)


def _convert(kind: Any, value: Any, where: str) -> Any:
    """Turn JSON data back into the annotated type, or say where it does not fit."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        kinds = [a for a in args if a is not type(None)]
        return _convert(next((a for a in kinds if type(value) is a), kinds[0]), value, where)
    if origin is Literal:
        _check(value in args, f"{where}: {value!r} is not one of {', '.join(map(repr, args))}")
        return value
    if origin is tuple:
        _check(isinstance(value, list | tuple), f"{where}: expected a list, got {value!r}")
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(_convert(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
        _check(len(value) == len(args), f"{where}: expected {len(args)} entries, got {value!r}")
        return tuple(_convert(a, v, f"{where}[{i}]") for i, (a, v) in enumerate(zip(args, value, strict=True)))
    if origin in (dict, Mapping):
        _check(isinstance(value, Mapping), f"{where}: expected an object, got {value!r}")
        return {_convert(args[0], k, where): _convert(args[1], v, f"{where}.{k}") for k, v in value.items()}
    if dataclasses.is_dataclass(kind):
        return from_dict(typing.cast(type, kind), value, where)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    _check(type(value) is kind, f"{where}: expected {kind.__name__}, got {value!r}")
    return value


def from_dict(cls: type[T], data: Any, where: str | None = None) -> T:
    """Rebuild a spec from what `to_dict` gave.

    Raises:
        SpecError: an unknown or missing key, a value of the wrong type, or one that the spec itself refuses.
    """
    where = where or cls.__name__
    _check(isinstance(data, Mapping), f"{where}: expected an object, got {data!r}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(map(str, set(data) - set(fields)))
    _check(not unknown, f"{where}: unknown key {', '.join(unknown)}")
    required = {n for n, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING}
    missing = sorted(required - set(data))
    _check(not missing, f"{where}: missing key {', '.join(missing)}")
    return cls(**{name: _convert(hints[name], value, f"{where}.{name}") for name, value in data.items()})


def _later(default: Any) -> Any:
    """A field that format version 1 began without: it is written only where it is not `default`."""
    return field(default=default, metadata={"later": True})


def to_dict(spec: Any) -> Any:
    """The spec as nested dictionaries, lists, numbers and strings; `json.dumps` accepts it."""
    if dataclasses.is_dataclass(spec) and not isinstance(spec, type):
        values = {f: getattr(spec, f.name) for f in dataclasses.fields(spec)}
        return {f.name: to_dict(v) for f, v in values.items() if not f.metadata.get("later") or v != f.default}
    if isinstance(spec, Mapping):
        return {k: to_dict(v) for k, v in spec.items()}
    if isinstance(spec, list | tuple):
        return [to_dict(v) for v in spec]
    return spec


# --------------------------------------------------------------------------------------------- grids


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
            _check(
                blocks and self.clip in ("none", "search"),
                f"{self.kind} has scales of its own: no zero point, no group size, no clip but a search",
            )
            _check(self.bits == form.bits, f"{self.kind} has {form.bits} bits, not {self.bits}")
        _check(self.kind != "levels" or plain, "levels have no zero point, no clip, and scales by row or token")
        _check(self.kind == "levels" or self.weigh == "channels", "only levels weigh errors in two ways")
        signed = self.symmetric and (self.kind, self.scope) == ("uniform", "row")
        _check(not self.signed_scale or signed, "a signed scale is of symmetric weights by row or group")
        whole = self.symmetric and self.group_size is None and self.clip == "none"
        _check(self.scope == "row" or whole, "one scale for a tensor is symmetric, without groups and without a clip")
        _check(self.width == 1 or self.scope == "tensor", "only a grid with one scale for a tensor splits channels")
        _check(1 <= self.width <= 16, f"width {self.width}: 1 to 16")
        _check(0 < self.clip_ratio <= 1, f"clip ratio {self.clip_ratio}: above 0, at most 1")
        _check(2 <= self.bits <= 8, f"{self.bits} bits: a grid has 2 to 8 bits (16 means unquantised)")
        _check(self.group_size is None or self.group_size >= 2, f"group size {self.group_size}: at least 2")

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
    _check(any(bits is not None for bits in given), "an override without bits")
    for bits in given:
        if isinstance(bits, str):
            formats.facts(bits)
            continue
        _check(bits is None or bits == 16 or 2 <= bits <= 8, f"{bits} bits: a grid has 2 to 8, or 16 for none")


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


def _storage(m: re.Match[str], both: str, letter: str) -> int | str | None:
    """What a part of a scheme's text says of one of two tensors: bits, or the name of a format."""
    found = m[both] or m[letter]
    return int(found) if found and found.isdecimal() else found or None


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """Which tensors of a model get which grid; `None` leaves them in 16 bit.

    `overrides` maps `site` or `block.site` (`mlp_mid`, `11.mlp_mid`) to other bits; the more specific key wins.
    `cache_overrides` maps a block (`11`) to other bits of its keys and values.
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

    def __post_init__(self) -> None:
        _check(
            len(self.clip_starts) == len(CLIP_STARTS), f"{len(self.clip_starts)} starts of clips: one for 2 to 8 bits"
        )
        for name in ("activations", "keys", "values"):
            spec = getattr(self, name)
            _check(spec is None or spec.group_size is None, f"{name}: group_size is for weights only")
            integers = spec is None or spec.clip != "search" or spec.format is not None
            _check(integers, f"{name}: a searched clip of integers is for weights only")
            _check(spec is None or not spec.signed_scale, f"{name}: a signed scale is for weights only")
            leveled = spec is not None and spec.kind == "levels" and name != "activations"
            _check(not leveled, f"{name}: levels are for weights and activations only")
            static = spec is not None and spec.scope == "tensor"
            _check(not static or name == "activations", f"{name}: one scale per token and head, not for a tensor")
        _check(self.weights is None or self.weights.width == 1, "weights: only channels of activations are split")
        _check(self.weights is None or self.weights.clip != "fixed", "weights: a fixed clip is for activations only")
        for key in self.overrides:
            block, dot, site = key.rpartition(".")
            _check(site in SITES and (_is_number(block) or not dot), f"override {key!r}: not [block.]site")
        for key in self.cache_overrides:
            _check(_is_number(key), f"override of keys and values {key!r}: not the number of a block")

    @property
    def weights_only(self) -> bool:
        """Whether activations, keys and values stay in 16 bit (overrides aside)."""
        return self.activations is self.keys is self.values is None

    @classmethod
    def parse(
        cls, text: str, *, clip: Literal["none", "learned"] = "learned", clip_starts: tuple[float, ...] = CLIP_STARTS
    ) -> Self:
        """Read `w4a4kv4`, `w3a16`, `w4g128a8`, `k4v2`, `w4a4kv4,mlp_mid=w8a8,11.attn_in=a8,0.k8,1.kv16`.

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
        _check(bool(m and head), f"scheme {text!r}: expected something like {expected}")
        assert m is not None

        def grid(storage: int | str | None, *, symmetric: bool, group: str | None = None) -> QuantSpec | None:
            if storage is None or storage == 16:
                _check(group is None, f"scheme {text!r}: a group size without weight bits")
                return None
            spec = QuantSpec.of(storage, symmetric=symmetric)
            if group:
                spec = dataclasses.replace(spec, group_size=int(group))
            return _with_clip(spec, clip, clip_starts)

        overrides, cache_overrides = _read_overrides(text, rest)
        return cls(
            weights=grid(_storage(m, "both", "w"), symmetric=True, group=m["g"]),
            activations=grid(_storage(m, "both", "a"), symmetric=True),
            keys=grid(_storage(m, "kv", "k"), symmetric=False),
            values=grid(_storage(m, "kv", "v"), symmetric=False),
            overrides=overrides,
            cache_overrides=cache_overrides,
            clip=clip,
            clip_starts=clip_starts,
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
        return text + "".join(f",{block}.{bits}" for block, bits in self.cache_overrides.items())

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


def _read_overrides(text: str, parts: Sequence[str]) -> tuple[dict[str, SiteBits], dict[str, CacheBits]]:
    """What follows the first comma of a scheme's text: bits of sites, and of blocks' keys and values.

    Raises:
        SpecError: a part of no such form or without bits, or a tensor named twice.
    """
    sites: dict[str, SiteBits] = {}
    caches: dict[str, dict[str, int | str]] = {}
    cached = re.compile(rf"(?P<block>\d+)\.{_cache()}")
    for part in parts:
        site, cache = _override().fullmatch(part), cached.fullmatch(part)
        if site is not None:
            key = f"{int(site['block'])}.{site['site']}" if site["block"] else site["site"]
            weights, activations = (_storage(site, "both", letter) for letter in "wa")
            _check(bool(weights or activations), f"scheme {text!r}: {part!r} gives no bits; use {part}w<bits>a<bits>")
            _check(key not in sites, f"scheme {text!r}: {key} is given twice")
            sites[key] = SiteBits(weights=weights, activations=activations)
        elif cache is not None and (cache["kv"] or cache["k"] or cache["v"]):
            given = caches.setdefault(str(int(cache["block"])), {})
            for name, letter in (("keys", "k"), ("values", "v")):
                if bits := _storage(cache, "kv", letter):
                    _check(name not in given, f"scheme {text!r}: {name} of block {int(cache['block'])} are given twice")
                    given[name] = bits
        else:
            _check(
                False,
                f"scheme {text!r}: {part!r} is neither [block.]site=w<bits>a<bits> with one of the sites "
                f"{', '.join(SITES)}, nor block.k<bits>v<bits> for the keys and values of one block",
            )
    return sites, {block: CacheBits(**given) for block, given in caches.items()}


# --------------------------------------------------------------------------------------------- parts of a method


@dataclass(frozen=True, kw_only=True)
class TransformSpec:
    """One change of basis on an edge; several compose in order.

    Attributes:
        kind: `shift` (a constant per channel), `diagonal` (per-channel scale), `matrix` (full), `kronecker`
            (P1 (x) P2), `blocks` (I (x) P2: one matrix for every `size` neighbours), `head` (one matrix inside all
            heads, which the heads' writer applies), `heads` (one for every key-value head, likewise).
        parameters: `inverse` trains the matrix itself and inverts it, `svd` trains U diag(d) V^T with U and V in
            Cayley form, so that the inverse is free of a general solve; `rotation` trains an orthogonal matrix by
            Cayley SGD; `fixed` stays at its start, which is orthogonal; `masked` starts at the identity and opens band
            by band, epoch by epoch, all off its diagonal held back by the factor `stability`; `product` trains the two
            matrices of a Kronecker product inside a `matrix` or `blocks`: in blocks of 32, one of 4 and one of 8.
        init: `orthogonal` (Haar), `hadamard` (randomised; a Haar factor where none exists), `identity`. For a diagonal:
            `absmax` is the paper's wmax^(1-alpha) / xmax^alpha, `second_moment` is (E w^2 / E x^2)^(1/4), `identity`.
            For a shift: `center`, the middle between a channel's ends, or `identity`, none.
        alpha: exponent of `absmax`.
        size: of `blocks`, and of nothing else: 16, 32, 64 or 128 are what kernels and formats have. It divides the
            channels of a site. Where heads are written, blocks lie inside heads, and the writer applies them: of a
            size that divides both this one and the heads' own.
    """

    kind: Literal["shift", "diagonal", "matrix", "kronecker", "blocks", "head", "heads"]
    parameters: Literal["inverse", "svd", "rotation", "fixed", "masked", "product"] = "inverse"
    init: Literal["orthogonal", "hadamard", "identity", "absmax", "second_moment", "center"] = "identity"
    alpha: float = 0.3
    stability: float = 0.1
    size: int = _later(0)

    def __post_init__(self) -> None:
        _check((self.kind == "blocks") == (self.size > 0), f"a {self.kind} of size {self.size}: only blocks have one")
        _check(self.size != 1, "blocks of 1 change nothing: use a diagonal")
        data = self.init in ("absmax", "second_moment")
        _check(self.kind == "diagonal" or not data, f"a {self.kind} transform has no {self.init} start")
        _check(self.kind != "diagonal" or data or self.init == "identity", f"a diagonal has no {self.init} start")
        shifted = self.init in ("center", "identity") if self.kind == "shift" else self.init != "center"
        _check(shifted, f"a {self.kind} transform has no {self.init} start")
        trains = self.kind not in ("diagonal", "shift") or self.parameters == "inverse"
        _check(trains, f"a {self.kind} has no {self.parameters} parameters")
        square = self.kind in ("matrix", "blocks")
        _check(self.parameters != "product" or square, f"a {self.kind} has no product for parameters")
        masked = self.parameters == "masked"
        _check(self.kind != "heads" or masked, "heads takes masked parameters; use head for one matrix that all share")
        _check(not masked or self.init == "identity", f"masked parameters have no {self.init} start")
        _check(not masked or self.kind in ("matrix", "head", "heads"), f"a {self.kind} has no masked parameters")
        _check(0 < self.stability <= 1, f"stability {self.stability}: above 0, at most 1")
        _check(0 <= self.alpha <= 1, f"alpha {self.alpha}: between 0 and 1")


Transforms = tuple[TransformSpec, ...]


@dataclass(frozen=True, kw_only=True)
class FitSpec:
    """Block-wise fit: each block's parameters against the full-precision block's output on the same inputs.

    Loss: mean squared error, divided by its own (detached) value, so that the learning rate has no scale
    (FlatQuant, section 4.1). AdamW.

    Attributes:
        inputs: of the block: `original`, the full-precision model's, or `quantised`, what the quantised blocks before
            it give (targets stay the full-precision model's on its own inputs).
        both_targets: of a fit on quantised inputs: add the error against what the full-precision block gives on the
            quantised inputs (OmniQuant's second term for 2-bit weights).
        schedule: `cosine` per step from `lr` to `lr * final_lr` (the same floor for every group), or `constant`.
        rotation_lr: of rotations, by Cayley SGD.
        code_lr: of weights on levels: of the levels, relative to where they start, and of what decides the codes.
        weight_lr: of the weights before transform and grid; see `EndToEndSpec` (EfficientQAT's first stage, arXiv
            2407.11062).
    """

    epochs: int = 15
    batch_size: int = 4
    lr: float = 5e-3
    clip_lr: float = 5e-2
    weight_decay: float = 0.01
    final_lr: float = 1e-3
    warmup_steps: int = 0
    rotation_lr: float = 1.5
    code_lr: float = 1e-3
    inputs: Literal["original", "quantised"] = "original"
    schedule: Literal["cosine", "constant"] = "cosine"
    both_targets: bool = False
    weight_lr: float = _later(0.0)

    def __post_init__(self) -> None:
        _check(
            not self.both_targets or self.inputs == "quantised",
            "with original inputs both targets are one: use inputs='quantised'",
        )
        _check(self.epochs >= 0, f"epochs {self.epochs}: at least 0")
        _check(self.batch_size >= 1, f"batch size {self.batch_size}: at least 1")
        _check(self.lr > 0 and self.clip_lr > 0, "learning rates must be positive")


@dataclass(frozen=True, kw_only=True)
class EndToEndSpec:
    """End-to-end fit of the same parameters through all blocks.

    Attributes:
        objective: KL divergence to the original's logits, or cross entropy with the next token of the text.
        round_weights: put weights on their grids while fitting. A solver that compensates rounding errors is better
            served by parameters that were fitted to activations alone (SpinQuant, section 4.3).
        rotation_lr: of rotations, by Cayley SGD.
        code_lr: of weights on levels; see `FitSpec`.
        weight_lr: of the weights before transform and grid, which then train through their rounding as well
            (straight-through), as a share of the root mean square of their site's; 0 leaves them as they are.
        final_lr: where every cosine ends, as a share of `lr` (of `weight_lr` for weights).
        eps: AdamW's, against gradients of the sum over tokens. A larger one holds back parameters whose gradients are
            small, mostly noise when tokens are few.
        checkpoint: where memory is short, compute each block again in the backward pass: a third more time, and
            activations of one block in memory instead of all.
    """

    steps: int = 0
    batch_size: int = 2
    lr: float = 1e-3
    clip_lr: float = 1e-2
    weight_lr: float = 0.0
    rotation_lr: float = 1.5
    code_lr: float = 1e-3
    objective: Literal["kl", "cross_entropy"] = "kl"
    round_weights: bool = True
    final_lr: float = 0.0
    eps: float = 1e-8
    checkpoint: bool = True

    def __post_init__(self) -> None:
        _check(self.steps >= 0, f"end-to-end steps {self.steps}: at least 0")
        _check(self.batch_size >= 1, f"end-to-end batch size {self.batch_size}: at least 1")
        _check(self.lr > 0 and self.clip_lr > 0 and self.weight_lr >= 0, "learning rates must be positive")


@dataclass(frozen=True, kw_only=True)
class CodebookSpec:
    """Weights as entries of codebooks: every `length` neighbours of an input column are one vector.

    At b bits a weight, a vector has b * length bits of index: up to `main_bits` for the first codebook, the rest for a
    second one, whose entries are added. Entries come on top.

    Attributes:
        length: of a vector; it divides the number of outputs.
        main_bits: of an index of the first codebook, at most.
        outliers: share of columns, those with the largest curvature, that get a codebook of their own.
        outlier_length, outlier_bits: of that codebook's vectors and indices.
    """

    length: int = 4
    main_bits: int = 8
    outliers: float = 0.0
    outlier_length: int = 2
    outlier_bits: int = 8

    def __post_init__(self) -> None:
        lengths, bits = (self.length, self.outlier_length), (self.main_bits, self.outlier_bits)
        _check(all(1 <= v <= 64 for v in lengths), f"vector lengths {lengths}: 1 to 64")
        _check(all(1 <= b <= 16 for b in bits), f"index bits {bits}: 1 to 16")
        _check(0 <= self.outliers < 1, f"outlier columns {self.outliers}: a share, below 1")

    def index_bits(self, bits: int) -> tuple[int, int]:
        """Bits of the first and of the second index of a vector; 0 where there is no second.

        Raises:
            SpecError: more bits than two codebooks have.
        """
        total = bits * self.length
        _check(
            total <= 2 * self.main_bits,
            f"{bits} bits a weight, {total} for a vector of {self.length}: two codebooks of {self.main_bits} have less",
        )
        main = min(total, self.main_bits)
        return main, total - main

    def entries(self, bits: int, vectors: int) -> int:
        """Entries of a codebook: 2^bits, or fewer where each would stand for less than 16 vectors."""
        return max(1, min(1 << bits, vectors // 16))

    def outlier_columns(self, n: int) -> int:
        """How many of n columns have a codebook of their own."""
        return round(self.outliers * n)


@dataclass(frozen=True, kw_only=True)
class RoundingSpec:
    """Rounding that is learned block by block, by signed gradients (AutoRound, arXiv 2309.05516).

    Every weight has an offset, up to half a step of its grid, that is added before rounding, and every scale a factor.
    They start where the solver's rounding is, and train on the quantised block's output error, on the inputs that the
    quantised blocks before give. A step moves each by the sign of its gradient; steps shrink linearly to 0.

    Attributes:
        steps: of the signed gradients; 0 leaves the solver's rounding as it is.
        batch_size: windows in a step; all of them where there are fewer.
        reach: how far an offset, in steps of its grid, and a factor can get from their start in all steps.
        checks: how often the error on all windows is measured on the way; the best of these, and of the start, is kept.
    """

    steps: int = 200
    batch_size: int = 8
    reach: float = 0.5
    checks: int = 4

    def __post_init__(self) -> None:
        _check(self.steps >= 0, f"rounding steps {self.steps}: at least 0")
        _check(self.batch_size >= 1, f"batch size {self.batch_size} of learned rounding: at least 1")
        _check(self.reach > 0, f"reach {self.reach}: must be positive")
        _check(self.checks >= 1, f"checks {self.checks}: at least 1")


@dataclass(frozen=True, kw_only=True)
class SolverSpec:
    """How the folded weights are rounded.

    Attributes:
        kind: to nearest (`rtn`), or with every column's error pushed onto those still free, on the scheme's grid
            (`gptq`) or in codebooks of as many bits (`codebook`).
        hessian: what that error costs: `input_gram`, the layer's output error; `output_adaptive`, the model's loss.
        gradients: of `output_adaptive`: one outer product for every sequence, or for every token.
        inputs: of the block, that the Gram matrix is of: what the `quantised` blocks before it give, or the `original`
            model's.
        damping: of the Hessian, relative to its mean diagonal.
        block_size: columns after which the error reaches those outside; a matter of speed alone.
        act_order: columns of large diagonal first; codebooks always do.
        codebook: of the kind `codebook`, and of no other.
        learned: what becomes of that rounding by learning.
        updates_scales: of `gptq` for weights in a format's blocks: a block's scale is found when compensation reaches
            it, and not before.
    """

    kind: Literal["rtn", "gptq", "codebook"] = "rtn"
    hessian: Literal["input_gram", "output_adaptive"] = "input_gram"
    gradients: Literal["sequence", "token"] = "sequence"
    inputs: Literal["quantised", "original"] = "quantised"
    damping: float = 0.01
    block_size: int = 128
    act_order: bool = False
    codebook: CodebookSpec | None = None
    learned: RoundingSpec | None = None
    updates_scales: bool = _later(False)

    def __post_init__(self) -> None:
        in_order = self.kind == "gptq" and not self.act_order
        _check(in_order or not self.updates_scales, "only gptq with columns in order updates scales: no act_order")
        _check(
            (self.kind == "codebook") == (self.codebook is not None),
            f"the solver {self.kind} " + ("needs a codebook" if self.codebook is None else "uses no codebook"),
        )
        _check(
            self.needs_hessian or self.hessian == "input_gram",
            f"the solver {self.kind} uses no Hessian: leave out {self.hessian}, or choose the solver gptq",
        )
        _check(self.damping > 0, f"damping {self.damping}: must be positive")
        _check(self.block_size >= 1, f"block size {self.block_size}: at least 1")
        grams = self.needs_hessian and self.hessian == "input_gram"
        _check(
            grams or self.inputs == "quantised",
            f"the solver {self.kind} with {self.hessian} has no Gram matrix of {self.inputs} inputs",
        )
        _check(not self.learns or self.kind != "codebook", "rounding is learned on a grid, which codebooks are not")

    @property
    def needs_hessian(self) -> bool:
        """Whether rounding minds a Hessian."""
        return self.kind != "rtn"

    @property
    def learns(self) -> bool:
        """Whether signed gradients follow."""
        return self.learned is not None and self.learned.steps > 0

    @property
    def needs_data(self) -> bool:
        """Whether rounding reads text."""
        return self.needs_hessian or self.learns


@dataclass(frozen=True, kw_only=True)
class BranchSpec:
    """A low-rank branch in 16 bit beside every rounded weight: only what it leaves is rounded.

    Attributes:
        rank: of the branch, shared by the readers of a site; no more than the weights have.
        rounds: how often the branch is decomposed anew from what rounding has left; 1 takes it from the weights.
    """

    rank: int = 32
    rounds: int = 1

    def __post_init__(self) -> None:
        _check(self.rank >= 1, f"branch rank {self.rank}: at least 1")
        _check(self.rounds >= 1, f"branch rounds {self.rounds}: at least 1")


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """Calibration text: `samples` windows of `seqlen` tokens, of `text` where a run is given no other.

    `text` is written as for `flatquant.data.calibration_tokens`.
    """

    samples: int = 128
    seqlen: int = 2048
    text: str = "wikitext2"

    def __post_init__(self) -> None:
        _check(self.samples >= 1 and self.seqlen >= 2, f"{self.samples} x {self.seqlen} tokens: too few to calibrate")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A method: a choice of parts.

    `transforms` maps a site to what sits there; besides the sites there are `qk`, the keys and queries, and `residual`,
    the stream that blocks read through their norms and add to.
    """

    name: str
    scheme: Scheme
    transforms: Mapping[str, Transforms] = field(default_factory=dict)
    fit: FitSpec | None = None
    end_to_end: EndToEndSpec | None = None
    solver: SolverSpec = field(default_factory=SolverSpec)
    branch: BranchSpec | None = None
    data: DataSpec = field(default_factory=DataSpec)

    def __post_init__(self) -> None:
        _check(
            self.branch is None or self.branch.rounds == 1 or self.solver.codebook is None,
            f"recipe {self.name}: a branch is refined by rounding to a grid, which codebooks are not; use one round",
        )
        unknown = sorted(set(self.transforms) - {*SITES, "qk", "residual"})
        known = ", ".join((*SITES, "qk", "residual"))
        _check(not unknown, f"recipe {self.name}: no site {', '.join(unknown)}; sites are {known}")
        qk = self.transforms.get("qk", ())
        fits_qk = all(t.kind == "matrix" or (t.kind, t.init) == ("diagonal", "identity") for t in qk)
        _check(fits_qk and len(qk) <= 1, f"recipe {self.name}: qk takes one matrix, or one diagonal that starts at 1")
        clipped = [s for s in (self.scheme.weights, self.scheme.activations) if s and s.clip == "learned"]
        self._check_residual()
        self._check_levels()
        static = self.scheme.activations is not None and self.scheme.activations.scope == "tensor"
        tensors = static or (self.scheme.weights is not None and self.scheme.weights.scope == "tensor")
        _check(
            not tensors or not self.fits,
            f"recipe {self.name}: one scale for a tensor is set before a fit could change what it covers",
        )
        for site, parts in self.transforms.items():
            places = [{"shift": 0, "diagonal": 1}.get(t.kind, 2) for t in parts]
            _check(
                places == sorted(set(places)),
                f"recipe {self.name}, {site}: at most one shift, one diagonal, one matrix or the like, in this order",
            )
        _check(
            self.fits or not clipped or bool(self.transforms),
            f"recipe {self.name}: learned clipping needs a fit; use clip='none' or give the recipe a fit",
        )
        named = ", ".join(sorted(self.scheme.named("weights")))
        if self.solver.updates_scales:
            blocks = named and (self.scheme.weights is None or self.scheme.weights.format)
            whole = not any(isinstance(o.weights, int) and o.weights < 16 for o in self.scheme.overrides.values())
            _check(bool(blocks) and whole, f"recipe {self.name}: only scales of a format's blocks are updated")
        if self.solver.learns:
            _check(
                self.scheme.weights is None or self.scheme.weights.scope == "row",
                f"recipe {self.name}: rounding is learned with scales by row or group, not with one for a tensor",
            )
            _check(not named, f"recipe {self.name}: rounding is learned for integers, not for {named}")
        _check(
            self.solver.codebook is None or not named,
            f"recipe {self.name}: weights in {named} are not in codebooks; use bits",
        )
        if self.solver.codebook is not None and self.scheme.weights is not None:
            _check(not self.fits, f"recipe {self.name}: fits round weights to a uniform grid, which codebooks are not")
            _check(
                self.scheme.weights.clip == "none"
                and self.scheme.weights.group_size is None
                and self.scheme.weights.scope == "row",
                f"recipe {self.name}: codebooks have neither clip nor groups; use clip='none' and w{{bits}}",
            )
        if self.fit and self.fit.epochs:
            _check(
                self.fit.batch_size <= self.data.samples,
                f"recipe {self.name}: batch size {self.fit.batch_size} exceeds {self.data.samples} samples",
            )
        if self.end_to_end and self.end_to_end.steps:
            _check(
                self.fit is None or self.fit.inputs == "original",
                f"recipe {self.name}: no block is quantised before an end-to-end fit, so a fit on quantised inputs "
                "cannot come before one",
            )
            weights = self.scheme.weights
            _check(
                self.end_to_end.round_weights or weights is None or weights.clip != "learned",
                f"recipe {self.name}: weights that are not rounded in the fit have no clip to learn",
            )
            _check(
                self.end_to_end.batch_size <= self.data.samples,
                f"recipe {self.name}: end-to-end batch size {self.end_to_end.batch_size} exceeds "
                f"{self.data.samples} samples",
            )

    def tuned(
        self,
        *,
        samples: int | None = None,
        seqlen: int | None = None,
        epochs: int | None = None,
        batch_size: int | None = None,
        lr: float | None = None,
    ) -> Self:
        """The same method with other settings, where it has them; all learning rates keep their proportions to `lr`."""
        given = {"samples": samples, "seqlen": seqlen}
        data = dataclasses.replace(self.data, **{k: v for k, v in given.items() if v is not None})
        first = self.fit or self.end_to_end
        ratio = 1.0 if lr is None or first is None else lr / first.lr

        def steps(part: Any) -> dict[str, Any]:
            rates = {k: getattr(part, k) * ratio for k in _RATES if hasattr(part, k)}
            return rates if batch_size is None else rates | {"batch_size": batch_size}

        fit, end_to_end = self.fit, self.end_to_end
        if fit is not None:
            fit = dataclasses.replace(fit, **steps(fit), epochs=fit.epochs if epochs is None else epochs)
        if end_to_end is not None:
            end_to_end = dataclasses.replace(end_to_end, **steps(end_to_end))
        solver = self.solver
        if solver.learned is not None and batch_size is not None:
            solver = dataclasses.replace(solver, learned=dataclasses.replace(solver.learned, batch_size=batch_size))
        return dataclasses.replace(self, data=data, fit=fit, end_to_end=end_to_end, solver=solver)

    def _check_residual(self) -> None:
        residual = self.transforms.get("residual", ())
        if not residual:
            return
        where = f"recipe {self.name}, residual"
        rotates = residual[0].kind == "matrix" and residual[0].parameters in ("fixed", "rotation")
        _check(
            rotates and len(residual) == 1,
            f"{where}: takes one matrix that is fixed or a rotation; only those commute with a norm",
        )
        fits_blocks = self.fit is not None and self.fit.epochs > 0
        _check(
            residual[0].parameters == "fixed" or not fits_blocks,
            f"{where}: a rotation that all blocks share is trained end to end, not block by block",
        )
        for site in ("attn_in", "mlp_in"):
            started = any(t.init in DATA_STARTS or t.kind == "shift" for t in self.transforms.get(site, ()))
            _check(
                not started,
                f"{where}: the statistics that transforms at {site} start from are those of the unrotated stream; "
                "start diagonals from the identity, and leave out shifts",
            )

    def _check_levels(self) -> None:
        weights, activations = self.scheme.weights, self.scheme.activations
        where = f"recipe {self.name}"
        if activations is not None and activations.kind == "levels":
            sited = any(parts for site, parts in self.transforms.items() if site != "qk")
            _check(not sited, f"{where}: levels of activations are those of untransformed ones; leave out transforms")
        if weights is None or weights.kind != "levels":
            return
        moved = any(t.parameters != "fixed" for parts in self.transforms.values() for t in parts)
        _check(not moved, f"{where}: weights on levels train themselves; only fixed transforms may come before them")
        _check(
            self.solver.kind == "rtn" and not self.solver.learns and self.branch is None,
            f"{where}: the fit chooses levels and codes of weights; use the solver rtn, and no branch",
        )
        released = self.end_to_end is not None and (self.end_to_end.weight_lr or not self.end_to_end.round_weights)
        _check(not released, f"{where}: there are no weights besides those on levels; use weight_lr 0 and round them")

    @property
    def fits(self) -> bool:
        """Whether anything is fitted, block by block or end to end."""
        return bool((self.fit and self.fit.epochs) or (self.end_to_end and self.end_to_end.steps))

    @property
    def needs_data(self) -> bool:
        """Whether calibration text is read at all: plain rounding needs none."""
        starts = any(t.init in DATA_STARTS for parts in self.transforms.values() for t in parts)
        inputs = self.scheme.activations
        static = inputs is not None and (inputs.scope == "tensor" or inputs.needs_rows)
        found = {name for tensors in ("activations", "keys", "values") for name in self.scheme.named(tensors)}
        static |= any(formats.facts(name).tensor_scale for name in found)
        offset = self.scheme.key_offset == "mean"
        return self.fits or starts or static or offset or (self.solver.needs_data and self.scheme.weights is not None)


# --------------------------------------------------------------------------------------------- a concrete model


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

    def __post_init__(self) -> None:
        _check(self.rank >= 0 and (not self.rank or self.weights is not None), "a branch is beside rounded weights")
        _check(bool(self.readers), "a site needs at least one reader")
        _check(min(self.shape) >= 1, f"site shape {self.shape}: sizes must be positive")
        if self.codebook is not None:
            _check(self.weights is not None, "a codebook needs the bits of its weights")
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
        _check(self.heads >= 1, f"a key offset of {self.heads} heads")


@dataclass(frozen=True, kw_only=True)
class BlockPlan:
    """The sites of one block, and the grids of its keys (after RoPE, times P_h if `qk`) and values."""

    sites: Mapping[str, SitePlan]
    head_dim: int
    qk: bool = False
    keys: QuantSpec | None = None
    values: QuantSpec | None = None
    key_offset: KeyOffset | None = None

    @property
    def attended(self) -> bool:
        """Whether anything happens to queries, keys or values."""
        return self.qk or any(part is not None for part in (self.keys, self.values, self.key_offset))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What serving needs to know besides tensors. `blocks_path` names the module list, e.g. `model.layers`."""

    blocks_path: str
    attention: str
    blocks: tuple[BlockPlan, ...]
