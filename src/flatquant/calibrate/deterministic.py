"""Kernels that give the same bits every time, where torch has them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch


class NoSuchKernel(RuntimeError):
    """An operation that torch has no deterministic kernel of."""


@contextmanager
def deterministic(*, strict: bool = True) -> Iterator[None]:
    """Choose kernels that give the same bits every time; attention's backward pass on CUDA has others.

    Args:
        strict: do not take another kernel where torch has none that does.

    Raises:
        NoSuchKernel: torch meets an operation that has none; a family may use one.
    """
    # torch asks for this of cuBLAS, whose workspaces it could share between streams.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = getattr(torch.utils.deterministic, "fill_uninitialized_memory")  # noqa: B009 - a property pyright misses
    torch.use_deterministic_algorithms(True, warn_only=not strict)
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010
    try:
        with nullcontext() if strict else warnings.catch_warnings():
            if not strict:
                warnings.filterwarnings("ignore", message=".*deterministic")
            yield
    except RuntimeError as error:
        if "deterministic" in str(error):
            raise NoSuchKernel from error
        raise
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        setattr(torch.utils.deterministic, "fill_uninitialized_memory", fill)  # noqa: B010
