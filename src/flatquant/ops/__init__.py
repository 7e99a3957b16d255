"""Tensor operations, each a folder with `reference.py`, the truth, beside any faster version."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch

HAS_TRITON = find_spec("triton") is not None

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
