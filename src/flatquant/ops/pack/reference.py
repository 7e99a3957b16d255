"""Bit packing: field i of a row occupies bits [i*b, (i+1)*b) of a little-endian bit stream.

For 4 bits this is the usual nibble layout, even index in the low nibble; for 8 bits the identity.
"""

import torch
from jaxtyping import Integer, UInt8
from torch import Tensor


def packed_width(n: int, bits: int) -> int:
    """Bytes that a row of n fields takes."""
    return -(-n * bits // 8)


def pack_bits(values: Integer[Tensor, "*batch n"], bits: int) -> UInt8[Tensor, "*batch bytes"]:
    """Pack unsigned `bits`-bit integers along the last dimension.

    Args:
        values: (.., n), each below 2^bits; uint8, or int32 for more than 8 bits.
        bits: 1 to 16.

    Returns:
        uint8, (.., ceil(n * bits / 8)); unused high bits of the last byte are zero.
    """
    if 8 % bits == 0:  # 1, 2, 4, 8: whole fields per byte
        per = 8 // bits
        pad = -values.shape[-1] % per
        fields = torch.nn.functional.pad(values, (0, pad)).unflatten(-1, (-1, per))  # (.., bytes, per)
        packed = fields[..., 0].clone()
        for i in range(1, per):
            packed |= fields[..., i] << (i * bits)
        return packed
    shifts = torch.arange(bits, dtype=values.dtype, device=values.device)
    stream = ((values[..., None] >> shifts) & 1).to(torch.uint8).flatten(-2)  # (.., n * bits)
    stream = torch.nn.functional.pad(stream, (0, -stream.shape[-1] % 8)).unflatten(-1, (-1, 8))  # (.., bytes, 8)
    return (stream << torch.arange(8, dtype=torch.uint8, device=values.device)).sum(-1, dtype=torch.uint8)


def unpack_bits(packed: UInt8[Tensor, "*batch bytes"], bits: int, n: int) -> Integer[Tensor, "*batch {n}"]:
    """Undo `pack_bits`.  # uint8, or int32 for more than 8 bits, (.., n)"""
    if bits == 4:  # the bytes of (x | x << 4) & 0x0F0F are the two nibbles: runs on every forward pass, so no detours
        wide = packed.to(torch.int16, memory_format=torch.contiguous_format)
        wide = wide.bitwise_or_(wide << 4).bitwise_and_(0x0F0F)
        return wide.view(torch.uint8)[..., :n].contiguous()
    if 8 % bits == 0:
        fields = [(packed >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)]
        return torch.stack(fields, -1).flatten(-2)[..., :n].contiguous()  # (.., bytes, per) -> (.., n)
    stream = (packed[..., None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1  # (.., bytes, 8)
    stream = stream.flatten(-2)[..., : n * bits].unflatten(-1, (n, bits))
    wide = torch.uint8 if bits <= 8 else torch.int32
    return (stream.to(wide) << torch.arange(bits, dtype=wide, device=packed.device)).sum(-1, dtype=wide)
