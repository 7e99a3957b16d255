"""Products of rows with the matrix of their group, all groups at once, with gradients for both operands.

Three ways give the same numbers but for the order of sums: PyTorch's kernel (`one`: bfloat16 on CUDA), a batch in which
every group has as many rows as the largest (`padded`), and the reference, one group after another. The first two save
launches; on a CPU, where these cost nothing, groups follow one another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor

from flatquant.ops.grouped_linear import reference

# Rows of a padded batch for each row that there is; and rows that a batch may have in any case: few tokens are bound by
# the weights.
_PADDING, _FEW = 2, 512
_ALIGNED = 16  # bytes of a row, for PyTorch's kernel
# PyTorch 2.10 gave it a public name. Both take matrices (E, n, o), and `offs`, where each group ends.
_KERNEL: Callable[..., Tensor] | None = getattr(F, "grouped_mm", getattr(torch, "_grouped_mm", None))


def gains(device: torch.device) -> bool:
    """Whether groups at once are faster than one after another."""
    return device.type != "cpu"


def grouped_linear(
    x: Float[Tensor, "rows n"], weight: Float[Tensor, "groups o n"], counts: Sequence[int]
) -> Float[Tensor, "rows o"]:
    """`reference.grouped_linear`, in the way that suits the device, the dtype and the counts. Under autocast, in its
    dtype."""
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    with torch.autocast(x.device.type, enabled=False):
        return way(x, weight, counts)(x, weight, counts)


def by_row(values: Shaped[Tensor, "groups ..."], counts: Sequence[int]) -> Shaped[Tensor, "rows ..."]:
    """What each group has, for each of its rows.  # (E, ..) -> (P, ..)"""
    times = torch.tensor(counts).to(values.device, non_blocking=True)
    return values.repeat_interleave(times, 0, output_size=sum(counts))


def way(
    x: Float[Tensor, "rows n"], weight: Float[Tensor, "groups o n"], counts: Sequence[int]
) -> Callable[[Tensor, Tensor, Sequence[int]], Tensor]:
    """What computes these products."""
    if not gains(x.device):
        return reference.grouped_linear
    if _has_kernel(x, weight):
        return one
    padded_rows = sum(count > 0 for count in counts) * max(counts, default=0)
    return padded if padded_rows <= max(_PADDING * sum(counts), _FEW) else reference.grouped_linear


def _has_kernel(x: Tensor, weight: Tensor) -> bool:
    sizes = (x.shape[-1] * x.element_size(), weight.shape[1] * x.element_size())
    if _KERNEL is None or x.dtype != torch.bfloat16 or any(size % _ALIGNED for size in sizes):
        return False
    return x.is_cuda and torch.cuda.get_device_capability(x.device) >= (8, 0)


def one(
    x: Float[Tensor, "rows n"], weight: Float[Tensor, "groups o n"], counts: Sequence[int]
) -> Float[Tensor, "rows o"]:
    """By PyTorch's kernel."""
    assert _KERNEL is not None
    if not len(x):
        return reference.grouped_linear(x, weight, counts)
    ends = torch.tensor(counts).cumsum(0).to(x.device, torch.int32, non_blocking=True)
    y: Tensor = _KERNEL(x.contiguous(), weight.contiguous().mT, offs=ends)
    return _Dense.apply(y) if y.requires_grad else y


def padded(
    x: Float[Tensor, "rows n"], weight: Float[Tensor, "groups o n"], counts: Sequence[int]
) -> Float[Tensor, "rows o"]:
    """As a batch of the groups that have rows."""
    reached = [group for group, count in enumerate(counts) if count]
    if not reached:
        return reference.grouped_linear(x, weight, counts)
    most = max(counts)
    slots = torch.cat([torch.arange(counts[group]) + place * most for place, group in enumerate(reached)])
    slots = slots.to(x.device, non_blocking=True)  # of each row in the batch
    batch = x.new_zeros(len(reached) * most, x.shape[1]).index_copy(0, slots, x).unflatten(0, (len(reached), most))
    chosen = weight if len(reached) == len(weight) else weight[torch.tensor(reached, device=weight.device)]
    return (batch @ chosen.mT).flatten(0, 1)[slots]


class _Dense(torch.autograd.Function):
    """The identity; its gradient is contiguous, which PyTorch's kernel wants."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad.contiguous()
