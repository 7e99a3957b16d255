"""Tensor operations, each a folder with `reference.py`, the truth, beside any faster version."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

HAS_TRITON = find_spec("triton") is not None


def dispatched(reference: Callable[P, R], suits: Callable[..., bool]) -> Callable[P, R]:
    """`reference`, or the kernel of the same name in the `triton.py` beside it.

    Args:
        suits: whether there is a kernel for these arguments, if Triton is installed.
    """
    home, name = reference.__module__.rpartition(".")[0], reference.__name__

    @functools.wraps(reference)
    def chosen(*args: P.args, **kwargs: P.kwargs) -> R:
        if HAS_TRITON and suits(*args, **kwargs):
            triton: Any = importlib.import_module(f"{home}.triton")  # only where it is needed: it takes a second
            return getattr(triton, name)(*args, **kwargs)
        return reference(*args, **kwargs)

    return chosen


_library = torch.library.Library("flatquant", "FRAGMENT")


def operator(name: str, run: Callable, fake: Callable, mutates: tuple[str, ...] = ()) -> None:
    """Define `torch.ops.flatquant.NAME`: one opaque operator for torch.compile, a plain call inside a CUDA graph.

    By `torch.library.Library` and not `custom_op`, whose wrappers cost more than the rest of a launch.

    Args:
        run: the implementation for every device, with annotations from which the schema is made.
        fake: shapes and dtypes of what `run` returns, of fake tensors.
        mutates: arguments that `run` writes to.
    """
    _library.define(name + torch.library.infer_schema(run, mutates_args=mutates))
    _library.impl(name, run, dispatch_key="CompositeExplicitAutograd")
    torch.library.register_fake(f"flatquant::{name}", fake, lib=_library)
