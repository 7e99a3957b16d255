"""Times of calls: medians of replayed CUDA graphs, and rows of measurements."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

PAST_CACHE = 200 << 20  # bytes that inputs rotate over


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement, in milliseconds; `ratio` is of `baseline_ms` to `ms`, None where the check failed."""

    what: str
    tokens: int
    error: float  # of the check: distance from the reference, in the check's own unit
    correct: bool
    ms: float | None = None
    low: float | None = None  # tenth percentile
    high: float | None = None  # ninetieth
    baseline: str = ""
    baseline_ms: float | None = None

    @property
    def ratio(self) -> float | None:
        """How many times faster than the baseline."""
        return None if self.ms is None or self.baseline_ms is None else self.baseline_ms / self.ms

    def json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self) | {"ratio": self.ratio}


@dataclass(frozen=True)
class Times:
    """Milliseconds of one call."""

    median: float
    low: float
    high: float


def measure(calls: Sequence[Callable[[], Any]], device: torch.device, *, seconds: float = 0.3) -> Times:
    """Time one call, from runs of all of them in turn; on CUDA as a graph.

    Args:
        calls: the same work on different data.
        seconds: to spend on it.
    """
    return in_turn([calls], device, seconds=seconds)[0]


def in_turn(sides: Sequence[Sequence[Callable[[], Any]]], device: torch.device, *, seconds: float = 0.3) -> list[Times]:
    """`measure` for each of several sides, run one after the other again and again: none meets a warmer device."""
    runs = [_recorded(calls, device) if device.type == "cuda" else partial(wall, calls) for calls in sides]
    for _ in range(3 if device.type == "cuda" else 1):
        for run in runs:
            run()
    times: list[list[float]] = [[] for _ in sides]
    until = time.perf_counter() + seconds * len(sides)
    while times and (len(times[0]) < 10 or (time.perf_counter() < until and len(times[0]) < 1000)):
        for run, calls, taken in zip(runs, sides, times, strict=True):
            taken.append(run() / len(calls))
    deciles = [statistics.quantiles(taken, n=10) for taken in times]
    return [Times(statistics.median(t), d[0], d[-1]) for t, d in zip(times, deciles, strict=True)]


def _recorded(calls: Sequence[Callable[[], Any]], device: torch.device) -> Callable[[], float]:
    """Calls as one graph; it gives the milliseconds of a replay."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for call in (*calls, calls[0]):
            call()
    torch.cuda.current_stream(device).wait_stream(stream)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def replay() -> float:
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    return replay


def wall(calls: Sequence[Callable[[], Any]]) -> float:
    start = time.perf_counter()
    for call in calls:
        call()
    return 1e3 * (time.perf_counter() - start)


def copies(bytes_each: int) -> int:
    """How many inputs of a size calls rotate over, so that none is found in the cache."""
    return max(1, min(64, -(-PAST_CACHE // max(1, bytes_each))))


def moves(size: int, count: int, device: torch.device) -> list[Callable[[], Any]]:
    """Copies that read and write `size` bytes together, of `count` pairs of buffers."""
    half = [torch.empty(max(1, size // 2), dtype=torch.uint8, device=device) for _ in range(2 * count)]
    return [partial(a.copy_, b) for a, b in zip(half[::2], half[1::2], strict=True)]


def made_row(
    what: str, tokens: int, error: float, times: Times | None, baseline: str, baseline_ms: float | None
) -> Row:
    """A row; of what failed its check there are no times."""
    if times is None:
        return Row(what=what, tokens=tokens, error=error, correct=False, baseline=baseline)
    return Row(
        what=what,
        tokens=tokens,
        error=error,
        correct=True,
        ms=times.median,
        low=times.low,
        high=times.high,
        baseline=baseline,
        baseline_ms=baseline_ms,
    )
