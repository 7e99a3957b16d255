"""The invariants of `QTensor`, and that packing keeps every integer."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flatquant.qtensor import QTensor
from flatquant.spec import QuantSpec


def random_qtensor(bits: int, symmetric: bool, groups: int = 1, shape: tuple[int, ...] = (3, 12)) -> QTensor:
    spec = QuantSpec(bits=bits, symmetric=symmetric)
    values = torch.randint(spec.low, spec.high + 1, shape).to(torch.int8 if symmetric else torch.uint8)
    scale = torch.rand(*shape[:-1], groups) + 0.1
    zero = None if symmetric else torch.randint(0, spec.high + 1, scale.shape).float()
    return QTensor(values=values, scale=scale, zero=zero, spec=spec)


@given(bits=st.integers(2, 8), symmetric=st.booleans(), n=st.integers(1, 30))
def test_packing_keeps_every_integer(bits: int, symmetric: bool, n: int) -> None:
    q = random_qtensor(bits, symmetric, shape=(2, n))
    q.values[0, 0], q.values[1, -1] = q.spec.low, q.spec.high
    back = QTensor.from_packed(q.packed(), q.scale, q.zero, q.spec, n)
    assert back.values.dtype == q.values.dtype
    assert torch.equal(back.values, q.values)
    back.check_range()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("groups", [1, 4])
def test_dequantize_is_scale_times_shifted_integers(symmetric: bool, groups: int) -> None:
    q = random_qtensor(4, symmetric, groups)
    want = torch.stack(
        [
            (q.values[:, j].double() - (0 if q.zero is None else q.zero[:, j // q.group].double()))
            * q.scale[:, j // q.group].double()
            for j in range(12)
        ],
        -1,
    )
    torch.testing.assert_close(q.dequantize(torch.float64), want)
    assert q.dequantize(torch.bfloat16).dtype == torch.bfloat16


def test_contradictions_are_refused() -> None:
    signed, unsigned = QuantSpec(bits=4), QuantSpec(bits=4, symmetric=False)
    int8, uint8, one = torch.zeros(2, 6, dtype=torch.int8), torch.zeros(2, 6, dtype=torch.uint8), torch.ones(2, 1)
    for values, scale, zero, spec, message in [
        (uint8, one, None, signed, "values must be"),
        (int8, one, one, signed, "no zero point"),
        (uint8, one, None, unsigned, "no zero point"),
        (uint8, one, torch.ones(2, 2), unsigned, "differ in shape"),
        (int8, torch.ones(2, 4), None, signed, "do not split"),
        (int8, torch.ones(3, 1), None, signed, "do not split"),
    ]:
        with pytest.raises(ValueError, match=message):
            QTensor(values=values, scale=scale, zero=zero, spec=spec)


@pytest.mark.parametrize("damage", ["high", "nan", "zero"])
def test_check_range_sees_what_shapes_do_not(damage: str) -> None:
    q = random_qtensor(4, True)
    q.check_range()
    if damage == "high":
        q.values[0, 0] = 8
    else:
        q.scale[0, 0] = float("nan") if damage == "nan" else 0.0
    with pytest.raises(ValueError, match=r"outside the grid|positive and finite"):
        q.check_range()
