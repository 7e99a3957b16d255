"""Packing is a bijection, tight, and laid out as its docstring says."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flatquant.ops.pack.reference import pack_bits, unpack_bits


@given(bits=st.integers(2, 8), rows=st.integers(1, 3), n=st.integers(1, 40), seed=st.integers(0, 1000))
def test_round_trip(bits: int, rows: int, n: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 2**bits, (rows, n), generator=generator, dtype=torch.uint8)
    packed = pack_bits(values, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, -(-n * bits // 8))
    assert torch.equal(unpack_bits(packed, bits, n), values)


@given(bits=st.integers(2, 8), n=st.integers(1, 40), seed=st.integers(0, 1000))
def test_fields_are_a_little_endian_bit_stream(bits: int, n: int, seed: int) -> None:
    values = torch.randint(0, 2**bits, (n,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    stream = sum(int(v) << (i * bits) for i, v in enumerate(values))
    assert bytes(pack_bits(values, bits).tolist()) == stream.to_bytes(-(-n * bits // 8), "little")


@pytest.mark.parametrize("bits", range(2, 9))
def test_any_leading_dimensions(bits: int) -> None:
    values = torch.randint(0, 2**bits, (2, 3, 5, 7), dtype=torch.uint8)
    # A slice of a larger tensor: unpacking must not rely on strides.
    packed = torch.cat((pack_bits(values, bits), pack_bits(values, bits)), dim=-2)[..., :5, :]
    assert torch.equal(unpack_bits(packed, bits, 7), values)
