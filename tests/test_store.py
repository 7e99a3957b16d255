"""Files are complete or as they were, whoever is killed; a folder has one writer, whoever else tries."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flatquant import store

ROOT = Path(__file__).parents[1]


def in_a_process(code: str, *arguments: object) -> subprocess.Popen[str]:
    """Another process, which imports `store` and has `folder`."""
    head = "import sys, time; from pathlib import Path; from flatquant import store; folder = Path(sys.argv[1])\n"
    return subprocess.Popen(
        [sys.executable, "-c", head + code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        stdout=subprocess.PIPE,
        text=True,
    )


def told(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ------------------------------------------------------------------------------------------------- files


def test_a_file_is_replaced_and_keeps_its_mode(tmp_path: Path) -> None:
    file = tmp_path / "file"
    store.write(file, b"one")
    file.chmod(0o640)
    store.write(file, b"two")
    assert file.read_bytes() == b"two"
    assert file.stat().st_mode & 0o777 == 0o640
    assert names(tmp_path) == ["file"]


def test_a_failure_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    store.write(file, b"one")

    def half() -> None:
        with store.replacing(file) as temporary:
            temporary.write_bytes(b"tw")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        half()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.EACCES, "Permission denied")))
    with pytest.raises(OSError, match="Permission"):
        store.write(file, b"two")
    assert file.read_bytes() == b"one"
    assert names(tmp_path) == ["file"]


def test_writers_of_one_file_do_not_share_a_temporary_file(tmp_path: Path) -> None:
    with store.replacing(tmp_path / "file") as first:
        first.write_bytes(b"first")
        store.write(tmp_path / "file", b"second")
    assert (tmp_path / "file").read_bytes() == b"first"
    assert names(tmp_path) == ["file"]


# ------------------------------------------------------------------------------------------------- folders


def test_a_folder_has_one_holder_and_is_left_as_it_was(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "folder"
    with store.held(folder):
        with pytest.raises(BlockingIOError, match=f"process {os.getpid()} holds it"), store.held(folder):
            raise AssertionError
        assert names(folder) == [store.LOCK_FILE]
    assert not folder.exists()
    folder.mkdir()
    (folder / "mine").touch()
    with store.held(folder), pytest.raises(BlockingIOError), store.held(folder, wait=0.05):
        raise AssertionError
    assert names(folder) == ["mine"]


@pytest.mark.skipif(store.fcntl is None, reason="there are no locks that end with a process")
def test_a_lock_ends_with_its_process_and_its_leftovers_go(tmp_path: Path) -> None:
    code = "with store.held(folder), store.replacing(folder / 'file') as t:\n t.touch(); print('in', flush=True)\n"
    process = in_a_process(code + " time.sleep(100)", tmp_path)
    try:
        assert told(process) == "in"
        with pytest.raises(BlockingIOError, match=f"process {process.pid} holds it"), store.held(tmp_path):
            raise AssertionError
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        assert len(names(tmp_path)) == 2
        with store.held(tmp_path):
            assert names(tmp_path) == [store.LOCK_FILE]
    finally:
        process.kill()


def test_one_waits_for_another(tmp_path: Path) -> None:
    (tmp_path / "count").write_text("0")
    code = (
        "print('in', flush=True)\n"
        "for _ in range(15):\n"
        " with store.held(folder, wait=60):\n"
        "  n = int((folder / 'count').read_text()); store.write(folder / 'count', str(n + 1).encode())\n"
    )
    processes = [in_a_process(code, tmp_path) for _ in range(3)]
    for process in processes:
        process.communicate(timeout=100)
        assert process.returncode == 0
    assert (tmp_path / "count").read_text() == "45"
    assert names(tmp_path) == ["count"]


def test_a_holder_may_remove_the_folder_and_another_make_it_anew(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    with store.held(folder):
        (folder / store.LOCK_FILE).unlink()
        folder.rmdir()
        second = store.held(folder)
        second.__enter__()
    assert names(folder) == [store.LOCK_FILE]  # the second's, which the first has left alone
    with pytest.raises(BlockingIOError), store.held(folder):
        raise AssertionError
    second.__exit__(None, None, None)
    assert not folder.exists()


def test_without_locks_of_the_system_a_file_is_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "fcntl", None)
    (tmp_path / "mine").touch()
    message = f"delete .*{store.LOCK_FILE}"
    with store.held(tmp_path), pytest.raises(BlockingIOError, match=message), store.held(tmp_path):
        raise AssertionError
    (tmp_path / store.LOCK_FILE).write_text("12345\n")  # as a killed process leaves it
    start = time.monotonic()
    message = "process 12345 holds it; if that is no more"
    with pytest.raises(BlockingIOError, match=message), store.held(tmp_path, wait=0.1):
        raise AssertionError
    assert time.monotonic() - start > 0.1
