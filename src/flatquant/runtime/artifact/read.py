"""`load`: a folder as a model, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, GenerationConfig, PreTrainedModel

from flatquant import seams
from flatquant.errors import ArtifactError, ModelError, one_line
from flatquant.models import WRAPPERS, auto_class, kept_dtype
from flatquant.modules import tied_names
from flatquant.runtime import fused
from flatquant.runtime.artifact.adopt import Origin, adopt
from flatquant.runtime.artifact.write import FOREIGN
from flatquant.runtime.build import install, install_ends
from flatquant.runtime.embedding import cast_embedding
from flatquant.runtime.folder import (
    CONFIG_FILE,
    GENERATION_FILE,
    Folder,
    StoredTensor,
    read_json,
    stored_kinds,
)
from flatquant.runtime.linear import DenseLinear


@torch.no_grad()
def load(
    path: Path | str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    verify: bool = True,
) -> PreTrainedModel:
    """Read a quantised folder; the model is ready to generate.

    Args:
        device: where tensors go, one by one.
        dtype: of what is stored in 16 bit (embeddings, norms, unquantised layers); as stored if None. Scales and
            transforms stay in float32.
        verify: compare every file with its hash. Names, shapes and types of tensors are always checked.

    Raises:
        ArtifactError: the folder is incomplete, damaged, of another format version or not ours.
        ModelError: `dtype` is one of integers.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise ModelError(f"dtype is {dtype}; give one of floating point, such as torch.bfloat16")
    folder = Folder.open(Path(path))
    if verify:
        folder.check_files()
    stored = folder.tensors()
    model = skeleton(folder, stored)
    state = read_tensors(folder, stored, torch.device(device))
    if dtype is not None:
        for name in _castable(model):
            if name in state:
                state[name] = state[name].to(kept_dtype(model, name, dtype))
        model.config.dtype = dtype
    model.load_state_dict(state, assign=True, strict=False)
    model.tie_weights()
    rebuild_buffers(model, torch.device(device))
    cast_embedding(model)
    if GENERATION_FILE in folder.files:
        try:
            model.generation_config = GenerationConfig.from_dict(read_json(folder.path / GENERATION_FILE))
        except (ValueError, TypeError, AttributeError) as error:
            raise ArtifactError(f"{folder.path / GENERATION_FILE} is damaged ({one_line(error)})") from error
    seams.use_attention(model, folder.plan.attention)
    adopt(model, Origin.of(folder))
    fused.attach(model)
    return model.eval().requires_grad_(False)


def skeleton(folder: Folder, stored: Mapping[str, StoredTensor]) -> PreTrainedModel:
    """The model with every tensor on the meta device: costs no memory whatever the numbers say.

    Args:
        stored: `folder.tensors()`.

    Raises:
        ArtifactError: the config, the plan and the stored tensors do not fit one another.
    """
    data = {k: v for k, v in folder.config.items() if k.lstrip("_") not in FOREIGN}
    where = folder.path / CONFIG_FILE
    kind = data.pop("model_type", None)
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise ArtifactError(f"{where}: the installed transformers does not know the model type {one_line(kind)}")
    blocks = folder.plan.blocks
    # Each block stores a tensor at least, so that the number of modules is bounded by the size of the files.
    if text_config(data).get("num_hidden_layers", len(blocks)) != len(blocks) or len(blocks) > len(stored):
        raise ArtifactError(f"{where} is damaged: the plan has {len(blocks)} blocks, the model another number")
    try:
        with torch.device("meta"):
            config = CONFIG_MAPPING[kind].from_dict(data)
            if (layers := config.get_text_config().num_hidden_layers) != len(blocks):
                raise ArtifactError(f"{where} is damaged: {len(blocks)} blocks planned of {layers}")
            model = auto_class(config.model_type).from_config(config)
            furnish(folder, model, tied_names(model), stored)
    except ArtifactError:
        raise
    except Exception as error:
        # A config is free-form data of another library: whatever it trips over, the folder is at fault.
        raise ArtifactError(f"{where} is damaged: no model can be built from it ({one_line(error)})") from error
    return model


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a `config.json` says of the model, of a wrapper's text part."""
    part = config.get("text_config") if config.get("model_type") in (None, *WRAPPERS) else None
    return part if isinstance(part, Mapping) else config


def furnish(folder: Folder, model: PreTrainedModel, tied: set[str], stored: Mapping[str, StoredTensor]) -> None:
    """Put empty serving modules into a model where the folder's plan says so: blocks, output layer, embedding.

    Args:
        tied: names of tensors that are others under a second name, and are not stored.

    Raises:
        ArtifactError: the plan does not fit the model, or the stored tensors are not exactly those that it needs.
    """
    try:
        modules = model.get_submodule(folder.plan.blocks_path)
    except AttributeError:
        modules = None
    if not isinstance(modules, nn.ModuleList) or len(modules) != len(folder.plan.blocks):
        path = one_line(folder.plan.blocks_path)
        raise ArtifactError(f"the plan does not fit the model: {path} is no list of its blocks")
    for module, block in zip(modules, folder.plan.blocks, strict=True):
        install(module, folder.plan.attention, block, packed=True)
    install_ends(model, folder.plan, packed=True)
    _compare(folder, model, tied, stored)


def _compare(folder: Folder, model: nn.Module, tied: set[str], stored: Mapping[str, StoredTensor]) -> None:
    """Raise ArtifactError unless the stored tensors are exactly those that the model needs."""
    needed = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    for word, names in (("lacks", needed.keys() - stored.keys()), ("has a surplus", stored.keys() - needed.keys())):
        for name in sorted(names):
            raise ArtifactError(f"{folder.path} {word} tensor {one_line(name)} ({len(names)} in all)")
    exact = stored_kinds(folder.plan)
    for name, tensor in needed.items():
        found = stored[name]
        if found.shape != tuple(tensor.shape):
            raise ArtifactError(f"{folder.path}: {name} is {found.shape}, the plan says {tuple(tensor.shape)}")
        if not tensor.is_floating_point():
            fits = found.dtype == tensor.dtype
        elif name in exact:
            fits = found.dtype in (tensor.dtype, torch.float64)
        else:
            fits = found.dtype.is_floating_point
        if not fits:
            raise ArtifactError(f"{folder.path}: {name} is {found.dtype}, the plan says {tensor.dtype}")


def read_tensors(folder: Folder, stored: Mapping[str, StoredTensor], device: torch.device) -> dict[str, Tensor]:
    """These tensors of a folder, by name.

    Raises:
        ArtifactError: a file cannot be read.
    """
    state = {}
    for file in folder.shards:
        try:
            with safe_open(folder.path / file, "pt") as f:
                for name in (n for n, t in stored.items() if t.file == file):
                    # A copy: the file may change while the model lives.
                    tensor = f.get_tensor(name)
                    state[name] = tensor.clone() if device.type == "cpu" else tensor.to(device)
        except (OSError, SafetensorError) as error:
            raise ArtifactError(f"{folder.path / file} cannot be read ({one_line(error)})") from error
    return state


def _castable(model: nn.Module) -> Iterator[str]:
    """Names of tensors in 16 bit: the original model's parameters and unquantised weights of our layers."""
    yield from (name for name, _ in model.named_parameters())
    yield from (f"{name}.weight" for name, module in model.named_modules() if isinstance(module, DenseLinear))


def rebuild_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Fill the buffers that are not stored but computed from the config: rotary embeddings, scales of embeddings."""
    for path, module in list(model.named_modules()):
        if not _uncomputed(module):
            continue
        owner = _owner(model, path)
        try:
            fresh = type(module)(config=owner.config)  # type: ignore[call-arg]
        except TypeError:
            _initialise_buffers(owner, module, device)
            continue
        if module.state_dict():  # it holds tensors of the model's as well
            for name in _uncomputed(module):
                setattr(module, name, getattr(fresh, name).to(device))
            continue
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, nn.Module.to(fresh, device))


def _owner(model: PreTrainedModel, path: str) -> PreTrainedModel:
    """The innermost model around a module: each part of a wrapper has a config of its own."""
    parts = path.split(".")[:-1]
    around = [model.get_submodule(".".join(parts[:count])) for count in range(len(parts), 0, -1)]
    return next((module for module in around if isinstance(module, PreTrainedModel)), model)


def _uncomputed(module: nn.Module) -> set[str]:
    """A module's buffers that no file stores, and that are on the meta device."""
    stored = module.state_dict(keep_vars=True)
    return {name for name, t in module.named_buffers(recurse=False) if t.is_meta and name not in stored}


def _initialise_buffers(model: PreTrainedModel, module: nn.Module, device: torch.device) -> None:
    """As `from_pretrained` does it: by the model's own rule, which leaves alone what is marked as loaded."""
    empty = _uncomputed(module)
    for name in empty:
        setattr(module, name, torch.full_like(getattr(module, name), torch.nan, device=device))
    for part in (module, model):  # some models have a rule for the module, some for the whole (Falcon-H1)
        missing = [t for name in empty if bool((t := getattr(module, name)).isnan().any())]
        if missing:
            _initialise(model, part, missing)
    for name in empty:
        if bool(getattr(module, name).isnan().any()):
            raise ArtifactError(f"cannot rebuild {name} of {type(module).__name__} from the config")


def _initialise(model: PreTrainedModel, part: nn.Module, missing: list[Tensor]) -> None:
    """A model's own rule for a part of it, which finds everything in the part loaded but what is `missing`."""
    left = {id(tensor) for tensor in missing}
    loaded = [tensor for tensor in (*part.parameters(), *part.buffers()) if id(tensor) not in left]
    for tensor in loaded:
        tensor._is_hf_initialized = True  # pyright: ignore[reportAttributeAccessIssue]
    model._init_weights(part)
    for tensor in loaded:
        del tensor._is_hf_initialized  # pyright: ignore[reportAttributeAccessIssue]
