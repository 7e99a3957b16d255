"""Products of 4-bit integers; on CUDA in kernels that read packed weights, or expand them for float8 or int8 units."""

from __future__ import annotations

import torch
from torch import Tensor

from flatquant.ops import HAS_TRITON
from flatquant.ops.int4_linear import reference
from flatquant.ops.kron_quantize.reference import Form

# A buffer a device for the weights of whatever layer is running, the last of a list: graphs know those before it.
_scratch: dict[torch.device, list[Tensor]] = {}


def form(tokens: int, device: torch.device, dtype: torch.dtype) -> Form:
    """The form in which a product of this many tokens, with a result in `dtype`, wants its integers.

    The float8 units round what they return to bfloat16: they serve no finer dtype.
    """
    many = device.type == "cuda" and tokens > reference.FEW
    return "float8" if many and dtype == torch.bfloat16 and _has_float8(device) else "planes"


def _has_float8(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 9)


def unsupported(o: int, n: int, device: torch.device) -> str | None:
    """Why there is no kernel for a weight of (o, n), or None if there is one."""
    if device.type != "cuda":
        return None
    if not HAS_TRITON:
        return "Triton is not installed"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPU has no bfloat16 units"
    from flatquant.ops.int4_linear import triton

    return triton.supports(o, n)


def int4_linear(
    x: Tensor,
    x_scale: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """`reference.int4_linear`, or its kernels; x in the form that `form` names."""
    if not x.is_cuda:
        return reference.int4_linear(x, x_scale, packed, scale, bias, residual, dtype)
    from flatquant.ops.int4_linear import triton

    if x.dtype == torch.int8 and x.shape[0] <= reference.FEW:
        kernel = triton.vector if x.shape[0] == 1 else triton.few
        return kernel(x, x_scale, packed, scale, bias, residual, dtype)
    weight = triton.expand(packed, _buffer(packed, x.dtype))
    if x.dtype == torch.int8:
        sums = torch._int_mm(x, weight.mT)  # pyright: ignore[reportPrivateImportUsage]
        return triton.scaled(sums, x_scale, scale, bias, residual, dtype)
    # Its result is bfloat16 wherever rows have scales.
    y = torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
        x,
        weight.mT,
        scale_a=x_scale,
        scale_b=scale[None, :],
        bias=None if bias is None else bias.to(torch.bfloat16),
        out_dtype=torch.bfloat16,
        use_fast_accum=False,
    )
    return (y if residual is None else y + residual).to(dtype)


def _buffer(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """Room for a weight at a byte an element.  # (o, n)"""
    size = 2 * packed.numel()
    held = _scratch.setdefault(packed.device, [])
    if not held or held[-1].numel() < size:
        held.append(torch.empty(size, dtype=torch.uint8, device=packed.device))
    return held[-1][:size].view(dtype).view(packed.shape[0], -1)
