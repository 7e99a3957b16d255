"""`QTensor`: integers on a uniform grid, and the packing of those integers into bytes.

Invariants, checked on construction:
- `values` is int8 (symmetric) or uint8 (asymmetric), shape [.., n]; every value lies in [spec.low, spec.high];
- `scale` is floating, shape [.., g], where g * group = n: one scale for `group` neighbours; strictly positive
  unless `spec.signed_scale`, where it is only not 0;
- `zero` is None if symmetric, else an integer-valued tensor of scale's shape in [0, 2^b - 1] range of the grid;
- the real values are `scale * (values - zero)`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int8, Shaped, UInt8
from torch import Tensor

from flatquant.ops.pack.reference import pack_bits, unpack_bits
from flatquant.spec import QuantSpec

__all__ = ["QTensor", "as_qtensor", "pack_bits", "unpack_bits"]


@dataclass(frozen=True, kw_only=True)
class QTensor:
    """A quantised matrix (or stack of them); see the module docstring for the invariants."""

    values: Int8[Tensor, "*rows n"] | UInt8[Tensor, "*rows n"]
    scale: Float[Tensor, "*rows g"]  # float32
    zero: Float[Tensor, "*rows g"] | None  # float32 holding integers
    spec: QuantSpec

    def __post_init__(self) -> None:
        want = torch.int8 if self.spec.symmetric else torch.uint8
        if self.values.dtype != want:
            raise ValueError(f"values must be {want}, got {self.values.dtype}")
        if (self.zero is None) != self.spec.symmetric:
            raise ValueError("a symmetric grid has no zero point, an asymmetric one has")
        if self.zero is not None and self.zero.shape != self.scale.shape:
            raise ValueError(f"zero {tuple(self.zero.shape)} and scale {tuple(self.scale.shape)} differ in shape")
        if self.values.shape[:-1] != self.scale.shape[:-1] or self.values.shape[-1] % self.scale.shape[-1]:
            raise ValueError(f"values {tuple(self.values.shape)} do not split into scales {tuple(self.scale.shape)}")

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def group(self) -> int:
        """How many neighbours share a scale."""
        return self.values.shape[-1] // self.scale.shape[-1]

    def check_range(self) -> None:
        """Raise ValueError unless every integer lies on the grid and every scale is finite and has its sign."""
        low, high = int(self.values.min()), int(self.values.max())
        if low < self.spec.low or high > self.spec.high:
            raise ValueError(f"integers {low}..{high} outside the grid {self.spec.low}..{self.spec.high}")
        scale = self.scale.abs() if self.spec.signed_scale else self.scale
        if not bool((torch.isfinite(scale) & (scale > 0)).all()):
            raise ValueError("scales must be positive and finite")

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """`scale * (values - zero)` computed in float32 (float64 if asked for), then cast.  # (.., n)"""
        work = torch.float64 if dtype == torch.float64 else torch.float32
        q = self.values.to(work).unflatten(-1, (-1, self.group))  # (.., g, group)
        if self.zero is not None:
            q = q - self.zero.to(work)[..., None]
        return (q * self.scale.to(work)[..., None]).flatten(-2).to(dtype)

    def rows(self, index: Tensor | slice) -> QTensor:
        """Some entries of the first dimension."""
        zero = None if self.zero is None else self.zero[index]
        return QTensor(values=self.values[index], scale=self.scale[index], zero=zero, spec=self.spec)

    def split(self, rows: list[int]) -> list[QTensor]:
        """Cut the first dimension into parts of these sizes, which are row ranges of the same memory."""
        zeros = [None] * len(rows) if self.zero is None else self.zero.split(rows)
        parts = zip(self.values.split(rows), self.scale.split(rows), zeros, strict=True)
        return [QTensor(values=v, scale=s, zero=z, spec=self.spec) for v, s, z in parts]

    def packed(self) -> Tensor:
        """The integers as a little-endian stream of `bits`-bit fields.  # uint8, (.., ceil(n * bits / 8))"""
        offset = self.values.to(torch.int16) - self.spec.low
        return pack_bits(offset.to(torch.uint8), self.spec.bits)

    @classmethod
    def from_packed(cls, packed: Tensor, scale: Tensor, zero: Tensor | None, spec: QuantSpec, n: int) -> QTensor:
        """Undo `packed`; `n` is the last dimension of the values."""
        values = unpack_bits(packed, spec.bits, n)
        if spec.symmetric:
            values = values.view(torch.int8) + spec.low  # wraps around at 8 bits, to the right integer
        return cls(values=values, scale=scale, zero=zero, spec=spec)


def as_qtensor(
    values: Shaped[Tensor, "o n"], scale: Float[Tensor, "o g"], zero: Float[Tensor, "o g"] | None, spec: QuantSpec
) -> QTensor:
    """Integers held in floats, (o, n), with (o, g) scales, as a QTensor."""
    dtype = torch.int8 if spec.symmetric else torch.uint8
    return QTensor(
        values=values.to(dtype).contiguous(),
        scale=scale.float().contiguous(),
        zero=None if zero is None else zero.float().contiguous(),
        spec=spec,
    )
