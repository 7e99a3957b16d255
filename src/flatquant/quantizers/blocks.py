"""Grids of the formats of `flatquant.formats`: for weights, and for activations in a fit and while serving."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from flatquant.errors import CalibrationError
from flatquant.formats import kinds
from flatquant.formats.base import SCALE, WHOLE, BlockFormat, Codes, Columns
from flatquant.modules import ExactBuffers
from flatquant.ops.pack.reference import pack_bits
from flatquant.spec import QuantSpec


class BlockWeights(nn.Module):
    """Weights in a format. There is nothing to learn: scales follow from the weights."""

    def __init__(self, spec: QuantSpec, peak: Tensor | None = None) -> None:
        """`peak` is what a scale for the whole tensor is made for; that of the weights given if None."""
        super().__init__()
        self.spec = spec
        self.format = kinds.blocks(spec)
        self.peak = peak

    @classmethod
    def covering(cls, spec: QuantSpec, weights: Iterable[Tensor]) -> BlockWeights:
        """One scale of the tensor for all of these, which are rounded one after another."""
        return cls(spec, torch.stack([w.abs().amax() for w in weights]).amax().float().reshape(1))

    def forward(self, w: Tensor) -> Tensor:
        """Round to the format's numbers, differentiable.  # (o, n)"""
        return self.format.fake(w, self.peak)

    def clamp_and_round(self, w: Tensor) -> Tensor:
        """`forward`: nothing is cut before.  # (o, n)"""
        return self(w)

    def nearest(self, w: Tensor) -> Codes:
        """Each weight to its nearest number.  # (o, n)"""
        return self.format.quantize(w, self.peak)

    def columns(self, w: Tensor, *, updated: bool = False) -> Columns:
        """w, (o, n), on its way into the format, some columns at a time."""
        return Columns(self.format, w, self.peak, updated=updated)


class LiveBlocks(nn.Module):
    """Activations in a format while a fit changes them: a scale of the tensor is that of what is rounded just now.

    Attributes:
        peak: the largest magnitude that `observe` was given, float32, (1,); what will be static is made for it.
    """

    def __init__(self, spec: QuantSpec) -> None:
        super().__init__()
        self.spec = spec
        self.format = kinds.blocks(spec)
        self.peak: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Round to the format's numbers, differentiable.  # x's shape and dtype"""
        return self.format.fake(x)

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Let `peak` cover x too."""
        found = x.detach().abs().amax().float().reshape(1)
        self.peak = found if self.peak is None else torch.maximum(self.peak, found)

    def frozen(self) -> FrozenBlocks:
        """As it serves.

        Raises:
            CalibrationError: a static scale is needed, and nothing finite was observed.
        """
        if not self.format.facts.tensor_scale:
            return FrozenBlocks(self.spec, None)
        if self.peak is None or not bool(torch.isfinite(self.peak)):
            raise CalibrationError(f"the static scale of activations in {self.format.name} needs finite ones to cover")
        return FrozenBlocks(self.spec, self.format.tensor_scale(self.peak))


class BlockRows(NamedTuple):
    """Rows in a format, packed; `whole` is the scale of the tensor, if there is one."""

    packed: Tensor  # uint8, (.., ceil(n * bits / 8))
    scale: Tensor  # (.., n / block)
    whole: Tensor | None
    format: BlockFormat

    @property
    def shape(self) -> torch.Size:
        """(.., n)."""
        return torch.Size((*self.scale.shape[:-1], self.scale.shape[-1] * self.format.block))

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The numbers, put together in float32 (float64 if asked for), then cast.  # (.., n)"""
        codes = self.format.unpack(self.packed, self.shape[-1])
        parts = {SCALE: self.scale} if self.whole is None else {SCALE: self.scale, WHOLE: self.whole}
        return self.format.decode(codes, parts, dtype)


class FrozenBlocks(ExactBuffers):
    """Activations, keys or values in a format: scales of blocks from each token, that of the tensor static."""

    tensor_scale: Tensor | None  # float32, (1,)

    def __init__(self, spec: QuantSpec, tensor_scale: Tensor | None) -> None:
        super().__init__()
        self.spec = spec
        self.format = kinds.blocks(spec)
        self.register_buffer("tensor_scale", tensor_scale)

    @classmethod
    def empty(cls, spec: QuantSpec) -> FrozenBlocks:
        """Before its tensors are loaded."""
        form = kinds.blocks(spec)
        part = form.layout(1, form.block).get(WHOLE)
        return cls(spec, None if part is None else torch.empty(part.shape, dtype=part.dtype, device="meta"))

    def forward(self, x: Tensor) -> Tensor:
        """Round to the format's numbers, differentiable.  # x's shape and dtype"""
        return self.format.fake(x, whole=self.tensor_scale)

    def quantize(self, x: Tensor) -> BlockRows:
        """Codes and scales."""
        parts = self.format.parts(x, whole=self.tensor_scale)
        packed = pack_bits(self.format.encode(x, parts), self.format.bits)
        return BlockRows(packed, parts[SCALE], parts.get(WHOLE), self.format)

    def rounded(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """What the codes of x stand for, in `dtype`; where x has a gradient, differentiable as `forward` is."""
        return self(x).to(dtype) if x.requires_grad else self.quantize(x).dequantize(dtype)
