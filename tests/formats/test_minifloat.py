"""The small numbers, by the tables of their specifications."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flatquant.formats.minifloat import E2M1, E4M3_MAX, from_e4m3, from_e8m0, to_e4m3, to_e8m0

CODES = torch.arange(256, dtype=torch.uint8)


def e2m1(code: int) -> float:
    """OCP MX v1.0, table 5: sign, two bits of exponent with bias 1, one of mantissa; subnormal at exponent 0."""
    sign, exponent, mantissa = -1 if code & 8 else 1, code >> 1 & 3, code & 1
    return sign * (mantissa / 2 if exponent == 0 else 2.0 ** (exponent - 1) * (1 + mantissa / 2))


def e4m3(code: int) -> float:
    """OCP FP8 v1.0, table 1: bias 7, three bits of mantissa; S.1111.111 is NaN, and there is no infinity."""
    sign, exponent, mantissa = -1 if code & 128 else 1, code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    return sign * (2.0**-6 * mantissa / 8 if exponent == 0 else 2.0 ** (exponent - 7) * (1 + mantissa / 8))


def test_e2m1_is_the_table() -> None:
    assert [e2m1(code) for code in range(8)] == list(E2M1)
    assert max(E2M1) == 6.0  # table 5's largest normal number
    assert min(m for m in E2M1 if m > 0) == 0.5  # and its only subnormal one


def test_e4m3_is_the_table() -> None:
    want = torch.tensor([e4m3(code) for code in range(256)])
    torch.testing.assert_close(from_e4m3(CODES), want, rtol=0, atol=0, equal_nan=True)
    assert want[0x7E] == E4M3_MAX == 448.0


def test_e8m0_is_the_table() -> None:
    """OCP MX v1.0, table 7: 2^-127 to 2^127, and NaN."""
    number = from_e8m0(CODES)
    assert [math.log2(x) for x in number[:-1].double().tolist()] == list(range(-127, 128))
    assert math.isnan(number[-1])


def test_scales_that_are_numbers_already_stay() -> None:
    assert torch.equal(to_e8m0(from_e8m0(CODES)), CODES)
    positive = torch.arange(1, 128, dtype=torch.uint8)
    assert torch.equal(to_e4m3(from_e4m3(positive)), positive)  # the last is NaN


@given(st.floats(2.0**-9, 448.0, width=32))
def test_e4m3_is_nearest_with_ties_to_even(x: float) -> None:
    table = [e4m3(code) for code in range(127)]
    code = int(to_e4m3(torch.tensor([x])))
    errors = [abs(x - number) for number in table]
    nearest = [c for c, error in enumerate(errors) if error == min(errors)]
    assert code == (nearest[0] if len(nearest) == 1 else next(c for c in nearest if c % 2 == 0))


@pytest.mark.parametrize("x, want", [(0.0, 0.125), (2.0**-11, 0.125), (449.0, 448.0), (1e30, 448.0), (math.inf, 448.0)])
def test_e4m3_beyond_its_ends(x: float, want: float) -> None:
    assert from_e4m3(to_e4m3(torch.tensor([x]))).item() == want


@given(st.floats(0.0, width=32, allow_infinity=False))
def test_e8m0_is_the_power_of_two_below(x: float) -> None:
    """Section 6.3: the largest power of two at most x; the smallest there is for what is less."""
    power = float(from_e8m0(to_e8m0(torch.tensor([x]))))
    assert power == 2.0**-127 if x < 2.0**-126 else power <= x < 2 * power


def test_e8m0_of_what_is_no_number_is_nan() -> None:
    assert from_e8m0(to_e8m0(torch.tensor([math.nan, math.inf]))).isnan().all()
