"""The formats of compressed-tensors that are ours too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from flatquant import formats


@dataclass(frozen=True, kw_only=True)
class Theirs:
    """What compressed-tensors calls a format of ours, and how its scales are made and stored."""

    name: str
    scales: Mapping[str, Any]
    activations: Mapping[str, Any]  # besides: when scales of theirs are found
    scale_dtype: torch.dtype


FORMATS = {
    "nvfp4": Theirs(
        name="nvfp4-pack-quantized",
        scales={"strategy": "tensor_group", "scale_dtype": "torch.float8_e4m3fn"},
        activations={"dynamic": "local", "observer": "static_minmax"},
        scale_dtype=torch.float8_e4m3fn,
    ),
    "mxfp4": Theirs(
        name="mxfp4-pack-quantized",
        scales={"strategy": "group", "scale_dtype": "torch.uint8"},
        activations={"dynamic": True},
        scale_dtype=torch.uint8,
    ),
}


def their_numbers(name: str) -> dict[str, Any]:
    """How compressed-tensors describes the numbers of a format, and which of them share a scale."""
    facts = formats.facts(name)
    return {"num_bits": facts.bits, "type": "float", "symmetric": True, "group_size": facts.block}
