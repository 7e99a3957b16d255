"""Weights in float8, with a scale for each block."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flatquant.errors import ModelError

NARROW = "F8_E4M3"  # as safetensors calls float8_e4m3fn
SCALE = "_scale_inv"  # behind the name of a weight in float8


def float8_block(config: Any, name: object) -> tuple[int, int] | None:
    """What of a weight in float8 shares a scale, (rows, columns), or None; the config no longer says it then.

    Raises:
        ModelError: weights in float8 whose scales are others.
    """
    said = getattr(config, "quantization_config", None)
    if not isinstance(said, dict) or said.get("quant_method") != "fp8":
        return None
    block = said.get("weight_block_size")
    if not isinstance(block, list | tuple) or len(block) != 2 or not all(type(b) is int and b > 0 for b in block):
        raise ModelError(
            f"{name} is in float8 without blocks of two dimensions (weight_block_size); give it in 16 bits"
        )
    del config.quantization_config
    return block[0], block[1]


def dequantized(weight: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """A weight times the scales of its blocks.  # float8_e4m3fn (o, n), (blocks of o, blocks of n) -> float32 (o, n)"""
    rows, columns = (torch.arange(size, device=scale.device) // b for size, b in zip(weight.shape, block, strict=True))
    return weight.float() * scale.float()[rows[:, None], columns]


def refuse_float8(folder: Path, name: object) -> None:
    """Raise a ModelError for weights in float8: transformers would take them without their scales."""
    try:
        narrow = next((key for _, key, _, dtype in headers(folder) if dtype.startswith(NARROW)), None)
    except (OSError, SafetensorError):
        return  # transformers has more to say of it
    if narrow is not None:
        raise unsaid(narrow, name)


def headers(folder: Path) -> Iterator[tuple[str, str, tuple[int, ...], str]]:
    """File, name, shape and dtype of every tensor in a folder's safetensors."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as stored:
            for key in stored.keys():  # noqa: SIM118 - not a dict
                part = stored.get_slice(key)
                yield file.name, key, tuple(part.get_shape()), part.get_dtype()


def unsaid(key: str, name: object) -> ModelError:
    """The error of a weight in float8 whose config does not say what its scales are."""
    return ModelError(f"{key} of {name} is in float8, and config.json does not say how; fetch the model again")
