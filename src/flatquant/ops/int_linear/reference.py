"""y = (x_int W_int^T) * s_x * s_w + b, with exact integer accumulation.

The product runs in float32, where integers are exact as long as the sums stay below 2^24: bits up to 8 x 4 and inner
dimensions up to 16,384, bits 4 x 4 up to 262,144. Weights with several scales per row are scaled before the product.
"""

import torch
from jaxtyping import Float, Shaped
from torch import Tensor


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
    """Multiply quantised activations by quantised weights.

    Args:
        x: integers in any dtype, (.., n).
        x_scale, x_zero: per token, (.., 1); zero None if symmetric.
        weight: integers, (o, n).
        weight_scale, weight_zero: (o, g); zero None if symmetric.
        bias: (o,) or None.

    Returns:
        `out_dtype`, (.., o).
    """
    w = multiplied(weight, weight_scale, weight_zero)
    y = (shifted(x, x_zero) @ w.mT) * x_scale.float()
    if weight_scale.shape[-1] == 1:
        y = y * weight_scale.float().mT
    if bias is not None:
        y = y + bias.float()
    return y.to(out_dtype)


def shifted(x: Shaped[Tensor, "*batch n"], zero: Shaped[Tensor, "*batch 1"] | None) -> Float[Tensor, "*batch n"]:
    """Activations less their zero points.  # float32, (.., n)"""
    return x.float() if zero is None else x.float() - zero.float()


def multiplied(
    weight: Shaped[Tensor, "*batch o n"], scale: Float[Tensor, "*batch o g"], zero: Shaped[Tensor, "*batch o g"] | None
) -> Float[Tensor, "*batch o n"]:
    """Weights as the product takes them: less their zero points, and scaled where a row has several scales.

    (.., o, n), and (.., o, g) twice -> float32, (.., o, n)
    """
    w = weight.float()
    if zero is not None:
        w = (w.unflatten(-1, (scale.shape[-1], -1)) - zero.float()[..., None]).flatten(-2)
    if scale.shape[-1] == 1:
        return w
    return (w.unflatten(-1, (scale.shape[-1], -1)) * scale.float()[..., None]).flatten(-2)
