"""Products of 4-bit integers; on CUDA in kernels that read packed weights, or expand them for float8 or int8 units.

`torch.ops.flatquant.int4_linear` is the operator. What kernels need besides, `scratch`, belongs to the caller. One
piece serves all products of a stream, one after another; it is kept as long as a CUDA graph that was recorded with it.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int32, Shaped, UInt8
from torch import Tensor

from flatquant.ops import HAS_TRITON, operator
from flatquant.ops.int4_linear import reference
from flatquant.ops.kron_quantize.reference import Form, of_rows

# Scratch begins with counters of programs that share rows, which are 0 before and after every product. Behind them are
# the sums of these programs, or a weight at a byte an element.
_COUNTERS, _SUMS = 2048, 264 * 64 * 4 * reference.FEW  # bytes, of the programs that an H100 runs at once


def form(device: torch.device, dtype: torch.dtype) -> Form:
    """The form in which products with a result in `dtype` want their integers.

    The float8 units round what they return to bfloat16: they serve no finer dtype.
    """
    return "either" if dtype == torch.bfloat16 and _has_float8(device) else "planes"


def _has_float8(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


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


def scratch_bytes(o: int, n: int) -> int:
    """Bytes of scratch that products of a weight of (o, n) take on CUDA."""
    return _COUNTERS + max(o * n, _SUMS)


def scratch(size: int, device: torch.device) -> UInt8[Tensor, " _"] | None:
    """Scratch of so many bytes; None on a CPU, which needs none.  # uint8"""
    return torch.zeros(size, dtype=torch.uint8, device=device) if device.type == "cuda" else None


def int4_linear(
    x: Shaped[Tensor, "tokens n"],
    x_scale: Float[Tensor, "tokens 1"],
    packed: UInt8[Tensor, "o bytes"],
    scale: Float[Tensor, " o"],
    bias: Float[Tensor, " o"] | None,
    residual: Float[Tensor, "tokens o"] | None,
    dtype: torch.dtype,
    scratch: UInt8[Tensor, " _"] | None = None,
) -> Float[Tensor, "tokens o"]:
    """`reference.int4_linear`, or its kernels; x in the form that `form` names, or float8 as such.

    Args:
        scratch: see `scratch`, of at least `scratch_bytes`; for one token, and on a CPU, None will do.

    Raises:
        ValueError: there is less scratch than this product takes.
    """
    return torch.ops.flatquant.int4_linear(x, x_scale, packed, scale, bias, residual, dtype, scratch)


def _run(
    x: Tensor,
    x_scale: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
    scratch: Tensor | None,
) -> Tensor:
    if of_rows(form(x.device, dtype), x.shape[0]) == "float8":
        x = x.view(torch.float8_e4m3fn)
    if not x.is_cuda:
        return reference.int4_linear(x, x_scale, packed, scale, bias, residual, dtype)
    from flatquant.ops.int4_linear import triton

    if x.dtype == torch.int8 and x.shape[0] == 1:
        return triton.vector(x, x_scale, packed, scale, bias, residual, dtype)
    counters, room = cut(scratch, x.shape[0], x.shape[1], len(packed))
    if x.dtype == torch.int8 and x.shape[0] <= reference.FEW:
        return triton.few(x, x_scale, packed, scale, bias, residual, dtype, (room.view(torch.int32), counters))
    weight = triton.expand(packed, room[: 2 * packed.numel()].view(x.dtype).view(len(packed), -1))
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


def cut(
    scratch: UInt8[Tensor, " _"] | None, tokens: int, n: int, o: int
) -> tuple[Int32[Tensor, " _"], UInt8[Tensor, " _"]]:
    """Counters, int32, and the rest, bytes, of scratch.

    Raises:
        ValueError: there is less than products of a weight of (o, n) take.
    """
    size, least = 0 if scratch is None else scratch.numel(), scratch_bytes(o, n)
    if scratch is None or size < least:
        raise ValueError(f"{tokens} tokens and a weight of {o} x {n} take {least} bytes of scratch, {size} were given")
    return scratch[:_COUNTERS].view(torch.int32), scratch[_COUNTERS:]


def _fake(x: Tensor, x_scale, packed: Tensor, scale, bias, residual, dtype: torch.dtype, scratch) -> Tensor:
    return x.new_empty((x.shape[0], packed.shape[0]), dtype=dtype)


operator("int4_linear", _run, _fake, mutates=("scratch",))
