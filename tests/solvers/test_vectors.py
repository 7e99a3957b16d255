"""Codebooks: k-means, the recursion with vectors for values, and what is stored of the result."""

import pytest
import torch
from torch import Tensor

from flatquant.codebook import Book, CodebookTensor
from flatquant.errors import CalibrationError, SpecError
from flatquant.ops.pack.reference import pack_bits, unpack_bits
from flatquant.quantizers import VectorGrid, WeightGrid
from flatquant.solvers import GPTQ, VectorSolver
from flatquant.solvers.recursion import compensate, one_by_one
from flatquant.spec import CodebookSpec, QuantSpec
from tests.solvers.test_solvers import correlated, damped, random


def skewed(n: int, seed: int = 0) -> Tensor:
    """A Hessian whose diagonal spans orders of magnitude."""
    size = (1.5 * random(n, seed=seed + 7)).exp()
    return correlated(n, seed) * torch.outer(size, size)


def proxy(w: Tensor, q: CodebookTensor, h: Tensor) -> float:
    d = w - q.dequantize(torch.float64)
    return float((d @ h * d).sum())


def grid(bits: int = 2, **spec) -> VectorGrid:
    return VectorGrid(CodebookSpec(**{"length": 4, "main_bits": 8, **spec}), bits)


class Fixed:
    """Entries that are given, not fitted."""

    def __init__(self, entries: Tensor, spec: CodebookSpec, bits: int) -> None:
        self.entries, self.spec, self.bits = entries, spec, bits

    def fit(self, vectors: Tensor, weights: Tensor, bits: int) -> Tensor:
        return self.entries

    nearest = VectorGrid.nearest


# -------------------------------------------------------------------------------------------------- k-means


def cost(vectors: Tensor, weights: Tensor, entries: Tensor) -> float:
    return float((weights * torch.cdist(vectors, entries).square().amin(1)).sum())


def test_entries_are_weighted_means_of_the_vectors_that_choose_them() -> None:
    vectors, weights = random(2000, 4).float(), random(2000, seed=1).abs().float()
    entries = grid().fit(vectors, weights, 5)
    assert entries.shape == (32, 4)
    assert torch.equal(entries, entries.half().float())
    choice = grid().nearest(vectors, entries)
    assert torch.equal(choice, torch.cdist(vectors, entries).argmin(1))
    for i in range(32):
        own = choice == i
        assert own.any()
        mean = (vectors[own] * weights[own, None]).sum(0) / weights[own].sum()
        torch.testing.assert_close(entries[i], mean, rtol=0.1, atol=0.1)  # k-means stops shortly before the fixed point


def test_weights_move_the_entries_to_where_errors_cost() -> None:
    vectors = random(4000, 2).float()
    weights = torch.where(vectors[:, 0] > 0, 100.0, 0.01)
    weighted, plain = grid().fit(vectors, weights, 4), grid().fit(vectors, torch.ones(4000), 4)
    assert cost(vectors, weights, weighted) < 0.75 * cost(vectors, weights, plain)
    assert cost(vectors, torch.ones(4000), plain) < cost(vectors, torch.ones(4000), weighted)


def test_k_means_finds_clusters_and_repeats_itself() -> None:
    centres = 10 * random(16, 3).float()
    vectors = (centres[:, None] + 0.01 * random(16, 50, 3, seed=1).float()).flatten(0, 1)
    entries = grid().fit(vectors, torch.ones(800), 4)
    assert torch.cdist(centres, entries).amin(1).max() < 0.05
    state = torch.get_rng_state()
    assert torch.equal(entries, grid().fit(vectors, torch.ones(800), 4))
    assert torch.equal(state, torch.get_rng_state())


def test_k_means_of_degenerate_vectors() -> None:
    same = torch.ones(400, 4)
    assert (grid().fit(same, torch.ones(400), 4) == 1).all()
    unused = grid().fit(random(400, 4).float(), torch.zeros(400), 4)
    assert torch.isfinite(unused).all()
    assert grid().fit(random(20, 4).float(), torch.ones(20), 8).shape == (1, 4)  # 20 vectors do not make 256 entries


# -------------------------------------------------------------------------------------------------- the recursion


def test_vectors_of_one_on_uniform_levels_are_gptq() -> None:
    w, h = random(6, 24).float(), correlated(24).float()
    w = w / w.abs().max() * 7  # one scale, 1, for all: that of the levels -8 .. 7
    spec = CodebookSpec(length=1, main_bits=4)
    ours = VectorSolver().solve(w, Fixed(torch.arange(-8.0, 8.0)[:, None], spec, 4), h)

    class Unit(WeightGrid):
        def grid(self, w: Tensor) -> tuple[Tensor, None]:
            return torch.ones(w.shape[0], 1), None

    want = GPTQ(act_order=True).solve(w, Unit(QuantSpec(bits=4)), h)
    assert torch.equal(ours.dequantize(), want.dequantize())


def test_an_isotropic_hessian_gives_the_nearest_entries() -> None:
    w = random(16, 96).float()
    books = grid(2, length=2, main_bits=4)
    q = VectorSolver().solve(w, books, 2.0 * torch.eye(96))
    vectors = w.mT.reshape(-1, 2)
    want = q.main.entries.float()[books.nearest(vectors, q.main.entries.float())].view(96, 16).mT
    assert torch.equal(q.dequantize(), want)


@pytest.mark.parametrize("block_size", [1, 7, 128])
def test_the_loss_is_what_the_theory_predicts(block_size: int) -> None:
    """The recursion's sum of e^2, from its own definition, is the true loss of the result (of the damped H)."""
    w, h = random(16, 40), skewed(40)
    q = VectorSolver(block_size=block_size).solve(w, grid(2, length=2, main_bits=4), h)
    result, moved, predicted = q.dequantize(torch.float64), w.clone(), 0.0
    order = torch.argsort(h.diagonal(), descending=True).tolist()
    for i, column in enumerate(order):
        free = order[i:]
        inverse = torch.linalg.inv(damped(h)[free][:, free])
        error = moved[:, column] - result[:, column]
        predicted += float((error**2 / inverse[0, 0]).sum())
        moved[:, free] -= torch.outer(error / inverse[0, 0], inverse[0])
        # Each vector is the nearest entry to what compensation made of the column.
        vectors = result[:, column].view(-1, 2)
        target = (moved[:, column] + error).view(-1, 2)  # moved[:, column] is the result now
        entries = q.main.entries.double()
        assert torch.equal(vectors, entries[torch.cdist(target, entries).argmin(1)])
    assert predicted == pytest.approx(proxy(w, q, damped(h)), rel=1e-8)


@pytest.mark.parametrize("seed", range(5))
def test_compensation_weights_second_books_and_outliers_each_help(seed: int) -> None:
    w, h = random(256, 48, seed=seed), skewed(48, seed=seed + 50)
    plain = VectorSolver().solve(w, grid(2, main_bits=8), torch.eye(48, dtype=torch.float64))
    weighted = VectorSolver().solve(w, grid(2, main_bits=8), torch.diag(h.diagonal()))
    ours = VectorSolver().solve(w, grid(2, main_bits=8), h)
    more = VectorSolver().solve(w, grid(4, main_bits=8), h)
    apart = VectorSolver().solve(w, grid(2, main_bits=8, outliers=0.1, outlier_length=1, outlier_bits=6), h)
    assert proxy(w, weighted, h) < proxy(w, plain, h)
    assert proxy(w, ours, h) < proxy(w, weighted, h)
    assert proxy(w, more, h) < proxy(w, ours, h)
    assert proxy(w, apart, h) < proxy(w, ours, h)


def test_large_curvature_first_is_better_than_last() -> None:
    better = 0
    for seed in range(10):
        w, h = random(64, 48, seed=seed), skewed(48, seed=seed + 50)
        first = VectorSolver().solve(w, grid(), h)
        entries = Fixed(first.main.entries.double(), grid().spec, 2)
        result = torch.empty_like(w)

        def fix(columns: Tensor, block: Tensor, u: Tensor, result: Tensor = result, e: Fixed = entries) -> Tensor:
            def fix_column(i: int, column: Tensor) -> Tensor:
                result[:, columns[i]] = e.entries[e.nearest(column.view(-1, 4), e.entries)].flatten()
                return result[:, columns[i]]

            return one_by_one(block, u, fix_column)

        compensate(w, h, torch.argsort(h.diagonal()), fix, damping=0.01, block_size=128)
        d = w - result
        better += proxy(w, first, h) <= float((d @ h * d).sum())
    assert better >= 9


def test_two_bits_in_vectors_beat_two_bits_on_a_grid() -> None:
    w, h = random(128, 64), correlated(64)
    uniform = GPTQ(act_order=True).solve(w, WeightGrid(QuantSpec(bits=2)), h)
    d = w - uniform.dequantize(torch.float64)
    assert proxy(w, VectorSolver().solve(w, grid(), h), h) < 0.5 * float((d @ h * d).sum())


def test_channels_that_are_never_used_cost_nothing_and_change_nothing() -> None:
    w, h = random(16, 24), correlated(24)
    dead = [0, 5, 23]
    h[dead] = 0
    h[:, dead] = 0
    other = w.clone()
    other[:, dead] = 100.0
    alive = [i for i in range(24) if i not in dead]
    a, b = (VectorSolver().solve(x, grid(2, length=2, main_bits=4), h).dequantize() for x in (w, other))
    assert torch.equal(a[:, alive], b[:, alive])


def test_what_it_needs_is_asked_for() -> None:
    with pytest.raises(CalibrationError, match="calibration text"):
        VectorSolver().solve(random(4, 4), grid(), None)
    w, h = random(8, 12), correlated(12)
    w0, h0 = w.clone(), h.clone()
    VectorSolver().solve(w, grid(), h)
    assert torch.equal(w, w0)
    assert torch.equal(h, h0)


# -------------------------------------------------------------------------------------------------- what is stored


@pytest.mark.parametrize(
    "bits, spec",
    [
        (2, {}),
        (3, {}),
        (4, {"outliers": 0.1}),
        (2, {"length": 6, "main_bits": 12, "outliers": 0.05, "outlier_length": 4, "outlier_bits": 11}),
        (3, {"length": 3, "main_bits": 5}),
    ],
)
def test_books_round_trip_through_bytes_of_the_promised_size(bits: int, spec: dict) -> None:
    books = grid(bits, **spec)
    w, h = random(96, 50), correlated(50)
    q = VectorSolver().solve(w, books, h)
    q.check_range()
    assert q.shape == (96, 50)
    few = books.spec.outlier_columns(50)
    main, residual = books.spec.index_bits(bits)
    assert main + residual == bits * books.spec.length
    assert (q.residual is not None) == (residual > 0)
    assert (q.columns is not None) == (few > 0)
    for book, width, length, columns in (
        (q.main, main, books.spec.length, 50 - few),
        (q.residual, residual, books.spec.length, 50 - few),
        (q.outliers, books.spec.outlier_bits, books.spec.outlier_length, few),
    ):
        if book is None:
            continue
        packed = book.packed()
        assert packed.shape == (96 // length, -(-columns * width // 8))
        assert book.entries.shape == (books.spec.entries(width, 96 // length * columns), length)
        again = Book.from_packed(packed, book.entries, book.bits, columns)
        assert torch.equal(again.indices, book.indices)
        assert torch.equal(again.dequantize(), book.dequantize())
    if q.columns is not None:
        assert set(q.columns.tolist()) == set(torch.argsort(h.diagonal(), descending=True)[:few].tolist())
        assert q.outliers is not None
        assert torch.equal(q.dequantize()[:, q.columns.long()], q.outliers.dequantize())


@pytest.mark.parametrize("bits", range(1, 17))
@pytest.mark.parametrize("n", [1, 7, 8, 33])
def test_fields_of_up_to_sixteen_bits_pack(bits: int, n: int) -> None:
    g = torch.Generator().manual_seed(bits)
    values = torch.randint(0, 1 << bits, (3, n), generator=g, dtype=torch.int32)
    values = values.to(torch.uint8) if bits <= 8 else values
    packed = pack_bits(values, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (3, -(-n * bits // 8))
    again = unpack_bits(packed, bits, n)
    assert again.dtype == values.dtype
    assert torch.equal(again, values)
    stream = "".join(format(int(byte), "08b")[::-1] for byte in packed[0])
    fields = [stream[i * bits : (i + 1) * bits] for i in range(n)]
    assert [int(f[::-1], 2) for f in fields] == values[0].tolist()


def test_invariants_are_checked() -> None:
    entries, indices = torch.zeros(4, 2, dtype=torch.float16), torch.zeros(3, 5, dtype=torch.uint8)
    book = Book(indices=indices, entries=entries, bits=2)
    for wrong in ({"indices": indices.int()}, {"entries": entries.float()}, {"bits": 9}, {"indices": indices[0]}):
        with pytest.raises(ValueError, match="must be"):
            Book(**{"indices": indices, "entries": entries, "bits": 2, **wrong})
    with pytest.raises(ValueError, match="come together"):
        CodebookTensor(main=book, outliers=book)
    with pytest.raises(ValueError, match="same vectors"):
        CodebookTensor(main=book, residual=Book(indices=indices[:2], entries=entries, bits=2))
    with pytest.raises(ValueError, match="index 4 of 4"):
        Book(indices=indices + 4, entries=entries, bits=3).check_range()
    with pytest.raises(ValueError, match="finite"):
        Book(indices=indices, entries=entries + torch.nan, bits=2).check_range()


def test_specs_that_make_no_sense_are_refused() -> None:
    assert CodebookSpec(length=8, main_bits=16).index_bits(2) == (16, 0)
    assert CodebookSpec(length=8, main_bits=16).index_bits(3) == (16, 8)
    assert CodebookSpec().index_bits(4) == (8, 8)
    with pytest.raises(SpecError, match="two codebooks of 8 have less"):
        CodebookSpec().index_bits(5)
    for wrong in ({"length": 0}, {"main_bits": 17}, {"outliers": 1.0}, {"outlier_bits": 0}):
        with pytest.raises(SpecError):
            CodebookSpec(**wrong)
