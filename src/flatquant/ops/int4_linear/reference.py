"""y = (x_int W_int^T) s_x s_w + b + r, with 4-bit weights that stay packed.

Weights are unsigned fields u = w + 8, two a byte, the even index in the low nibble (`ops/pack`).
"""

import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor

from flatquant.ops.int_linear.reference import int_linear
from flatquant.ops.kron_quantize.reference import FEW as FEW  # tokens up to which kernels read weights packed
from flatquant.ops.pack.reference import unpack_bits


def int4_linear(
    x: Shaped[Tensor, "tokens n"],
    x_scale: Float[Tensor, "tokens 1"],
    packed: UInt8[Tensor, "o bytes"],
    scale: Float[Tensor, " o"],
    bias: Float[Tensor, " o"] | None,
    residual: Float[Tensor, "tokens o"] | None,
    dtype: torch.dtype,
) -> Float[Tensor, "tokens o"]:
    """Multiply 4-bit integers.

    Args:
        x: integers -8..7, (T, n): as float8 in order, or as int8 with even channels before odd ones.
        x_scale: float32, (T, 1).
        packed: weights, uint8, (o, n / 2).
        scale: of weights, float32, (o,).
        bias: float32, (o,), or None.
        residual: added to the result, (T, o), or None.
        dtype: of the result.

    Returns:
        (T, o).
    """
    planes = x.dtype == torch.int8
    w = unpack_bits(packed, 4, x.shape[-1]).view(torch.int8) - 8
    x = x.float()
    if planes:
        x = x.unflatten(-1, (2, -1)).mT.flatten(-2)
    y = int_linear(x, x_scale, None, w, scale[:, None], None, bias, torch.float32)
    return (y if residual is None else y + residual.float()).to(dtype)


def expand(packed: UInt8[Tensor, "o bytes"], dtype: torch.dtype) -> Shaped[Tensor, "o n"]:
    """Weights at a byte each: float8 (e4m3), in which -8..7 are exact, or int8 with even channels before odd ones.

    (o, n / 2) -> (o, n)
    """
    w = unpack_bits(packed, 4, 2 * packed.shape[-1]).float() - 8
    return (torch.cat((w[:, ::2], w[:, 1::2]), -1) if dtype == torch.int8 else w).to(dtype)
