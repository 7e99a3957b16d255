"""The packed cache's kernels write what the reference writes, and read what was written."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

CUDA = torch.cuda.is_available()
pytest.importorskip("triton", reason="Triton has no build for this platform")

from flatquant.ops import kron_quantize  # noqa: E402
from flatquant.ops.kron_quantize import Site  # noqa: E402
from flatquant.ops.kron_quantize.reference import merged  # noqa: E402
from flatquant.ops.kv_cache import STEPS, Heads, Shortage, Store, offset_matrix, reference  # noqa: E402
from flatquant.ops.kv_cache import triton as fused  # noqa: E402

pytestmark = [pytest.mark.gpu] if CUDA else []
DEVICE = "cuda" if CUDA else "cpu"
# Triton's interpreter multiplies the bits of bfloat16 as if they were integers, and cuts instead of rounding.
DTYPES = (torch.float32, torch.float16, *([torch.bfloat16] if CUDA else []))
PLACES = 40


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh tensors hold NaN, so that an element that is not written shows."""
    empty = torch.empty

    def poison(size, **kwargs):
        return (
            torch.full(size, float("nan"), **kwargs)
            if empty(0, **kwargs).is_floating_point()
            else empty(size, **kwargs)
        )

    monkeypatch.setattr(fused.torch, "empty", poison)


def store(b: int, h: int, d: int, g: torch.Generator, places: int = PLACES) -> Store:
    """A cache full of rubbish: what counts must have been written."""
    return Store(
        torch.randint(0, 256, (b, h, places, d // 2), generator=g).to(DEVICE, torch.uint8),
        torch.full((b, h, places), float("nan"), device=DEVICE),
        torch.randint(0, 16, (b, h, places), generator=g).to(DEVICE, torch.uint8),
    )


def make_heads(
    queries: int, keys: int, d: int, matrix: bool, g: torch.Generator, offset: bool = False, norms: bool = False
) -> Heads:
    turn, size = torch.linalg.qr(torch.randn(d, d, generator=g)).Q, torch.rand(d, generator=g) + 0.5
    pair = torch.stack((turn / size, turn * size)).to(DEVICE) if matrix else None  # P^-T and P
    ratios = (torch.rand(2, 2, generator=g) * 0.3 + 0.7).to(DEVICE)
    heads = Heads(queries, keys, d, pair, ratios, eps=1e-3)
    if norms:
        heads = heads._replace(norms=(torch.rand(2, d, generator=g) + 0.5).to(DEVICE))
    if not offset:
        return heads
    m = torch.randn(keys, d, generator=g).mul(30).to(DEVICE)
    return heads._replace(offset=m, back=offset_matrix(m, None if pair is None else pair[1]))


def angles(b: int, t: int, d: int, g: torch.Generator):
    angle = torch.rand(b, t, d // 2, generator=g).mul(6).repeat(1, 1, 2)
    return angle.cos().to(DEVICE), angle.sin().to(DEVICE)


SHAPES = ((1, 1, 16), (4, 2, 20), (3, 3, 32), (6, 2, 64))


# Shape and matrix are parameters, not draws: kernels of all kinds are compiled, side by side where there are cores.
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("matrix", [True, False])
@pytest.mark.parametrize("offset", [True, False])
@pytest.mark.parametrize("norms", [True, False])
@settings(deadline=None, max_examples=320 if CUDA else 2)
@given(
    batch=st.integers(1, 2),
    tokens=st.sampled_from((1, 5, 20)),
    at=st.integers(0, 20),
    shared=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_appending_equals_the_reference(
    shape: tuple[int, int, int],
    batch: int,
    tokens: int,
    at: int,
    matrix: bool,
    offset: bool,
    norms: bool,
    shared: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    g = torch.Generator().manual_seed(seed)
    queries, keys, d = shape
    heads = make_heads(queries, keys, d, matrix, g, offset, norms)
    qkv = torch.randn(batch, tokens, (queries + 2 * keys) * d, generator=g).mul(3).to(DEVICE, dtype)
    cos, sin = angles(1 if shared else batch, tokens, d, g)
    stores = [store(batch, keys, d, g) for _ in range(2)]
    copies = [Store(*(t.clone() for t in s)) for s in stores]
    place = torch.tensor([at], device=DEVICE)
    got = fused.append(qkv, cos, sin, heads, *stores, place)
    want = reference.append(qkv, cos, sin, heads, *copies, place)
    # The matrix units' operands are of qkv's type; a value on the edge between two integers may go either way.
    step = copies[0].scale[:, :, at : at + tokens].max().item() * 1.01
    near = 2e-2 if matrix else torch.finfo(dtype).eps * 2
    torch.testing.assert_close(got[0], want[0], rtol=near, atol=near * 8)
    torch.testing.assert_close(got[1].float(), want[1].float(), rtol=near, atol=step)
    torch.testing.assert_close(got[2], want[2], rtol=0, atol=0)  # values: the same arithmetic, the same bits
    for name in ("packed", "zero"):
        assert torch.equal(getattr(stores[1], name), getattr(copies[1], name))
    torch.testing.assert_close(stores[1].scale, copies[1].scale, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(stores[0].scale, copies[0].scale, rtol=1e-2, atol=0, equal_nan=True)
    # Nothing but the new places was touched, and what was returned is what is stored.
    before, after = slice(0, at), slice(at + tokens, PLACES)
    for s, c in zip(stores, copies, strict=True):
        assert torch.equal(s.packed[:, :, before], c.packed[:, :, before])
        assert torch.equal(s.packed[:, :, after], c.packed[:, :, after])
    for s, dense in zip(stores, got[1:3], strict=True):
        kept = s.read(at + tokens)[:, :, at:].to(dtype)
        torch.testing.assert_close(kept, dense, rtol=0, atol=0)
    short = fused.append(qkv, cos, sin, heads, *stores, place, dense=False).short
    assert (short is None) == (want.short is None) == (not offset)
    if short is not None:
        size = want.short.abs().max().item()
        torch.testing.assert_close(short, want.short, rtol=1e-5, atol=1e-6 * size)


@pytest.mark.parametrize("matrix", [True, False])
def test_a_prompt_of_many_tokens_takes_several_heads_at_once(matrix: bool) -> None:
    g = torch.Generator().manual_seed(5)
    queries, keys, d, batch, tokens = 8, 4, 16, 2, 520
    heads = make_heads(queries, keys, d, matrix, g)
    qkv = torch.randn(batch, tokens, (queries + 2 * keys) * d, generator=g).to(DEVICE, torch.float16)
    cos, sin = angles(batch, tokens, d, g)
    stores = [store(batch, keys, d, g, tokens + 3) for _ in range(2)]
    copies = [Store(*(t.clone() for t in s)) for s in stores]
    place = torch.tensor([3], device=DEVICE)
    got = fused.append(qkv, cos, sin, heads, *stores, place)
    want = reference.append(qkv, cos, sin, heads, *copies, place)
    step = copies[0].scale[:, :, 3:].max().item() * 1.01
    near = 1e-2 if matrix else 2e-3
    torch.testing.assert_close(got[0], want[0], rtol=near, atol=near * 4)
    torch.testing.assert_close(got[1].float(), want[1].float(), rtol=near, atol=step)
    torch.testing.assert_close(got[2], want[2], rtol=0, atol=0)


@settings(deadline=None, max_examples=500 if CUDA else 20)
@given(
    exponent=st.sampled_from((-147, -140, -126, -79, -78, 0, 40, 104)),
    seed=st.integers(0, 99),
)
def test_values_are_divided_as_a_division_rounds(exponent: int, seed: int) -> None:
    """Every value lies on an integer of its row's grid or in the middle between two, where the last bit decides."""
    g = torch.Generator().manual_seed(seed)
    heads = Heads(1, 1, 32, None, torch.ones(2, 2, device=DEVICE))
    steps = torch.randint(-14, 17, (1, 20, 3 * 32), generator=g) * 0.5
    steps[..., ::32], steps[..., 1::32] = -7, 8
    scale = torch.randint(1 << 18, (1, 20, 1), generator=g) * 2 + 1
    qkv = (steps * scale).ldexp(torch.tensor(exponent)).to(DEVICE)
    cos, sin = angles(1, 20, 32, g)
    stores = [store(1, 1, 32, g) for _ in range(2)]
    copies = [Store(*(t.clone() for t in s)) for s in stores]
    place = torch.tensor([0], device=DEVICE)
    fused.append(qkv, cos, sin, heads, *stores, place)
    reference.append(qkv, cos, sin, heads, *copies, place)
    for name in ("packed", "zero", "scale"):
        got, want = (getattr(s[1], name)[:, :, :20] for s in (stores, copies))
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def shortage(q: torch.Tensor, start: torch.Tensor, length: int, even: bool, g: torch.Generator) -> Shortage:
    """As large as a constant makes it. Places are one position apart, or anywhere; those that do not count hold NaN."""
    batch, _, d = q.shape
    frequencies = 10 ** -torch.linspace(0, 4, d // 2)
    first = torch.randint(0, 9, (batch, 1), generator=g) - start.cpu()[:, None]
    positions = first + torch.arange(PLACES) if even else torch.randint(0, 999, (batch, PLACES), generator=g)
    angles = positions[..., None] * frequencies
    turns = torch.cat((angles.cos(), angles.sin()), dim=-1) * 1.2  # scaled, as for long texts
    turns[:, length:] = float("nan")
    turns[torch.arange(PLACES) < start.cpu()[:, None]] = float("nan")
    angles = torch.arange(STEPS)[:, None] * frequencies
    steps = torch.cat((angles.cos(), angles.sin()), dim=-1).to(
        torch.float32 if q.dtype == torch.float32 else torch.float16
    )
    amounts = torch.randn(q.shape, generator=g) * 30
    gaps = torch.full((batch,), int(not even), dtype=torch.int32)
    return Shortage(*(t.to(DEVICE) for t in (amounts, turns, steps, gaps)))


@settings(deadline=None, max_examples=2500 if CUDA else 20)
@given(
    shape=st.sampled_from(SHAPES),
    batch=st.integers(1, 3),
    length=st.integers(1, PLACES),
    parts=st.integers(1, 4),
    window=st.none() | st.integers(1, 30),
    offset=st.booleans(),
    even=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_attention_equals_the_reference(
    shape: tuple[int, int, int],
    batch: int,
    length: int,
    parts: int,
    window: int | None,
    offset: bool,
    even: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    g = torch.Generator().manual_seed(seed)
    queries, keys, d = shape
    stores = [store(batch, keys, d, g) for _ in range(2)]
    for s in stores:
        s.scale[:, :, :length] = torch.rand(batch, keys, length, generator=g).add(0.05).to(DEVICE)
    q = torch.randn(batch, queries, d, generator=g).to(DEVICE, dtype)
    start = torch.randint(0, length, (batch,), generator=g).to(DEVICE)
    short = shortage(q, start, length, even, g) if offset else None
    arguments = (q, *stores, torch.tensor([length - 1], device=DEVICE), start, window, d**-0.5, short)
    out, lse = fused.attend(*arguments, parts=parts, least=16, block=16)
    assert out.shape == (batch, queries, min(parts, -(-PLACES // 16)), d)
    assert not out.isnan().any()
    got = merged(out, lse)
    if short is not None:  # of a matrix product in the reference, also places that do not count
        arguments = (*arguments[:-1], short._replace(angles=short.angles.nan_to_num()))
    want = merged(*reference.attend(*arguments))
    near = max(1e-3, 4 * torch.finfo(dtype).eps)  # weights of attention are rounded to q's type before the product
    atol = near * want.abs().max().item()
    if short is not None and short.steps.dtype == torch.float16:
        # Angles of at most 1.2 are rounded to 11 bits: scores move by at most five standard deviations of the sum, and
        # with them by how much a value counts.
        moved = 5 * short.amounts.norm(dim=-1).max().item() * 1.2 * 2**-11 / math.sqrt(12) * d**-0.5
        atol += 2 * moved * stores[1].read(length).abs().nan_to_num().max().item()
    torch.testing.assert_close(got, want, rtol=near, atol=atol)


@pytest.mark.parametrize("matrix", [True, False])
def test_keys_less_an_offset_get_it_back(matrix: bool) -> None:
    """The reference itself: scores, and whole keys, are those of keys that were stored as they are on a fine grid."""
    g = torch.Generator().manual_seed(4)
    queries, keys, d, n = 4, 2, 16, 7
    heads = make_heads(queries, keys, d, matrix, g, offset=True)
    plain = heads._replace(offset=None, back=None)
    cos, sin = angles(2, n, d, g)
    assert heads.offset is not None
    constant = torch.zeros(queries + 2 * keys, d, device=DEVICE)
    constant[queries : queries + keys] = heads.offset
    qkv = (torch.randn(2, n, (queries + 2 * keys) * d, generator=g) * 1e-3).to(DEVICE) + constant.flatten()
    turns = torch.cat((cos[..., : d // 2], sin[..., : d // 2]), dim=-1)
    stores, exact = ([store(2, keys, d, g, n) for _ in range(2)] for _ in range(2))
    place = torch.tensor([0], device=DEVICE)
    q, k, _, amounts = reference.append(qkv, cos, sin, heads, *stores, place)
    whole = reference.append(qkv, cos, sin, plain, *exact, place).k  # four bits of a large number: far off
    wanted = reference.rotate(qkv.unflatten(-1, (-1, d)).transpose(1, 2)[:, queries:-keys], cos[:, None], sin[:, None])
    wanted = wanted if heads.matrices is None else wanted @ heads.matrices[1]
    got = k + heads.given_back(turns)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=2e-3)
    assert (whole - wanted).abs().max() > 1
    last, start = torch.tensor([n - 1], device=DEVICE), torch.zeros(2, dtype=torch.int64, device=DEVICE)
    assert amounts is not None
    short = Shortage(amounts[:, :, -1], turns, turns, start.int())
    out, lse = reference.attend(q[:, :, -1], *stores, last, start, None, 0.01, short)
    scores = (q[:, :, -1, None] @ wanted.repeat_interleave(2, dim=1).mT)[:, :, 0] * 0.01
    torch.testing.assert_close(lse[..., 0], scores.logsumexp(-1), rtol=1e-3, atol=1e-3)
    values = stores[1].read(n).repeat_interleave(2, dim=1)
    torch.testing.assert_close(out[:, :, 0], (scores.softmax(-1)[:, :, None] @ values)[:, :, 0], rtol=1e-3, atol=1e-4)


def test_padding_and_places_not_yet_used_do_not_count() -> None:
    g = torch.Generator().manual_seed(3)
    keys, values = store(1, 1, 16, g), store(1, 1, 16, g)
    for s in (keys, values):
        s.scale[:, :, 4:9] = 0.5
    q = torch.randn(1, 1, 16, generator=g).to(DEVICE)
    last, start = torch.tensor([8], device=DEVICE), torch.tensor([4], device=DEVICE)
    out, lse = fused.attend(q, keys, values, last, start, None, 0.25, parts=2, least=16, block=16)
    rows = values.read(9)[0, 0, 4:]
    scores = (keys.read(9)[0, 0, 4:] @ q[0, 0]) * 0.25
    torch.testing.assert_close(merged(out, lse)[0], scores.softmax(0) @ rows, rtol=1e-4, atol=1e-4)


def test_places_that_are_not_used_change_no_bit() -> None:
    """Parts begin and end where the tokens say, however many places the cache has."""
    g = torch.Generator().manual_seed(4)
    few = [store(2, 1, 16, g, places=160) for _ in range(2)]
    for s in few:
        s.scale[:, :, :] = torch.rand(2, 1, 160, generator=g).add(0.05).to(DEVICE)
    many = [reference.Store(*(torch.cat((t, t, t, t), 2) for t in s)) for s in few]
    q = torch.randn(2, 2, 16, generator=g).to(DEVICE)
    start = torch.tensor([0, 3], device=DEVICE)
    site = Site((2, 16), None, None, torch.ones(2, device=DEVICE), 4)
    for last in (20, 70, 159):
        given = (torch.tensor([last], device=DEVICE), start, None, 0.25)
        (out, lse), (more, more_lse) = (fused.attend(q, *s, *given, parts=20, least=32, block=16) for s in (few, many))
        parts = out.shape[2]
        assert parts < more.shape[2]
        assert torch.equal(out, more[:, :, :parts])
        assert torch.equal(lse, more_lse[:, :, :parts])
        assert more_lse[:, :, parts:].isneginf().all()
        if CUDA:
            got, want = (kron_quantize.merge(*parts, site, "planes") for parts in ((out, lse), (more, more_lse)))
            assert all(map(torch.equal, got, want))
