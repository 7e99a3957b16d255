"""The serving stages of linears whose weights are in a format of `flatquant.formats`: blocks, or learned levels.

As with integers there are two types: `FrozenCodes` (codes one by one, as the solver left them) and `PackedCodes` (the
same codes packed into bytes, as they are stored). The tensors and their names are the format's layout.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from flatquant.formats.base import Codes, Format
from flatquant.runtime.linear import FrozenSite, NumberLinear, Unpacked


class CodeLinear(NumberLinear, ABC):
    """Weights in a format; activations on a grid are multiplied as the numbers they stand for."""

    def __init__(self, site: FrozenSite, parts: Mapping[str, Tensor], bias: Tensor | None, form: Format) -> None:
        super().__init__(site, bias)
        self.format = form
        self.part_names = tuple(parts)
        for name, part in parts.items():
            self.register_buffer(name, part)

    @property
    def parts(self) -> dict[str, Tensor]:
        """The tensors of the layout besides the codes."""
        return {name: self.get_buffer(name) for name in self.part_names}

    @abstractmethod
    def qweight(self) -> Codes:
        """The weight.  # (o, n)"""

    def numbers(self, dtype: torch.dtype) -> Tensor:
        return self.qweight().dequantize(dtype)


class FrozenCodes(CodeLinear, Unpacked):
    """Codes one per byte: what the solver chose."""

    codes: Tensor
    loose = "codes"

    def __init__(self, site: FrozenSite, weight: Codes, bias: Tensor | None) -> None:
        super().__init__(site, weight.parts, bias, weight.format)
        self.register_buffer("codes", weight.codes)  # uint8, (o, n)
        self.bits = weight.format.bits

    def qweight(self) -> Codes:
        return Codes(codes=self.codes, parts=self.parts, format=self.format)

    def pack(self) -> Tensor:
        return self.qweight().packed()


class PackedCodes(CodeLinear):
    """Codes packed into bytes: what is stored and served."""

    packed: Tensor

    def __init__(
        self,
        site: FrozenSite,
        packed: Tensor,
        parts: Mapping[str, Tensor],
        bias: Tensor | None,
        form: Format,
        n: int,
    ) -> None:
        super().__init__(site, parts, bias, form)
        self.register_buffer("packed", packed)  # uint8, (o, ceil(n * bits / 8))
        self.n = n

    @classmethod
    def of(cls, frozen: FrozenCodes) -> PackedCodes:
        """Pack a frozen linear."""
        n = frozen.codes.shape[1]
        return cls(frozen.site, frozen.pack(), frozen.parts, frozen.bias, frozen.format, n)

    def qweight(self) -> Codes:
        return Codes(codes=self.format.unpack(self.packed, self.n), parts=self.parts, format=self.format)
