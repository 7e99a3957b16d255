"""One fused call at a time on a device."""

from __future__ import annotations

import functools
import threading

import torch


class DeviceLock:
    """One fused call at a time on a device, in the order of the device's streams, with the device as the current one.

    All calls of a model share its scratch: two at once would write over each other's.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._lock = threading.RLock()
        self._last: torch.cuda.Stream | None = None
        self._outer: list[int] = []  # the devices that were current

    def __enter__(self) -> None:
        self._lock.acquire()
        if self._device.type == "cuda":
            self._outer.append(torch.cuda.current_device())
            torch.cuda.set_device(self._device)
            stream = torch.cuda.current_stream(self._device)
            # A recording of the caller's may not wait for work outside of it.
            if stream != self._last and not torch.cuda.is_current_stream_capturing():
                if self._last is not None:
                    stream.wait_stream(self._last)
                self._last = stream

    def __exit__(self, *_: object) -> None:
        if self._outer:
            torch.cuda.set_device(self._outer.pop())
        self._lock.release()


@functools.cache
def device_lock(device: torch.device) -> DeviceLock:
    return DeviceLock(device)
