"""Runs `quantize`, kills it (SIGKILL) at chosen and at random points, resumes it, and compares bytes.

    python tests/killing.py RECIPE MODEL_FOLDER TEXT WORK_FOLDER TRIALS

A program of its own: every run is a fork of a process that has imported all and computed nothing, which costs a tenth
of a start from nothing. Prints JSON: how many kills hit a living run, and what differed from the run left alone.
"""

import dataclasses
import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from flatquant import api, recipes
from flatquant.spec import DataSpec, EndToEndSpec, FitSpec, Recipe, SolverSpec


def make_recipe(name: str) -> Recipe:
    if name == "rtn":
        return recipes.rtn("w4a4kv4")
    small = dataclasses.replace(
        recipes.flatquant("w4a4kv4"), data=DataSpec(samples=4, seqlen=16), fit=FitSpec(epochs=2, batch_size=2)
    )
    if name == "gptq":
        return dataclasses.replace(small, solver=SolverSpec(kind="gptq"))
    assert name == "end to end"
    return dataclasses.replace(small, end_to_end=EndToEndSpec(steps=20, batch_size=2))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file; of the report all but `timing`."""
    found = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    report = json.loads(found["flatquant_report.json"])
    assert report.pop("timing")["total"] > 0
    return {**found, "flatquant_report.json": json.dumps(report, sort_keys=True).encode()}


class Runs:
    def __init__(self, recipe: str, model: str, text: str, work: Path) -> None:
        self.recipe, self.model, self.text, self.work = make_recipe(recipe), model, text, work

    def start(self, output: Path, *, resume: bool) -> int:
        child = os.fork()
        if child:
            return child
        code = 1
        try:
            text = self.text if self.recipe.needs_data else None
            api.quantize(self.model, self.recipe, text, output=output, device="cpu", resume=resume)
            code = 0
        finally:
            if code:
                traceback.print_exc()
            sys.stderr.flush()
            os._exit(code)

    def finish(self, output: Path, *, resume: bool) -> None:
        _, status = os.waitpid(self.start(output, resume=resume), 0)
        assert status == 0, status

    def killed(self, output: Path, when: Callable[[], bool], *, resume: bool) -> bool:
        """Start a run and kill it when `when` says so; whether it was still alive."""
        child = self.start(output, resume=resume)
        while not when():
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                assert status == 0, status
                return False
            time.sleep(0.0005)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        return os.WIFSIGNALED(status)


def names(folder: Path) -> list[str]:
    """What a folder holds; a run that ends removes it at any moment."""
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


def main() -> None:
    recipe, model, text, folder, trials = sys.argv[1:]
    work, rng = Path(folder), random.Random(recipe)
    runs = Runs(recipe, model, text, work)
    start = time.perf_counter()
    runs.finish(work / "whole", resume=False)
    seconds = time.perf_counter() - start
    expected = contents(work / "whole")
    result = {"kills": 0, "finished after a kill": 0, "different": [], "left": []}
    for trial in range(int(trials)):
        output = work / f"trial-{trial}"
        partial = work / f"trial-{trial}.partial"
        for attempt in range(rng.choice([1, 1, 3])):
            if trial % 3 == 0:  # at any time
                until = time.perf_counter() + rng.uniform(0, seconds)
                when = lambda: time.perf_counter() > until  # noqa: B023, E731
            elif trial % 3 == 1:  # when so many more pieces are kept
                want = len(names(partial)) + rng.randint(1, 4)
                when = lambda: len(names(partial)) >= want  # noqa: B023, E731
            else:  # while the folder is written, or has just appeared
                name = output.name + rng.choice(["", ".tmp-*"])
                when = lambda: any(work.glob(name))  # noqa: B023, E731
            result["kills"] += runs.killed(output, when, resume=attempt > 0)
            result["finished after a kill"] += output.is_dir()
        runs.finish(output, resume=True)
        found = contents(output)
        different = [name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)]
        result["different"] += [f"{trial}: {name}" for name in different]
        result["left"] += [p.name for p in work.glob(f"{output.name}.*")]
    print(json.dumps(result))


if __name__ == "__main__":
    main()
