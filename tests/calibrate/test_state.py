"""What a run leaves behind: complete or absent, and only for the run it belongs to."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from flatquant import store
from flatquant.calibrate import state as module
from flatquant.calibrate.state import RUN_FILE, RunState, fingerprint
from flatquant.errors import CalibrationError

IDENTITY = {"recipe": {"name": "flatquant", "bits": [4, 4]}, "seed": 0}
TENSORS = {"a": torch.arange(6).reshape(2, 3), "b": torch.randn(4, 4).mT, "c": torch.ones(2, dtype=torch.bfloat16)}


def refused(folder: Path, identity: dict, *, resume: bool, match: str) -> None:
    with pytest.raises(CalibrationError, match=match) as caught:
        RunState(folder, identity, resume=resume)
    assert "\n" not in str(caught.value)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    run = RunState(tmp_path / "deep" / "run", IDENTITY, resume=False)
    assert not run.has("fitted-00000")
    run.save("fitted-00000", TENSORS, {"losses": [2.5, 1.0]})
    again = RunState(tmp_path / "deep" / "run", IDENTITY, resume=True)
    assert again.has("fitted-00000")
    tensors, note = again.load("fitted-00000")
    assert note == {"losses": [2.5, 1.0]}
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)


def test_an_unfinished_run_is_not_overwritten(tmp_path: Path) -> None:
    RunState(tmp_path, IDENTITY, resume=False).save("fitted-00000", TENSORS)
    refused(tmp_path, IDENTITY, resume=False, match="resume")
    assert RunState(tmp_path, IDENTITY, resume=True).has("fitted-00000")


def test_another_run_is_not_resumed(tmp_path: Path) -> None:
    RunState(tmp_path, IDENTITY, resume=False)
    for other, named in (
        ({**IDENTITY, "seed": 1}, "seed"),
        ({**IDENTITY, "recipe": {"name": "flatquant", "bits": [4, 8]}}, "recipe"),
        ({**IDENTITY, "model": "another"}, "model"),
    ):
        refused(tmp_path, other, resume=True, match=named)
    RunState(tmp_path, json.loads(json.dumps(IDENTITY)), resume=True)


def test_resuming_where_nothing_is_starts(tmp_path: Path) -> None:
    RunState(tmp_path / "new", IDENTITY, resume=True)
    assert json.loads((tmp_path / "new" / RUN_FILE).read_text()) == IDENTITY


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file" / "run", IDENTITY, resume=False, match="cannot make")


@pytest.mark.parametrize("existing", [False, True])
def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path, monkeypatch, existing: bool) -> None:
    run = RunState(tmp_path, IDENTITY, resume=False)
    if existing:
        run.save("block", TENSORS, "old")
    before = sorted(p.name for p in tmp_path.iterdir())

    def half(tensors, path: Path, **_) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "save_file", half)
    with pytest.raises(CalibrationError, match=r"block\.safetensors.*No space left.*--resume") as caught:
        run.save("block", TENSORS, "new")
    assert "\n" not in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    assert run.has("block") == existing
    if existing:
        assert run.load("block")[1] == "old"


def test_a_failing_rename_leaves_nothing_half_written(tmp_path: Path, monkeypatch) -> None:
    run = RunState(tmp_path, IDENTITY, resume=False)

    def fail(*_) -> None:
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(CalibrationError, match=r"block\.safetensors: Permission denied; .*--resume"):
        run.save("block", TENSORS)
    refused(tmp_path / "new", IDENTITY, resume=False, match=r"run\.json: Permission denied")
    (tmp_path / "new").rmdir()
    assert [p.name for p in tmp_path.iterdir()] == [RUN_FILE]


def test_a_killed_writer_s_leftover_does_not_count(tmp_path: Path) -> None:
    run = RunState(tmp_path, IDENTITY, resume=False)
    with store.replacing(tmp_path / "other") as temporary:
        temporary.write_bytes(b"")
    (tmp_path / "other").unlink()
    (tmp_path / temporary.name.replace("other", "block.safetensors")).write_bytes(b"half")
    assert not run.has("block")
    with store.held(tmp_path):
        run.save("block", TENSORS)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["block.safetensors", RUN_FILE]


@pytest.mark.parametrize("damage", ["cut", "empty", "text"])
def test_damage_is_an_error_in_one_line(tmp_path: Path, damage: str) -> None:
    run = RunState(tmp_path, IDENTITY, resume=False)
    run.save("block", TENSORS)
    path = tmp_path / "block.safetensors"
    path.write_bytes({"cut": path.read_bytes()[:-3], "empty": b"", "text": b"no tensors here"}[damage])
    with pytest.raises(CalibrationError, match="damaged") as caught:
        run.load("block")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_a_damaged_run_file_is_an_error_in_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / RUN_FILE).write_text(text)
    refused(tmp_path, IDENTITY, resume=True, match=".")


def test_a_fingerprint_sees_every_byte() -> None:
    def model(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).to(dtype)

    assert fingerprint(model()) == fingerprint(model())
    others = [
        model(1),
        model(dtype=torch.bfloat16),
        model(),
        model(),
        nn.Sequential(*model(), nn.Identity(), nn.PReLU()),
    ]
    with torch.no_grad():
        others[2][0].bias[1] += 1e-6
        others[3][1].running_mean[0] = 1e-30
    assert len({fingerprint(m) for m in (model(), *others)}) == 6
