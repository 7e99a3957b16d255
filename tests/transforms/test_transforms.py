"""Every transform is one matrix P: x -> x P, W -> W P^-T, and x W^T stays what it was."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flatquant.transforms import (
    Compose,
    Diagonal,
    DirectFactor,
    Identity,
    Kronecker,
    Matrix,
    MovedGain,
    Shift,
    SVDFactor,
    Transform,
    Written,
    hadamard_split,
    kronecker_split,
)
from flatquant.transforms.diagonal import BOUND, absmax_scale, second_moment_scale


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def regular(n: int, seed: int) -> Tensor:
    return 2 * torch.eye(n, dtype=torch.float64) + 0.5 * random(n, n, seed=seed) / n**0.5


def kronecker(n: int, seed: int, factor: type = DirectFactor) -> Kronecker:
    n1, n2 = kronecker_split(n)
    return Kronecker(factor(regular(n1, seed)), factor(regular(n2, seed + 1)))


def diagonal(n: int, seed: int) -> Diagonal:
    return Diagonal(random(n, seed=seed).exp())


MAKERS: dict[str, Callable[[int, int], Transform]] = {
    "identity": lambda n, seed: Identity(),
    "diagonal": diagonal,
    "matrix, direct": lambda n, seed: Matrix(DirectFactor(regular(n, seed))),
    "matrix, svd": lambda n, seed: Matrix(SVDFactor(regular(n, seed))),
    "kronecker, direct": kronecker,
    "kronecker, svd": lambda n, seed: kronecker(n, seed, SVDFactor),
    "left only": lambda n, seed: Kronecker(kronecker(n, seed).left, None),
    "right only": lambda n, seed: Kronecker(None, kronecker(n, seed).right),
    "diagonal, then kronecker": lambda n, seed: Compose([diagonal(n, seed), kronecker(n, seed)]),
    "matrix, then diagonal": lambda n, seed: Compose([Matrix(DirectFactor(regular(n, seed))), diagonal(n, seed)]),
    "two matrices": lambda n, seed: Compose([Matrix(DirectFactor(regular(n, seed + i))) for i in range(2)]),
}


@pytest.mark.parametrize("name", MAKERS)
@settings(deadline=None, max_examples=20)
@given(n=st.sampled_from([1, 2, 3, 4, 6, 7, 11, 12, 13, 24, 30]), seed=st.integers(0, 99))
def test_products_with_weights_are_preserved(name: str, n: int, seed: int) -> None:
    transform = MAKERS[name](n, seed)
    x, w = random(2, 3, n, seed=seed + 7), random(5, n, seed=seed + 8)
    y, v = transform(x), transform.inverse_t(w)
    assert y.shape == x.shape
    assert v.shape == w.shape
    torch.testing.assert_close(y @ v.mT, x @ w.mT, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("n", [1, 7, 12])
def test_a_transform_is_one_matrix_and_its_inverse_transpose(name: str, n: int) -> None:
    transform = MAKERS[name](n, 3)
    eye = torch.eye(n, dtype=torch.float64)
    p, p_inv_t = transform(eye), transform.inverse_t(eye)
    torch.testing.assert_close(p_inv_t, torch.linalg.inv(p).mT, rtol=1e-9, atol=1e-9)
    x = random(4, n, seed=1)
    torch.testing.assert_close(transform(x), x @ p)
    if name == "diagonal":
        torch.testing.assert_close(p, torch.diag(transform.scale))


@pytest.mark.parametrize("factor", [DirectFactor, SVDFactor])
@pytest.mark.parametrize("n1, n2", [(2, 3), (3, 2), (1, 5), (4, 4)])
def test_kronecker_is_the_kronecker_product_with_the_left_factor_slow(factor: type, n1: int, n2: int) -> None:
    left, right = regular(n1, 1), regular(n2, 2)
    transform = Kronecker(factor(left), factor(right))
    x = random(3, n1 * n2, seed=5)
    dense = torch.kron(left, right)
    torch.testing.assert_close(transform(x), x @ dense)
    torch.testing.assert_close(transform.inverse_t(x), x @ torch.linalg.inv(dense).mT)
    by_hand = left.mT @ x[0].reshape(n1, n2) @ right
    torch.testing.assert_close(transform(x[:1])[0], by_hand.flatten())


def test_compose_applies_its_parts_in_order() -> None:
    first, second = diagonal(4, 0), Matrix(DirectFactor(regular(4, 1)))
    x = random(3, 4, seed=2)
    torch.testing.assert_close(Compose([first, second])(x), (x * first.scale) @ regular(4, 1))
    assert not torch.allclose(Compose([first, second])(x), Compose([second, first])(x))


def test_written_leaves_activations_and_undoes_in_weights() -> None:
    inner = Matrix(DirectFactor(regular(4, 1)))
    x = random(3, 4, seed=2)
    assert Written(inner)(x) is x
    torch.testing.assert_close(Written(inner).inverse_t(x), inner.inverse_t(x))


def test_a_moved_gain_is_the_norm_s_of_before() -> None:
    gain, x, w = random(4, seed=3), random(3, 4, seed=2), random(5, 4, seed=1)
    moved = MovedGain(gain)
    assert moved(x) is x
    torch.testing.assert_close(moved(x) @ moved.inverse_t(w).mT, (x * gain) @ w.mT)


@pytest.mark.parametrize("name", MAKERS)
def test_gradients_match_finite_differences(name: str) -> None:
    transform = MAKERS[name](6, 1)
    x, w, target = random(2, 6, seed=1).requires_grad_(), random(3, 6, seed=2), random(2, 3, seed=3)
    parameters = list(transform.parameters())

    def loss(*_: Tensor) -> Tensor:  # gradcheck moves x and the parameters in place
        y, v = transform(x), transform.inverse_t(w)
        return (y.tanh() @ v.tanh().mT * target).sum()  # tanh: without it P would cancel and its gradient vanish

    assert torch.autograd.gradcheck(loss, (x, *parameters))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_activations_keep_their_dtype(dtype: torch.dtype) -> None:
    x = random(3, 12, seed=1).to(dtype)
    for name, make in MAKERS.items():
        assert make(12, 1).float()(x).dtype == dtype, name


# -------------------------------------------------------------------------------------------------- split


def test_kronecker_split_is_the_cheapest_of_all() -> None:
    for n in range(1, 3001):
        n1, n2 = kronecker_split(n)
        assert n1 * n2 == n
        assert n1 <= n2
        assert n1 + n2 == min(a + n // a for a in range(1, n + 1) if n % a == 0)


@given(n=st.integers(1, 600), blocks=st.integers(1, 16), split=st.sampled_from([kronecker_split, hadamard_split]))
def test_a_left_factor_in_blocks(n: int, blocks: int, split) -> None:
    n1, n2 = split(blocks * n, blocks)
    assert n1 * n2 == blocks * n
    assert n1 % blocks == 0
    if split is kronecker_split:
        assert n1 + n2 == min(blocks * a + n // a for a in range(1, n + 1) if n % a == 0)


@pytest.mark.parametrize(
    "n, want",
    [(1, (1, 1)), (13, (1, 13)), (576, (24, 24)), (1536, (32, 48)), (4096, (64, 64)), (5120, (64, 80)),
     (11008, (86, 128)), (14336, (112, 128)), (18944, (128, 148)), (28672, (128, 224))],
)  # fmt: skip
def test_kronecker_split_of_known_models(n: int, want: tuple[int, int]) -> None:
    assert kronecker_split(n) == want


# ----------------------------------------------------------------------------------------------- diagonal


def test_a_diagonal_starts_where_asked_and_never_changes_sign() -> None:
    scale = torch.tensor([0.5, 1.0, 20.0])
    d = Diagonal(scale)
    torch.testing.assert_close(d.scale, scale)
    for step in (-3.0, -30.0, 5.0):  # far beyond what a trained c itself would survive
        with torch.no_grad():
            d.log_scale.add_(step)
        assert (d.scale > 0).all()
        assert torch.isfinite(d.scale).all()


def test_a_diagonal_s_start_is_bounded() -> None:
    d = Diagonal(torch.tensor([0.0, 1e-30, 1e30]))
    torch.testing.assert_close(d.scale, torch.tensor([1 / BOUND, 1 / BOUND, BOUND]), rtol=1e-5, atol=0)


def test_absmax_start_is_the_paper_s() -> None:
    x, w = torch.tensor([2.0, 0.0, 1e3]), torch.tensor([0.5, 0.25, 0.0])
    got = absmax_scale(x, w, 0.3)
    for j in range(3):
        want = max(float(w[j]), 1e-5) ** 0.7 / max(float(x[j]), 1e-5) ** 0.3
        assert float(got[j]) == pytest.approx(max(want, 1e-5), rel=1e-5)
    # alpha 0 looks at weights only, alpha 1 at activations only
    torch.testing.assert_close(absmax_scale(x[:1], w[:1], 0.0), w[:1])
    torch.testing.assert_close(absmax_scale(x[:1], w[:1], 1.0), 1 / x[:1])


def test_second_moment_start_minimises_the_product_of_norms() -> None:
    x, w = random(64, 6, seed=0) * torch.arange(1, 7), random(9, 6, seed=1)
    x2, w2 = x.square().mean(0), w.square().mean(0)
    c = second_moment_scale(x2, w2)
    torch.testing.assert_close(c, (w2 / x2) ** 0.25)

    def product(c: Tensor) -> float:
        return float((x2 * c**2).sum() * (w2 / c**2).sum())

    for seed in range(20):
        assert product(c) < product(c * (0.1 * random(6, seed=seed)).exp())
    # A channel without signal has nothing to balance.
    assert second_moment_scale(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])).tolist() == [1.0, 1.0]


def test_a_shift_is_undone_by_the_bias() -> None:
    g = torch.Generator().manual_seed(0)
    x, w, d = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((5, 12), (7, 12), (12,)))
    shift = Shift(d)
    torch.testing.assert_close(shift(x) @ w.mT + shift.product(w), x @ w.mT)
    assert shift(x.half()).dtype == torch.float16
