"""A model and its tokenizer, whole."""

import json
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from flatquant.errors import ModelError, first_line
from flatquant.models.checkpoint import Checkpoint, tensors_of
from flatquant.models.float8 import SCALE, float8_block, refuse_float8
from flatquant.models.folder import (
    WRAPPERS,
    auto_class,
    check_config,
    check_folder,
    check_size,
    generation_config,
    read_config,
    read_tokenizer,
)
from flatquant.models.place import resolve
from flatquant.models.silence import quiet

# What `AutoProcessor` reads beside a tokenizer's files.
_PROCESSOR = (
    "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json", "chat_template.json",
)  # fmt: skip


def load_model(
    name: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model, in eval mode and with gradients off, and its tokenizer.

    Args:
        name: a hub id, a folder, a `.gguf` file, or one of `ALIASES`.
        dtype: of the weights; None keeps the dtype they are stored in (float16 for a GGUF).
        device: where the model goes.
        trust_remote_code: run Python code that ships with the model.

    Raises:
        ModelError: the model is missing, unreachable, damaged, not a causal LM, stored as pickles, or already
            quantised by this package.
    """
    folder = resolve(name)
    if isinstance(folder, Path):
        check_folder(folder)
    with quiet():
        config = read_config(folder, name, trust_remote_code)
        check_config(config, name)
        if isinstance(folder, Path):
            check_size(folder, config)
        block = float8_block(config, name)
        if block is None:
            if isinstance(folder, Path):
                refuse_float8(folder, name)
            model, report = _load_weights(folder, name, config, dtype, trust_remote_code)
        elif isinstance(folder, Path):
            model, report = _load_float8(folder, name, config, dtype, block)
        else:
            raise ModelError(f"{name} is in float8, and is read from a local folder; fetch it, and give its folder")
        _check_report(report, name)
        tokenizer = read_tokenizer(folder, name, trust_remote_code)
        try:
            model.to(device)  # pyright: ignore[reportArgumentType]
        except (RuntimeError, AssertionError) as error:  # no such device, or out of its memory
            raise ModelError(f"cannot move {name} to {device}: {first_line(error)}; choose another device") from error
    return model.eval().requires_grad_(False), tokenizer


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that lies in a folder, a quantised one included.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    with quiet():
        return read_tokenizer(folder, folder, False)


def processor_files(model: PreTrainedModel) -> list[Path]:
    """The files of a wrapper's processor, where the model came from; none of other models."""
    place = getattr(model.config, "_name_or_path", None)
    if model.config.model_type not in WRAPPERS or not place:
        return []
    quietly = {
        "_raise_exceptions_for_gated_repo": False,
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_connection_errors": False,
    }
    return [Path(file) for name in _PROCESSOR if (file := cached_file(place, name, **quietly)) is not None]


def loaded_bytes(folder: Path) -> int:
    """About the bytes that a folder's weights take in memory: weights in float8 become two bytes each."""
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    try:
        said = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config") or {}
        return 2 * stored if said.get("quant_method") == "fp8" else stored
    except (OSError, ValueError, AttributeError):  # what loading has more to say of
        return stored


def _load_weights(
    folder: Path | str, name: object, config: Any, dtype: torch.dtype | None, trust_remote_code: bool
) -> tuple[PreTrainedModel, dict[str, Any]]:
    try:
        loaded = auto_class(config.model_type).from_pretrained(
            folder,
            config=config,
            dtype="auto" if dtype is None else dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except Exception as error:  # as above; SafetensorError, for one, is no subclass of OSError
        raise ModelError(f"cannot load the weights of {name}: {first_line(error)}; fetch the model again") from error
    return cast(tuple[PreTrainedModel, dict[str, Any]], loaded)


def _load_float8(
    folder: Path, name: object, config: Any, dtype: torch.dtype | None, block: tuple[int, int]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """`_load_weights` of a folder with weights in float8, which transformers multiplies as such on some GPUs."""
    files, shapes = tensors_of(folder, name, block)
    dtype = cast(torch.dtype, dtype or getattr(config, "dtype", None) or torch.bfloat16)
    checkpoint = Checkpoint(folder, files, {key: dtype for key in shapes if key + SCALE in files}, block)
    state = {key: checkpoint.read(key) for key in shapes}
    try:
        kind: Any = auto_class(config.model_type)._model_mapping[type(config)]
        model, report = kind.from_pretrained(
            None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
        )
    except Exception as error:  # as above
        raise ModelError(f"cannot load the weights of {name}: {first_line(error)}; fetch the model again") from error
    model.name_or_path = model.config.name_or_path = str(folder)
    if model.can_generate():
        model.generation_config = generation_config(folder)
    return model, report


def _check_report(report: dict[str, Any], name: object) -> None:
    """transformers fills absent weights with random numbers and goes on; here that is an error."""
    for kind, what in (("missing_keys", "has no weights for"), ("mismatched_keys", "has weights of another shape for")):
        keys = sorted(key if isinstance(key, str) else key[0] for key in report.get(kind, ()))
        if keys:
            raise ModelError(f"{name} {what} {keys[0]} (and {len(keys) - 1} more); fetch the model again")
