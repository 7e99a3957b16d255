"""`save`: a quantised model as a folder."""

from __future__ import annotations

import copy
import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel

from flatquant import store
from flatquant.errors import ArtifactError, one_line
from flatquant.modules import tensor_bytes, tied_names
from flatquant.runtime.artifact.evaluations import write_card
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
    content_hash,
    file_digest,
    json_bytes,
    plan_to_json,
    rounded_ends,
    unquantised_bytes,
)
from flatquant.runtime.linear import Unpacked
from flatquant.spec import Plan, Recipe, from_dict

# Keys of a config that name code, kernels or places of the machine that wrote it.
FOREIGN = ("auto_map", "attn_implementation", "use_kernels", "name_or_path", "transformers_weights")

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_CODES = list(_NAMES)

# What says something about the model and is not read for serving.
_UNHASHED = (CARD_FILE, COLLECTION_FILE, EVALUATION_FILE, REPORT_FILE)


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
                "files": {n: file_digest(temporary / n) for n in files_of(temporary) if n not in _UNHASHED},
            }
            config["quantization_config"]["content_hash"] = content_hash(config)
            (temporary / CONFIG_FILE).write_bytes(json_bytes(config))
            report = report if completed is None else completed(temporary)
            (temporary / REPORT_FILE).write_bytes(json_bytes(report))
            cards = [folder / CARD_FILE for folder in (output, companions and companions.path) if folder]
            write_card(temporary, next(filter(Path.is_file, cards), None))
            for name in files_of(temporary):
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


def _publish(temporary: Path, output: Path) -> None:
    """Make the finished folder appear: by one rename, or into a folder that holds other files, the config last."""
    if not output.is_dir() or not any(output.iterdir()):
        os.replace(temporary, output)
        return
    names = sorted(files_of(temporary), key=lambda name: name == CONFIG_FILE)
    for stale in {*output.glob("flatquant*.safetensors"), output / INDEX_FILE} - {output / name for name in names}:
        stale.unlink(missing_ok=True)
    for name in names:
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(temporary / name, output / name)


def _config_to_json(model: PreTrainedModel) -> dict[str, Any]:
    config = model.config.to_diff_dict()
    config = {k: v for k, v in config.items() if k.lstrip("_") not in FOREIGN and k != "quantization_config"}
    for part in (config, *(value for value in config.values() if isinstance(value, dict) and "dtype" in value)):
        part["dtype"] = str(model.dtype).removeprefix("torch.")  # of a wrapper, its parts' too
    config["architectures"] = [type(model).__name__]
    config["tie_word_embeddings"] = is_tied(model)
    return config


def unquantised(model: nn.Module, plan: Plan) -> dict[str, int]:
    """`unquantised_bytes` of a quantised model in memory, as it would be stored."""
    pending = _pending(model, lambda name: model.state_dict()[name])
    return unquantised_bytes({name: (len(t.shape), t.nbytes) for name, t in pending.items()}, plan)


def rounded_ends_of(model: nn.Module, plan: Plan) -> dict[str, dict[str, Any] | None]:
    """`rounded_ends` of a quantised model in memory, as it would be stored."""
    pending = _pending(model, lambda name: model.state_dict()[name])
    return rounded_ends({name: t.nbytes for name, t in pending.items()}, plan)


def is_tied(model: PreTrainedModel) -> bool:
    """Whether the output layer is the embeddings."""
    return bool(tied_names(model))


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
    tied = tied_names(model)
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
            tensor = pended.make()
            assert (tensor.dtype, tuple(tensor.shape)) == (pended.dtype, pended.shape), name
            f.write(tensor_bytes(tensor))


def files_of(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
