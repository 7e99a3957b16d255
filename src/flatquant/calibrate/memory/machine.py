"""Memory that there is: what the process has, what is free on the host and on a device."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from flatquant import distributed

_MMAP_THRESHOLD = -3  # of glibc's malloc.h
_OWN_THRESHOLD = 32 << 20  # what glibc moves its threshold up to by itself


def resident_bytes() -> int:
    """Host memory that the process has now; 0 where the system does not say."""
    return _status("VmRSS")


def peak_resident_bytes() -> int | None:
    """The most host memory that the process has had; None where the system does not say."""
    if found := _status("VmHWM"):
        return found
    try:
        import resource
    except ImportError:  # Windows
        return None
    # On Linux this would count what the parent had when it started the process.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def forget_peak(device: torch.device) -> None:
    """Forget how much memory was in use before, on a GPU or of the process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak of resident memory starts anew


def peak_bytes(device: torch.device) -> int | None:
    """Peak bytes since `forget_peak`: of the GPU, or resident on the CPU where Linux says so."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM") or None


def release(device: torch.device) -> None:
    """Give back what is no longer used."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _status(key: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), 0)


def free_host_bytes() -> int | None:
    """Host memory that can be had: the least of what the kernel and the process's control group say.

    Ranks on one host have equal parts of it.
    """
    found = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    except (OSError, ValueError, IndexError):
        pass
    try:
        group = Path("/sys/fs/cgroup")
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        if limit != "max":
            # Pages of files count as used, and are given up when memory is short.
            cached = dict(line.split() for line in (group / "memory.stat").read_text().splitlines()).get("file", "0")
            found.append(max(0, int(limit) - int(used) + int(cached)))
    except (OSError, ValueError):
        pass
    if not found and hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(found) // distributed.local_size() if found else None


def return_freed_memory() -> None:
    """From now on, let the C library return the memory of large tensors to the kernel as soon as they are freed.

    Left to itself, it keeps more and more of it, between what lives: a process that streams a model grows by half of
    every block.
    """
    _return_above(1 << 18)


@contextmanager
def freed_memory_returned() -> Iterator[None]:
    """The same for a while, of tensors of 4 MiB or more: in a fit, whose tensors come and go, it takes time."""
    _return_above(4 << 20)
    try:
        yield
    finally:
        _return_above(_OWN_THRESHOLD)


def _return_above(size: int) -> None:
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library has no such function
            ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, size)


def free_device(device: torch.device) -> int | None:
    """Bytes that tensors on a CUDA device may still take; None on the host."""
    if device.type != "cuda":
        return None
    ours = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch's, and free again
    return torch.cuda.mem_get_info(device)[0] + ours
