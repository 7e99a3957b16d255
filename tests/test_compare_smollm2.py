"""The benchmark of all methods: its jobs, its budget, and that a run that was cut short goes on."""

import json
from pathlib import Path

import pytest
from benchmarks import compare_smollm2, tables
from benchmarks.compare_smollm2 import CHANGES, JOBS, Job, measure, tiny

from flatquant.compare import Bench, Settings
from flatquant.recipes import RECIPES
from tests.tiny_models import tiny_llama, tiny_tokenizer


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 40)
    (tmp_path / "bench" / "rows").mkdir(parents=True)
    settings = Settings(
        model="tiny", calibration=str(text), perplexity=(str(text),), window=32, windows=2, device="cpu"
    )
    return Bench(settings, tmp_path / "bench", load=lambda: (tiny_llama(hidden=32), tiny_tokenizer()))


def test_jobs_are_all_methods_at_all_schemes_that_they_take() -> None:
    pairs = {(job.method, job.scheme) for job in JOBS}
    assert len(pairs) == len(JOBS)
    for scheme in ("w4a16", "w3a16", "w2a16"):
        assert {method for method, at in pairs if at == scheme} == set(RECIPES)
    weights_alone = {"autoround", "vptq", "oac"}
    assert {m for m, s in pairs if s == "w4a4kv4"} == set(RECIPES) - weights_alone
    for job in JOBS:
        made = job.recipe()
        assert (made == RECIPES[job.method](job.scheme)) == (job.method not in CHANGES)


@pytest.mark.parametrize("method", sorted(RECIPES))
def test_every_method_gives_a_row(method: str, bench: Bench, tmp_path: Path) -> None:
    jobs = [job for job in JOBS if job.method == method][:2]
    measure(jobs, bench, tmp_path / "result.json", prepare=tiny)
    result = json.loads((tmp_path / "result.json").read_text())
    assert [s["job"] for s in result["samples"]] == [job.name for job in jobs]
    for sample in result["samples"]:
        assert "error" not in sample
        assert result["metrics"]["rows"][sample["job"]]["kl"] == sample["kl"] > 0
        assert sample["recipe"]["name"] == method
        assert bool(sample["note"]) == (method in CHANGES)


def test_a_run_stops_in_time_and_goes_on(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "result.json"
    jobs = [Job("gptq", "w4a16", 20), Job("rtn", "w4a16", 5), Job("rtn", "w4g5a16", 5), Job("rtn", "w3a16", 5)]
    measure(jobs, bench, path, prepare=tiny, left=lambda: 10.0)
    assert "gptq/w4a16: no time" in capsys.readouterr().out
    rows = {s["job"]: s for s in json.loads(path.read_text())["samples"]}
    assert list(rows) == ["rtn/w4a16", "rtn/w4g5a16", "rtn/w3a16"]
    assert "group size 5" in rows["rtn/w4g5a16"]["error"]
    seen = []
    real = Bench.measure
    monkeypatch.setattr(Bench, "measure", lambda self, made: seen.append(made.name) or real(self, made))
    measure(jobs, bench, path, prepare=tiny)
    assert seen == ["gptq"]
    again = {s["job"]: s for s in json.loads(path.read_text())["samples"]}
    assert len(again) == 4
    assert all(again[job] == row for job, row in rows.items())
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    (tmp_path / f"{compare_smollm2.NAME}.json").write_text(path.read_text())
    table = "\n".join(tables.compared())
    assert "| gptq |" in table
    assert "group size 5" not in table


def test_parts_are_joined_in_order(bench: Bench, tmp_path: Path) -> None:
    jobs = [job for job in JOBS if job.method == "rtn"]
    parts = [tmp_path / str(i) / f"{compare_smollm2.NAME}.json" for i in range(2)]
    measure(jobs[2:], bench, parts[0], prepare=tiny, share=tmp_path / "taken")
    measure(jobs, bench, parts[1], prepare=tiny, share=tmp_path / "taken")
    assert len(json.loads(parts[1].read_text())["samples"]) == 2
    compare_smollm2.merge(parts, tmp_path / "joined.json")
    joined = json.loads((tmp_path / "joined.json").read_text())
    assert [s["job"] for s in joined["samples"]] == [job.name for job in jobs]
    assert list(joined["metrics"]["rows"]) == [job.name for job in jobs]
    other = json.loads(parts[1].read_text()) | {"device": "another"}
    parts[1].write_text(json.dumps(other))
    with pytest.raises(SystemExit, match="another device"):
        compare_smollm2.merge(parts, tmp_path / "joined.json")
