"""The serving stages of a site: `FrozenSite`, and the linears that read it.

A stage is a type, never a flag: `DenseLinear` (weights in 16 bit), `FrozenLinear` (integers, as the solver left them),
`PackedLinear` (the same integers packed into bytes, as they are stored). All three compute the same function of the
same integers, so a model in memory and its saved copy agree to the last bit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatquant.modules import ExactBuffers, Site
from flatquant.ops.grouped_linear import by_row, gains, grouped_linear
from flatquant.ops.int_linear import grouped_int_linear, int_linear
from flatquant.ops.kron.reference import kron_matmul
from flatquant.ops.pack.reference import packed_width
from flatquant.qtensor import QTensor
from flatquant.quantizers import ActivationLevels, Dynamic, FrozenBlocks, SplitGrid
from flatquant.spec import QuantSpec

# Bytes of experts' stored weights that are numbers at a time: those of 4 bits take eight times as many.
_TOGETHER = 1 << 26
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

    def product(
        self, experts: Sequence[Sequence[nn.Module]], x: Tensor, index: Tensor | slice, counts: Sequence[int]
    ) -> Tensor | None:
        """Weights are numbers while they are multiplied: those of some experts at a time, which rows reach."""
        kinds = {type(linear) for linears in experts for linear in linears}
        kind = next(iter(kinds))
        if not gains(x.device) or len(kinds) > 1 or not issubclass(kind, IntegerLinear | NumberLinear):
            return None
        y = self(x)
        y = y.rows(index) if isinstance(y, QTensor) else y[index]
        reached = [i for i, count in enumerate(counts) if count]
        together = max(1, _TOGETHER // sum(t.nbytes for linear in experts[0] for t in linear.buffers()))
        parts, start = [], 0
        for first in range(0, len(reached), together):
            some = reached[first : first + together]
            rows = slice(start, start + sum(counts[i] for i in some))
            start = rows.stop
            mine = y.rows(rows) if isinstance(y, QTensor) else y[rows]
            these: Any = [experts[i] for i in some]
            parts.append(kind.grouped(these, mine, [counts[i] for i in some], x.dtype))
        return torch.cat(parts) if parts else None

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


def _stacked(experts: Sequence[Sequence[nn.Module]], name: str) -> Tensor:
    """A buffer of linears: those of an expert row upon row, experts upon one another.  # (E, o, ..)"""
    return torch.stack([torch.cat([linear.get_buffer(name) for linear in linears]) for linears in experts])


def _known(bias: Tensor | None) -> Tensor:
    assert bias is not None, "of one site's experts, all have biases or none"
    return bias


class Unpacked(ABC):
    """A module that keeps integers one per element in the buffer `loose`; stored, they are packed into bytes."""

    loose: ClassVar[str]
    bits: int  # of an integer

    @abstractmethod
    def pack(self) -> Tensor:
        """What is stored instead, as the tensor `packed`.  # uint8"""

    @property
    def packed_bytes(self) -> int:
        """Size of what `pack` gives."""
        rows, n = getattr(self, self.loose).shape
        return rows * packed_width(n, self.bits)


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

    @classmethod
    @abstractmethod
    def grouped(
        cls, experts: Sequence[Sequence[Self]], y: Tensor | QTensor, counts: Sequence[int], dtype: torch.dtype
    ) -> Tensor:
        """What linears of this stage make of rows of their site's output; see `Site.product`.  # (rows, o)"""

    @staticmethod
    def _biased(experts: Sequence[Sequence[SiteLinear]], y: Tensor, counts: Sequence[int]) -> Tensor:
        """Outputs of all experts with their biases.  # (rows, o)"""
        if experts[0][0].bias is None:
            return y
        biases = torch.stack([torch.cat([_known(linear.bias) for linear in linears]) for linears in experts])
        return y + by_row(biases, counts).to(y.dtype)


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

    @classmethod
    def grouped(
        cls, experts: Sequence[Sequence[Self]], y: Tensor | QTensor, counts: Sequence[int], dtype: torch.dtype
    ) -> Tensor:
        weight = torch.stack([torch.cat([linear.numbers(dtype) for linear in linears]) for linears in experts])
        rows = y.dequantize(dtype) if isinstance(y, QTensor) else y
        return cls._biased(experts, grouped_linear(rows, weight, counts), counts)


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

    @abstractmethod
    def lookup(self, rows: Tensor) -> QTensor:
        """Some rows of the weight, by their numbers.  # int64, (k,) -> (k, n)"""

    def plain(self) -> Tensor:
        return self.qweight().dequantize()

    def forward(self, x: Tensor) -> Tensor:
        y = self.site(x)
        w = self.qweight()
        if isinstance(y, QTensor):
            return int_linear(y.values, y.scale, y.zero, w.values, w.scale, w.zero, self.bias, x.dtype)
        return F.linear(y, w.dequantize(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    @classmethod
    @abstractmethod
    def _integers(cls, experts: Sequence[Sequence[Self]], scale: Tensor, zero: Tensor | None) -> QTensor:
        """The weights of several experts, those of one row upon row.  # (E, o, n), with scales of (E, o, g)"""

    @classmethod
    def grouped(
        cls, experts: Sequence[Sequence[Self]], y: Tensor | QTensor, counts: Sequence[int], dtype: torch.dtype
    ) -> Tensor:
        zero = None if experts[0][0].zero is None else _stacked(experts, "zero")
        w = cls._integers(experts, _stacked(experts, "scale"), zero)
        if isinstance(y, QTensor):
            out = grouped_int_linear(y.values, y.scale, y.zero, w.values, w.scale, w.zero, counts)
        else:
            out = grouped_linear(y, w.dequantize(dtype), counts)
        return cls._biased(experts, out, counts).to(dtype)


class FrozenLinear(IntegerLinear, Unpacked):
    """Integers one per byte: the solver's output."""

    values: Tensor
    loose = "values"

    def __init__(self, site: FrozenSite, weight: QTensor, bias: Tensor | None) -> None:
        super().__init__(site, weight.scale, weight.zero, bias, weight.spec)
        self.register_buffer("values", weight.values)  # int8 | uint8, (o, n)
        self.bits = weight.spec.bits

    def qweight(self) -> QTensor:
        return QTensor(values=self.values, scale=self.scale, zero=self.zero, spec=self.spec)

    @classmethod
    def _integers(cls, experts: Sequence[Sequence[Self]], scale: Tensor, zero: Tensor | None) -> QTensor:
        return QTensor(values=_stacked(experts, "values"), scale=scale, zero=zero, spec=experts[0][0].spec)

    def lookup(self, rows: Tensor) -> QTensor:
        return self.qweight().rows(rows)

    def pack(self) -> Tensor:
        return self.qweight().packed()


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

    @classmethod
    def _integers(cls, experts: Sequence[Sequence[Self]], scale: Tensor, zero: Tensor | None) -> QTensor:
        first = experts[0][0]
        return QTensor.from_packed(_stacked(experts, "packed"), scale, zero, first.spec, first.n)

    def lookup(self, rows: Tensor) -> QTensor:
        zero = None if self.zero is None else self.zero[rows]
        return QTensor.from_packed(self.packed[rows], self.scale[rows], zero, self.spec, self.n)

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
