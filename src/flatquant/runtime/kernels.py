"""From a model's modules to the operators of `ops`: a site's transform and grid, and the linears that read it.

`KernelLinear` computes what `FrozenSite` and `PackedLinear` compute: on a CPU the same bits, on CUDA in two kernels.
Whether there are kernels is said by exceptions (`Unsupported`), since callers tell their users why not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flatquant.modules import joined
from flatquant.ops import int4_linear, int8_linear
from flatquant.ops.kron_quantize import Form, Site
from flatquant.quantizers import Dynamic
from flatquant.runtime.linear import FrozenSite, PackedLinear
from flatquant.transforms import kronecker_split


class Unsupported(Exception):
    """Why there are no kernels for something; ends as the text of a warning."""


@dataclass(frozen=True)
class Product:
    """The linears of one site as one matrix."""

    packed: Tensor  # uint8, (o, n / 2)
    scale: Tensor  # float32, (o,)
    bias: Tensor | None  # float32, (o,)
    factor: float = 1.0  # of what is added to the residual stream; the bias has it

    def __call__(
        self, x: Tensor, x_scale: Tensor, residual: Tensor | None, dtype: torch.dtype, scratch: Tensor | None = None
    ) -> Tensor:
        """(T, n) -> (T, o)"""
        x_scale = x_scale if self.factor == 1 else x_scale * self.factor
        return int4_linear.int4_linear(x, x_scale, self.packed, self.scale, self.bias, residual, dtype, scratch)

    @property
    def scratch_bytes(self) -> int:
        """See `int4_linear.scratch_bytes`."""
        return int4_linear.scratch_bytes(len(self.packed), 2 * self.packed.shape[1])

    @classmethod
    def of(cls, linears: list[PackedLinear], factor: float = 1.0) -> Product:
        """Join linears; their own tensors become parts of the joined ones, so that nothing is held twice."""
        packed = joined([m.packed for m in linears])
        scale = joined([m.scale for m in linears])[:, 0]
        bias = None
        if any(m.bias is not None for m in linears):
            bias = torch.cat([scale.new_zeros(len(m.packed)) if m.bias is None else m.bias.float() for m in linears])
        at = 0
        for m in linears:
            rows = slice(at, at + len(m.packed))
            m.packed, m.scale = packed[rows], scale[rows, None]
            if m.bias is not None and bias is not None and m.bias.dtype == bias.dtype:
                m.bias = bias[rows]
            at = rows.stop
        return cls(packed, scale, bias if bias is None or factor == 1 else bias * factor, factor)


@dataclass(frozen=True)
class OutputLayer:
    """An output layer with weights of 8 bits, and its input in 16."""

    packed: Tensor  # uint8, (o, n)
    scale: Tensor  # float32, (o,)
    bias: Tensor | None  # (o,)

    def __call__(self, x: Tensor) -> Tensor:
        """(.., n) -> (.., o)"""
        y = int8_linear.int8_linear(x.reshape(-1, x.shape[-1]), self.packed, self.scale, self.bias)
        return y.view(*x.shape[:-1], y.shape[-1])

    @classmethod
    def of(cls, linear: PackedLinear) -> OutputLayer:
        """
        Raises:
            Unsupported: kernels do not take it.
        """
        if linear.spec.bits != 8 or linear.scale.shape[1] != 1 or linear.site.activations is not None:
            raise Unsupported(
                "its output layer is rounded otherwise than to 8 bits with one scale a row and inputs in 16 bit"
            )
        reason = int8_linear.unsupported(len(linear.packed), linear.n, linear.packed.device)
        if reason is not None:
            raise Unsupported(f"there is no kernel for {reason} (the output layer)")
        return cls(linear.packed, linear.scale[:, 0].contiguous(), linear.bias)


def packed_linear(module: nn.Module, where: str) -> PackedLinear:
    """A linear whose weight kernels multiply.

    Raises:
        Unsupported: they do not.
    """
    if not isinstance(module, PackedLinear):
        raise Unsupported(f"{where} is a {type(module).__name__}, not packed integers")
    if module.spec.bits != 4 or not module.spec.symmetric or module.scale.shape[1] != 1:
        raise Unsupported(f"the weights of {where} are not symmetric 4-bit integers with one scale a row")
    reason = int4_linear.unsupported(len(module.packed), module.n, module.packed.device)
    if reason is not None:
        raise Unsupported(f"there is no kernel for {reason} ({where})")
    return module


def kernel_site(site: FrozenSite, n: int, heads: int | None, where: str, device: torch.device) -> Site:
    """A site as kernels take it. Without factors any rows will do: heads, or as many as factors would have.

    Raises:
        Unsupported: they do not take it.
    """
    grid = site.activations
    if not isinstance(grid, Dynamic) or not grid.spec.symmetric:
        raise Unsupported(f"the activations of {where} are not on a symmetric grid a token")
    if site.down is not None:
        raise Unsupported(f"{where} has a low-rank branch")
    if site.shift is not None:
        raise Unsupported(f"{where} is shifted")
    if site.left is not None:
        n1 = site.left.shape[0]
    else:
        n1 = 1 if site.right is not None else heads or rows_of(n)
    if site.right is not None and site.right.shape[0] * n1 != n:
        raise Unsupported(f"{where}: factors of another size")
    made = Site((n1, n // n1), site.left, site.right, ratios_of(grid, device), grid.spec.bits)
    reason = made.unsupported() if device.type == "cuda" else None
    if reason is not None:
        raise Unsupported(f"there is no kernel for {reason} ({where})")
    return made


def rows_of(n: int) -> int:
    """How many rows n channels make that have an even number of columns."""
    n1, n2 = kronecker_split(n)
    return n1 if n2 % 2 == 0 else kronecker_split(n // 2)[0]


def ratios_of(grid: Dynamic, device: torch.device) -> Tensor:
    """Shares of a row's lower and upper end that the grid covers.  # float32, (2,)"""
    ratios = grid.clip.ratios()
    ones = torch.ones(2, dtype=torch.float32, device=device)  # an engine may have another default
    return ones if ratios is None else torch.stack(ratios).float().contiguous()


class KernelLinear(nn.Module):
    """Linears that read one site, as two operators. torch.compile takes it whole, and CUDA graphs record it."""

    def __init__(
        self,
        quantize: Callable[[Tensor, Form], tuple[Tensor, Tensor]],
        product: Product,
        scratch: Tensor | None,
    ) -> None:
        """
        Args:
            quantize: integers of rows in a form, with their scales; `kron_quantize.plain` of a site.
            scratch: see `int4_linear.scratch`; of whoever runs several of these, one after another.
        """
        super().__init__()
        self.quantize, self.product, self.scratch = quantize, product, scratch

    def forward(self, x: Tensor) -> Tensor:
        """(.., n) -> (.., o)"""
        rows = x.reshape(-1, x.shape[-1])
        y = self.product(*self.quantize(rows, int4_linear.form(x.device, x.dtype)), None, x.dtype, self.scratch)
        return y.view(*x.shape[:-1], y.shape[-1])
