"""Factors: exact starts, exact inverses, exact gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flatquant.errors import SpecError
from flatquant.modules import trainable_parameters
from flatquant.spec import TransformSpec
from flatquant.transforms import (
    BlockFactor,
    DirectFactor,
    Factor,
    FixedFactor,
    OrthogonalFactor,
    SVDFactor,
    make_factor,
    make_left,
    shared_inverses,
)
from flatquant.transforms.factor import cayley, inverse, polish
from flatquant.transforms.start import random_hadamard, random_orthogonal

FACTORS = [DirectFactor, SVDFactor]
SIZES = st.sampled_from([1, 2, 3, 5, 6, 7, 8, 12, 13, 16, 20])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def regular(n: int, seed: int = 0) -> Tensor:
    """An invertible matrix of modest condition that is neither symmetric nor orthogonal."""
    return (
        torch.eye(n, dtype=torch.float64) * 2
        + 0.5 * torch.randn(n, n, generator=generator(seed), dtype=torch.float64) / n**0.5
    )


def moved(factor: Factor, noise: float = 0.3, seed: int = 0) -> Factor:
    g = generator(seed)
    with torch.no_grad():
        for p in factor.parameters():
            p.add_(noise * torch.randn(p.shape, generator=g, dtype=p.dtype) / len(p) ** 0.5)
    return factor


@pytest.mark.parametrize("kind", FACTORS)
@settings(deadline=None, max_examples=25)
@given(n=SIZES, seed=st.integers(0, 99))
def test_p_transposed_times_its_inverse_is_the_identity(kind: type, n: int, seed: int) -> None:
    factor = moved(kind(regular(n, seed)), seed=seed)
    assert factor.size == n
    eye = torch.eye(n, dtype=torch.float64)
    torch.testing.assert_close(factor.matrix().mT @ factor.inverse_t(), eye, rtol=0, atol=1e-9)
    assert n == 1 or not torch.allclose(factor.matrix().mT @ factor.matrix(), eye, atol=1e-3)  # not orthogonal


@pytest.mark.parametrize("kind", FACTORS)
@settings(deadline=None, max_examples=25)
@given(n=SIZES, seed=st.integers(0, 99))
def test_a_factor_starts_at_exactly_the_matrix_asked_for(kind: type, n: int, seed: int) -> None:
    start = regular(n, seed)
    torch.testing.assert_close(kind(start).matrix(), start, rtol=0, atol=1e-13)
    start = random_orthogonal(n, generator(seed))
    torch.testing.assert_close(kind(start).matrix(), start, rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", FACTORS)
def test_the_identity_starts_without_any_rounding(kind: type) -> None:
    for n in (1, 7, 16):
        factor = kind(torch.eye(n))
        assert torch.equal(factor.matrix(), torch.eye(n))
        assert torch.equal(factor.inverse_t(), torch.eye(n))


def test_a_factor_owns_its_start() -> None:
    start = torch.eye(3)
    factor = DirectFactor(start)
    start += 1
    assert torch.equal(factor.matrix(), torch.eye(3))


@pytest.mark.parametrize("kind", FACTORS)
def test_gradients_through_matrix_and_inverse_match_finite_differences(kind: type) -> None:
    factor = moved(kind(regular(4)))
    names = [n for n, _ in factor.named_parameters()]

    def call(method: str, *values: Tensor) -> Tensor:
        state = dict(zip(names, values, strict=True)) | dict(factor.named_buffers())
        return torch.func.functional_call(_Method(factor, method), {f"factor.{k}": v for k, v in state.items()}, ())

    values = [p.detach().clone().requires_grad_() for p in factor.parameters()]
    for method in ("matrix", "inverse_t"):
        assert torch.autograd.gradcheck(lambda *v, m=method: call(m, *v), values)


class _Method(torch.nn.Module):
    """Calls a factor's method as a forward pass."""

    def __init__(self, factor: Factor, method: str) -> None:
        super().__init__()
        self.factor, self.method = factor, method

    def forward(self) -> Tensor:
        return getattr(self.factor, self.method)()


SHARED = [8] * 20 + [40] * 3 + [48, 64, 130, 256]  # more than a batch has, and sizes that have a batch each


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("warn_only", [False, True])
def test_an_inverse_leaves_the_choice_of_kernels_as_it_was(strict: bool, warn_only: bool) -> None:
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        torch.use_deterministic_algorithms(strict, warn_only=warn_only)
        inverse(torch.eye(3))
        assert torch.are_deterministic_algorithms_enabled() == strict
        assert torch.is_deterministic_algorithms_warn_only_enabled() == warn_only
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def test_inverses_that_are_shared_are_those_of_each_factor_and_have_their_gradients() -> None:
    factors = [DirectFactor(regular(n, seed)) for seed, n in enumerate(SHARED)]
    want = [f.inverse_t() for f in factors]
    gradients = torch.autograd.grad(sum(w.sin().sum() for w in want), [f.p for f in factors])
    with shared_inverses(factors):
        got = [f.inverse_t() for f in factors]
        for f, a, b in zip(factors, got, want, strict=True):
            assert f.inverse_t() is a
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
        for a, b in zip(
            torch.autograd.grad(sum(w.sin().sum() for w in got), [f.p for f in factors]), gradients, strict=True
        ):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    assert all(f.shared is None for f in factors)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_graph_can_hold_all_inverses_of_a_model() -> None:
    factors = [DirectFactor(regular(n, seed).float().cuda()) for seed, n in enumerate(SHARED * 4)]

    def step() -> None:
        with shared_inverses(factors):
            sum(f.inverse_t().sin().sum() for f in factors).backward()

    def gradients() -> list[Tensor]:
        found = [f.p.grad.clone() for f in factors]
        for f in factors:
            f.p.grad = None
        return found

    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        step()
        want = gradients()
        with torch.cuda.graph(graph, stream=stream):
            step()
        graph.replay()
        for a, b in zip(gradients(), want, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", FACTORS)
def test_all_parameters_are_declared_for_training(kind: type) -> None:
    factor = kind(regular(5))
    assert {id(p) for p in trainable_parameters(factor)["transform"]} == {id(p) for p in factor.parameters()}


# ------------------------------------------------------------------------------------------ orthogonal ones


@pytest.mark.parametrize("kind", [FixedFactor, OrthogonalFactor])
@pytest.mark.parametrize("n", [1, 2, 9, 12, 30])
def test_orthogonal_factors_are_their_own_inverse_transpose(kind: type, n: int) -> None:
    start = random_hadamard(n, generator())
    factor = kind(start).double()  # a start that was rounded to float32
    assert factor.size == n
    eye = torch.eye(n, dtype=torch.float64)
    torch.testing.assert_close(factor.matrix().mT @ factor.inverse_t(), eye, rtol=0, atol=1e-12)
    torch.testing.assert_close(factor.matrix().mT @ factor.matrix(), eye, rtol=0, atol=1e-12)
    torch.testing.assert_close(factor.matrix().float(), start, rtol=0, atol=1e-6)


def test_only_a_rotation_is_trained_and_its_gradient_is_tangent() -> None:
    start = random_orthogonal(7, generator())
    assert not any(trainable_parameters(FixedFactor(start)).values())
    factor = OrthogonalFactor(start).double()
    assert [id(p) for p in trainable_parameters(factor)["rotation"]] == [id(factor.q)]
    target = torch.randn(7, 7, generator=generator(), dtype=torch.float64)
    (factor.matrix() * target).sum().backward()
    q, grad = factor.q.detach(), factor.q.grad
    assert grad is not None
    torch.testing.assert_close(q.mT @ grad + grad.mT @ q, torch.zeros_like(q), rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------------ parts


@settings(deadline=None, max_examples=25)
@given(n=SIZES, seed=st.integers(0, 99), size=st.floats(0.01, 10))
def test_cayley_gives_rotations(n: int, seed: int, size: float) -> None:
    raw = size * torch.randn(n, n, generator=generator(seed), dtype=torch.float64)
    q = cayley(raw)
    torch.testing.assert_close(q.mT @ q, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-11)
    assert torch.linalg.det(q) == pytest.approx(1.0)
    assert torch.equal(cayley(torch.zeros(n, n)), torch.eye(n))
    half = (raw.tril(-1) - raw.tril(-1).mT) / 2  # (I - A/2) Q = I + A/2
    eye = torch.eye(n, dtype=torch.float64)
    torch.testing.assert_close((eye - half) @ q, eye + half, rtol=1e-10, atol=1e-10)


def test_polish_squares_the_error() -> None:
    u = random_orthogonal(9, generator()).double()
    eye = torch.eye(9, dtype=torch.float64)
    rounded = (u.mT @ u - eye).abs().max()
    polished = polish(u).mT @ polish(u) - eye
    assert 1e-9 < rounded < 1e-6
    assert polished.abs().max() < 1e-12


def test_polish_keeps_float32_under_autocast() -> None:
    """A rotation that every block shares gathers gradients that float16 cannot hold."""
    u = torch.linalg.qr(torch.randn(8, 8)).Q.requires_grad_()
    with torch.autocast("cpu", torch.float16):
        y = polish(u)
    assert y.dtype == torch.float32
    y.backward(torch.full((8, 8), 1e6))
    assert u.grad is not None
    assert u.grad.isfinite().all()


# ----------------------------------------------------------------------------------------------- starts


@pytest.mark.parametrize("start", [random_orthogonal, random_hadamard])
@pytest.mark.parametrize("n", [1, 2, 6, 7, 11, 12, 16, 40])
def test_random_starts_are_orthogonal_and_seeded(start, n: int) -> None:
    a, again, other = start(n, generator(1)), start(n, generator(1)), start(n, generator(2))
    assert a.shape == (n, n)
    assert a.dtype == torch.float32
    torch.testing.assert_close(a.mT @ a, torch.eye(n), rtol=0, atol=1e-5)
    assert torch.equal(a, again)
    assert n <= 2 or not torch.equal(a, other)


def test_a_hadamard_of_a_power_of_two_spreads_every_channel_evenly() -> None:
    h = random_hadamard(16, generator())
    torch.testing.assert_close(h.abs(), torch.full((16, 16), 0.25), rtol=0, atol=0)


def test_a_hadamard_start_leaves_no_more_to_chance_than_it_must() -> None:
    for n, d in ((12, 12), (20, 20), (36, 36), (18, 2), (88, 88)):
        magnitudes = random_hadamard(n, generator()).abs().unflatten(0, (-1, d)).unflatten(-1, (-1, d))
        spread = magnitudes.amax((1, 3)) - magnitudes.amin((1, 3))  # inside every d x d tile
        assert float(spread.max()) < 1e-6


def test_random_starts_leave_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    random_orthogonal(5, generator())
    random_hadamard(12, generator())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "parameters, kind",
    [("inverse", DirectFactor), ("svd", SVDFactor), ("fixed", FixedFactor), ("rotation", OrthogonalFactor)],
)
@pytest.mark.parametrize("init", ["orthogonal", "hadamard", "identity"])
def test_make_factor_makes_what_the_spec_says(parameters, kind: type, init) -> None:
    factor = make_factor(TransformSpec(kind="matrix", parameters=parameters, init=init), 12, generator(4))
    assert type(factor) is kind
    if init == "identity":
        want = torch.eye(12)
    else:
        want = {"orthogonal": random_orthogonal, "hadamard": random_hadamard}[init](12, generator(4))
    torch.testing.assert_close(factor.matrix(), want, rtol=0, atol=2e-6)


def test_a_product_is_that_of_two_small_matrices() -> None:
    spec = TransformSpec(kind="blocks", size=32, parameters="product", init="hadamard")
    factor = make_factor(spec, 32, torch.Generator().manual_seed(0)).double()
    assert [tuple(p.shape) for p in factor.parameters()] == [(4, 4), (8, 8)]
    with torch.no_grad():
        torch.testing.assert_close(factor.matrix() @ factor.matrix().mT, torch.eye(32).double(), rtol=0, atol=1e-6)
        for p in factor.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)).double())
    torch.testing.assert_close(factor.matrix().mT @ factor.inverse_t(), torch.eye(32).double())
    with shared_inverses([factor]):
        torch.testing.assert_close(factor.matrix().mT @ factor.inverse_t(), torch.eye(32).double())
    with pytest.raises(SpecError, match="no product"):
        TransformSpec(kind="kronecker", parameters="product")


# ------------------------------------------------------------------------------------------------- blocks


@settings(deadline=None, max_examples=25)
@given(
    size=st.integers(1, 6),
    ranks=st.sampled_from([2, 3, 4]),
    parameters=st.sampled_from(["inverse", "svd", "rotation"]),
    init=st.sampled_from(["orthogonal", "hadamard", "identity"]),
    seed=st.integers(0, 99),
)
def test_blocks_stay_blocks_and_train(size: int, ranks: int, parameters: str, init: str, seed: int) -> None:
    spec = TransformSpec(kind="kronecker", parameters=parameters, init=init, ranks=ranks)  # type: ignore[arg-type]
    factor = make_left(spec, size * ranks, generator(seed))
    assert isinstance(factor, BlockFactor)
    assert factor.size == size * ranks
    if parameters != "rotation":
        moved(factor, seed=seed)
    p, inverse = factor.matrix(), factor.inverse_t()
    torch.testing.assert_close(p.mT @ inverse, torch.eye(size * ranks), rtol=0, atol=1e-4)
    inside = torch.block_diag(*torch.ones(ranks, size, size)).bool()
    assert (p[~inside] == 0).all()
    assert (inverse[~inside] == 0).all()
    with shared_inverses([factor]):
        torch.testing.assert_close(factor.inverse_t(), inverse, rtol=1e-4, atol=1e-4)
    (p * torch.randn(p.shape, generator=generator(seed))).sum().backward()
    trained = [q for group in trainable_parameters(factor).values() for q in group]
    assert sum(q.grad is not None for q in trained) >= ranks


def test_one_rank_has_one_factor() -> None:
    spec = TransformSpec(kind="kronecker", init="orthogonal")
    assert torch.equal(make_left(spec, 6, generator()).matrix(), make_factor(spec, 6, generator()).matrix())


@pytest.mark.parametrize("kind", ["matrix", "diagonal", "blocks", "head"])
def test_only_kronecker_factors_are_made_for_ranks(kind: str) -> None:
    size = 4 if kind == "blocks" else 0
    with pytest.raises(SpecError, match=f"a {kind} is not made for ranks: only a kronecker is"):
        TransformSpec(kind=kind, size=size, ranks=2)  # type: ignore[arg-type]
