"""Learned levels: numbers that are sums of a few numbers with signs, W_ij = sum_k +-v_ik (arXiv 2012.13762).

Bit k of a code is set where v_k is added, clear where it is subtracted. The numbers v are those of a row, or of a group
of neighbours in a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flatquant.formats.base import Format, Layout, Part
from flatquant.ops.pack.reference import packed_width

LEVELS = "levels"  # float32, (o, g, K)


class Levels(Format):
    """K numbers in every row, or in every group of a row; see the module docstring."""

    def __init__(self, bits: int, group_size: int | None) -> None:
        """`bits` is K."""
        self.bits, self.group_size = bits, group_size

    def layout(self, o: int, n: int) -> Layout:
        group = self.group_size or n
        if n % group:
            raise ValueError(f"groups of {group} do not divide {n}")
        return {
            "packed": Part(torch.uint8, (o, packed_width(n, self.bits)), "packed"),
            LEVELS: Part(torch.float32, (o, n // group, self.bits), "grids"),
        }

    def decode(self, codes: Tensor, parts: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
        levels = parts[LEVELS].to(torch.float64 if dtype == torch.float64 else torch.float32)
        places = torch.arange(self.bits, device=levels.device)
        set_bits = torch.arange(1 << self.bits, device=levels.device)[:, None] >> places & 1  # (2^K, K)
        sums = levels @ (2 * set_bits - 1).to(levels).mT  # (o, g, 2^K)
        chosen = codes.long().unflatten(-1, (levels.shape[1], -1))  # (o, g, n / g)
        return sums.gather(-1, chosen).flatten(-2).to(dtype)

    def check_parts(self, parts: dict[str, Tensor]) -> None:
        if not bool(torch.isfinite(parts[LEVELS]).all()):
            raise ValueError("levels must be finite")
