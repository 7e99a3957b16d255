"""The time left: right for a steady run, near for one whose plan was wrong, and never jumping."""

import random
from itertools import pairwise

import pytest

from flatquant.progress import Forecast, duration

Steps = list[tuple[str, float, int, float]]


def run(stages: dict[str, tuple[int, float]], start: float = 100.0) -> Steps:
    """Calls of a run whose stages take (units, seconds a unit), one after another, with the time of each call."""
    calls, now = [], start
    for stage, (units, seconds) in stages.items():
        calls.append((stage, 0, units, now))
        for done in range(1, units + 1):
            now += seconds
            calls.append((stage, done, units, now))
    return calls


def told(work: dict[str, float], calls: Steps) -> list[tuple[float, float | None]]:
    """(Seconds that are left, what was told of them), at every call."""
    forecast, end, out = Forecast(work), calls[-1][3], []
    for call in calls:
        forecast.update(*call)
        out.append((end - call[3], forecast.left()))
    return out


def test_a_plan_that_is_right_is_told_exactly() -> None:
    pairs = told({"a": 10.0, "b": 40.0, "c": 5.0}, run({"a": (20, 1.0), "b": (8, 10.0), "c": (1, 10.0)}))
    known = [(truth, said) for truth, said in pairs if said is not None]
    assert len(known) > len(pairs) - 4
    for truth, said in known:
        assert said == pytest.approx(truth, abs=1e-6)


def test_nothing_is_told_before_anything_is_measured() -> None:
    forecast = Forecast({"a": 10.0, "b": 1000.0})
    forecast.update("a", 0, 10, 5.0)
    assert forecast.left() is None
    assert forecast.stage_left("a") is None
    forecast.update("a", 10, 10, 15.0)  # a hundredth of the work
    assert forecast.left() is None
    forecast.update("b", 0, 100, 15.0)
    assert forecast.stage_left("b") == pytest.approx(1000.0)
    forecast.update("b", 2, 100, 35.0)
    assert forecast.left() is not None


def test_without_a_plan_stages_still_have_a_time() -> None:
    forecast = Forecast()
    for call in run({"text": (10, 2.0)})[:5]:
        forecast.update(*call)
    assert forecast.stage_left("text") == pytest.approx(12.0)
    assert forecast.left() is None


@pytest.mark.parametrize("seed", range(20))
def test_a_wrong_plan_is_corrected_without_jumps(seed: int) -> None:
    draw = random.Random(seed)
    stages = {name: (draw.randint(10, 60), draw.uniform(0.5, 8.0)) for name in "abcd"}
    work = {name: n * s * draw.uniform(1 / 3, 3) for name, (n, s) in stages.items()}
    calls = run(stages)
    pairs = told(work, calls)
    total = calls[-1][3] - calls[0][3]
    expected = [(total - truth) + said for truth, said in pairs if said is not None]  # of the whole run
    for (before, after), call in zip(pairwise(expected), calls[len(calls) - len(expected) + 1 :], strict=True):
        passed = stages[call[0]][1] / max(call[3] - calls[0][3], 1e-9)  # of the time since the start
        assert abs(after - before) <= 30 * passed * total
        assert abs(after - before) <= 0.25 * max(before, total)
    for truth, said in pairs:
        if truth < 0.25 * total:
            assert said is not None
            assert abs(said - truth) < 0.25 * total
    assert pairs[-1][1] == pytest.approx(0, abs=0.05 * total)


def test_stages_that_take_turns_are_each_measured() -> None:
    forecast, now = Forecast({"pass": 3.0, "fit": 60.0}), 0.0
    for block in range(6):
        forecast.update("pass", block, 10, now)
        now += 1
        forecast.update("pass", block + 1, 10, now)
        forecast.update("fit", 4 * block, 40, now)
        for step in range(1, 5):
            now += 5
            forecast.update("fit", 4 * block + step, 40, now)
    assert forecast.stages["pass"].seconds == pytest.approx(6)
    assert forecast.stage_left("pass") == pytest.approx(4, rel=0.1)
    assert forecast.stage_left("fit") == pytest.approx(80, rel=0.1)
    assert forecast.left() == pytest.approx(84, rel=0.1)


def test_what_an_earlier_run_did_does_not_count_as_measured() -> None:
    forecast = Forecast({"fit": 1.0})
    forecast.update("load", 0, 1, 0.0)
    forecast.update("fit", 90, 100, 1.0)  # a resumed run begins there
    forecast.update("fit", 92, 100, 9.0)
    assert forecast.stage_left("fit") == pytest.approx(8 * 4.0)


@pytest.mark.parametrize(
    "seconds, text", [(0.2, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"), (7800, "2 h 10 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
