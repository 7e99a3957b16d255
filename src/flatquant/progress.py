"""How far a run is, stage by stage, and how long it will still take.

Work is planned in any one unit. A stage that has begun goes on at the pace that was measured of it; one that has not is
expected at the pace of all that was measured. A pace that rests on little work is mixed with the plan's, and the total
moves towards a new value over a tenth of the time since the start, so that one slow step does not show as a jump.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

# (stage, done, total); `done` may be a fraction of a unit. The first call after another stage's says where a stage
# stands, and the next ones how far it has come.
Progress = Callable[[str, float, int], None]

_LEAST_SHARE = 0.02  # of the planned work, measured before the whole run's time is told
_TRUST = 0.03  # share of a stage after which its own pace counts as much as the plan's


@dataclass
class _Stage:
    done: float = 0.0
    total: float = 1.0
    advanced: float = 0.0  # of `total`, while it was watched
    seconds: float = 0.0

    @property
    def rest(self) -> float:
        """Share that is still to come."""
        return max(0.0, 1 - self.done / max(self.total, 1e-9))

    @property
    def measured(self) -> float:
        """Share that was watched."""
        return self.advanced / max(self.total, 1e-9)


class Forecast:
    """The seconds left of every stage and of a whole run.

    Args:
        work: what each stage of the run is expected to cost, in one unit; a stage that is not listed adds nothing
            to the whole before it begins.
    """

    def __init__(self, work: Mapping[str, float] | None = None) -> None:
        self.work = {stage: cost for stage, cost in (work or {}).items() if cost > 0}
        self.stages: dict[str, _Stage] = {}
        self.current: str | None = None
        self.start: float | None = None
        self.now = 0.0
        self.whole: float | None = None  # seconds of the run, smoothed

    def update(self, stage: str, done: float, total: float, now: float) -> None:
        """Note that `stage` stands at `done` of `total`, at `now` seconds of any clock."""
        if self.start is None:
            self.start = self.now = now
        found = self.stages.setdefault(stage, _Stage())
        found.total = total
        passed, before, self.now = now - self.now, self.now, now
        if stage == self.current:
            found.seconds += passed
            found.advanced += max(0.0, done - found.done)
        elif self.current is not None:
            self.stages[self.current].seconds += passed
        found.done, self.current = done, stage
        self._settle(now - before)

    def stage_left(self, stage: str) -> float | None:
        """Seconds left of a stage; None before anything is known of it."""
        found = self.stages.get(stage)
        if found is None:
            return self._planned(stage)
        if found.rest == 0:
            return 0.0
        planned = self._planned(stage)
        if planned is None:
            return found.rest * found.seconds / found.measured if found.measured else None
        # Seconds of the whole stage, as if a share of `_TRUST` had been measured at the planned pace.
        return found.rest * (found.seconds + _TRUST * planned) / (found.measured + _TRUST)

    def left(self) -> float | None:
        """Seconds left of the whole run; None while it is being estimated."""
        if self.whole is None or self.start is None:
            return None
        return max(0.0, self.start + self.whole - self.now)

    def _planned(self, stage: str) -> float | None:
        """Seconds of a whole stage at the pace of all that was measured."""
        known = [(s, self.work[name]) for name, s in self.stages.items() if name in self.work and s.measured]
        done = sum(s.measured * cost for s, cost in known)
        if stage not in self.work or not done:
            return None
        return self.work[stage] * sum(s.seconds for s, _ in known) / done

    def _settle(self, passed: float) -> None:
        """Move the whole run's seconds towards what is expected now."""
        assert self.start is not None
        share = sum(s.measured * self.work.get(name, 0.0) for name, s in self.stages.items())
        if not self.work or share < _LEAST_SHARE * sum(self.work.values()):
            return
        parts = [self.stage_left(stage) for stage in {**self.work, **self.stages}]
        elapsed = self.now - self.start
        expected = elapsed + sum(part for part in parts if part is not None)
        if self.whole is None:
            self.whole = expected
        else:
            self.whole += (1 - math.exp(-10 * passed / max(elapsed, 1e-9))) * (expected - self.whole)


def duration(seconds: float) -> str:
    """A time for people: `42 s`, `3 min 05 s`, `2 h 10 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
