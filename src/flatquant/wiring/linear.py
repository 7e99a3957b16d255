"""The fit-able stage of a site: one transform, one activation grid, and the joined weights of all its readers.

The readers of a site multiply the same tensor, so their weights are joined row-wise: one inverse, one weight grid, one
product a step, whatever the number of readers. Weights are frozen; each forward pass derives the quantised weight from
them and the site's current transform, so gradients reach the transform through activations and weights alike
(FlatQuant, section 3.1, eq. 2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatquant.modules import Site, Trainable
from flatquant.ops.grouped_linear import by_row, grouped_linear
from flatquant.ops.kron.reference import kron_matmul
from flatquant.quantizers import (
    ActivationLevels,
    BlockWeights,
    Dynamic,
    LiveBlocks,
    SplitGrid,
    WeightGrid,
    WeightLevels,
)
from flatquant.spec import QuantSpec
from flatquant.transforms import Diagonal, Factor, HeadDiagonal, HeadMatrices, Identity, Shift, Transform

# On a GPU a fit is bound by launches and memory traffic. Up to this size, one dense product forward and two backward
# beat the structured product's many passes: 8192 x 1536 x 1536 in half precision takes an H100 0.06 ms.
DENSE_LIMIT = 2048


class _Operands:
    """Q(W P^-T) of all readers, (sum of rows, n), with their biases, (sum of rows,)."""

    def __init__(self, weight: Tensor, bias: Tensor | None, sizes: Sequence[int]) -> None:
        self.weight, self.bias = weight, bias
        self._weights = weight.split(list(sizes))
        self._biases = [None] * len(sizes) if bias is None else bias.split(list(sizes))

    def of(self, index: int) -> tuple[Tensor, Tensor | None]:
        """Those of one reader.  # (o, n), (o,)"""
        return self._weights[index], self._biases[index]


class HeadOutput(nn.Module):
    """What a writer absorbs on its output rows: one matrix P per head, shared by all heads.

    For a writer of the residual stream, all of its output is one head.
    """

    def __init__(self, factor: Factor) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, y: Tensor) -> Tensor:
        """Outputs (or a bias) times P, head by head.  # (.., heads * head_dim)"""
        return kron_matmul(y, None, self.factor.matrix().to(y.dtype))


class PartRows(nn.Module):
    """What a fused writer absorbs on `size` rows of each group, from `first` on: others are of q and k, say."""

    def __init__(self, output: nn.Module, groups: int, first: int, size: int) -> None:
        super().__init__()
        self.output = output
        self.groups, self.first, self.size = groups, first, size

    def forward(self, y: Tensor) -> Tensor:
        """Outputs (or a bias), those of every group mapped.  # (.., rows)"""
        y = y.unflatten(-1, (self.groups, -1))
        before, own, after = y.tensor_split([self.first, self.first + self.size], dim=-1)
        return torch.cat([before, self.output(own.flatten(-2)).view_as(own), after], dim=-1).flatten(-2)


class HeadsOutput(nn.Module):
    """What the writer of heads absorbs of a transform that differs from head to head."""

    def __init__(self, heads: HeadDiagonal | HeadMatrices) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, y: Tensor) -> Tensor:
        """Outputs (or a bias), head by head.  # (.., kv_heads * head_dim)"""
        return self.heads.write(y)


class RowScale(nn.Module):
    """What a writer absorbs on n of its rows, from `first` on, of a scale of the channels that they write."""

    def __init__(self, diagonal: Diagonal, first: int, n: int) -> None:
        super().__init__()
        self.diagonal = diagonal
        self.first, self.n = first, n

    def forward(self, y: Tensor) -> Tensor:
        """Outputs (or a bias), some of them scaled.  # (.., rows)"""
        before, own, after = y.split([self.first, self.n, y.shape[-1] - self.first - self.n], dim=-1)
        return torch.cat([before, self.diagonal(own), after], dim=-1)


class ReaderScale(nn.Module):
    """What queries absorb of their keys' `HeadDiagonal`: rows divided by its scale."""

    def __init__(self, diagonal: HeadDiagonal) -> None:
        super().__init__()
        self.diagonal = diagonal

    def forward(self, y: Tensor) -> Tensor:
        """Outputs (or a bias) over the scale.  # (.., heads * head_dim)"""
        return self.diagonal.inverse_t(y)


class Followed(nn.Module):
    """The weight of a router, which stays in 16 bit, in the basis that its input is written in during a fit."""

    def __init__(self, transform: Transform) -> None:
        super().__init__()
        self.transform = transform

    def forward(self, w: Tensor) -> Tensor:
        """w P^-T.  # (o, n)"""
        return self.transform.inverse_t(w.to(torch.promote_types(w.dtype, torch.float32))).to(w.dtype)


class JoinedWeight(Trainable):
    """The weights of a site's readers, row upon row; frozen until an end-to-end fit releases them.

    Stored in 16 bits, they stay so where a block is put in float32. Folding, in float64, widens them.
    """

    group = "weight"

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = nn.Parameter(value, requires_grad=False)

    def store(self, dtype: torch.dtype) -> None:
        """Have the weights in another dtype."""
        self.value = nn.Parameter(self.value.detach().to(dtype), requires_grad=self.value.requires_grad)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True):
        def keep(t: Tensor) -> Tensor:
            out = fn(t)
            return out.to(t.dtype) if t.dtype.itemsize == 2 and out.dtype == torch.float32 else out

        return super()._apply(keep, recurse)


class FitSite(Site):
    """Transforms and fake-quantises one tensor, once for all its readers, and multiplies it by their weights."""

    bias: Tensor | None  # (sum of rows,)
    eye: Tensor | None  # (n, n), where the transform is applied as one dense matrix

    def __init__(
        self,
        transform: Transform,
        activations: Dynamic | SplitGrid | ActivationLevels | LiveBlocks | None,
        weights: QuantSpec | None,
        linears: Sequence[nn.Linear],
        outputs: Sequence[Sequence[nn.Module]],
        shift: Shift | None = None,
        *,
        alone: bool = False,
    ) -> None:
        """`outputs` has, for every linear, the maps its output rows absorb, in order; `shift` precedes `transform`.

        With `alone`, each reader is multiplied when it is called: not all of them read every token.
        """
        super().__init__()
        self.alone = alone
        self.shift = shift
        self.transform = transform
        self.activations = activations
        self.sizes = [linear.out_features for linear in linears]
        weight = torch.cat([linear.weight.detach() for linear in linears])
        self.joined = JoinedWeight(weight if weight.dtype == torch.float64 else weight.float())
        biases = [linear.bias for linear in linears]
        self.has_bias = [b is not None or shift is not None for b in biases]
        if any(self.has_bias):
            filled = [
                torch.zeros(o).to(self.weight) if b is None else b for b, o in zip(biases, self.sizes, strict=True)
            ]
            self.register_buffer("bias", torch.cat([b.detach() for b in filled]).to(self.weight.dtype))
        else:
            self.register_buffer("bias", None)
        self.grid: WeightGrid | WeightLevels | BlockWeights | None = None  # levels come once all is on one device
        if weights is not None and weights.kind == "uniform":
            self.grid = WeightGrid.for_weight(weights, (sum(self.sizes), linears[0].in_features))
        elif weights is not None and weights.format is not None:
            self.grid = BlockWeights(weights)
        self.outputs = nn.ModuleList(nn.Sequential(*maps) for maps in outputs)
        n = linears[0].in_features
        dense = weight.is_cuda and n <= DENSE_LIMIT and not isinstance(transform, Identity)
        self.register_buffer("eye", torch.eye(n, dtype=self.weight.dtype) if dense else None)

    @property
    def weight(self) -> Tensor:
        """The original weights of all readers; if they are stored in 16 bits, a copy.  # float32 or float64, (o, n)"""
        value = self.joined.value
        return value.to(torch.promote_types(value.dtype, torch.float32))

    def _transformed(self, x: Tensor) -> Tensor:
        """(x - d) P.  # (.., n)"""
        if self.shift is not None:
            x = self.shift(x)
        if self.eye is not None:
            return x @ self.transform(self.eye).to(x.dtype)
        return self.transform(x)

    def _inverse_transformed(self) -> Tensor:
        """W P^-T.  # (sum of rows, n)"""
        if self.eye is not None:
            return self.weight @ self.transform.inverse_t(self.eye)
        return self.transform.inverse_t(self.weight)

    @property
    def _has_outputs(self) -> bool:
        return any(len(maps) for maps in self.outputs)  # type: ignore[arg-type]

    def transformed_weight(self) -> Tensor:
        """W P^-T, clipped, then mapped by the readers' output transforms: what a solver rounds.  # (sum of rows, n)"""
        w = self._inverse_transformed()
        if isinstance(self.grid, WeightGrid):
            w = self.grid.clamp(w)
        if self._has_outputs:
            parts = zip(self.outputs, w.split(self.sizes), strict=True)
            w = torch.cat([output(part.mT).mT for output, part in parts])
        return w

    def transformed_bias(self) -> Tensor | None:
        """The biases, with W d where inputs are shifted, mapped by the output transforms.  # (sum of rows,)"""
        bias = self.bias
        if bias is not None and self.shift is not None:
            bias = bias + self.shift.product(self.weight)
        if bias is None or not self._has_outputs:
            return bias
        parts = zip(self.outputs, bias.split(self.sizes), strict=True)
        return torch.cat([output(part) for output, part in parts])

    def _quantised_weight(self) -> Tensor:
        """`transformed_weight` on its grid.  # (sum of rows, n)"""
        if self.grid is None:
            return self.transformed_weight()
        if isinstance(self.grid, WeightLevels):
            return self.grid()
        if self._has_outputs:
            # A row's scale gathers the gradients of all its weights: a sum that float16 may not hold.
            with torch.autocast(self.joined.value.device.type, enabled=False):
                return self.grid(self.transformed_weight())
        return self.grid.clamp_and_round(self._inverse_transformed())

    def _quantised(self, x: Tensor) -> Tensor:
        y = self._transformed(x)
        return y if self.activations is None else self.activations(y)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """The output of every reader."""
        return self._once("outputs", x, lambda: self._outputs(x))  # readers call one after another with the same tensor

    def _outputs(self, x: Tensor) -> tuple[Tensor, ...]:
        y = F.linear(self._quantised(x), self._quantised_weight(), self.transformed_bias())
        return y.split(self.sizes, -1) if len(self.sizes) > 1 else (y,)  # one of several views bears no change in place

    def rows(self, x: Tensor, index: Tensor | slice) -> Tensor:
        part = x[index]
        if self._shares:
            y, operands = self._once("operands", x, lambda: self._operands(x))
            self._keep("rows", part, (y[index], operands))
        return part

    def product(
        self, experts: Sequence[Sequence[nn.Module]], x: Tensor, index: Tensor | slice, counts: Sequence[int]
    ) -> Tensor | None:
        readers = [linear.index for linears in experts for linear in linears if isinstance(linear, FitLinear)]
        each = len(experts[0])
        if readers != list(range(readers[0], readers[0] + each * len(experts))) or not self._shares:
            return None  # others stand between them, or would be computed for each reader
        rows = sum(self.sizes[: readers[0]]), sum(self.sizes[readers[0] : readers[-1] + 1])
        y, operands = self._once("operands", x, lambda: self._operands(x))
        weight = operands.weight.narrow(0, *rows).unflatten(0, (len(experts), -1))  # (E, o, n)
        out = grouped_linear(y[index], weight, counts)
        if operands.bias is None:
            return out
        bias = operands.bias.narrow(0, *rows).unflatten(0, (len(experts), -1))
        return out + by_row(bias, counts).to(out.dtype)

    def _operands(self, x: Tensor) -> tuple[Tensor, _Operands]:
        """Q(x P), and what readers multiply it by."""
        return self._quantised(x), _Operands(self._quantised_weight(), self.transformed_bias(), self.sizes)

    def output(self, x: Tensor, index: int) -> Tensor:
        """The output of one reader: alone for some rows, which are its own, else with all others.  # (.., o)"""
        seen = self._seen("rows", x)
        if seen is None and not self.alone:
            return self(x)[index]
        found: tuple[Tensor, _Operands]
        found = self._once("operands", x, lambda: self._operands(x)) if seen is None else seen.result
        return F.linear(found[0], *found[1].of(index))


class FitLinear(nn.Module):
    """Stands where a reader was: hands out its share of the site's product."""

    def __init__(self, site: FitSite, index: int) -> None:
        super().__init__()
        self.site = site
        self.index = index

    def forward(self, x: Tensor) -> Tensor:
        return self.site.output(x, self.index)
