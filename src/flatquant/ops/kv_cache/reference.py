"""Keys and values as packed 4-bit integers: writing new tokens, and attention that reads them.

A cache holds S places for each of B sequences and H heads; a place is a row of packed integers with a scale and a
zero point of its own (asymmetric, per token and head). Which places count: those from `start` of a sequence (what lies
before is padding on the left) up to `length`, and of these the last `window`, where there is one.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from flatquant.ops.kron_quantize.reference import rms_norm
from flatquant.ops.pack.reference import pack_bits, unpack_bits
from flatquant.ops.quantize.reference import quantize, row_grid

STEPS = 64  # positions of which `Shortage.steps` has the angles


class Store(NamedTuple):
    """Keys, or values, of one layer."""

    packed: Tensor  # uint8, (B, H, S, head_dim / 2)
    scale: Tensor  # float32, (B, H, S)
    zero: Tensor  # uint8, (B, H, S)

    def read(self, length: int) -> Tensor:
        """The first `length` places.  # float32, (B, H, length, head_dim)"""
        integers = unpack_bits(self.packed[:, :, :length], 4, 2 * self.packed.shape[-1]).float()
        return (integers - self.zero[:, :, :length, None]) * self.scale[:, :, :length, None]


class Heads(NamedTuple):
    """What happens to queries, keys and values between projection and attention."""

    queries: int
    keys: int
    head_dim: int
    matrices: Tensor | None  # P_h^-T of queries and P_h of keys, (2, head_dim, head_dim), float32 for the reference
    ratios: Tensor  # of keys, of values: shares of a row's lower and upper end that the grid covers, float32, (2, 2)
    offset: Tensor | None = None  # m: a place j holds keys less R_j m, m before RoPE, float32, (keys, head_dim)
    back: Tensor | None = None  # `offset_matrix` of m and P_h, float32, (keys, head_dim, head_dim)
    norms: Tensor | None = None  # gains of RMS norms of queries and of keys before RoPE, float32, (2, head_dim)
    eps: float = 0.0  # of these norms

    def given_back(self, angles: Tensor) -> Tensor:
        """R_j m P_h, by which what places hold is short.  # (B, T, head_dim) -> float32 (B, keys, T, head_dim)"""
        assert self.back is not None
        return angles.float()[:, None] @ self.back

    def shortage(self, q: Tensor) -> Tensor:
        """q R_j m per cosine and sine of a place j, of queries that are turned and not yet transformed.

        (B, queries, T, head_dim) -> float32 (B, queries, T, head_dim)
        """
        assert self.offset is not None
        return shortage(q, self.offset)


class Appended(NamedTuple):
    """New tokens, transformed."""

    q: Tensor  # (B, queries, T, head_dim)
    k: Tensor  # that their places stand for, (B, keys, T, head_dim)
    v: Tensor
    short: Tensor | None  # `Heads.shortage` of keys less an offset, float32, (B, queries, T, head_dim)


class Shortage(NamedTuple):
    """What gives attention back the offset that its keys are stored without."""

    amounts: Tensor  # `Heads.shortage` of the queries, float32, (B, queries, head_dim)
    angles: Tensor  # cosines and sines of every place, one a pair of channels, float32, (B, S, head_dim)
    steps: Tensor  # the same of positions 0, 1, .., not scaled for long texts, (STEPS, head_dim)
    gaps: Tensor  # not 0 where a sequence's places are not one position apart, int32, (B,)


def shortage(
    q: Float[Tensor, "batch queries tokens head_dim"], m: Float[Tensor, "heads head_dim"]
) -> Float[Tensor, "batch queries tokens head_dim"]:
    """q R_j m per cosine and sine of a place j; see `Heads.shortage`.

    Args:
        q: turned and not yet transformed, (B, queries, T, head_dim).
        m: (keys, head_dim).
    """
    m = m.repeat_interleave(q.shape[1] // len(m), dim=0)[:, None]
    (a, b), (ma, mb) = q.float().chunk(2, dim=-1), m.chunk(2, dim=-1)
    return torch.cat((a * ma + b * mb, b * ma - a * mb), dim=-1)


def offset_matrix(
    m: Float[Tensor, "heads head_dim"], p: Float[Tensor, "head_dim head_dim"] | None
) -> Float[Tensor, "heads head_dim head_dim"]:
    """B with [cos_j | sin_j] B = R_j m P: of R_j m, channel i is m_i cos - m_i' sin, channel i' is m_i' cos + m_i sin.

    Args:
        m: (heads, head_dim).
        p: (head_dim, head_dim), or None for the identity.

    Returns:
        (heads, head_dim, head_dim).
    """
    a, b = m.chunk(2, dim=-1)
    cosines = torch.cat((a.diag_embed(), b.diag_embed()), dim=-1)  # (heads, head_dim / 2, head_dim)
    sines = torch.cat((-b.diag_embed(), a.diag_embed()), dim=-1)
    whole = torch.cat((cosines, sines), dim=-2)
    return whole if p is None else whole @ p


def rotate(
    x: Float[Tensor, "*batch head_dim"], cos: Float[Tensor, "*angles head_dim"], sin: Float[Tensor, "*angles head_dim"]
) -> Float[Tensor, "*batch head_dim"]:
    """Rotary position embedding (arXiv 2104.09864) in the pairing of Llama: channel i with i + head_dim / 2."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


def _put(store: Store, x: Tensor, ratios: Tensor, at: int) -> Tensor:
    """Quantise x into the places from `at` on; what it then stands for.  # (B, H, T, head_dim)"""
    scale, zero = row_grid(x, ratios[0], ratios[1], 0, 15)
    assert zero is not None
    q = quantize(x.float(), scale, zero, 0, 15)
    place = slice(at, at + x.shape[2])
    store.packed[:, :, place] = pack_bits(q.to(torch.uint8), 4)
    store.scale[:, :, place] = scale[..., 0]
    store.zero[:, :, place] = zero[..., 0].to(torch.uint8)
    return (q - zero) * scale


def append(
    qkv: Float[Tensor, "batch tokens n"],
    cos: Float[Tensor, "_ tokens head_dim"],
    sin: Float[Tensor, "_ tokens head_dim"],
    heads: Heads,
    keys: Store,
    values: Store,
    at: Integer[Tensor, "1"],
) -> Appended:
    """Normalise queries and keys, turn them by their positions, transform them (FlatQuant, section 3.2); store keys and
    values.

    Keys are stored, and returned, less their offset.

    Args:
        qkv: queries, keys and values of all heads, (B, T, (queries + 2 keys) head_dim).
        cos, sin: of the tokens' positions, (B or 1, T, head_dim).
        at: the first free place, an integer, (1,).
    """
    h, d = heads, heads.head_dim
    rows = qkv.float().unflatten(-1, (-1, d)).transpose(1, 2)  # (B, heads, T, head_dim)
    q, k, v = rows.split((h.queries, h.keys, h.keys), dim=1)
    if h.norms is not None:
        q, k = rms_norm(q, h.norms[0], h.eps), rms_norm(k, h.norms[1], h.eps)
    if h.offset is not None:
        k = k - h.offset[:, None]
    cos, sin = cos.float()[:, None], sin.float()[:, None]
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    short = None if h.offset is None else h.shortage(q)
    if h.matrices is not None:
        q, k = q @ h.matrices[0], k @ h.matrices[1]
    first = int(at)
    k, v = _put(keys, k, h.ratios[0], first), _put(values, v, h.ratios[1], first)
    return Appended(q.to(qkv.dtype), k.to(qkv.dtype), v.to(qkv.dtype), short)


def attend(
    q: Float[Tensor, "batch queries head_dim"],
    keys: Store,
    values: Store,
    last: Integer[Tensor, "1"],
    start: Integer[Tensor, " batch"],
    window: int | None,
    scaling: float,
    short: Shortage | None = None,
) -> tuple[Float[Tensor, "batch queries parts head_dim"], Float[Tensor, "batch queries parts"]]:
    """Attention of one new token per sequence over its cache.

    Args:
        q: (B, queries, head_dim).
        last: the new token's place, the last one in use, an integer, (1,).
        start: the first place of each sequence that is no padding, integers, (B,).
        window: how many places count at most, or None.
        short: of keys less an offset.

    Returns:
        float32 (B, queries, 1, head_dim), and the scores' log-sum-exps (B, queries, 1): all in one part.
    """
    n = int(last) + 1
    groups = q.shape[1] // keys.packed.shape[1]
    k, v = (s.read(n).repeat_interleave(groups, dim=1) for s in (keys, values))
    scores = (q.float()[:, :, None] @ k.mT)[:, :, 0]  # (B, queries, n)
    if short is not None:
        scores = scores + short.amounts @ short.angles[:, :n].mT
    scores = scores * scaling
    place = torch.arange(n, device=q.device)
    counts = place >= start[:, None]
    if window is not None:
        counts &= place >= n - window
    scores = scores.masked_fill(~counts[:, None], -torch.inf)
    lse = scores.logsumexp(-1, keepdim=True)
    return (scores - lse).exp()[:, :, None] @ v, lse
