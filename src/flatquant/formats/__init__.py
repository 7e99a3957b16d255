"""What numbers can be stored as: a format is one file of this folder, and a line of facts here.

A scheme names a format where it would give bits: `wNAMEa8`, or `NAME` for weights and activations. A plan knows a
format by its facts alone, so that nothing here imports torch; `make` loads the file. `register` adds a format from
outside the package (docs/formats.md).

Integers, learned levels and vector codebooks have no such names: `w4`, or a recipe, means them. `kinds.py` knows them
too.
"""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flatquant.errors import SpecError

if TYPE_CHECKING:
    from flatquant.formats.base import BlockFormat


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a scheme and a plan need to know of a format.

    Attributes:
        name: how schemes write it: a letter, then letters and digits. It may not read as bits (`w4`, `kv4`).
        bits: of a number's code, without scales.
        block: neighbours in a row that share a scale; it divides the inputs of every layer stored so.
        tensor_scale: whether there is also one scale for a tensor. That of activations is found from calibration text.
        code: the class, or where it is: `module:Class`.
    """

    name: str
    bits: int
    block: int
    tensor_scale: bool = False
    code: str | type[BlockFormat]

    def __post_init__(self) -> None:
        named = re.fullmatch(r"[a-z][a-z0-9]*", self.name)
        named = named and not re.fullmatch(r"(w|a|kv?|v|g)\d+.*|.*(w|a|k|v|g)\d+", self.name)
        if not named or self.name in ("uniform", "levels"):
            raise SpecError(f"format name {self.name!r}: use letters and digits that do not read as bits")
        if not 2 <= self.bits <= 8 or self.block < 1:
            raise SpecError(f"format {self.name}: {self.bits} bits in blocks of {self.block}; use 2 to 8 bits")


_FACTS: dict[str, Facts] = {}


def register(facts: Facts) -> None:
    """Make a format known by its name. Naming the same format again replaces it.

    Raises:
        SpecError: a scheme could read the name as another format of one kind of tensor, or the other way.
    """
    for known in _FACTS:
        if any(facts.name == letter + known or known == letter + facts.name for letter in ("w", "a", "k", "v", "kv")):
            raise SpecError(f"format name {facts.name!r}: a scheme could mean {known!r} by it; use another")
    _FACTS[facts.name] = facts


def names() -> tuple[str, ...]:
    """The formats that schemes may name."""
    return tuple(sorted(_FACTS))


def facts(name: str) -> Facts:
    """The facts of a format.

    Raises:
        SpecError: there is none of this name.
    """
    if name not in _FACTS:
        raise SpecError(
            f"unknown format {name!r}; known: {', '.join(names())}; register one of your own first (docs/formats.md)"
        )
    return _FACTS[name]


def make(name: str, *, searched: bool = False) -> BlockFormat:
    """The format itself; `searched` says how it finds the scales of blocks (`BlockFormat.stretches`).

    Raises:
        SpecError: there is none of this name.
    """
    found = facts(name)
    if isinstance(found.code, str):
        module, _, leaf = found.code.partition(":")
        return getattr(importlib.import_module(module), leaf)(found, searched=searched)
    return found.code(found, searched=searched)


register(Facts(name="mxfp4", bits=4, block=32, code="flatquant.formats.mxfp4:MXFP4"))
register(Facts(name="nvfp4", bits=4, block=16, tensor_scale=True, code="flatquant.formats.nvfp4:NVFP4"))
