"""The benchmark of bounded memory: its rows, and what each way to hold weights takes and loses."""

import json
import sys
from pathlib import Path

import pytest
from benchmarks import bounded_memory

from flatquant.spec import EndToEndSpec
from tests.tiny_models import tiny_llama, tiny_tokenizer


def test_every_way_to_hold_weights_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_llama(layers=2).save_pretrained(tmp_path / "tiny")
    tiny_tokenizer().save_pretrained(tmp_path / "tiny")
    (tmp_path / "code.txt").write_text("def f(x):\n    return x + 1\n" * 40)
    calibration = tmp_path / "calibration.txt"
    calibration.write_text("A river rises in the hills and runs to the sea.\n" * 60)
    given = [tmp_path / "tiny", "--tiny", "--device", "cpu", "--out", tmp_path, "--calibration", calibration]
    given += ["--only-texts", "--texts", tmp_path / "code.txt"]
    monkeypatch.setattr(sys, "argv", ["bounded_memory", *map(str, given)])
    bounded_memory.main()
    found = json.loads((tmp_path / "bounded-memory-tiny.json").read_text())
    rows = {sample["rung"]: sample for sample in found["samples"]}
    assert len(rows) == 5
    for memory in bounded_memory.MEMORIES:
        recipe = rows[bounded_memory.rung(memory)]["recipe"]
        assert recipe["end_to_end"].get("memory", EndToEndSpec().memory) == memory
    metrics = found["metrics"]["memories"]["w4a4kv4"]
    assert list(metrics) == ["full", "compact", "transforms"]
    for memory, row in metrics.items():
        assert row["kl"]["code.txt"] == rows[bounded_memory.rung(memory)]["kl"]
        assert row["perplexity"]["code.txt"] > 0
        assert row["seconds"] > 0
        assert row["estimated_bytes"] > 0
        assert row["lost"].keys() == {"rtn", "reference"}
    assert metrics["compact"]["estimated_bytes"] < metrics["full"]["estimated_bytes"]


def test_what_is_lost_is_a_share_of_the_gain() -> None:
    base, full = {"a": 1.0, "b": 0.2}, {"a": 0.2, "b": 0.3}
    assert bounded_memory.lost(base, full, full) == {"a": 0.0, "b": None}
    assert bounded_memory.lost(base, full, {"a": 0.4, "b": 0.1}) == {"a": pytest.approx(0.25), "b": None}
    assert bounded_memory.lost(base, full, base)["a"] == 1
