"""Files that are complete or absent, and folders that one process at a time writes to.

A file is written under a temporary name of its own in the same folder, synced, and renamed. A folder is locked by the
operating system where it can (`flock`): such a lock ends with its process, however that ends. Elsewhere the lock is
the file itself, which a killed process leaves behind: the error then names the file to delete.

Errors are OSErrors; callers say what they mean for their folder.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK_FILE = ".flatquant.lock"

_POLL_SECONDS = 0.02
_LEFTOVER = re.compile(r"\..+\.tmp-[0-9a-f]{8}")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give the name of a file to write; when the body ends it takes the place of `path`, if it fails it is removed.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp-{secrets.token_hex(4)}")
    try:
        yield temporary
        if path.is_file():
            shutil.copymode(path, temporary)
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def write(path: Path, data: bytes) -> None:
    """Write a file so that it is either complete or as it was.

    Raises:
        OSError: as `replacing`.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def sync(path: Path) -> None:
    """Have the system put a file or folder on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # folders cannot be opened there
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def held(folder: Path, *, wait: float = 0.0) -> Iterator[None]:
    """Be the only process that writes to a folder; it is made if absent, and removed if nothing is in it afterwards.

    What killed processes were writing is removed: whoever holds the folder knows that no one else is.

    Args:
        wait: seconds to wait for another process.

    Raises:
        BlockingIOError: another process holds it still; `strerror` says which.
        OSError: the folder cannot be made or written.
    """
    file = folder / LOCK_FILE
    deadline = time.monotonic() + wait
    while (lock := _try(file)) is None:
        if time.monotonic() >= deadline:
            raise BlockingIOError(errno.EAGAIN, _holder(file), str(file))
        time.sleep(_POLL_SECONDS)
    try:
        for path in folder.iterdir():
            if _LEFTOVER.fullmatch(path.name):
                path.unlink(missing_ok=True)
        yield
    finally:
        _release(lock, file)
        with suppress(OSError):  # other files are in it
            folder.rmdir()


def _try(file: Path) -> int | None:
    """The descriptor of a lock file that is now ours; None while it is another process's."""
    file.parent.mkdir(parents=True, exist_ok=True)
    exclusive = os.O_EXCL if fcntl is None else 0
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | exclusive, 0o666)
    except (FileExistsError, FileNotFoundError):  # held; or its folder has just been removed by its last holder
        return None
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(descriptor, file):
            os.truncate(descriptor, 0)
            os.write(descriptor, f"{os.getpid()}\n".encode())
            return descriptor
    except BlockingIOError:
        pass
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)  # another's, or its last holder has removed the file since it was opened
    return None


def _release(lock: int, file: Path) -> None:
    ours = _is_at(lock, file)  # the holder may have removed the whole folder, and another process made it anew
    if os.name == "nt":
        os.close(lock)  # an open file cannot be removed there
    if ours:
        file.unlink(missing_ok=True)
    if os.name != "nt":
        os.close(lock)


def _is_at(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(file))
    except FileNotFoundError:
        return False


def _holder(file: Path) -> str:
    process = ""
    with suppress(OSError):
        process = " " + file.read_text().strip()
    if fcntl is None:
        return f"process{process} holds it; if that is no more, delete {file}"
    return f"process{process} holds it"
