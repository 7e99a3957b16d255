"""The serving stages of a site: `FrozenSite`, and the linears that read it.

A stage is a type, never a flag: `DenseLinear` (weights in 16 bit), `FrozenLinear` (integers, as the solver left them),
`PackedLinear` (the same integers packed into bytes, as they are stored). All three compute the same function of the
same integers, so a model in memory and its saved copy agree to the last bit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from flatquant.modules import ExactBuffers, Site
from flatquant.ops.int_linear import int_linear
from flatquant.ops.kron.reference import kron_matmul
from flatquant.ops.pack.reference import packed_width
from flatquant.qtensor import QTensor
from flatquant.quantizers import ActivationLevels, Dynamic, FrozenBlocks, SplitGrid
from flatquant.spec import QuantSpec

_State = tuple[int, int]  # of a tensor: how often it was changed in place, and where its numbers lie


class FrozenSite(ExactBuffers, Site):
    """Transforms one tensor and puts it on its grid, once for all its readers.

    Buffers: `shift` d (n,), `left` P1 (n1, n1) and `right` P2 (n2, n2), float32, each present only if it runs online;
    `down` L2 (r, n), float16, where the readers have a low-rank branch.
    """

    left: Tensor | None
    right: Tensor | None
    down: Tensor | None
    shift: Tensor | None

    def __init__(
        self,
        left: Tensor | None,
        right: Tensor | None,
        activations: Dynamic | SplitGrid | ActivationLevels | FrozenBlocks | None,
        down: Tensor | None = None,
        shift: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("shift", shift)
        self.register_buffer("left", left)
        self.register_buffer("right", right)
        self.register_buffer("down", down)
        self.activations = activations

    def forward(self, x: Tensor) -> Tensor | QTensor:
        """(x - d) (P1 (x) P2), as integers if activations are on a uniform grid here, else in x's dtype.  # (.., n)

        Levels and formats have no product of integers: they are the numbers they stand for. Integers carry no gradient:
        where x has one, the result is the numbers that the integers stand for, and the gradient passes the rounding
        straight through.
        """
        return self._computed(x)[0]

    def branch(self, x: Tensor) -> Tensor:
        """x (P1 (x) P2) L2^T, not on any grid.  # (.., r)"""
        low = self._computed(x)[1]
        assert low is not None, "this site has no branch"
        return low

    def rows(self, x: Tensor, index: Tensor | slice) -> Tensor:
        part = x[index]
        if self._shares:
            if self._seen("whole", x) is None:
                self(x)  # so that who watches this site sees all of x once
            out, low = self._computed(x)
            rows = out.rows(index) if isinstance(out, QTensor) else out[index]
            self._keep("rows", part, (rows, None if low is None else low[index]))
        return part

    def _computed(self, x: Tensor) -> tuple[Tensor | QTensor, Tensor | None]:
        """What `forward` and `branch` give."""
        part = self._seen("rows", x)
        return self._once("whole", x, lambda: self._compute(x)) if part is None else part.result

    def transformed(self, x: Tensor) -> Tensor:
        """(x - d) (P1 (x) P2), not on any grid, in the wider of the types of x and of the factors.  # (.., n)"""
        y = x if self.shift is None else x.to(self.shift.dtype) - self.shift
        factor = self.left if self.left is not None else self.right
        return y if factor is None else kron_matmul(y.to(factor.dtype), self.left, self.right)

    def _compute(self, x: Tensor) -> tuple[Tensor | QTensor, Tensor | None]:
        y = self.transformed(x)
        if self.activations is None:
            out = y.to(x.dtype)
        elif y.requires_grad or not isinstance(self.activations, Dynamic | SplitGrid):
            out = self.activations(y).to(x.dtype)
        else:
            out = self.activations.quantize(y)
        return out, None if self.down is None else F.linear(y, self.down.to(y.dtype))


class Unpacked(ABC):
    """A module that keeps integers one per element in the buffer `loose`; stored, they are packed into bytes."""

    loose: ClassVar[str]

    @abstractmethod
    def pack(self) -> Tensor:
        """What is stored instead, as the tensor `packed`.  # uint8"""

    @property
    @abstractmethod
    def packed_bytes(self) -> int:
        """Size of what `pack` gives."""


class SiteLinear(ExactBuffers, ABC):
    """A linear layer that reads a `FrozenSite`. The site is registered by the block, not by its readers."""

    bias: Tensor | None

    def __init__(self, site: FrozenSite, bias: Tensor | None) -> None:
        super().__init__()
        self._site = (site,)  # in a tuple: no second registration, no second copy in the state dict
        self.register_buffer("bias", bias)

    @property
    def site(self) -> FrozenSite:
        return self._site[0]

    @abstractmethod
    def plain(self) -> Tensor:
        """The weight as numbers, in the site's coordinates.  # float32, (o, n)"""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """(.., n) -> (.., o)"""


class NumberLinear(SiteLinear, ABC):
    """Multiplies the numbers that weights stand for; activations on a grid are multiplied as theirs."""

    @abstractmethod
    def numbers(self, dtype: torch.dtype) -> Tensor:
        """The weight in `dtype`, in the site's coordinates.  # (o, n)"""

    def plain(self) -> Tensor:
        return self.numbers(torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        y = self.site(x)
        if isinstance(y, QTensor):
            y = y.dequantize(x.dtype)
        return F.linear(y, self.numbers(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class DenseLinear(NumberLinear):
    """Weights in 16 bit (or more), in the site's coordinates."""

    weight: Tensor

    def __init__(self, site: FrozenSite, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(site, bias)
        self.register_buffer("weight", weight)  # (o, n)

    def numbers(self, dtype: torch.dtype) -> Tensor:
        return self.weight.to(dtype)


class IntegerLinear(SiteLinear, ABC):
    """Weights on a grid; where activations are on one too, the product is one of integers."""

    scale: Tensor
    zero: Tensor | None

    def __init__(
        self, site: FrozenSite, scale: Tensor, zero: Tensor | None, bias: Tensor | None, spec: QuantSpec
    ) -> None:
        super().__init__(site, bias)
        self.register_buffer("scale", scale)  # float32, (o, g)
        self.register_buffer("zero", zero)  # float32 holding integers, (o, g), or None
        self.spec = spec

    @abstractmethod
    def qweight(self) -> QTensor:
        """The weight.  # (o, n)"""

    def plain(self) -> Tensor:
        return self.qweight().dequantize()

    def forward(self, x: Tensor) -> Tensor:
        y = self.site(x)
        w = self.qweight()
        if isinstance(y, QTensor):
            return int_linear(y.values, y.scale, y.zero, w.values, w.scale, w.zero, self.bias, x.dtype)
        return F.linear(y, w.dequantize(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class FrozenLinear(IntegerLinear, Unpacked):
    """Integers one per byte: the solver's output."""

    values: Tensor
    loose = "values"

    def __init__(self, site: FrozenSite, weight: QTensor, bias: Tensor | None) -> None:
        super().__init__(site, weight.scale, weight.zero, bias, weight.spec)
        self.register_buffer("values", weight.values)  # int8 | uint8, (o, n)

    def qweight(self) -> QTensor:
        return QTensor(values=self.values, scale=self.scale, zero=self.zero, spec=self.spec)

    def pack(self) -> Tensor:
        return self.qweight().packed()

    @property
    def packed_bytes(self) -> int:
        o, n = self.values.shape
        return o * packed_width(n, self.spec.bits)


class PackedLinear(IntegerLinear):
    """Integers packed into bytes: what is stored and served."""

    packed: Tensor

    def __init__(
        self,
        site: FrozenSite,
        packed: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        bias: Tensor | None,
        spec: QuantSpec,
        n: int,
    ) -> None:
        super().__init__(site, scale, zero, bias, spec)
        self.register_buffer("packed", packed)  # uint8, (o, ceil(n * bits / 8))
        self.n = n
        self._loose: tuple[Tensor, _State, Tensor] | None = None  # packed, its state then, its integers

    @classmethod
    def of(cls, linear: FrozenLinear) -> PackedLinear:
        """Pack a frozen linear."""
        w = linear.qweight()
        return cls(linear.site, w.packed(), w.scale, w.zero, linear.bias, w.spec, w.shape[-1])

    def qweight(self) -> QTensor:
        """The weight. On a CPU its integers are kept one per byte from the first use on: unpacking costs more than all
        else there, and a laptop has the memory. They are unpacked anew where `packed` is another tensor or was
        changed in place (but for `packed.data.zero_()` and its like: torch does not count these).  # (o, n)
        """
        packed, last = self.packed, self._loose  # each read once: another thread may replace it
        if packed.device.type != "cpu" or packed.is_inference():  # whose changes nothing counts
            self._loose = None
            return QTensor.from_packed(packed, self.scale, self.zero, self.spec, self.n)
        now = (packed._version, packed.data_ptr())
        if last is not None and last[0] is packed and last[1] == now:
            return QTensor(values=last[2], scale=self.scale, zero=self.zero, spec=self.spec)
        w = QTensor.from_packed(packed, self.scale, self.zero, self.spec, self.n)
        self._loose = (packed, now, w.values)
        return w
