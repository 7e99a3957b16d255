"""Products of quantised activations and weights of any widths, as `reference.int_linear` defines them."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from flatquant.ops.grouped_linear import by_row, grouped_linear
from flatquant.ops.int_linear import reference

_local = threading.local()


def int_linear(
    x: Shaped[Tensor, "*batch n"],
    x_scale: Float[Tensor, "*batch 1"],
    x_zero: Shaped[Tensor, "*batch 1"] | None,
    weight: Shaped[Tensor, "o n"],
    weight_scale: Float[Tensor, "o groups"],
    weight_zero: Shaped[Tensor, "o groups"] | None,
    bias: Float[Tensor, " o"] | None,
    out_dtype: torch.dtype,
) -> Float[Tensor, "*batch o"]:
    """`reference.int_linear`; on a CPU, weights become floats in memory that every product uses again.

    Fresh memory for the floats of a large matrix costs more than filling it: each page of it has to be mapped first.
    """
    if weight.device.type == "cpu" and not weight.is_floating_point():
        weight = _room(weight).copy_(weight)
    return reference.int_linear(x, x_scale, x_zero, weight, weight_scale, weight_zero, bias, out_dtype)


def grouped_int_linear(
    x: Shaped[Tensor, "rows n"],
    x_scale: Float[Tensor, "rows 1"],
    x_zero: Shaped[Tensor, "rows 1"] | None,
    weight: Shaped[Tensor, "groups o n"],
    weight_scale: Float[Tensor, "groups o g"],
    weight_zero: Shaped[Tensor, "groups o g"] | None,
    counts: Sequence[int],
) -> Float[Tensor, "rows o"]:
    """`reference.int_linear` of rows and the weights of their group, without a bias; see `grouped_linear`.

    Args:
        x, x_scale, x_zero: rows of all groups, one group's behind another's, (P, n), (P, 1).
        weight, weight_scale, weight_zero: (E, o, n), (E, o, g).
        counts: rows of each group.

    Returns:
        float32, (P, o).
    """
    w = reference.multiplied(weight, weight_scale, weight_zero)
    y = grouped_linear(reference.shifted(x, x_zero), w, counts) * x_scale.float()
    return y * by_row(weight_scale[..., 0].float(), counts) if weight_scale.shape[-1] == 1 else y


def _room(weight: Tensor) -> Tensor:
    """Float32 memory of a weight's shape, one piece a thread.

    It is no inference tensor, whoever asks first: those could not be written outside of inference mode.
    """
    held = getattr(_local, "room", None)
    if held is None or held.numel() < weight.numel():
        with torch.inference_mode(False):
            held = _local.room = torch.empty(weight.numel(), dtype=torch.float32)
    return held[: weight.numel()].view(weight.shape)
