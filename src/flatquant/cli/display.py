"""Progress on a terminal, or as lines."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from flatquant.progress import Forecast, duration

if TYPE_CHECKING:
    from flatquant.calibrate.memory import Estimate


_WHOLE = "whole run"
_UNITS = {
    "capture": "window ", "full precision": "block ", "fit": "epoch ", "fold": "block ", "solve": "block ",
    "text": "token ", "end to end": "step ",
}  # fmt: skip


class Display:
    """Progress on stderr with the time left: bars on a terminal, elsewhere a line where a stage begins and ends.

    Call it with (stage, done, total). Between those lines no more than `every` seconds pass without another, whether or
    not the stage says anything. `epochs` turns the fit's epochs of all blocks into "block 3/30".
    """

    def __init__(
        self, *, silent: bool, epochs: int = 0, every: float = 10.0, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self.bars: Progress | None = None
        if not silent and self.console.is_terminal:
            self.bars = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f}%"),
                TimeElapsedColumn(),
                TextColumn("{task.fields[left]}", markup=False),
                console=self.console,
            )
        self.silent, self.epochs, self.every, self.clock = silent, epochs, every, clock
        self.forecast = Forecast()
        self.tasks: dict[str, Any] = {}
        self.last: tuple[str, float, int] | None = None
        self.begun: set[str] = set()
        self.ended: set[str] = set()
        self.start = self.spoken = clock()
        self.lock = threading.RLock()
        self.over = threading.Event()

    def __enter__(self) -> Display:
        if self.bars is not None:
            self.bars.start()
        elif not self.silent:
            threading.Thread(target=self._keep_speaking, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        if self.bars is not None:
            self.bars.stop()

    def __call__(self, stage: str, done: float, total: int) -> None:
        if self.silent:
            return
        with self.lock:
            self.forecast.update(stage, done, total, self.clock())
            self.last = stage, done, total
            if self.bars is not None:
                self._bar(self.bars, stage, done, total)
            elif self._worth_a_line(stage, done, total):
                self._speak()

    def expect(self, estimate: Estimate) -> None:
        """Say what a run will need, and from now on when it will be over."""
        self.note(estimate)
        self.forecast.work = dict(estimate.work)

    def note(self, what: object) -> None:
        """A line of its own."""
        if not self.silent:
            with self.lock:
                self.spoken = self.clock()
                self.console.print(f"[{self.spoken - self.start:7.1f} s] {what}", markup=False)

    def _worth_a_line(self, stage: str, done: float, total: int) -> bool:
        """Whether a stage begins or ends, or nothing was said for a while."""
        begins, ends = stage not in self.begun, done >= total and stage not in self.ended
        self.begun.add(stage)
        if ends:
            self.ended.add(stage)
        return begins or ends or self.clock() - self.spoken >= self.every

    def _keep_speaking(self) -> None:
        """Lines of a stage that says nothing itself."""
        while not self.over.wait(min(1.0, self.every / 4)):
            with self.lock:
                if self.last is not None and self.clock() - self.spoken >= self.every and not self.over.is_set():
                    self._speak()

    def _speak(self) -> None:
        assert self.last is not None
        stage, done, total = self.last
        parts = [self._describe(stage, done, total)]
        if done < total:
            parts.append(self._left(self._by_now(self.forecast.stage_left(stage))))
        if self.forecast.work:
            parts.append(f"whole run: {self._left(self._by_now(self.forecast.left()))}")
        self.note("; ".join(parts))

    def _left(self, seconds: float | None) -> str:
        return "estimating the time left" if seconds is None else f"{duration(seconds)} left"

    def _by_now(self, left: float | None) -> float | None:
        """Seconds left by now of those that the forecast knew at the last call."""
        return None if left is None else max(0.0, left - (self.clock() - self.forecast.now))

    def _bar(self, bars: Progress, stage: str, done: float, total: int) -> None:
        text, left = self._describe(stage, done, total), self._left(self._by_now(self.forecast.stage_left(stage)))
        if stage not in self.tasks:
            self.tasks[stage] = bars.add_task(text, total=total, left=left)
        bars.update(self.tasks[stage], description=text, completed=done, total=total, left=left if done < total else "")
        if self.forecast.work:
            passed, rest = self.clock() - self.start, self._by_now(self.forecast.left())
            whole = None if rest is None else passed + rest
            if _WHOLE not in self.tasks:
                self.tasks[_WHOLE] = bars.add_task(_WHOLE, total=whole, left="")
            bars.update(self.tasks[_WHOLE], total=whole, completed=passed, left=self._left(rest))

    def _describe(self, stage: str, done: float, total: int) -> str:
        kind, whole = stage.rpartition(": ")[2], int(done)
        if kind == "fit" and self.epochs:
            return f"{stage}, block {max(1, -int(-done // self.epochs))}/{total // self.epochs}, epoch {whole}/{total}"
        if total == 1:
            return f"{stage}, done" if whole else stage
        return f"{stage}, {_UNITS.get(kind, '')}{whole}/{total}"
