"""What a format is: codes for a matrix of numbers, what is stored beside them, and what they stand for.

A `Format` says how a matrix lies in a file (`layout`) and which numbers it is (`decode`). `Codes` are such a matrix.

A `BlockFormat` cuts every row into blocks. A block has one stored scale, and every number a code of a few bits: a sign
and a magnitude. The number is sign * magnitude * step, and the step follows from the block's scale and, where there is
one, the scale of the whole tensor. `fake` is the same rounding for a fit: values and no codes, with a gradient.

A subclass says which magnitudes there are, which scale a block gets, and what step a stored scale stands for.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from flatquant.formats import Facts
from flatquant.ops.pack.reference import pack_bits, packed_width, unpack_bits


class Part(NamedTuple):
    """One tensor of a layout; `kind` is what a folder's sizes are listed by."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    kind: Literal["packed", "grids"]


Layout = dict[str, Part]  # the tensors that a matrix is stored as, by name


class Format(ABC):
    """A matrix as codes of `bits` each, and other tensors, its parts; see the module docstring."""

    bits: int
    shared: frozenset[str] = frozenset()  # parts that belong to all rows together

    @abstractmethod
    def layout(self, o: int, n: int) -> Layout:
        """The tensors that an (o, n) matrix is stored as: `packed`, its codes, and its parts.

        Raises:
            ValueError: rows of n numbers have no place in the format.
        """

    @abstractmethod
    def decode(self, codes: Tensor, parts: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
        """What codes stand for, computed in float32 (float64 if asked for), then cast.  # (o, n)"""

    @abstractmethod
    def check_parts(self, parts: dict[str, Tensor]) -> None:
        """Raise ValueError unless the parts give every code a finite number."""

    def unpack(self, packed: Tensor, n: int) -> Tensor:
        """Undo `Codes.packed`; n is the number of columns.  # uint8, (o, n)"""
        return unpack_bits(packed, self.bits, n)


@dataclass(frozen=True, kw_only=True)
class Codes:
    """A matrix in some format, one code per number. Invariants, checked on construction:

    - `codes` is uint8, shape (o, n);
    - `parts` are the tensors of `format.layout(o, n)` but for `packed`, which `codes` are before packing.
    """

    codes: Tensor  # uint8, (o, n)
    parts: dict[str, Tensor]
    format: Format

    def __post_init__(self) -> None:
        if self.codes.dtype != torch.uint8 or self.codes.dim() != 2:
            raise ValueError(f"codes must be a uint8 matrix, got {self.codes.dtype}")
        o, n = self.codes.shape
        layout = {name: part for name, part in self.format.layout(o, n).items() if name != "packed"}
        if layout.keys() != self.parts.keys():
            raise ValueError(f"parts are {', '.join(self.parts)}, the format has {', '.join(layout)}")
        for name, part in layout.items():
            found = self.parts[name]
            if (found.dtype, tuple(found.shape)) != (part.dtype, part.shape):
                raise ValueError(f"{name} is {found.dtype} {tuple(found.shape)}, not {part.dtype} {part.shape}")

    def check_range(self) -> None:
        """Raise ValueError unless every code is one of the format's and stands for a finite number."""
        if self.codes.numel() and int(self.codes.max()) >> self.format.bits:
            raise ValueError(f"code {int(self.codes.max())} of {1 << self.format.bits}")
        self.format.check_parts(self.parts)

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The numbers, put together in float32 (float64 if asked for), then cast.  # (o, n)"""
        return self.format.decode(self.codes, self.parts, dtype)

    def packed(self) -> Tensor:
        """The codes as a little-endian stream of fields.  # uint8, (o, ceil(n * bits / 8))"""
        return pack_bits(self.codes, self.format.bits)

    def split(self, rows: list[int]) -> list[Codes]:
        """Cut the first dimension into parts of these sizes, which are row ranges of the same memory.

        What all rows share, each part has for itself.
        """
        pieces = [dict[str, Tensor]() for _ in rows]
        for name, part in self.parts.items():
            cut = [part.clone() for _ in rows] if name in self.format.shared else part.split(rows)
            for piece, tensor in zip(pieces, cut, strict=True):
                piece[name] = tensor
        codes = self.codes.split(rows)
        return [Codes(codes=c, parts=p, format=self.format) for c, p in zip(codes, pieces, strict=True)]


SCALE, WHOLE = "scale", "tensor_scale"  # names in a layout


class Columns:
    """A matrix on its way into a format, column by column, for solvers that compensate errors.

    Scales are those of the matrix as it was given, or, updated, those of every block as compensation has left it when
    its first column is fixed. The scale of the tensor stays as it is.
    """

    def __init__(self, format: BlockFormat, w: Tensor, peak: Tensor | None, *, updated: bool) -> None:
        """See `BlockFormat.parts`; w is float32 or float64, (o, n)."""
        self.format, self.updated = format, updated
        self.block = format.block
        self.parts = format.parts(w, peak)
        self.codes = torch.zeros(w.shape, dtype=torch.uint8, device=w.device)

    def fix(self, columns: Tensor, block: Tensor, u: Tensor) -> Tensor:
        """Round columns from left to right, each column's error pushed onto those to its right.

        Args:
            columns: where they are, int64, (b,); updated scales need whole blocks of neighbours.
            block: what compensation has made of them, (o, b); unchanged.
            u: the block of the upper Cholesky factor of H^-1 on its diagonal, (b, b).

        Returns:
            Errors (w_q - Q(w_q)) / u_qq, (o, b).
        """
        w, errors = block.clone(), torch.empty_like(block)
        steps = self._steps(w)
        for i, column in enumerate(columns.tolist()):
            group = column // self.block
            if self.updated and column % self.block == 0:
                self.parts[SCALE][:, group : group + 1] = self.format.block_scales(
                    w[:, i : i + self.block], self.parts.get(WHOLE)
                )
                steps = self._steps(w)
            code = self.format.nearest(w[:, i] / steps[:, group])
            self.codes[:, column] = code
            errors[:, i] = (w[:, i] - self.format.values(code, w.dtype) * steps[:, group]) / u[i, i]
            w[:, i + 1 :] -= errors[:, i : i + 1] * u[i, i + 1 :]
        return errors

    def _steps(self, like: Tensor) -> Tensor:
        return self.format.steps(self.parts[SCALE], self.parts.get(WHOLE)).to(like.dtype)  # (o, g)

    def result(self) -> Codes:
        """What was stored."""
        return Codes(codes=self.codes, parts=self.parts, format=self.format)


class BlockFormat(Format):
    """Signed magnitudes in blocks of a row; see the module docstring."""

    magnitudes: ClassVar[tuple[float, ...]]  # by code, ascending from 0; the sign bit is above them
    shared = frozenset({WHOLE})
    scale_dtype: ClassVar[torch.dtype]  # of stored scales
    stretches: ClassVar[tuple[float, ...]] = ()  # of a block's largest magnitude: a search tries the scales made for it

    def __init__(self, facts: Facts, *, searched: bool = False) -> None:
        """`searched`: give a block the scale of least squared error, of the one that covers it and its `stretches`."""
        self.facts, self.searched = facts, searched
        self.name, self.bits, self.block = facts.name, facts.bits, facts.block
        assert len(self.magnitudes) == 1 << (self.bits - 1), "one magnitude for every code without its sign"

    # ------------------------------------------------------------------------- what a subclass gives

    @abstractmethod
    def scales(self, peak: Tensor, whole: Tensor | None) -> Tensor:
        """The stored scales of blocks.

        Args:
            peak: largest magnitude of every block, float32.
            whole: of the tensor, as `tensor_scale` gave it.

        Returns:
            `scale_dtype`, of peak's shape.
        """

    @abstractmethod
    def steps(self, scales: Tensor, whole: Tensor | None) -> Tensor:
        """What a magnitude of 1 stands for in each block.  # float32, positive or NaN"""

    def tensor_scale(self, peak: Tensor) -> Tensor | None:
        """The scale of a tensor whose largest magnitude is `peak`, float32, (1,); None for a format without."""
        return None

    def magnitude(self, x: Tensor) -> Tensor:
        """The magnitude nearest to x, at least 0 and in steps; of two, that of the even code.  # x's shape and dtype"""
        return self._table("values", x)[torch.bucketize(x, self._table("ends", x), right=True, out_int32=True)]

    # ------------------------------------------------------------------------- what all have

    def layout(self, o: int, n: int) -> Layout:
        if n % self.block:
            raise ValueError(f"{self.name}: blocks of {self.block} do not divide {n}")
        whole = {WHOLE: Part(torch.float32, (1,), "grids")} if self.facts.tensor_scale else {}
        return {
            "packed": Part(torch.uint8, (o, packed_width(n, self.bits)), "packed"),
            SCALE: Part(self.scale_dtype, (o, n // self.block), "grids"),
            **whole,
        }

    def parts(self, x: Tensor, peak: Tensor | None = None, whole: Tensor | None = None) -> dict[str, Tensor]:
        """Scales for x, (.., n).

        Args:
            peak: what a scale of the tensor is made for, float32, (1,); the largest magnitude of x if None.
            whole: a scale of the tensor that was made before.
        """
        if whole is None and self.facts.tensor_scale:
            whole = self.tensor_scale(x.abs().amax().reshape(1) if peak is None else peak)
        scales = self.block_scales(x, whole)
        return {SCALE: scales} if whole is None else {SCALE: scales, WHOLE: whole}

    def block_scales(self, x: Tensor, whole: Tensor | None) -> Tensor:
        """Stored scales for x under a tensor scale that stays as it is.  # (.., n / block)"""
        peak = self._blocks(x).abs().amax(-1).float()
        scales = self.scales(peak, whole)
        if not self.searched:
            return scales
        blocks, first = self._blocks(x.float()), self.steps(scales, whole)
        least = self._errors(blocks, first)
        for stretch in self.stretches:
            other = self.scales(peak * stretch, whole)
            step = self.steps(other, whole)
            errors = self._errors(blocks, step) * (step / first).square()
            better = errors < least  # never where either is NaN
            scales, least = torch.where(better, other, scales), torch.where(better, errors, least)
        return scales

    def _errors(self, blocks: Tensor, step: Tensor) -> Tensor:
        """Sums of squared errors, in squared steps.  # (.., g, block), (.., g) -> (.., g)"""
        ratio = (blocks / step[..., None]).abs_()
        return ratio.sub_(self.magnitude(ratio)).square_().sum(-1)

    def encode(self, x: Tensor, parts: dict[str, Tensor]) -> Tensor:
        """The nearest codes of x, (.., n), in blocks with these scales.  # uint8, (.., n)"""
        step = self.steps(parts[SCALE], parts.get(WHOLE))[..., None]
        return self.nearest(self._blocks(x) / step.to(_work(x))).flatten(-2)

    def decode(self, codes: Tensor, parts: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
        """See `Format.decode`; of any shape.  # (.., n)"""
        work = torch.float64 if dtype == torch.float64 else torch.float32
        step = self.steps(parts[SCALE], parts.get(WHOLE)).to(work)[..., None]
        return (self.values(codes, work).unflatten(-1, (-1, self.block)) * step).flatten(-2).to(dtype)

    def fake(self, x: Tensor, peak: Tensor | None = None, whole: Tensor | None = None) -> Tensor:
        """Round x and return the numbers; the gradient is 1 up to the largest magnitude, and 0 for what is cut.

        Args:
            x: (.., n).
            peak, whole: see `parts`.
        """
        fixed = x.detach()
        parts = self.parts(fixed, peak, whole)
        step = self.steps(parts[SCALE], parts.get(WHOLE)).to(_work(x))[..., None]
        ratio = self._blocks(fixed) / step  # (.., g, block)
        rounded = self.magnitude(ratio.abs()).copysign_(ratio).mul_(step).flatten(-2).to(x.dtype)
        if not x.requires_grad:
            return rounded
        return _StraightThrough.apply(x, rounded, (ratio.abs_() <= self.magnitudes[-1]).flatten(-2))

    def quantize(self, x: Tensor, peak: Tensor | None = None) -> Codes:
        """Round to nearest: the codes of x, (o, n), and their scales."""
        parts = self.parts(x, peak)
        return Codes(codes=self.encode(x, parts), parts=parts, format=self)

    def nearest(self, x: Tensor) -> Tensor:
        """The code whose number is nearest to x, which is in steps; of two, the even one.  # uint8, x's shape"""
        work = x.to(_work(x)).contiguous()
        code = torch.bucketize(work.abs(), self._table("ends", work), right=True, out_int32=True)
        return (code + (work < 0) * len(self.magnitudes)).to(torch.uint8)

    def values(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The numbers of codes, in steps.  # codes' shape"""
        return self._table("values", codes.new_empty(0, dtype=dtype))[codes.int()]

    def check_parts(self, parts: dict[str, Tensor]) -> None:
        steps = self.steps(parts[SCALE], parts.get(WHOLE))
        if not bool((torch.isfinite(steps) & (steps > 0)).all()):
            raise ValueError("steps must be positive and finite")

    def _blocks(self, x: Tensor) -> Tensor:
        return x.to(_work(x)).unflatten(-1, (-1, self.block))  # (.., g, block)

    def _table(self, which: Literal["ends", "values"], like: Tensor) -> Tensor:
        table = _ends if which == "ends" else _values
        return table(self.magnitudes, like.dtype, like.device)


class _StraightThrough(torch.autograd.Function):
    """Numbers that stand for x; the gradient is passed on where `kept` says so."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Tensor, kept: Tensor) -> Tensor:
        ctx.save_for_backward(kept)
        return rounded

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (kept,) = ctx.saved_tensors
        return grad * kept, None, None


@cache
def _values(magnitudes: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    positive = torch.tensor(magnitudes, dtype=dtype, device=device)
    return torch.cat([positive, -positive])


@cache
def _ends(magnitudes: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The least number that rounds to each code but the first. A number halfway between two takes the even code."""
    m = torch.tensor(magnitudes, dtype=dtype, device=device)
    middle = (m[1:] + m[:-1]) / 2
    to_lower = torch.arange(len(middle), device=device) % 2 == 0
    return torch.where(to_lower, torch.nextafter(middle, torch.full_like(middle, torch.inf)), middle)


def _work(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
