"""A model to be run, by its name."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flatquant.models import load_model, load_tokenizer
from flatquant.runtime import artifact


def is_quantised(name: str) -> bool:
    """Whether a folder says that it is one of ours, whatever its state."""
    try:
        config = json.loads((Path(name) / "config.json").read_bytes())
        return config["quantization_config"]["quant_method"] == "flatquant"
    except (OSError, ValueError, KeyError, TypeError):
        return False


def open_model(
    name: str, device: torch.device, dtype: torch.dtype | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model to be run: a quantised folder, or whatever `load_model` takes. Float32 on a CPU: half is slower there."""
    dtype = dtype or (torch.float32 if device.type == "cpu" else None)
    if is_quantised(name):
        return artifact.load(name, device=device, dtype=dtype), load_tokenizer(Path(name))
    return load_model(name, device=device, dtype=dtype)
