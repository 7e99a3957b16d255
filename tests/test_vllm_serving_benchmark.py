"""What the benchmark of vLLM's speed makes of its engines' rows. The engines themselves run with vLLM alone."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from benchmarks.vllm_serving import BASE, Job, metrics, options, random_config, random_folder, rows

from flatquant.engines.vllm import support


def job(home: Path, side: str, path: Path | None = None) -> Job:
    return Job(
        model="m", side=side, path=str(path), home=str(home), sequences=[1, 3], prompt=16, new=9, repeats=1, eager=True
    )


def row(side: str, sequences: int, first: list[float], whole: list[float]) -> dict[str, Any]:
    times = {"first_seconds": first, "whole_seconds": whole}
    return {"model": "m", "side": side, "sequences": sequences, "prompt": 16, "new": 9, **times}


def test_rates_are_those_of_median_times() -> None:
    found = metrics(
        [row(BASE, 2, [0.5, 0.1, 0.9], [2.5, 2.5, 9.0]), row("w4a4", 2, [1.0], [1.5]), row("w4a4", 4, [1], [2])]
    )
    base, ours = found["m"][BASE]["2"], found["m"]["w4a4"]
    assert base == {"prefill": 2 * 16 / 0.5, "output": 2 * 9 / 2.5, "decode": 2 * 8 / 2.0}
    assert ours["2"]["times"] == pytest.approx({"prefill": 0.5, "output": 2.5 / 1.5, "decode": 4.0})
    assert "times" not in ours["4"]


def test_an_engine_that_fails_is_named_and_the_others_are_measured(tmp_path: Path, capsys) -> None:
    def process(job: Job, code: str) -> tuple[Job, subprocess.Popen]:
        code = f"import pathlib, time\nfile = lambda what: pathlib.Path({str(job.stem)!r} + '.' + what)\n{code}"
        with job.file("log").open("w") as log:
            return job, subprocess.Popen([sys.executable, "-c", code], stdout=log, stderr=log)

    good = """
file("ready").write_text("1.0")
while not file("go").exists():
    time.sleep(0.01)
for n in (1, 3):
    with file("rows").open("a") as out:
        out.write('{"sequences": %d}\\n' % n)
"""
    engines = [process(job(tmp_path, "bad"), "raise ValueError('why')"), process(job(tmp_path, "good"), good)]
    half = process(job(tmp_path, "half"), good.replace("(1, 3)", "(1,)"))
    assert list(rows([*engines, half])) == [{"sequences": 1}, {"sequences": 3}, {"sequences": 1}]
    said = capsys.readouterr().out
    assert "m bad FAILED" in said
    assert "ValueError: why" in said
    assert "m good started in 1.0 s" in said
    assert "m half FAILED" in said


def test_random_models_are_ones_that_vllm_serves(tmp_path: Path) -> None:
    random_config("tiny", tmp_path / "plain", True)
    random_folder("tiny", "w4a4kv4", str(tmp_path / "packed"), True)
    support.check_packed(support.open_folder(tmp_path / "packed"))
    assert options(job(tmp_path, BASE, tmp_path / "plain"))["load_format"] == "dummy"
    assert "load_format" not in options(job(tmp_path, "w4a4kv4", tmp_path / "packed"))
