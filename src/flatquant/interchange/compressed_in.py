"""FP4 folders of compressed-tensors, in."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedModel

from flatquant import seams
from flatquant.errors import ArtifactError, one_line
from flatquant.formats.base import SCALE, WHOLE
from flatquant.interchange.theirs import FORMATS, their_numbers
from flatquant.models import auto_class
from flatquant.recipes import rtn
from flatquant.runtime.artifact import Origin, adopt, rebuild_buffers
from flatquant.runtime.build import install
from flatquant.runtime.codes import CodeLinear
from flatquant.spec import Plan, Recipe, Scheme, to_dict
from flatquant.wiring.arch import Geometry, blocks_at
from flatquant.wiring.archs import arch_of
from flatquant.wiring.plan import make_plan


@torch.no_grad()
def import_compressed(path: Path) -> tuple[PreTrainedModel, Plan, Recipe, dict[str, Any]]:
    """Read an FP4 model of compressed-tensors; codes and scales stay what they are.

    Args:
        path: the folder, with `config.json` and safetensors.

    Returns:
        The model, the plan and recipe for `artifact.save`, and a report.

    Raises:
        ArtifactError: the folder is damaged, in another format, or leaves some linears of a block as they were.
        FamilyError: the model's family is unknown.
    """
    try:
        config = json.loads((path / "config.json").read_bytes())
        state = {n: t for file in sorted(path.glob("*.safetensors")) for n, t in load_file(file).items()}
    except (OSError, ValueError, SafetensorError) as error:
        raise ArtifactError(f"cannot read {path}: {one_line(error)}") from error
    scheme = _their_scheme(path, config)
    recipe = rtn(dataclasses.replace(Scheme.parse(scheme, clip="none"), key_offset="none"))
    model = _empty_model(path, config)
    arch = arch_of(model.config, model)
    blocks = blocks_at(model, arch.blocks)
    plan = make_plan(recipe, arch, Geometry.of(model.config), blocks)
    seams.use_attention(model, plan.attention)
    for index, (block, block_plan) in enumerate(zip(blocks, plan.blocks, strict=True)):
        install(block, plan.attention, block_plan, packed=True)
        for name, site in block_plan.sites.items():
            root = f"{arch.blocks}.{index}."
            statics = [state.pop(f"{root}{reader}.input_global_scale", None) for reader in site.readers]
            if site.activations is not None and site.activations.format and site.activations.format.tensor_scale:
                found = [s.float().flatten() for s in statics if s is not None]
                if len(found) < len(statics) or any(not torch.equal(s, found[0]) for s in found):
                    raise ArtifactError(f"{path}: the readers of {root}{name} do not share one input_global_scale")
                if len(found[0]) != 1 or not 0 < float(found[0]) < float("inf"):
                    raise ArtifactError(f"{path}: input_global_scale of {root}{name} is no positive number")
                state[f"{root}flatquant.{name}.activations.{WHOLE}"] = found[0]
    state = {_our_name(name): _our_bytes(name, tensor) for name, tensor in state.items()}
    try:
        surplus = model.load_state_dict(state, assign=True, strict=False).unexpected_keys
    except RuntimeError as error:
        raise ArtifactError(f"{path}: tensors do not fit the model ({one_line(error)})") from error
    model.tie_weights()
    empty = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    for word, names in (("lacks", empty), ("has a surplus", surplus)):
        if names:
            raise ArtifactError(f"{path} {word} tensor {one_line(names[0])} ({len(names)} in all)")
    rebuild_buffers(model, torch.device("cpu"))
    for name, module in model.named_modules():
        if isinstance(module, CodeLinear):
            if module.get_buffer("packed").dtype != torch.uint8:
                raise ArtifactError(f"{path}: {name}.weight_packed is not of uint8")
            try:
                module.qweight().check_range()
            except ValueError as error:
                raise ArtifactError(f"{path}: {name}: {error}") from error
    report: dict[str, Any] = {
        "recipe": to_dict(recipe),
        "data": {"source": "imported from compressed-tensors", "samples": 0, "seqlen": 0},
    }
    model.eval().requires_grad_(False)
    adopt(model, Origin(plan=plan, scheme=str(recipe.scheme), recipe=to_dict(recipe), report=report))
    return model, plan, recipe, report


def _their_scheme(path: Path, config: Any) -> str:
    """The scheme of a compressed-tensors folder, as ours are written."""
    quantisation = config.get("quantization_config") if isinstance(config, dict) else None
    if not isinstance(quantisation, dict):
        quantisation = {}
    ours = {theirs.name: name for name, theirs in FORMATS.items()}
    kind, groups = quantisation.get("format"), quantisation.get("config_groups")
    if not isinstance(kind, str) or kind not in ours or not isinstance(groups, dict):
        raise ArtifactError(f"{path} is not a compressed-tensors model in {' or '.join(ours)}")
    group = next(iter(groups.values()), None)
    if len(groups) != 1 or not isinstance(group, dict) or group.get("targets") != ["Linear"]:
        raise ArtifactError(f"{path}: only one scheme for all linears is read")
    if quantisation.get("kv_cache_scheme") is not None:
        raise ArtifactError(f"{path}: keys and values that are quantised are not read; only 16 bit")
    name = ours[kind]
    _check_grid(path, name, "weights", group.get("weights"))
    given = group.get("input_activations")
    if given is None:
        return f"w{name}a16"
    _check_grid(path, name, "input_activations", given)
    return name


def _check_grid(path: Path, name: str, tensors: str, given: object) -> None:
    """Raise ArtifactError unless a description of weights or activations is that of a format."""
    if not isinstance(given, dict):
        raise ArtifactError(f"{path}: {tensors} is {one_line(given)}, no description of a grid")
    found = {"symmetric": True, **given}
    for key, value in their_numbers(name).items():
        if found.get(key) != value:
            raise ArtifactError(f"{path}: {tensors} with {key} {one_line(found.get(key))} are not {name}; only {value}")


def _empty_model(path: Path, config: dict[str, Any]) -> PreTrainedModel:
    """The model that a config describes, with all tensors on the meta device."""
    data = {k: v for k, v in config.items() if k not in ("quantization_config", "auto_map")}
    kind = data.pop("model_type", None)
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise ArtifactError(f"{path}: the installed transformers does not know the model type {one_line(kind)}")
    with torch.device("meta"):
        made = CONFIG_MAPPING[kind].from_dict(data)
        return auto_class(made.model_type).from_config(made, dtype=made.dtype)


_NAMES = {"weight_packed": "packed", "weight_scale": SCALE, "weight_global_scale": WHOLE}  # theirs: ours


def _our_name(name: str) -> str:
    root, _, leaf = name.rpartition(".")
    return f"{root}.{_NAMES[leaf]}" if leaf in _NAMES else name


def _our_bytes(name: str, tensor: Tensor) -> Tensor:
    if name.endswith(".weight_scale"):
        return tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor
    return tensor.float().flatten() if name.endswith(".weight_global_scale") else tensor
