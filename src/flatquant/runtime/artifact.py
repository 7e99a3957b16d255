"""A quantised model as a folder: `save`, `load`, `inspect`. The format itself is described in `folder.py`.

A folder appears complete or not at all, its bytes depend on nothing but the model (and the report), and a loaded model
computes the same logits, to the last bit, as the one that was saved.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import mul
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, GenerationConfig, PreTrainedModel

from flatquant import seams, store
from flatquant.errors import ArtifactError, one_line
from flatquant.models import WRAPPERS, auto_class
from flatquant.runtime import fused
from flatquant.runtime.build import install
from flatquant.runtime.card import model_card, updated
from flatquant.runtime.folder import (
    CARD_FILE,
    COLLECTION_FILE,
    CONFIG_FILE,
    DTYPES,
    EVALUATION_FILE,
    FORMAT_VERSION,
    GENERATION_FILE,
    INDEX_FILE,
    METHOD,
    REPORT_FILE,
    SINGLE_FILE,
    Folder,
    StoredTensor,
    content_hash,
    json_bytes,
    left_in_16_bit,
    plan_to_json,
    read_json,
    stored_kinds,
    unquantised_bytes,
)
from flatquant.runtime.hf import adopt
from flatquant.runtime.kvcache import token_bytes
from flatquant.runtime.linear import DenseLinear, Unpacked
from flatquant.spec import Plan, Recipe, from_dict

# Keys of a config that name code, kernels or places of the machine that wrote it.
_FOREIGN = ("auto_map", "attn_implementation", "use_kernels", "name_or_path", "transformers_weights")

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_CODES = list(_NAMES)

# What says something about the model and is not read for serving.
_UNHASHED = (CARD_FILE, COLLECTION_FILE, EVALUATION_FILE, REPORT_FILE)

_AGAINST_ORIGINAL = ("original", "divergence")  # results that depend on which model is the original
_EVALUATION_WAIT = 30.0  # seconds, for another process to end its writing


# --------------------------------------------------------------------------------------------- save


def check_output(output: Path) -> None:
    """Raise ArtifactError unless a folder can be made at `output`: nothing is there, or an empty folder."""
    try:
        if output.exists() and not output.is_dir():
            raise ArtifactError(f"{output} is in the way; choose another output folder")
        if output.is_dir() and any(path.name != store.LOCK_FILE for path in output.iterdir()):
            raise ArtifactError(f"the output folder {output} is not empty; choose another, or empty it first")
    except OSError as error:
        raise ArtifactError(f"cannot use {output}: {error.strerror or error}") from error


@torch.no_grad()
def save(
    model: PreTrainedModel,
    plan: Plan,
    output: Path,
    *,
    recipe: Mapping[str, Any],
    report: Mapping[str, Any],
    scheme: str | None = None,
    tokenizer: Any = None,
    companions: Folder | None = None,
    beside: Sequence[Path] = (),
    max_shard_bytes: int = 5_000_000_000,
    replace: bool = False,
    elsewhere: Callable[[str], Tensor] | None = None,
    completed: Callable[[Path], Mapping[str, Any]] | None = None,
) -> None:
    """Write a quantised model as a folder, one tensor at a time. The model in memory stays as it is.

    Args:
        plan: what `calibrate` returned with the model.
        output: absent or an empty folder; appears by one rename when everything is on the disk.
        recipe: `spec.to_dict` of the recipe.
        report: kept as `flatquant_report.json`.
        scheme: for people; that of the recipe if None. (A loaded model's recipe may be one of a later version.)
        tokenizer: saved along if given.
        companions: a folder whose files beside the model (tokenizer, evaluation) are copied, those that are whole.
        beside: further files that are copied: a processor's.
        max_shard_bytes: of tensors in one file; a larger tensor has a file of its own.
        replace: `output` may hold files; those of the same names, and older tensors of ours, are replaced. Of a card
            that is there, or that `companions` has, only our sections are.
        elsewhere: gives the tensors that the model has on the meta device, by their names in its state.
        completed: called with the folder before it appears, when all but the report is on the disk; what it returns is
            kept as the report.

    Raises:
        ArtifactError: something is in the way, or the disk is full or read-only. Nothing half-written stays.
        SpecError: `recipe` is not a recipe.
    """
    output = Path(output)
    if not (replace and output.is_dir()):
        check_output(output)
    scheme = scheme or str(from_dict(Recipe, recipe).scheme)
    output = output.resolve()
    temporary = output.with_name(f"{output.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            temporary.mkdir()
            _write_tensors(_pending(model, elsewhere), temporary, max_shard_bytes)
            if model.can_generate() and model.generation_config is not None:
                text = model.generation_config.to_json_string(use_diff=True)
                (temporary / GENERATION_FILE).write_text(text, encoding="utf-8")
            if tokenizer is not None:
                tokenizer.save_pretrained(temporary)
            for file in beside:
                shutil.copyfile(file, temporary / file.name)
            if companions is not None:
                _copy_companions(companions, temporary)
            config = _config_to_json(model)
            config["quantization_config"] = {
                "quant_method": METHOD,
                "format_version": FORMAT_VERSION,
                "scheme": scheme,
                "recipe": dict(recipe),
                "plan": plan_to_json(plan),
                "files": {n: _sha256(temporary / n) for n in _files(temporary) if n not in _UNHASHED},
            }
            config["quantization_config"]["content_hash"] = content_hash(config)
            (temporary / CONFIG_FILE).write_bytes(json_bytes(config))
            report = report if completed is None else completed(temporary)
            (temporary / REPORT_FILE).write_bytes(json_bytes(report))
            cards = [folder / CARD_FILE for folder in (output, companions and companions.path) if folder]
            write_card(temporary, next(filter(Path.is_file, cards), None))
            for name in _files(temporary):
                # safetensors makes files that only their owner may read
                shutil.copymode(temporary / CONFIG_FILE, temporary / name)
                store.sync(temporary / name)
            store.sync(temporary)
            _publish(temporary, output)
            store.sync(output.parent)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or one_line(error)
            raise ArtifactError(f"cannot write {output}: {reason}; free space or choose another folder") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _copy_companions(source: Folder, target: Path) -> None:
    broken = source.damaged()
    names = [name for name in source.companions if name not in broken and not (target / name).exists()]
    names += [name for name in (EVALUATION_FILE, COLLECTION_FILE) if (source.path / name).is_file()]
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source.path / name, target / name)


def keep_evaluation(path: Path, result: Mapping[str, Any]) -> bool:
    """Add what was measured to a folder's `flatquant_evaluation.json`, and to its card.

    Other processes may do so at the same time, and any of them may be killed: nothing that was kept is lost.

    Args:
        result: with `original.sha256` where it depends on the original: see `facing`.

    Returns:
        Whether the card has a place for it; one that its owner wrote anew is left alone.

    Raises:
        ArtifactError: the folder is not ours, or cannot be written.
    """
    folder = Folder.open(path)
    file = folder.path / EVALUATION_FILE
    try:
        with store.held(folder.path, wait=_EVALUATION_WAIT):
            kept = facing(read_evaluation(folder.path), result.get("original", {}).get("sha256"))
            store.write(file, json_bytes(merged(kept, result)))
            return write_card(folder.path)
    except OSError as error:
        raise ArtifactError(f"cannot write {file}: {error.strerror or error}") from error


def read_evaluation(folder: Path) -> dict[str, Any]:
    """`flatquant_evaluation.json`; empty if there is none.

    Raises:
        ArtifactError: it is damaged.
    """
    file = folder / EVALUATION_FILE
    kept = read_json(file) if file.is_file() else {}
    if not isinstance(kept, dict):
        raise ArtifactError(f"{file} is damaged: not a JSON object; delete it, and evaluate again")
    return kept


def facing(kept: Mapping[str, Any], original: str | None) -> dict[str, Any]:
    """What is kept, seen from one original: results against others are put under `others`, its own taken from there.

    Args:
        original: its identity (`models.identity`), which stands in `original.sha256`; None changes nothing.
    """
    current = kept.get("original", {}).get("sha256")
    if original is None or current == original:
        return dict(kept)
    own = {k: v for k, v in kept.items() if k not in _AGAINST_ORIGINAL and k != "others"}
    others = dict(kept.get("others", {}))
    if against := {k: kept[k] for k in _AGAINST_ORIGINAL if k in kept}:
        others[current or "unknown"] = against
    own |= others.pop(original, {})
    return own | ({"others": others} if others else {})


def merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Both, entry by entry; the new one wins."""
    both = {**old, **new}
    return {
        k: merged(old[k], new[k]) if isinstance(old.get(k), Mapping) and isinstance(new.get(k), Mapping) else v
        for k, v in both.items()
    }


def write_card(folder: Path, owned: Path | None = None) -> bool:
    """Write README.md from the folder's own JSON files: the sections that are ours if it exists, else all of it.

    Args:
        owned: a card to go on from, where the folder has none.

    Returns:
        False: the card has no place for our sections, and is as it was.

    Raises:
        ArtifactError: one of the JSON files is damaged.
    """
    config, report = (read_json(folder / name) for name in (CONFIG_FILE, REPORT_FILE))
    new = card = model_card(config, report, read_evaluation(folder))
    for place in (folder / CARD_FILE, owned):
        if place is not None and place.is_file():
            data = place.read_bytes()  # bytes: the ends of its lines stay what they are
            card = updated(data.decode("utf-8", errors="surrogateescape"), new)
            store.write(folder / CARD_FILE, data if card is None else card.encode("utf-8", errors="surrogateescape"))
            return card is not None
    store.write(folder / CARD_FILE, new.encode())
    return True


def _publish(temporary: Path, output: Path) -> None:
    """Make the finished folder appear: by one rename, or into a folder that holds other files, the config last."""
    if not output.is_dir() or not any(output.iterdir()):
        os.replace(temporary, output)
        return
    names = sorted(_files(temporary), key=lambda name: name == CONFIG_FILE)
    for stale in {*output.glob("flatquant*.safetensors"), output / INDEX_FILE} - {output / name for name in names}:
        stale.unlink(missing_ok=True)
    for name in names:
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(temporary / name, output / name)


def _config_to_json(model: PreTrainedModel) -> dict[str, Any]:
    config = model.config.to_diff_dict()
    config = {k: v for k, v in config.items() if k.lstrip("_") not in _FOREIGN and k != "quantization_config"}
    for part in (config, *(value for value in config.values() if isinstance(value, dict) and "dtype" in value)):
        part["dtype"] = str(model.dtype).removeprefix("torch.")  # of a wrapper, its parts' too
    config["architectures"] = [type(model).__name__]
    config["tie_word_embeddings"] = is_tied(model)
    return config


def unquantised(model: nn.Module, plan: Plan) -> dict[str, int]:
    """`unquantised_bytes` of a quantised model in memory, as it would be stored."""
    pending = _pending(model, lambda name: model.state_dict()[name])
    return unquantised_bytes({name: (len(t.shape), t.nbytes) for name, t in pending.items()}, plan)


def is_tied(model: PreTrainedModel) -> bool:
    """Whether the output layer is the embeddings."""
    return bool(_tied(model))


def _tied(model: nn.Module) -> set[str]:
    """Names of parameters that are another parameter, listed before, under a second name."""
    first = {id(p): name for name, p in model.named_parameters()}
    return {n for n, p in model.named_parameters(remove_duplicate=False) if first[id(p)] != n}


@dataclass(frozen=True)
class _Pending:
    """A tensor to be stored, made when it is written."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def _pending(model: nn.Module, elsewhere: Callable[[str], Tensor] | None) -> dict[str, _Pending]:
    """What is stored of a model: its state with integers packed and tied weights once."""
    tied = _tied(model)
    unpacked = {f"{name}.{m.loose}": m for name, m in model.named_modules() if isinstance(m, Unpacked)}
    pending: dict[str, _Pending] = {}
    for name, tensor in model.state_dict().items():
        if tensor.is_meta and elsewhere is None:
            raise ArtifactError(f"{name} is offloaded; load the model without offloading, then save it")
        if name in unpacked:
            module, prefix = unpacked[name], name.removesuffix(unpacked[name].loose)
            make = module.pack
            if tensor.is_meta and elsewhere is not None:
                make = partial(_pack_filled, module, prefix, elsewhere)
            rows = tensor.shape[0]
            pending[prefix + "packed"] = _Pending(torch.uint8, (rows, module.packed_bytes // rows), make)
        elif name not in tied:
            if tensor.dtype not in _NAMES:
                raise ArtifactError(f"{name} is {tensor.dtype}, which a folder cannot hold; convert it before saving")
            make = partial(elsewhere, name) if tensor.is_meta and elsewhere is not None else lambda t=tensor: t
            pending[name] = _Pending(tensor.dtype, tuple(tensor.shape), make)
    return dict(sorted(pending.items()))


def _pack_filled(module: Unpacked, prefix: str, elsewhere: Callable[[str], Tensor]) -> Tensor:
    """What a module that is on the meta device packs once it has its tensors."""
    filled = copy.deepcopy(module)
    assert isinstance(filled, nn.Module)
    filled.load_state_dict({name: elsewhere(prefix + name) for name in filled.state_dict()}, assign=True)
    assert isinstance(filled, Unpacked)
    return filled.pack()


def _write_tensors(pending: Mapping[str, _Pending], folder: Path, max_shard_bytes: int) -> None:
    shards: list[list[str]] = []
    room = 0
    for name, tensor in pending.items():
        if not shards or tensor.nbytes > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= tensor.nbytes
    count = len(shards)
    numbered = [f"flatquant-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    files = numbered if count > 1 else [SINGLE_FILE]
    for file, names in zip(files, shards, strict=True):
        _write_shard({name: pending[name] for name in names}, folder / file)
    if count > 1:
        total = sum(t.nbytes for t in pending.values())
        where = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        (folder / INDEX_FILE).write_bytes(json_bytes({"metadata": {"total_size": total}, "weight_map": where}))


def _write_shard(pending: Mapping[str, _Pending], path: Path) -> None:
    """The bytes that safetensors' `save_file` writes, with one tensor in memory at a time."""
    order = sorted(pending.items(), key=lambda item: (-_CODES.index(item[1].dtype), item[0]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in order:
        start, end = end, end + tensor.nbytes
        code = _NAMES[tensor.dtype]
        header[name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for name, pended in order:
            tensor = pended.make().detach().cpu().contiguous()
            assert (tensor.dtype, tuple(tensor.shape)) == (pended.dtype, pended.shape), name
            f.write(memoryview(tensor.flatten().view(torch.uint8).numpy()))  # pyright: ignore[reportArgumentType]


def _files(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def _sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


# --------------------------------------------------------------------------------------------- load


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
    """
    folder = Folder.open(Path(path))
    if verify:
        folder.check_files()
    stored = folder.tensors()
    model = skeleton(folder, stored)
    state = read_tensors(folder, stored, torch.device(device))
    if dtype is not None:
        for name in _castable(model):
            if name in state:
                state[name] = state[name].to(dtype)
        model.config.dtype = dtype
    model.load_state_dict(state, assign=True, strict=False)
    model.tie_weights()
    rebuild_buffers(model, torch.device(device))
    if GENERATION_FILE in folder.files:
        try:
            model.generation_config = GenerationConfig.from_dict(read_json(folder.path / GENERATION_FILE))
        except (ValueError, TypeError, AttributeError) as error:
            raise ArtifactError(f"{folder.path / GENERATION_FILE} is damaged ({one_line(error)})") from error
    seams.use_attention(model, folder.plan.attention)
    adopt(model, folder.plan, folder.scheme, folder.recipe, folder.read_report(), folder)
    fused.attach(model)
    return model.eval().requires_grad_(False)


def skeleton(folder: Folder, stored: Mapping[str, StoredTensor]) -> PreTrainedModel:
    """The model with every tensor on the meta device: costs no memory whatever the numbers say.

    Args:
        stored: `folder.tensors()`.

    Raises:
        ArtifactError: the config, the plan and the stored tensors do not fit one another.
    """
    data = {k: v for k, v in folder.config.items() if k.lstrip("_") not in _FOREIGN}
    where = folder.path / CONFIG_FILE
    kind = data.pop("model_type", None)
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise ArtifactError(f"{where}: the installed transformers does not know the model type {one_line(kind)}")
    blocks = folder.plan.blocks
    # Each block stores a tensor at least, so that the number of modules is bounded by the size of the files.
    if _text_config(data).get("num_hidden_layers", len(blocks)) != len(blocks) or len(blocks) > len(stored):
        raise ArtifactError(f"{where} is damaged: the plan has {len(blocks)} blocks, the model another number")
    try:
        with torch.device("meta"):
            config = CONFIG_MAPPING[kind].from_dict(data)
            if (layers := config.get_text_config().num_hidden_layers) != len(blocks):
                raise ArtifactError(f"{where} is damaged: {len(blocks)} blocks planned of {layers}")
            model = auto_class(config).from_config(config)
            furnish(folder, model, _tied(model), stored)
    except ArtifactError:
        raise
    except Exception as error:
        # A config is free-form data of another library: whatever it trips over, the folder is at fault.
        raise ArtifactError(f"{where} is damaged: no model can be built from it ({one_line(error)})") from error
    return model


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a `config.json` says of the model, of a wrapper's text part."""
    part = config.get("text_config") if config.get("model_type") in (None, *WRAPPERS) else None
    return part if isinstance(part, Mapping) else config


def furnish(folder: Folder, model: PreTrainedModel, tied: set[str], stored: Mapping[str, StoredTensor]) -> None:
    """Put empty serving modules into a model's blocks, where the folder's plan says so.

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
    loaded = [*module.parameters(recurse=False), *(t for n, t in module.named_buffers(recurse=False) if n not in empty)]
    for tensor in loaded:
        tensor._is_hf_initialized = True  # pyright: ignore[reportAttributeAccessIssue]
    model._init_weights(module)
    for tensor in loaded:
        del tensor._is_hf_initialized  # pyright: ignore[reportAttributeAccessIssue]
    for name in empty:
        if bool(getattr(module, name).isnan().any()):
            raise ArtifactError(f"cannot rebuild {name} of {type(module).__name__} from the config")


# --------------------------------------------------------------------------------------------- inspect


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What a folder holds and costs; JSON-ready through `spec.to_dict`.

    Attributes:
        parameters: of the original model, tied ones counted once; `quantised_parameters` lie on a weight grid.
        bytes_by_kind: of tensors: `packed` integers, `grids` (scales, zero points), `transforms` (online factors,
            clips) and `dense` (embeddings, norms, biases, unquantised layers). `unquantised_bytes` says what is in
            `dense`, `left_in_16_bit` which weights, activations, keys and values the scheme gives no grid.
        bits_per_quantised_weight: packed, grids and transforms over the quantised parameters; None if there are none.
        bits_per_parameter: all tensors over all parameters. `compression` is 16 bit over that.
        kv_bytes_per_token: of `QuantizedCache`, all layers, scales and zero points included, and the angles that keys
            with an offset need, if all layers turn by the same; `kv_bytes_per_token_16bit` of a plain cache.
        damaged: files that are missing or differ from their hash; empty for a whole folder. Numbers are then of the
            tensors whose files can still be read.
        report: `flatquant_report.json` without its lists (their lengths instead), with calibration text and verdict in
            full; None if it is missing.
    """

    scheme: str
    recipe: str
    architecture: str
    format_version: int
    content_hash: str
    blocks: int
    parameters: int
    quantised_parameters: int
    files: Mapping[str, int]
    bytes_by_kind: Mapping[str, int]
    unquantised_bytes: Mapping[str, int]
    left_in_16_bit: tuple[str, ...]
    bits_per_quantised_weight: float | None
    bits_per_parameter: float
    compression: float
    kv_bytes_per_token: int
    kv_bytes_per_token_16bit: int
    damaged: tuple[str, ...]
    report: Mapping[str, Any] | None


def inspect(path: Path | str, *, verify: bool = True) -> Inspection:
    """Read a folder's headers and hashes; no model is built.

    Args:
        verify: compare every file with its hash (reads all of it); otherwise `damaged` only lists missing files.

    Raises:
        ArtifactError: `config.json` cannot be read, or a file whose hash is right is not what it should be.
    """
    folder = Folder.open(Path(path))
    damaged = folder.damaged() if verify else [n for n in sorted(folder.files) if not (folder.path / n).is_file()]
    stored = folder.tensors(damaged)
    kinds = stored_kinds(folder.plan)
    missing = sorted(kinds.keys() - stored.keys())
    if missing and not damaged:
        raise ArtifactError(f"{folder.path} lacks tensor {one_line(missing[0])} ({len(missing)} in all)")
    sizes: dict[str, int] = {"packed": 0, "grids": 0, "transforms": 0, "dense": 0}
    dense = 0
    for name, tensor in stored.items():
        sizes[kinds.get(name, "dense")] += tensor.nbytes
        dense += tensor.numel if name not in kinds else 0
    quantised = 0
    for index, block in enumerate(folder.plan.blocks):
        for site in block.sites.values():
            book = ("inner." if site.rank else "") + ("" if site.codebook is None else "books.main.")
            for reader in site.readers if site.weights else ():
                packed = stored.get(f"{folder.plan.blocks_path}.{index}.{reader}.{book}packed")
                rows = packed.shape[0] if packed is not None else 0
                rows *= 1 if site.codebook is None else site.codebook.length
                quantised += rows * site.shape[0] * site.shape[1]
    total, parameters = sum(sizes.values()), max(dense + quantised, 1)
    ours = sizes["packed"] + sizes["grids"] + sizes["transforms"]
    kv, kv16 = _kv_bytes(folder)
    report = folder.read_report()
    return Inspection(
        scheme=folder.scheme,
        recipe=str(folder.recipe.get("name", "")),
        architecture=_architecture(folder.config),
        format_version=FORMAT_VERSION,
        content_hash=folder.content_hash,
        blocks=len(folder.plan.blocks),
        parameters=parameters,
        quantised_parameters=quantised,
        files={name: (folder.path / name).stat().st_size for name in _files(folder.path) if name[0] != "."},
        bytes_by_kind=sizes,
        unquantised_bytes=unquantised_bytes({n: (len(t.shape), t.nbytes) for n, t in stored.items()}, folder.plan),
        left_in_16_bit=tuple(left_in_16_bit(folder.plan)),
        bits_per_quantised_weight=8 * ours / quantised if quantised else None,
        bits_per_parameter=8 * total / parameters,
        compression=2 * parameters / max(total, 1),
        kv_bytes_per_token=kv,
        kv_bytes_per_token_16bit=kv16,
        damaged=tuple(damaged),
        report=_summary(report) or None,
    )


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""


def _kv_bytes(folder: Folder) -> tuple[int, int]:
    names = ("num_key_value_heads", "num_attention_heads", "n_head")
    config = _text_config(folder.config)
    heads = next((found for name in names if (found := config.get(name))), None)
    if type(heads) is not int or heads < 1:
        raise ArtifactError(f"{folder.path / CONFIG_FILE} is damaged: no number of attention heads")
    blocks = folder.plan.blocks
    copies = [1 if b.latent else heads for b in blocks]
    kv = [token_bytes(b.key_dim, b.keys) + token_bytes(b.value_dim, b.values) for b in blocks]
    plain = [2 * (b.key_dim + b.value_dim) for b in blocks]
    turned = [b.key_dim for b in blocks if b.key_offset is not None and b.key_offset.pairing != "none"]
    angles = max(turned, default=0) * (4 if folder.config.get("dtype") == "float32" else 2)
    return sum(map(mul, copies, kv)) + angles, sum(map(mul, copies, plain))


def _summary(data: Mapping[str, Any]) -> dict[str, Any]:
    def short(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: short(v) for k, v in value.items()}
        return len(value) if isinstance(value, list) else value

    return {k: v if k in ("data", "verdict") else short(v) for k, v in data.items()}
