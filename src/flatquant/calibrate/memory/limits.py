"""Limits on memory: read from text, and held by torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from flatquant.errors import SpecError

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_DECIMAL = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def parse_bytes(text: str) -> int:
    """`20GiB`, `800MB` or a number of bytes.

    Raises:
        SpecError: something else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?", text.strip().upper())
    size = 0
    if match is not None and (match[2] or not match[3]):
        size = int(float(match[1]) * (_UNITS if match[3] else _DECIMAL)[match[2]])
    if size < 1:
        raise SpecError(f"memory {text!r}: give something like 20GiB, 800MB, or bytes")
    return size


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bytes to stay within; None is what is free when the run starts. On a CPU, the device is the host."""

    device: int | None = None
    host: int | None = None


@contextmanager
def capped(device: torch.device, limits: Limits) -> Iterator[None]:
    """Make torch refuse device memory beyond a limit, so that it is one."""
    if device.type != "cuda" or limits.device is None:
        yield
        return
    index = torch.cuda.current_device() if device.index is None else device.index
    total = torch.cuda.mem_get_info(index)[1]
    torch.cuda.set_per_process_memory_fraction(min(1.0, limits.device / total), index)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, index)


def size_text(size: int) -> str:
    """Bytes for people."""
    return f"{size / 2**30:.1f} GiB" if size >= 1 << 30 else f"{size / 2**20:.1f} MiB"
