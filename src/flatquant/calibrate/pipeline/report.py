"""What a run reports: notes of blocks, wall time, peak memory."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from flatquant.calibrate.blockwise import Fitted
from flatquant.calibrate.end2end import FittedModel
from flatquant.wiring.fitted import InputStatistics


@dataclass(kw_only=True)
class Report:
    """What happened, for `flatquant_report.json`. Seconds are wall time, memory is peak bytes on the device."""

    blocks: list[dict[str, Any]] = field(default_factory=list)
    end_to_end: FittedModel | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory: int | None = None


@dataclass(kw_only=True)
class Clock:
    """Adds wall time to a report's stages."""

    seconds: dict[str, float]
    device: torch.device

    def __call__(self, stage: str) -> _Span:
        return _Span(self, stage)


@dataclass
class _Span:
    clock: Clock
    stage: str
    start: float = 0.0

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        if self.clock.device.type == "cuda":
            torch.cuda.synchronize(self.clock.device)
        elapsed = time.perf_counter() - self.start
        self.clock.seconds[self.stage] = self.clock.seconds.get(self.stage, 0.0) + elapsed


def measured(fitted: Fitted | FittedModel) -> dict[str, Any]:
    """What a fit came to on windows that it was not trained on, JSON-ready: before and after, None where not finite."""
    assert fitted.held_out is not None
    losses = [x if math.isfinite(x) else None for x in fitted.held_out]
    plain = fitted.plain if fitted.plain is not None and math.isfinite(fitted.plain) else None
    return {"held_out": losses, "plain": plain, "undone": fitted.undone}


def routed(statistics: Mapping[str, InputStatistics]) -> dict[str, Any]:
    """What a report says of a block's experts: the tokens that each saw, and which saw fewer than it has inputs."""
    seen = [s for s in statistics.values() if len(s.tokens) > 1]
    if not seen:
        return {}
    tokens, n = seen[0].tokens, max(len(s.absmax) for s in seen)
    return {"experts": {"tokens": list(tokens), "rare": [i for i, count in enumerate(tokens) if count < n]}}
