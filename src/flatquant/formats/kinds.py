"""Of a plan's grid, the format: those that schemes name, and integers, levels and codebooks."""

from __future__ import annotations

from flatquant import formats
from flatquant.formats import codebooks, integers
from flatquant.formats.base import BlockFormat, Format, Layout
from flatquant.formats.levels import Levels
from flatquant.spec import CodebookSpec, QuantSpec


def of(spec: QuantSpec) -> Format | None:
    """The format of numbers on a grid; None for integers, which have arithmetic of their own (`QTensor`)."""
    match spec.kind:
        case "uniform":
            return None
        case "levels":
            return Levels(spec.bits, spec.group_size)
        case _:
            return blocks(spec)


def blocks(spec: QuantSpec) -> BlockFormat:
    """The format that a grid names, and how it finds its scales."""
    return formats.make(spec.kind, searched=spec.clip == "search")


def layout(spec: QuantSpec, codebook: CodebookSpec | None, o: int, n: int) -> Layout:
    """The tensors that an (o, n) matrix of weights is stored as.

    Raises:
        ValueError: rows of n numbers have no place in the format.
    """
    if codebook is not None:
        return codebooks.layout(codebook, spec.bits, o, n)
    form = of(spec)
    return integers.layout(spec, o, n) if form is None else form.layout(o, n)
