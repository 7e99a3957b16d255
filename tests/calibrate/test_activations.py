"""Activations off the device: what is written is what is read, in any order, and nothing stays behind."""

import gc
import os
import time
from pathlib import Path

import pytest
import torch

from flatquant.calibrate.activations import Kept, OnDisk, OnHost, Place, Spilled, like, mapped, room
from flatquant.errors import CalibrationError
from tests.laws import CPU

SHAPE = (7, 5, 3)


@pytest.fixture(params=["device", "host", "disk"])
def place(request: pytest.FixtureRequest) -> Place:
    return request.param


def values(dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_come_back_as_they_went(place: Place, dtype: torch.dtype, tmp_path: Path) -> None:
    kept, want = room(SHAPE, dtype, CPU, place, tmp_path), values(dtype)
    for i in range(0, 7, 2):  # the last batch is smaller
        kept[i : i + 2] = want[i : i + 2].float()
    assert (kept.shape, kept.dtype) == (want.shape, dtype)
    for _ in range(2):  # epochs
        assert torch.equal(torch.cat([kept[i : i + 3] for i in range(0, 7, 3)]), want)
    assert torch.equal(kept[4:6], want[4:6])
    assert torch.equal(kept[1:2], want[1:2])
    assert [len(part) for part in kept.split(3)] == [3, 3, 1]
    assert torch.equal(torch.cat(list(kept.split(2))), want)


def test_what_is_written_after_a_read_is_read(place: Place, tmp_path: Path) -> None:
    kept = room(SHAPE, torch.float32, CPU, place, tmp_path)
    kept[0:7] = values(torch.float32)
    kept[0:2]  # the next rows may be on their way
    kept[2:4] = torch.ones(2, 5, 3)
    assert torch.equal(kept[2:4], torch.ones(2, 5, 3))


@pytest.mark.parametrize("kind", [OnHost, OnDisk])
def test_what_a_reader_does_to_rows_does_not_come_back(kind: type[Spilled], tmp_path: Path) -> None:
    kept = OnHost(SHAPE, torch.float32, CPU) if kind is OnHost else OnDisk(SHAPE, torch.float32, CPU, tmp_path)
    kept[0:7] = values(torch.float32)
    kept[0:7].zero_()
    assert torch.equal(kept[0:7], values(torch.float32))


def test_a_function_of_all_rows_stays_where_they_are(place: Place, tmp_path: Path) -> None:
    kept = room(SHAPE, torch.float32, CPU, place, tmp_path)
    kept[0:7] = values(torch.float32)
    twice = mapped(kept, 2, lambda x: 2 * x)
    assert type(twice) is type(kept) is type(like(kept))
    assert torch.equal(twice[0:7], 2 * values(torch.float32))
    assert torch.equal(kept[0:7], values(torch.float32))


def test_a_result_that_is_not_finite_is_an_error(place: Place, tmp_path: Path) -> None:
    kept: Kept = room(SHAPE, torch.float32, CPU, place, tmp_path)
    kept[0:7] = torch.ones(SHAPE)
    with pytest.raises(CalibrationError, match="not finite"):
        mapped(kept, 2, lambda x: x / 0)


def test_a_file_has_no_name_and_takes_no_memory_map(tmp_path: Path) -> None:
    kept = OnDisk((64, 128, 128), torch.float32, CPU, tmp_path)
    kept[0:64] = torch.ones(64, 128, 128)
    kept[0:8]
    assert not list(tmp_path.iterdir())
    if Path("/proc/self/maps").exists():
        assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    file = kept._file
    assert os.fstat(file.fileno()).st_nlink == 0  # its room is free as soon as it is closed
    del kept
    latest = time.monotonic() + 10  # the thread may still be reading ahead, and holds it until then
    while not file.closed and time.monotonic() < latest:
        gc.collect()
        time.sleep(0.01)
    assert file.closed


def test_rows_that_were_never_written_are_an_error(tmp_path: Path) -> None:
    kept = OnDisk(SHAPE, torch.float32, CPU, tmp_path)
    kept[0:2] = torch.ones(2, 5, 3)
    with pytest.raises(CalibrationError, match="never written"):
        kept[2:4]


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="cannot write in"):
        OnDisk(SHAPE, torch.float32, CPU, tmp_path / "absent")


def test_a_full_disk_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = OnDisk(SHAPE, torch.float32, CPU, tmp_path)

    class Full:
        def seek(self, _: int) -> None: ...

        def write(self, _: object) -> None:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(kept, "_file", Full())
    with pytest.raises(CalibrationError, match="No space left on device; free space and run again with --resume"):
        kept[0:1] = torch.ones(1, 5, 3)
