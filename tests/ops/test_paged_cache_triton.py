"""The kernel reads from pages what the reference reads."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

CUDA = torch.cuda.is_available()
pytest.importorskip("triton", reason="Triton has no build for this platform")

from flatquant.ops.kv_cache import offset_matrix, shortage  # noqa: E402
from flatquant.ops.paged_cache import Batch, attend, place_bytes, stores_of, triton  # noqa: E402
from flatquant.ops.paged_cache.reference import Short, decode  # noqa: E402

pytestmark = [pytest.mark.gpu] if CUDA else []
DEVICE = "cuda" if CUDA else "cpu"
DTYPES = (torch.float32, torch.float16, *([torch.bfloat16] if CUDA else []))
PLACES = 16


@pytest.mark.parametrize("shape", [(1, 1, 16), (4, 2, 20), (3, 3, 32), (6, 2, 64)])
@pytest.mark.parametrize("offset", [True, False])
@settings(deadline=None, max_examples=160 if CUDA else 3)
@given(
    lengths=st.lists(st.sampled_from((1, 15, 16, 17, 40)), min_size=1, max_size=3),
    window=st.sampled_from([None, 1, 5, 17, 50]),
    dtype=st.sampled_from(DTYPES),
    parts=st.sampled_from((1, 3)),
    padding=st.sampled_from((0, 64)),
    seed=st.integers(0, 99),
)
def test_pages_are_read_as_by_the_reference(
    shape: tuple[int, int, int],
    offset: bool,
    lengths: list[int],
    window: int | None,
    dtype: torch.dtype,
    parts: int,
    padding: int,
    seed: int,
) -> None:
    g = torch.Generator().manual_seed(seed)
    queries, heads, d = shape
    counts = [-(-n // PLACES) for n in lengths]
    pages = sum(counts) + 2
    page = heads, PLACES, place_bytes(d)
    bytes_ = torch.randint(0, 256, (pages, math.prod(page) + padding), generator=g).to(DEVICE, torch.uint8)
    cache = bytes_[:, : math.prod(page)].unflatten(1, page)  # an engine may pad its pages
    for store in stores_of(cache):
        store.scale.copy_(torch.rand(store.scale.shape, generator=g) / 8)
        store.zero.copy_(torch.randint(0, 16, store.zero.shape, generator=g))
    table = torch.zeros(len(lengths), max(counts) + 1, dtype=torch.int32)
    free = 1 + torch.randperm(pages - 1, generator=g)
    for row, own in zip(table, free[: sum(counts)].split(counts), strict=True):
        row[: len(own)] = own
    keys, values = stores_of(cache)
    batch = Batch(*(t.to(DEVICE) for t in (table, torch.tensor(lengths), torch.arange(len(lengths) + 1))))
    q = torch.randn(len(lengths), queries, d, generator=g).to(DEVICE, dtype)
    short = back = None
    if offset:
        m = torch.randn(heads, d, generator=g).mul(3).to(DEVICE)
        angle = torch.rand(max(lengths), d // 2, generator=g).mul(6)
        angles = torch.cat((angle.cos(), angle.sin()), dim=-1).to(DEVICE)
        short = Short(shortage(q.transpose(0, 1)[None], m)[0].transpose(0, 1).contiguous(), angles)
        lacking = angles @ offset_matrix(m, None)  # (heads, positions, d)

        def back(at: torch.Tensor) -> torch.Tensor:
            return lacking[:, at]

    want = attend(q.float(), keys, values, batch, window, d**-0.5, None, back)
    got = triton.decode(q, keys, values, batch, window, d**-0.5, short, parts=parts, least=16, block=16)
    torch.testing.assert_close(
        decode(q.float(), keys, values, batch, window, d**-0.5, short), want, rtol=1e-4, atol=1e-4
    )
    assert got.dtype == dtype
    near = 1e-5 if dtype == torch.float32 else 2e-2 if dtype == torch.bfloat16 else 3e-3
    torch.testing.assert_close(got.float(), want, rtol=near, atol=near * 4)
