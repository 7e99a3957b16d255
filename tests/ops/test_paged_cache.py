"""Pages hold what a cache in one piece holds, wherever they lie, and attention over them is attention over it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flatquant.ops.kv_cache import Store
from flatquant.ops.kv_cache.reference import attend as attend_dense
from flatquant.ops.pack.reference import pack_bits
from flatquant.ops.paged_cache import Batch, attend, place_bytes, reference, stores_of, write
from flatquant.ops.quantize.reference import quantize, row_grid

HEADS, DIM, PLACES = 2, 8, 4


def codes(x: Tensor) -> Store:
    """(.., head_dim) on the grid of each row."""
    one = torch.ones(1)
    scale, zero = row_grid(x, one, one, 0, 15)
    assert zero is not None
    packed = pack_bits(quantize(x, scale, zero, 0, 15).to(torch.uint8), 4)
    return Store(packed, scale[..., 0], zero[..., 0].to(torch.uint8))


class Filled:
    """Requests of some lengths in pages that lie in any order, and the same of each in one piece."""

    def __init__(self, lengths: list[int], seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        counts = [-(-n // PLACES) for n in lengths]
        pages = 1 + torch.randperm(sum(counts) + 2, generator=g)  # page 0 is nobody's
        self.cache = torch.randint(0, 256, (len(pages) + 1, HEADS, PLACES, place_bytes(DIM)), generator=g).to(
            torch.uint8
        )
        self.keys, self.values = stores_of(self.cache)
        self.table = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
        self.rows = []
        for request, (n, own) in enumerate(zip(lengths, pages[: sum(counts)].split(counts), strict=True)):
            self.table[request, : len(own)] = own
            k, v = (torch.randn(n, HEADS, DIM, generator=g) for _ in range(2))
            slots = own.repeat_interleave(PLACES)[:n] * PLACES + torch.arange(n) % PLACES
            write(self.keys, codes(k), slots)
            write(self.values, codes(v), slots)
            self.rows.append((codes(k), codes(v)))

    def dense(self, request: int) -> tuple[Store, Store]:
        """As one sequence of `ops.kv_cache`.  # (1, heads, n, ..)"""
        keys, values = (Store(*(part.transpose(0, 1)[None] for part in side)) for side in self.rows[request])
        return keys, values


lengths = st.lists(st.integers(1, 11), min_size=1, max_size=3)
windows = st.sampled_from([None, 1, 3, 6, 40])


@settings(deadline=None, max_examples=40)
@given(lengths=lengths, window=windows, seed=st.integers(0, 99))
def test_one_new_token_sees_what_it_sees_in_one_piece(lengths: list[int], window: int | None, seed: int) -> None:
    filled = Filled(lengths, seed)
    q = torch.randn(len(lengths), 2 * HEADS, DIM, generator=torch.Generator().manual_seed(seed))
    batch = Batch(filled.table, torch.tensor(lengths), torch.arange(len(lengths) + 1))
    got = attend(q, filled.keys, filled.values, batch, window, 0.3)
    for request, n in enumerate(lengths):
        last, start = torch.tensor([n - 1]), torch.tensor([0])
        want, _ = attend_dense(q[request][None], *filled.dense(request), last, start, window, 0.3)
        torch.testing.assert_close(got[request], want[0, :, 0], rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=40)
@given(
    lengths=lengths,
    window=windows,
    cap=st.sampled_from([None, 2.0]),
    short=st.booleans(),
    part=st.integers(1, 5),
    scores=st.sampled_from([reference.SCORES, 30]),
    seed=st.integers(0, 99),
)
def test_parts_of_a_prompt_are_the_whole(
    lengths: list[int], window: int | None, cap: float | None, short: bool, part: int, scores: int, seed: int
) -> None:
    """Some new tokens at a time; tokens of no request behind the others; keys that are short of something.

    Args:
        scores: at a time of the whole.
    """
    filled = Filled(lengths, seed)
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(sum(lengths) + 1, 2 * HEADS, DIM, generator=g)
    lacking = torch.randn(HEADS, 12, DIM, generator=g)

    def run(news: list[int], at: list[int], rows: Tensor) -> Tensor:
        starts = torch.tensor([0, *news]).cumsum(0)
        batch = Batch(filled.table, torch.tensor(at), starts)
        back = (lambda positions: lacking[:, positions]) if short else None
        return attend(rows, filled.keys, filled.values, batch, window, 0.3, cap, back)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "SCORES", scores)
        whole = run(lengths, lengths, q)
    assert whole[-1].abs().max() == 0
    for request, own in enumerate(whole[:-1].split(lengths)):
        rows = q[:-1].split(lengths)[request]
        for begin in range(0, lengths[request], part):
            piece = rows[begin : begin + part]
            news, at = [0] * len(lengths), list(lengths)
            news[request], at[request] = len(piece), begin + len(piece)
            torch.testing.assert_close(run(news, at, piece), own[begin : begin + part], rtol=1e-5, atol=1e-5)


def test_capped_scores_and_short_keys() -> None:
    """Against the formula."""
    filled = Filled([7], 0)
    g = torch.Generator().manual_seed(1)
    q, lacking = torch.randn(1, HEADS, DIM, generator=g), torch.randn(HEADS, 7, DIM, generator=g)
    batch = Batch(filled.table, torch.tensor([7]), torch.tensor([0, 1]))
    got = attend(q, filled.keys, filled.values, batch, None, 0.5, 1.5, lambda at: lacking[:, at])
    keys, values = (store.read(7)[0] for store in filled.dense(0))
    scores = 1.5 * torch.tanh((q[0][:, None] @ (keys + lacking).mT) * 0.5 / 1.5)
    torch.testing.assert_close(got[0], (scores.softmax(-1) @ values)[:, 0], rtol=1e-5, atol=1e-5)


def test_nothing_else_is_written() -> None:
    filled = Filled([9], 0)
    before = filled.cache.clone()
    page = int(filled.table[0, 1])
    new = codes(torch.randn(3, HEADS, DIM))
    write(filled.keys, new, torch.tensor([page * PLACES + 2, -1, page * PLACES + 1]))
    keys, _ = stores_of(before)
    for part, values in zip(keys, new, strict=True):
        part[page, :, 2], part[page, :, 1] = values[0], values[2]
    assert torch.equal(before, filled.cache)


@pytest.mark.parametrize("head_dim", [32, 64, 80, 128])
def test_a_place_is_its_integers_and_their_grid(head_dim: int) -> None:
    cache = torch.zeros(3, HEADS, 16, place_bytes(head_dim), dtype=torch.uint8)
    stores = stores_of(cache)
    assert sum(part.nbytes for store in stores for part in store) == cache.nbytes
    assert [part.shape for part in stores[0]] == [(3, HEADS, 16, head_dim // 2), (3, HEADS, 16), (3, HEADS, 16)]
    for number, part in enumerate(part for store in stores for part in store):
        part.fill_(number + 1)
    assert [part.unique().item() for store in stores for part in store] == [1, 2, 3, 4, 5, 6]
