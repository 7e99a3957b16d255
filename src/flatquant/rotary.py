"""Rotary position embedding (arXiv 2104.09864), R_j x, of tensors that a model has not turned itself.

Attention modules are given the cosines and sines of their tokens' positions. Both include the scaling of long texts, so
that R_j is a rotation times that number. Channels behind the first r are left alone where only some are turned.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from flatquant.spec import Pairing


class Angles(NamedTuple):
    """Cosines and sines as attention modules are given them."""

    cos: Tensor  # (B or 1, T, r)
    sin: Tensor

    @classmethod
    def among(cls, value: object) -> Angles | None:
        """An argument of an attention module as angles, if it is a pair of tensors (B or 1, T, r)."""
        if not isinstance(value, tuple | list) or len(value) != 2:
            return None
        cos, sin = value
        if not isinstance(cos, Tensor) or not isinstance(sin, Tensor) or cos.shape != sin.shape or cos.ndim != 3:
            return None
        return cls(cos, sin) if cos.is_floating_point() else None

    def of_pairs(self, pairing: Pairing) -> Tensor:
        """One cosine and one sine for every pair of channels.  # (B or 1, T, r): r / 2 cosines, then the sines"""
        half = self.cos.shape[-1] // 2
        pairs = slice(0, None, 2) if pairing == "interleaved" else slice(half)
        out = torch.empty_like(self.cos)
        out[..., :half], out[..., half:] = self.cos[..., pairs], self.sin[..., pairs]  # autocast refuses to join some
        return out


def turned(
    x: Float[Tensor, "#b heads #t d"], angles: Float[Tensor, "#b #t r"], pairing: Pairing
) -> Float[Tensor, "_ heads _ d"]:
    """R_j x.

    Args:
        x: (B or 1, heads, T or 1, head_dim).
        angles: of pairs, (B or 1, T, r).

    Returns:
        (B, heads, T, head_dim), in the wider of both types.
    """
    cos, sin = angles[:, None].chunk(2, dim=-1)  # (B or 1, 1, T, r / 2)
    return _turned(x, cos, sin, pairing)


def constant_at(
    m: Float[Tensor, "heads d"], angles: Float[Tensor, "b t r"] | None, pairing: Pairing
) -> Float[Tensor, "_ heads _ d"]:
    """R_j m of a constant m, (heads, head_dim), or m where nothing turns it.  # (B or 1, heads, T or 1, head_dim)"""
    x = m[None, :, None]
    return x if angles is None else turned(x, angles, pairing)


def turned_back(
    x: Float[Tensor, "#b heads #t d"], angles: Float[Tensor, "#b #t r"], pairing: Pairing
) -> Float[Tensor, "_ heads _ d"]:
    """R_j^-1 x; see `turned`."""
    cos, sin = angles[:, None].chunk(2, dim=-1)
    square = cos.square() + sin.square()
    return _turned(x, cos / square, -sin / square, pairing)


def _turned(x: Tensor, cos: Tensor, sin: Tensor, pairing: Pairing) -> Tensor:
    half = cos.shape[-1]
    x, rest = x[..., : 2 * half], x[..., 2 * half :]
    a, b = x.chunk(2, dim=-1) if pairing == "halves" else (x[..., ::2], x[..., 1::2])
    pair = a * cos - b * sin, b * cos + a * sin  # (B, heads, T, r / 2)
    out = torch.cat(pair, dim=-1) if pairing == "halves" else torch.stack(pair, dim=-1).flatten(-2)
    if rest.shape[-1]:
        out = torch.cat((out, rest.to(out.dtype).expand(*out.shape[:-1], -1)), dim=-1)
    return out
