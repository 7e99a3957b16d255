"""Grouped products are the products of the groups one after another, and so are their gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flatquant.ops import grouped_linear as op
from flatquant.ops.grouped_linear import reference
from flatquant.ops.int_linear import grouped_int_linear
from flatquant.ops.int_linear import reference as integers

CUDA = torch.cuda.is_available()
pytestmark = [pytest.mark.gpu] if CUDA else []
DEVICE = torch.device("cuda" if CUDA else "cpu")
COUNTS = st.lists(st.sampled_from((0, 0, 1, 2, 7)), min_size=1, max_size=5)


@pytest.mark.parametrize("way", [op.one, op.padded], ids=lambda way: way.__name__)
@settings(deadline=None, max_examples=40)
@given(counts=COUNTS, o=st.sampled_from((8, 24)), n=st.sampled_from((8, 16)), seed=st.integers(0, 99))
def test_groups_at_once_are_groups_one_after_another(way, counts: list[int], o: int, n: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    # PyTorch's kernel has no float64, and on CUDA bfloat16 alone.
    dtype = torch.float64 if way is op.padded else torch.bfloat16 if CUDA else torch.float32
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    x = torch.randn(sum(counts), n, generator=g).to(DEVICE, dtype).requires_grad_()
    weight = torch.randn(len(counts), o, n, generator=g).to(DEVICE, dtype).requires_grad_()
    towards = torch.randn(sum(counts), o, generator=g).to(DEVICE, dtype)
    found = []
    for product in (reference.grouped_linear, way):
        y = product(x, weight, counts)
        grads = torch.autograd.grad((y * towards).sum() + y.sum(), (x, weight)) if sum(counts) else ()
        found.append((y, *grads))
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@settings(deadline=None, max_examples=40)
@given(counts=COUNTS, groups=st.sampled_from((1, 2)), zeros=st.booleans(), seed=st.integers(0, 99))
def test_integers_of_groups_are_multiplied_exactly(counts: list[int], groups: int, zeros: bool, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    rows, o, n = sum(counts), 6, 8
    x = torch.randint(-8, 8, (rows, n), generator=g, dtype=torch.int8)
    w = torch.randint(-8, 8, (len(counts), o, n), generator=g, dtype=torch.int8)
    x_scale, scale = torch.rand(rows, 1, generator=g) + 0.1, torch.rand(len(counts), o, groups, generator=g) + 0.1
    x_zero, zero = ((torch.randint(-3, 3, t.shape, generator=g).float() if zeros else None) for t in (x_scale, scale))
    got = grouped_int_linear(x, x_scale, x_zero, w, scale, zero, counts)
    start = 0
    for e, count in enumerate(counts):
        part = slice(start, start + count)
        own = None if x_zero is None else x_zero[part]
        of_weight = None if zero is None else zero[e]
        want = integers.int_linear(x[part], x_scale[part], own, w[e], scale[e], of_weight, None, torch.float32)
        if groups == 1:
            assert torch.equal(got[part], want)
        torch.testing.assert_close(got[part], want)
        start += count


def test_autocast_decides_the_dtype() -> None:
    x, weight = torch.randn(3, 8, device=DEVICE), torch.randn(2, 8, 8, device=DEVICE)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert op.grouped_linear(x, weight, [2, 1]).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("counts", "way"),
    [
        ([4, 4, 4], op.padded),
        ([1, 0, 900], op.padded),
        ([1] * 9 + [900], reference.grouped_linear),
        ([0, 3], op.padded),
    ],
)
def test_few_rows_and_even_groups_are_padded(counts: list[int], way, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.empty(sum(counts), 8), torch.empty(len(counts), 8, 8)
    assert op.way(x, weight, counts) is reference.grouped_linear  # on a CPU
    monkeypatch.setattr(op, "gains", lambda device: True)
    assert op.way(x, weight, counts) is way
