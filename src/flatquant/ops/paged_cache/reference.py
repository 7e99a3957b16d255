"""Keys and values as packed 4-bit integers in pages (PagedAttention, arXiv 2309.06180): writing, and attention.

A page has N places for every head. Place j of a sequence is place j % N of the page that the sequence's table names for
j // N. A place holds the same as one of `ops.kv_cache`: packed integers, a scale and a zero point of its own.

In memory, a page of one head is one run of bytes: integers of N keys, integers of N values, scales of both, zero points
of both. So a page can be copied or cleared by whoever owns the memory, and every part of it is contiguous.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer, UInt8
from torch import Tensor

from flatquant.ops.kv_cache.reference import Store

SCORES = 1 << 26  # of a prompt at a time: their mask lies in memory, or they themselves where they have a cap


class Batch(NamedTuple):
    """Requests whose tokens lie one after another in one row."""

    table: Tensor  # pages of every request, integers, (R, M)
    lengths: Tensor  # places of every request, new tokens included, integers, (R,)
    starts: Tensor  # of the requests' new tokens in the row, and the row's end, integers, (R + 1,)


class Short(NamedTuple):
    """What keys less an offset m lack in scores: q R_j m, as a sum over cosines and sines of the position j."""

    amounts: Tensor  # `kv_cache.shortage` of the queries, float32, (T, queries, head_dim)
    angles: Tensor  # of every position, cosines and then sines, one a pair of channels, (positions, head_dim)


def place_bytes(head_dim: int) -> int:
    """Bytes of the key and the value of one token and head."""
    return 2 * (head_dim // 2 + 4 + 1)


def stores_of(cache: UInt8[Tensor, "pages heads places bytes"]) -> tuple[Store, Store]:
    """Keys and values in a cache's memory, as views.

    Args:
        cache: uint8, (pages, heads, N, `place_bytes`), a page of one head contiguous; N a multiple of 4.

    Returns:
        Stores of (pages, heads, N) places.
    """
    places, half = cache.shape[2], (cache.shape[3] - 10) // 2
    run = cache.flatten(2)  # (pages, heads, bytes)
    sizes = [places * half] * 2 + [4 * places] * 2 + [places] * 2
    k, v, k_scale, v_scale, k_zero, v_zero = run.split(sizes, dim=-1)

    def store(packed: Tensor, scale: Tensor, zero: Tensor) -> Store:
        return Store(packed.unflatten(-1, (places, half)), scale.view(torch.float32), zero)

    return store(k, k_scale, k_zero), store(v, v_scale, v_zero)


def write(store: Store, new: Store, slots: Integer[Tensor, " tokens"]) -> None:
    """Put keys, or values, of tokens into their places.

    Args:
        new: of tokens: integers (T, heads, head_dim / 2), scales and zero points (T, heads).
        slots: the page times N plus the place of every token, integers, (T,); a negative one is not written.
    """
    some = slots >= 0
    places = store.scale.shape[2]
    page, at = slots[some] // places, slots[some] % places
    for part, values in zip(store, new, strict=True):
        part[page, :, at] = values[some]


def read(store: Store, pages: Integer[Tensor, " pages"]) -> Float[Tensor, "heads places head_dim"]:
    """All places of some pages, one page after another.  # (p,) -> float32 (heads, p N, head_dim)"""
    found = Store(*(part[pages].transpose(0, 1).flatten(1, 2)[None] for part in store))
    return found.read(found.scale.shape[2])[0]


def attend(
    q: Float[Tensor, "tokens queries head_dim"],
    keys: Store,
    values: Store,
    batch: Batch,
    window: int | None,
    scaling: float,
    cap: float | None = None,
    back: Callable[[Tensor], Tensor] | None = None,
) -> Float[Tensor, "tokens queries head_dim"]:
    """Causal attention of new tokens over their requests' places, which hold their own keys and values already.

    Args:
        q: (T, queries, head_dim).
        window: how many places a token sees at most, its own included; None: all.
        cap: scores s become cap tanh(s / cap).
        back: what keys at some positions (n,) are short of, float32 (heads, n, head_dim). A place is a position.

    Returns:
        (T, queries, head_dim) in q's dtype; tokens of no request are 0.
    """
    out, places = torch.zeros_like(q), keys.scale.shape[2]

    def fill(own: slice, table: Tensor, length: int) -> None:
        """One request; what is unpacked of it is gone before the next."""
        new = own.stop - own.start
        first = 0 if window is None else max(0, length - new - window + 1) // places
        pages = table[first : -(-length // places)].long()
        at = torch.arange(first * places, length, device=q.device)
        k, v = _unpacked(keys, pages, at, q, back), _unpacked(values, pages, at, q)
        last = torch.arange(length - new, length, device=q.device)
        size = max(1, SCORES // (len(at) * (1 if cap is None else q.shape[1])))
        for rows, into, place in zip(*(x.split(size) for x in (q[own], out[own], last[:, None])), strict=True):
            seen = at <= place
            if window is not None:
                seen &= at > place - window
            into.copy_(_attention(rows, k, v, seen, scaling, cap))

    starts = batch.starts.tolist()
    for request, length in enumerate(batch.lengths.tolist()):
        if starts[request] < starts[request + 1]:
            fill(slice(starts[request], starts[request + 1]), batch.table[request], length)
    return out


def _unpacked(
    store: Store, pages: Tensor, at: Tensor, q: Tensor, back: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Places `at`, (n,), once for every head of queries q (T, queries, d), in its dtype.  # (1, queries, n, d)"""
    x = read(store, pages)[:, : len(at)]
    x = (x if back is None else x + back(at)).to(q.dtype)
    return x.repeat_interleave(q.shape[1] // len(x), dim=0)[None]


def _attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scaling: float, cap: float | None) -> Tensor:
    """(T, queries, d), (1, queries, n, d), (1, queries, n, d), bool (T, n) -> (T, queries, d)"""
    rows = q.transpose(0, 1)[None]  # (1, queries, T, d)
    if cap is None:
        mask = None if bool(seen.all()) else seen
        return F.scaled_dot_product_attention(rows, k, v, attn_mask=mask, scale=scaling)[0].transpose(0, 1)
    scores = (rows.float() @ k.float().mT) * scaling
    scores = (cap * torch.tanh(scores / cap)).masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ v.float())[0].transpose(0, 1).to(q.dtype)


def decode(
    q: Float[Tensor, "tokens queries head_dim"],
    keys: Store,
    values: Store,
    batch: Batch,
    window: int | None,
    scaling: float,
    short: Short | None = None,
) -> Float[Tensor, "tokens queries head_dim"]:
    """`attend` of requests with one new token each, where what keys lack is added to scores.

    Args:
        q: (R, queries, head_dim).
    """
    out = torch.empty_like(q)
    for request, length in enumerate(batch.lengths.tolist()):
        pages = batch.table[request, : -(-length // keys.scale.shape[2])].long()
        groups = q.shape[1] // keys.scale.shape[1]
        k, v = (read(store, pages)[:, :length].repeat_interleave(groups, dim=0) for store in (keys, values))
        scores = (q[request].float()[:, None] @ k.mT)[:, 0]  # (queries, length)
        if short is not None:
            scores = scores + short.amounts[request] @ short.angles[:length].float().mT
        if window is not None:
            scores[:, : max(0, length - window)] = -torch.inf
        out[request] = ((scores * scaling).softmax(-1)[:, None] @ v)[:, 0].to(q.dtype)
    return out
