"""What blocks receive: the first block's hidden states, and the keyword arguments every block is called with."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import compress, islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from flatquant import seams
from flatquant.calibrate.activations import K, Kept, mapped
from flatquant.calibrate.lent import Lent
from flatquant.calibrate.samples import Samples, Windows, inputs_of
from flatquant.errors import DataError, one_line
from flatquant.modules import widened
from flatquant.rotary import Angles, turned_back
from flatquant.runtime.embedding import embedding_device
from flatquant.spec import KeyOffset, Pairing, by_expert, is_experts
from flatquant.transforms import Factor
from flatquant.wiring.arch import Arch, blocks_at, rotary_channels, submodule
from flatquant.wiring.fitted import InputStatistics

_ROWS, _ROWS_A_CALL = 128, 32  # tokens of a site's input that are kept


@dataclass(frozen=True, kw_only=True)
class BlockCall:
    """How the model calls one block, besides the hidden states; the same for windows of one length of text.

    `repeated` arguments are noted for one window, and have rows for each.
    `own` are positional arguments that every window has its own of, with a row for each (one: for all), by position.
    `lent` says what of a stream of hidden states are keys and values that blocks lend to later ones, if any do.
    `added` is what the model adds to what the block before gives (Qwen3-VL: features of an image).
    `windows` are the calls of every window where these differ. The block is then called for one after another: how an
    argument is laid out for several of them is each model's own.
    `basis` is that of a block's residual stream once it is wrapped. Hidden states between blocks stay in the original
    basis, so that both models' can be compared; a rotated block is entered and left through the basis.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    basis: Factor | None = None
    repeated: tuple[str, ...] = ()
    added: Tensor | None = None  # (1, T, h)
    own: dict[int, Kept] = field(default_factory=dict)  # (N, T, ..)
    lent: Lent | None = None
    windows: tuple[BlockCall, ...] = ()

    def __call__(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """Run a block; on all of `windows`, if there are such.  # (B, T, h) -> (B, T, h)"""
        if self.windows:
            pairs = zip(self.windows, hidden.split(1), strict=True)
            return torch.cat([replace(own.to(x.device), basis=self.basis)(block, x) for own, x in pairs])
        if self.lent is not None:
            shared = self.lent.lent(hidden)
            alone = replace(self, lent=None, kwargs={**self.kwargs, seams.LENT: shared})
            return self.lent.joined(alone(block, self.lent.states(hidden)), shared)
        if self.added is not None:
            hidden = hidden + self.added.to(hidden.dtype)
        if self.basis is not None:
            hidden = hidden @ self.basis.matrix().to(hidden.dtype)
        rows = {name: self.kwargs[name].repeat(len(hidden), 1, 1) for name in self.repeated}
        assert all(kept.shape[0] in (1, len(hidden)) for kept in self.own.values()), "which windows are these?"
        own = {i: kept[: len(hidden)].to(hidden) for i, kept in self.own.items()}
        args = [own.get(i, value) for i, value in enumerate(self.args)]
        out = block(hidden, *args, **(self.kwargs | rows))
        out = out if isinstance(out, Tensor) else out[0]
        return out if self.basis is None else out @ self.basis.inverse_t().mT.to(out.dtype)

    def of(self, windows: Tensor) -> BlockCall:
        """The call of some windows, by number.  # int64, (B,)"""
        if self.windows:
            return replace(self, windows=tuple(self.windows[i] for i in windows.tolist()))
        return replace(self, own={i: _rows(kept, windows) for i, kept in self.own.items()}) if self.own else self

    def states(self, stream: Tensor) -> Tensor:
        """The hidden states of a stream, without what blocks lend.  # (.., h)"""
        return stream if self.lent is None else self.lent.states(stream)

    def in_order(self, block: nn.Module) -> Callable[[Tensor], Tensor]:
        """A block as a function that is given all windows in their order, some at a time.  # (B, T, h) -> (B, T, h)"""
        if not self.windows and not self.own:
            return partial(self, block)
        ahead = itertools.count()
        return lambda hidden: self.of(torch.tensor([*islice(ahead, len(hidden))]))(block, hidden)

    def to(self, device: torch.device) -> BlockCall:
        """The same call with its tensors on `device`. Those of `windows` and `own` go there when called."""
        return self.map(lambda t: t.to(device))

    def map(self, f: Callable[[Tensor], Tensor]) -> BlockCall:
        """The same call with `f` of its tensors."""
        return replace(self, args=_map(self.args, f), kwargs=_map(self.kwargs, f), added=_map(self.added, f))


def _map(value: Any, f: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return f(value)
    if isinstance(value, tuple | list):
        return type(value)(_map(v, f) for v in value)
    if isinstance(value, dict):
        return {k: _map(v, f) for k, v in value.items()}
    return value


def _rows(kept: Kept, windows: Tensor) -> Tensor:
    """Rows by number; one alone is that of all. A CUDA graph may be recorded of it if both are on the device."""
    if kept.shape[0] == 1:
        return kept[:1]
    if isinstance(kept, Tensor):
        return kept[windows.to(kept.device)]
    return torch.cat([kept[i : i + 1] for i in windows.tolist()])


@contextmanager
def _recorded(blocks: nn.ModuleList) -> Iterator[list[tuple[Tensor, tuple, dict]]]:
    """Make every block note its call and hand on zeros: the next one is given what the model adds in between."""
    calls: list[tuple[Tensor, tuple, dict]] = []

    def record(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append((hidden, args, kwargs))
        return torch.zeros_like(hidden)

    for block in blocks:
        block.forward = record  # shadows the method; the block keeps its type and attributes
    try:
        yield calls
    finally:
        for block in blocks:
            del block.forward


@torch.no_grad()
def capture(
    model: PreTrainedModel,
    arch: Arch,
    tokens: Windows,
    room: Callable[[tuple[int, ...], torch.dtype], Kept] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Kept, list[BlockCall]]:
    """Embed all windows and note how each block is called. No block is computed, or need have its tensors.

    Args:
        tokens: int64, (N, T); or samples.
        room: makes room for the hidden states, of a shape and the model's dtype; on the model's device if None.
        progress: called with (windows done, windows).

    Returns:
        Hidden states before block 0, (N, T, h), and one call per block; of several samples, with one for each.

    Raises:
        DataError: the model does not take a sample.
    """
    blocks = blocks_at(model, arch.blocks)
    device = embedding_device(model)
    make = room or (lambda shape, dtype: torch.empty(shape, dtype=dtype, device=device))
    hidden: Kept | None = None
    seen: list[list[BlockCall]] = []  # by window; of token ids, of the first
    if progress is not None:
        progress(0, len(tokens))
    with _recorded(blocks) as recorded:
        for i, inputs in enumerate(inputs_of(tokens)):
            recorded.clear()
            try:
                model.base_model(**{k: _map(v, lambda t: t.to(device)) for k, v in inputs.items()}, use_cache=False)
            except (TypeError, ValueError, RuntimeError, IndexError) as error:  # what models raise of odd inputs
                if isinstance(tokens, Samples):
                    kind = type(model).__name__
                    raise DataError(f"sample {i}: {kind} does not take it ({one_line(error)})") from error
                raise
            first = recorded[0][0]
            if hidden is None:
                lent = Lent.of(blocks, first.shape[-1])
                hidden = make((tokens.shape[0], first.shape[1], lent.width + lent.numbers), first.dtype)
            if not seen or isinstance(tokens, Samples):
                seen.append([_call_of(arch, lent, *call, first=call is recorded[0]) for call in recorded])
            if not isinstance(tokens, Samples):
                _keep_own(arch, seen[0], [args for _, args, _ in recorded], i, tokens.shape[0], make)
            hidden[i : i + 1] = F.pad(first, (0, lent.numbers))
            if progress is not None:
                progress(i + 1, len(tokens))
    assert hidden is not None
    if len(seen) == 1:
        return hidden, seen[0]
    return hidden, [BlockCall(args=(), kwargs={}, lent=own[0].lent, windows=own) for own in zip(*seen, strict=True)]


def _call_of(arch: Arch, lent: Lent, hidden: Tensor, args: tuple, kwargs: dict[str, Any], *, first: bool) -> BlockCall:
    added = None if first or not bool(hidden.any()) else hidden
    return BlockCall(
        args=args,
        kwargs=_without_cache(kwargs),
        repeated=arch.repeated,
        added=added,
        lent=lent if seams.LENT in kwargs else None,
    )


def _keep_own(
    arch: Arch, calls: list[BlockCall], given: list[tuple], window: int, windows: int, make: Callable[..., Kept]
) -> None:
    """Note a window's own arguments in every block's call."""
    for call, args in zip(calls, given, strict=True):
        for i in (i for i in arch.own if i < len(args) and isinstance(args[i], Tensor)):
            if i not in call.own:
                call.own[i] = make((windows, *args[i].shape[1:]), args[i].dtype)
            call.own[i][window : window + 1] = args[i]


def _without_cache(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in kwargs.items() if not seams.is_cache(v)}


class _Moments:
    """Running ends and mean square of the last dimension, and some of its rows."""

    def __init__(self) -> None:
        self.low, self.high = torch.tensor(torch.inf), torch.tensor(-torch.inf)
        self.total = self.square = torch.zeros(())
        self.tokens = 0
        self.rows: list[Tensor] = []  # spread over the first calls

    def add(self, x: Tensor) -> None:
        x = x.detach().flatten(0, -2).float()  # (tokens, n)
        self.low, self.high = torch.minimum(x.amin(0), self.low.to(x)), torch.maximum(x.amax(0), self.high.to(x))
        self.total, self.square = x.sum(0) + self.total.to(x), x.square().sum(0) + self.square.to(x)
        self.tokens += x.shape[0]
        room = _ROWS - sum(map(len, self.rows))
        self.rows.append(x[:: max(1, len(x) // _ROWS_A_CALL)][: min(room, _ROWS_A_CALL)].clone())


class _SeenKeys(seams.KeyValue):
    """Leaves queries, keys and values alone, and notes keys as they were before RoPE."""

    def __init__(self, moments: _Moments, pairing: Pairing, rotary: int | None) -> None:
        super().__init__()
        self.rotary = rotary
        self._moments = moments
        self._pairing: Pairing = pairing

    def query(self, q: Tensor) -> Tensor:
        return q

    def key(self, k: Tensor, angles: Angles | None = None) -> Tensor:
        pairs = seams.position_angles(angles, self._pairing)
        before = k if pairs is None else turned_back(k.float(), pairs.float(), self._pairing)
        self._moments.add(before.transpose(1, 2).flatten(2))  # (B, T, heads head_dim)
        return k

    def value(self, v: Tensor) -> Tensor:
        return v


class Observer:
    """Collects statistics of every site's input while a block runs.

    Every token passes through as many experts of a mixture as every other: over all of them, means are what they are
    over tokens.
    """

    def __init__(self, block: nn.Module, arch: Arch, keys: KeyOffset | None = None) -> None:
        """With `keys`, also of keys before RoPE, under `qk`; nothing else may be attached to the attention module."""
        arch = arch.of(block)
        self._moments = {edge.site: _Moments() for edge in arch.edges}
        self._attention = None
        if keys is not None and arch.attention is not None:
            self._moments["qk"] = _Moments()
            self._attention = submodule(block, arch.attention)
            rotary = rotary_channels(block, arch)
            seams.attach(self._attention, _SeenKeys(self._moments["qk"], keys.pairing, rotary))
        groups = {edge.site: by_expert(edge.readers) for edge in arch.edges}
        # Of a mixture, what all tokens pass is no expert.
        self._counted = {site: [is_experts(g) or len(paths) == 1 for g in paths] for site, paths in groups.items()}
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
        if self._attention is not None:
            seams.detach(self._attention)
        out = {}
        for site, m in self._moments.items():
            assert m.tokens, f"{site} was never reached"
            out[site] = InputStatistics(
                absmax=torch.maximum(m.high, -m.low),
                center=(m.high + m.low) / 2,
                mean=m.total / m.tokens,
                square=m.square / m.tokens,
                rows=torch.cat(m.rows),
                tokens=tuple(compress(self._tokens.get(site, ()), self._counted.get(site, ()))),
            )
        return out


@torch.no_grad()
def run_block(block: nn.Module, call: BlockCall, hidden: K, batch_size: int) -> K:
    """A block's outputs on all windows, in hidden's dtype, kept where hidden is.  # (N, T, h)

    Raises:
        CalibrationError: an output is not finite.
    """
    run = call.in_order(block)
    with widened(block, hidden.dtype) as work:
        return mapped(hidden, batch_size, lambda x: run(x.to(work)).to(hidden.dtype))
