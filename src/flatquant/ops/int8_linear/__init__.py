"""Products of numbers in 16 bit and weights of 8; on CUDA in kernels that read the bytes.

`torch.ops.flatquant.int8_linear` is the operator. Many tokens are bound by arithmetic: their weights are made numbers,
some rows at a time, and multiplied by PyTorch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from flatquant.ops import HAS_TRITON, operator
from flatquant.ops.int8_linear import reference

ROWS = 16384  # of a weight that are numbers at a time


def unsupported(o: int, n: int, device: torch.device) -> str | None:
    """Why there is no kernel for a weight of (o, n), or None if there is one."""
    if device.type != "cuda":
        return None
    if not HAS_TRITON:
        return "Triton is not installed"
    return f"a weight of {o} x {n} in 8 bits (multiples of 16 columns are needed)" if n % 16 else None


def int8_linear(
    x: Float[Tensor, "tokens n"],
    packed: UInt8[Tensor, "o n"],
    scale: Float[Tensor, " o"],
    bias: Float[Tensor, " o"] | None,
) -> Float[Tensor, "tokens o"]:
    """`reference.int8_linear`, or its kernels."""
    return torch.ops.flatquant.int8_linear(x, packed, scale, bias)


def _run(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    if not x.is_cuda:
        return reference.int8_linear(x, packed, scale, bias)
    if x.shape[0] > reference.FEW:
        return many(x, packed, scale, bias)
    from flatquant.ops.int8_linear import triton

    return triton.few(x, packed, scale, bias)


def many(
    x: Float[Tensor, "tokens n"],
    packed: UInt8[Tensor, "o n"],
    scale: Float[Tensor, " o"],
    bias: Float[Tensor, " o"] | None,
    rows: int = ROWS,
) -> Float[Tensor, "tokens o"]:
    """The product, with weights as numbers in x's dtype, `rows` of them at a time."""
    parts = zip(packed.split(rows), scale.split(rows), strict=True)
    y = torch.cat([F.linear(x, reference.numbers(p, s, x.dtype)) for p, s in parts], dim=-1)
    return y if bias is None else y + bias.to(x.dtype)


def _fake(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], packed.shape[0]))


operator("int8_linear", _run, _fake)
