"""Where activations lie between blocks: on the device as plain tensors, or off it, in host memory or in a file.

What lies off the device answers to the little that calibration asks of a tensor (shape, rows in, rows out), so that no
stage knows the difference, and keeps the same bits. A fit reads rows in order, over and over: from the host the next
rows are on their way while the device works on these, from a file a thread reads them.

What was given up: a memory map of the file. Its pages would count as the process's memory until the kernel takes them
back, and a bound that cannot be measured is none.
"""

from __future__ import annotations

import math
import tempfile
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Literal, TypeVar, cast

import torch
from torch import Tensor

from flatquant.errors import CalibrationError, first_line
from flatquant.modules import tensor_bytes

Place = Literal["device", "host", "disk"]


class Spilled(ABC):
    """Activations (N, T, h) that lie off the device. Rows are asked for, and given, as tensors on it."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.dtype, self.device = torch.Size(shape), dtype, device

    @abstractmethod
    def __getitem__(self, rows: slice) -> Tensor:
        """Rows on the device; what is done to them does not come back."""

    @abstractmethod
    def __setitem__(self, rows: slice, values: Tensor) -> None:
        """Keep rows, in `dtype`."""

    @abstractmethod
    def like(self) -> Spilled:
        """Room of the same shape in the same place, not yet filled."""

    def split(self, size: int) -> Iterator[Tensor]:
        """All rows in order, `size` at a time."""
        for start in range(0, self.shape[0], size):
            yield self[start : start + size]

    def _range(self, rows: slice) -> tuple[int, int]:
        start, stop, step = rows.indices(self.shape[0])
        assert step == 1, "rows are read and written in a row"
        return start, max(start, stop)

    def _next(self, start: int, stop: int) -> tuple[int, int]:
        """The rows that an epoch asks for after these."""
        first = stop if stop < self.shape[0] else 0
        return first, min(first + stop - start, self.shape[0])


Kept = Tensor | Spilled
K = TypeVar("K", bound=Kept)


class OnHost(Spilled):
    """In host memory; pinned for a GPU, whose copies of the next rows then run beside its work."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(shape, dtype, device)
        on_gpu = device.type == "cuda"
        try:
            self._rows = torch.empty(shape, dtype=dtype, pin_memory=on_gpu)
        except RuntimeError as error:  # out of memory, or of what may be pinned
            why = first_line(error)
            raise CalibrationError(f"no host memory for activations ({why}); set --max-host-memory") from error
        self._copies = torch.cuda.Stream(device) if on_gpu else None
        self._ahead: tuple[tuple[int, int], Tensor] | None = None

    def __getitem__(self, rows: slice) -> Tensor:
        wanted = self._range(rows)
        if self._copies is None:
            return self._rows[slice(*wanted)].clone()
        sent = self._ahead[1] if self._ahead is not None and self._ahead[0] == wanted else self._send(*wanted)
        now = torch.cuda.current_stream(self.device)
        now.wait_stream(self._copies)
        sent.record_stream(now)  # it was allocated on the stream of the copies
        following = self._next(*wanted)
        self._ahead = (following, self._send(*following)) if following != wanted else None
        return sent

    def _send(self, start: int, stop: int) -> Tensor:
        with torch.cuda.stream(self._copies):
            return self._rows[start:stop].to(self.device, non_blocking=True)

    def __setitem__(self, rows: slice, values: Tensor) -> None:
        self._ahead = None
        if self._copies is not None:
            self._copies.synchronize()  # a copy of what was there
        self._rows[rows].copy_(values)

    def like(self) -> OnHost:
        return OnHost(self.shape, self.dtype, self.device)


class OnDisk(Spilled):
    """In a file without a name, which is gone when the process is. A thread reads the next rows."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, folder: Path) -> None:
        super().__init__(shape, dtype, device)
        self._folder = folder
        self._row_bytes = math.prod(shape[1:]) * dtype.itemsize
        try:
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - it lives as long as this object
        except OSError as error:
            raise CalibrationError(f"cannot write in {folder}: {error.strerror or error}") from error
        self._reader = ThreadPoolExecutor(1)
        self._ahead: tuple[tuple[int, int], Future[Tensor]] | None = None
        weakref.finalize(self, _end, self._file, self._reader)

    def __getitem__(self, rows: slice) -> Tensor:
        wanted, ahead = self._range(rows), self._settled()
        found = ahead[1] if ahead is not None and ahead[0] == wanted else self._read(*wanted)
        following = self._next(*wanted)
        if following != wanted:
            self._ahead = (following, self._reader.submit(self._read, *following))
        return found.to(self.device)

    def _settled(self) -> tuple[tuple[int, int], Tensor] | None:
        """What was read ahead. Afterwards nobody else uses the file."""
        if self._ahead is None:
            return None
        (where, future), self._ahead = self._ahead, None
        return where, future.result()

    def _read(self, start: int, stop: int) -> Tensor:
        out = torch.empty((stop - start, *self.shape[1:]), dtype=self.dtype)
        self._file.seek(start * self._row_bytes)
        if self._file.readinto(tensor_bytes(out)) != out.nbytes:
            raise CalibrationError(f"rows {start} to {stop} of the activations in {self._folder} were never written")
        return out

    def __setitem__(self, rows: slice, values: Tensor) -> None:
        self._settled()
        start, stop = self._range(rows)
        values = values.to("cpu", self.dtype)
        assert values.shape == (stop - start, *self.shape[1:])
        try:
            self._file.seek(start * self._row_bytes)
            self._file.write(tensor_bytes(values))
            self._file.flush()
        except OSError as error:
            reason = error.strerror or error
            raise CalibrationError(
                f"cannot keep activations in {self._folder}: {reason}; free space and run again with --resume"
            ) from error

    def like(self) -> OnDisk:
        return OnDisk(self.shape, self.dtype, self.device, self._folder)


def _end(file: IO[bytes], reader: ThreadPoolExecutor) -> None:
    reader.shutdown(wait=False)
    file.close()


def room(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, place: Place, folder: Path | None = None
) -> Kept:
    """Room for activations of `shape`, not yet filled.

    Args:
        folder: where files go; the system's folder for temporary files if None.

    Raises:
        CalibrationError: there is none.
    """
    match place:
        case "device":
            return torch.empty(shape, dtype=dtype, device=device)
        case "host":
            return OnHost(shape, dtype, device)
        case "disk":
            return OnDisk(shape, dtype, device, folder or Path(tempfile.gettempdir()))


def like(kept: K) -> K:
    """Room of the same shape in the same place."""
    return cast(K, torch.empty_like(kept) if isinstance(kept, Tensor) else kept.like())


def cyclic(kept: Kept, start: int, count: int) -> Tensor:
    """`count` rows from `start` on, the first after the last.  # (count, ..)"""
    start %= kept.shape[0]
    rows = kept[start : start + count]
    return rows if len(rows) == count else torch.cat([rows, cyclic(kept, 0, count - len(rows))])


def mapped(kept: K, size: int, function: Callable[[Tensor], Tensor]) -> K:
    """`function` of all rows, `size` at a time, kept where they lie.

    Raises:
        CalibrationError: a result is not finite.
    """
    out = like(kept)
    finite = torch.ones((), dtype=torch.bool, device=kept.device)
    for start in range(0, kept.shape[0], size):
        values = function(kept[start : start + size])
        out[start : start + size] = values
        finite = finite & torch.isfinite(values).all()
    if not bool(finite):  # one look, so that a GPU is not waited for at every batch
        raise CalibrationError(
            "its outputs are not finite (NaN or infinity in the weights, or an overflow of the 16-bit format); "
            "check the model file, or try --dtype float32 or bfloat16"
        )
    return out
