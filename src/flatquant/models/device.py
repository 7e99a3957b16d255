"""The device that a run is on."""

import torch

from flatquant import distributed
from flatquant.errors import ModelError


def find_device(name: str | torch.device | None = None) -> torch.device:
    """The device of this name, by default a GPU if there is one: of several ranks on a host, to each its own.

    Raises:
        ModelError: it is neither the CPU nor a CUDA device that is there.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ModelError(f"unknown device {str(name)!r}; give cpu, cuda or cuda:1") from error
    if device.type not in ("cpu", "cuda"):
        raise ModelError(f"device {device} is neither the CPU nor a CUDA device; give cpu, cuda or cuda:1")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ModelError("there is no CUDA device here, or torch was built without CUDA; choose device cpu")
    if device.type == "cuda" and (own := distributed.local_rank()) is not None:
        if device.index not in (None, own):
            raise ModelError(f"device {device} is one, and there are several ranks; give cuda, or leave out the device")
        device = torch.device("cuda", own)
    if device.type == "cuda" and device.index is not None and device.index >= torch.cuda.device_count():
        raise ModelError(f"there is no {device} here: the last one is cuda:{torch.cuda.device_count() - 1}")
    return device
