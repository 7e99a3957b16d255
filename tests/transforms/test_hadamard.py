"""Hadamard matrices: H H^T = n I in integers, for every order that a construction reaches."""

import pytest
import torch

from flatquant.transforms.hadamard import hadamard, hadamard_split, has_hadamard, largest_hadamard_divisor

# One of each construction, and what the models of this field need.
SYLVESTER = [1, 2, 4, 8, 64, 256]
PALEY_ONE = [12, 20, 24, 28, 44, 60, 80, 108, 140, 168]  # 28 - 1 = 27 = 3^3
PALEY_TWO = [36, 52, 76, 100, 148]  # 52 / 2 - 1 = 25 = 5^2, 100 / 2 - 1 = 49 = 7^2
WILLIAMSON = [92, 172]
PRODUCTS = [40, 56, 144, 576, 1536]


@pytest.mark.parametrize("n", SYLVESTER + PALEY_ONE + PALEY_TWO + WILLIAMSON + PRODUCTS)
def test_rows_are_orthogonal_and_of_ones(n: int) -> None:
    h = hadamard(n)
    assert h.shape == (n, n)
    assert torch.equal(h.abs(), torch.ones(n, n))
    assert torch.equal(h @ h.mT, n * torch.eye(n))  # float32 is exact below 2^24


@pytest.mark.parametrize("n", [3, 6, 9, 10, 18, 90, 154])
def test_orders_that_cannot_exist_are_refused(n: int) -> None:
    assert not has_hadamard(n)
    with pytest.raises(ValueError, match=f"order {n}"):
        hadamard(n)


def test_all_small_orders_but_three_are_reached() -> None:
    """Below 200 they all exist; ours lack those that need a larger search (29, 39) or other constructions."""
    assert [n for n in range(4, 200, 4) if not has_hadamard(n)] == [116, 156, 188]


@pytest.mark.parametrize("n, d", [(576, 576), (90, 2), (9, 1), (154, 2), (43 * 8, 344), (7 * 16, 112)])
def test_the_largest_divisor_that_can_be_mixed(n: int, d: int) -> None:
    assert largest_hadamard_divisor(n) == d


@pytest.mark.parametrize(
    "n, split",
    [
        (11008, (64, 172)),  # not the cheapest, (86, 128)
        (8960, (80, 112)),
        (18944, (128, 148)),
        (4864, (64, 76)),
        (29568, (168, 176)),
        (1536, (32, 48)),
        (28672, (128, 224)),
        (154, (11, 14)),  # nothing to gain: the cheapest
        (7, (1, 7)),
    ],
)
def test_splits_have_hadamard_matrices_on_both_sides_where_they_can(n: int, split: tuple[int, int]) -> None:
    assert hadamard_split(n) == split
