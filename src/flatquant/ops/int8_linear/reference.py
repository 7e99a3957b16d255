"""y = (x W_int^T) s + b, with weights of 8 bits and activations in 16: an output layer.

Weights are unsigned fields u = w + 128, one a byte (`ops/pack`).
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

FEW = 64  # tokens up to which kernels read weights as they are stored


def int8_linear(
    x: Float[Tensor, "tokens n"],
    packed: UInt8[Tensor, "o n"],
    scale: Float[Tensor, " o"],
    bias: Float[Tensor, " o"] | None,
) -> Float[Tensor, "tokens o"]:
    """Multiply by 8-bit integers, in float32.

    Args:
        x: floating, (T, n).
        packed: weights, uint8, (o, n).
        scale: of weights, float32, (o,).
        bias: (o,), or None.

    Returns:
        In x's dtype, (T, o).
    """
    y = F.linear(x.float(), packed.float() - 128) * scale
    return (y if bias is None else y + bias.float()).to(x.dtype)


def numbers(packed: UInt8[Tensor, "o n"], scale: Float[Tensor, " o"], dtype: torch.dtype) -> Float[Tensor, "o n"]:
    """The weights as numbers.  # (o, n)"""
    return ((packed.float() - 128) * scale[:, None]).to(dtype)
