"""What blocks receive: the first block's hidden states, and the keyword arguments every block is called with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flatquant.spec import by_expert
from flatquant.transforms import Factor
from flatquant.wiring.apply import InputStatistics
from flatquant.wiring.arch import Arch, submodule


@dataclass(frozen=True, kw_only=True)
class BlockCall:
    """How the model calls one block, besides the hidden states; the same for windows of one length.

    `basis` is that of a block's residual stream once it is wrapped. Hidden states between blocks stay in the original
    basis, so that both models' can be compared; a rotated block is entered and left through the basis.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    basis: Factor | None = None

    def __call__(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """Run a block.  # (B, T, h) -> (B, T, h)"""
        if self.basis is not None:
            hidden = hidden @ self.basis.matrix().to(hidden.dtype)
        out = block(hidden, *self.args, **self.kwargs)
        out = out if isinstance(out, Tensor) else out[0]
        return out if self.basis is None else out @ self.basis.inverse_t().mT.to(out.dtype)

    def to(self, device: torch.device) -> BlockCall:
        """The same call with its tensors on `device`."""
        return replace(self, args=_to(self.args, device), kwargs=_to(self.kwargs, device))


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        return type(value)(_to(v, device) for v in value)
    if isinstance(value, dict):
        return {k: _to(v, device) for k, v in value.items()}
    return value


@contextmanager
def _recorded(blocks: nn.ModuleList) -> Iterator[list[tuple[Tensor, tuple, dict]]]:
    """Make every block note its call and hand the hidden states on unchanged."""
    calls: list[tuple[Tensor, tuple, dict]] = []

    def record(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append((hidden, args, kwargs))
        return hidden

    for block in blocks:
        block.forward = record  # shadows the method; the block keeps its type and attributes
    try:
        yield calls
    finally:
        for block in blocks:
            del block.forward


@torch.no_grad()
def capture(model: PreTrainedModel, arch: Arch, tokens: Tensor) -> tuple[Tensor, list[BlockCall]]:
    """Embed all windows and note how each block is called. No block is computed.

    Args:
        tokens: int64, (N, T).

    Returns:
        Hidden states before block 0, (N, T, h) in the model's dtype on its device, and one call per block.
    """
    blocks = submodule(model, arch.blocks)
    assert isinstance(blocks, nn.ModuleList)
    device = next(model.get_input_embeddings().parameters()).device
    hidden, calls = [], []
    with _recorded(blocks) as recorded:
        for window in tokens.split(1):
            recorded.clear()
            model.base_model(input_ids=window.to(device), use_cache=False)
            hidden.append(recorded[0][0])
            if not calls:
                calls = [BlockCall(args=args, kwargs=_without_cache(kwargs)) for _, args, kwargs in recorded]
    return torch.cat(hidden), calls


def _without_cache(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in kwargs.items() if k != "past_key_values"}


class _Moments:
    """Running absolute maximum and mean square of the last dimension."""

    def __init__(self) -> None:
        self.absmax: Tensor | None = None
        self.square: Tensor | None = None
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        x = x.detach().flatten(0, -2).float()  # (tokens, n)
        absmax, square = x.abs().amax(0), x.square().sum(0)
        self.absmax = absmax if self.absmax is None else torch.maximum(self.absmax, absmax)
        self.square = square if self.square is None else self.square + square
        self.tokens += x.shape[0]


class Observer:
    """Collects statistics of every site's input while a block runs.

    Every token passes through as many experts of a mixture as every other: over all of them, means are what they are
    over tokens.
    """

    def __init__(self, block: nn.Module, arch: Arch) -> None:
        self._moments = {edge.site: _Moments() for edge in arch.edges}
        groups = {edge.site: by_expert(edge.readers) for edge in arch.of(block).edges}
        self._tokens = {site: [0] * len(paths) for site, paths in groups.items()}
        self._handles = [
            submodule(block, path).register_forward_pre_hook(self._hook(site, index))
            for site, paths in groups.items()
            for index, (path, *_) in enumerate(paths)
        ]

    def _hook(self, site: str, index: int):
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._moments[site].add(args[0])
            self._tokens[site][index] += args[0].shape[:-1].numel()

        return hook

    def close(self) -> dict[str, InputStatistics]:
        """Stop observing; the statistics per site."""
        for handle in self._handles:
            handle.remove()
        out = {}
        for site, m in self._moments.items():
            assert m.absmax is not None, f"{site} was never reached"
            assert m.square is not None
            tokens = tuple(self._tokens[site])
            out[site] = InputStatistics(absmax=m.absmax, square=m.square / m.tokens, tokens=tokens)
        return out


@torch.no_grad()
def run_block(block: nn.Module, call: BlockCall, hidden: Tensor, batch_size: int) -> Tensor:
    """A block's outputs on all windows, in hidden's dtype.  # (N, T, h)"""
    out = torch.empty_like(hidden)
    for start in range(0, hidden.shape[0], batch_size):
        batch = hidden[start : start + batch_size]
        out[start : start + batch_size] = call(block, batch)
    return out
