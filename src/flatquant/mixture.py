"""Which texts a run is calibrated on, and how its windows are divided among them: `wikitext2:1,c4:3,self:1,FILE`.

Windows are divided by shares with the method of largest remainders, and ordered so that every stretch of them has about
the same shares as the whole: fits take them in that order, batch by batch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from flatquant.errors import DataError

SELF = "self"  # text that the model writes
NAMED = ("wikitext2", "c4", SELF)
_NUMBER = re.compile(r"\d+(\.\d+)?")


@dataclass(frozen=True)
class Source:
    """A text, one of `NAMED` or a file or folder, and its share of the windows."""

    text: str
    share: Fraction = Fraction(1)

    @property
    def name(self) -> str:
        """The text without its folder: reports travel, and where a file lay says nothing elsewhere."""
        return self.text if self.text in NAMED else Path(self.text).name


@dataclass(frozen=True)
class Mixture:
    """One text or several."""

    sources: tuple[Source, ...]

    @classmethod
    def parse(cls, source: str | Path) -> Mixture:
        """Read `wikitext2:1,c4:3,self:1,FILE`; a share that is not given is 1.

        The path of a file or folder that exists may hold commas and colons. A `Path` is always one text.

        Raises:
            DataError: a share that is no number above 0, a text that is named twice, or no name at all.
        """
        if isinstance(source, Path):
            return cls((Source(str(source)),))
        found = tuple(_source(item.strip(), source) for item in _items(source))
        texts = [part.text for part in found]
        for text in texts:
            if texts.count(text) > 1:
                raise DataError(f"calibration text {source!r} names {text} twice; give it one share")
        return cls(found)

    def __str__(self) -> str:
        """The names, with shares in lowest whole numbers where there are several."""
        if len(self.sources) == 1:
            return self.sources[0].name
        return ",".join(f"{s.name}:{share}" for s, share in zip(self.sources, self._whole_shares, strict=True))

    @property
    def writes(self) -> bool:
        """Whether the model writes some of it."""
        return any(source.text == SELF for source in self.sources)

    def divided(self, windows: int) -> tuple[int, ...]:
        """How many windows of each text.

        Raises:
            DataError: fewer windows than texts.
        """
        if windows < len(self.sources):
            raise DataError(
                f"{windows} windows are too few for {len(self.sources)} texts; use more samples or fewer texts"
            )
        return divided(windows, [source.share for source in self.sources])

    def written(self, windows: int) -> int:
        """How many of so many windows the model writes."""
        counts = zip(self.sources, self.divided(windows), strict=True) if self.writes else ()
        return sum(count for source, count in counts if source.text == SELF)

    def evenly(self, fewest: int, most: int) -> int:
        """At least `fewest` windows, divided without remainders where `most` allows it, else with one of each text."""
        whole = sum(self._whole_shares)
        even = -(-fewest // whole) * whole
        return even if even <= most else max(fewest, len(self.sources))

    @property
    def _whole_shares(self) -> list[int]:
        """Shares in lowest whole numbers."""
        common = math.lcm(*(source.share.denominator for source in self.sources))
        whole = [int(source.share * common) for source in self.sources]
        return [share // math.gcd(*whole) for share in whole]


def divided(total: int, shares: Sequence[Fraction]) -> tuple[int, ...]:
    """A whole number in whole parts by shares, with largest remainders; ties go to the first.

    No part is 0 where the total is enough for 1 each.
    """
    quotas = [total * share / sum(shares) for share in shares]
    parts = [math.floor(quota) for quota in quotas]
    by_remainder = sorted(range(len(parts)), key=lambda i: parts[i] - quotas[i])  # stable
    for i in by_remainder[: total - sum(parts)]:
        parts[i] += 1
    while 0 in parts and total >= len(parts):
        parts[parts.index(max(parts))] -= 1
        parts[parts.index(0)] += 1
    return tuple(parts)


def interleaved(counts: Sequence[int]) -> list[tuple[int, int]]:
    """Every (source, index) of so many windows a source, in an order whose every stretch has about the same shares.

    Index i of n is placed at (i + 1/2) / n of the way, as Webster's method would.
    """
    places = [(Fraction(2 * i + 1, 2 * n), source, i) for source, n in enumerate(counts) for i in range(n)]
    return [(source, i) for _, source, i in sorted(places)]


def calibrated_on(data: Any) -> str:
    """What a model was calibrated on, and how much of each text; empty where it read none.

    Args:
        data: the entry `data` of a report; it comes from a file, and may be anything.
    """
    if not isinstance(data, Mapping) or not data.get("samples"):
        return ""
    whole = f"{data.get('source')}, {data.get('samples')} windows of {data.get('seqlen')} tokens"
    sources = data.get("sources")
    parts = [part for part in sources if isinstance(part, Mapping)] if isinstance(sources, list) else []
    shares = (f"{part.get('windows')} of {part.get('source')} {part.get('cut')}" for part in parts)
    return f"{whole} ({', '.join(shares)})" if parts else whole


def _items(text: str) -> Iterator[str]:
    """What stands between commas; commas in the path of something that exists do not count."""
    pieces = text.split(",")
    while pieces:
        ends = range(len(pieces), 1, -1)
        end = next((end for end in ends if _exists(",".join(pieces[:end]))), 1)
        yield ",".join(pieces[:end])
        pieces = pieces[end:]


def _source(item: str, whole: str) -> Source:
    if item in NAMED or _on_disk(item):
        return Source(item)
    text, colon, share = (part.strip() for part in item.rpartition(":"))
    if not colon:
        text = item
    if not text:
        raise DataError(f"calibration text {whole!r} lacks a name; give for example wikitext2:1,c4:3")
    if not colon:
        return Source(item)
    if _NUMBER.fullmatch(share) and Fraction(share) > 0:
        return Source(text, Fraction(share))
    if _NUMBER.fullmatch(share) or text in NAMED or _on_disk(text):
        raise DataError(f"share {share!r} of calibration text {text} is no number above 0; give for example {text}:3")
    return Source(item)  # a path with a colon


def _exists(item: str) -> bool:
    """Whether this is a path, with or without a share."""
    text, colon, share = item.strip().rpartition(":")
    return _on_disk(item.strip()) or bool(colon and _NUMBER.fullmatch(share.strip()) and _on_disk(text.strip()))


def _on_disk(path: str) -> bool:
    with suppress(OSError, ValueError):  # too long, or with a null character
        return bool(path) and Path(path).expanduser().exists()
    return False
