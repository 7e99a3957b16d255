"""What one grid looks like: `QuantSpec`; and the bits of some tensors that differ from the others'."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal, Self

from flatquant import formats
from flatquant.spec.convert import check

# The quantised inputs of a transformer block, in the order data meets them.
SITES = ("attn_in", "attn_out", "mlp_in", "mlp_mid")
# Of which each rank of tensor parallelism holds a part: their linears are cut by columns.
CUT_SITES = ("attn_out", "mlp_mid")
# What schemes call the output layer and the embedding, whatever a family calls them.
HEAD, EMBEDDING = "lm_head", "embed_tokens"

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
        for spec in filter(None, (self.weights, self.activations)):
            check_plain(spec, HEAD)
        check(self.activations is None or self.activations.group_size is None, f"{HEAD}: groups are for weights only")

    def __str__(self) -> str:
        return f"{plain_weights(self.weights)}a{self.activations.bits if self.activations else 16}"


def check_plain(spec: QuantSpec, end: str) -> None:
    """Raise SpecError unless a grid of the output layer or the embedding is as plain as `HeadGrids` are."""
    plain = QuantSpec(bits=spec.bits, group_size=spec.group_size)
    check(spec == plain, f"{end}: symmetric integers without a clip, one scale a row, group or token")


def plain_weights(spec: QuantSpec) -> str:
    """Such a grid of weights, as schemes have it: `w8`, `w4g64`."""
    return f"w{spec.bits}" + (f"g{spec.group_size}" if spec.group_size else "")
