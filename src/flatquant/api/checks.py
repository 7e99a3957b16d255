"""What a run can be told to do, and what it has."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flatquant.calibrate.memory import (
    Limits,
    free_host_bytes,
)
from flatquant.calibrate.pipeline import solved_name
from flatquant.calibrate.samples import UNSCORED, Samples, Windows, placeholder
from flatquant.calibrate.state import RunState
from flatquant.errors import ArtifactError, CalibrationError, DataError
from flatquant.evaluate.verdict import PACKED_ERROR
from flatquant.families import plan_for
from flatquant.models import (
    check_ids,
)
from flatquant.modules import tensor_bytes
from flatquant.progress import Progress
from flatquant.runtime.experts import open_experts
from flatquant.runtime.linear import Unpacked
from flatquant.spec import Plan, Recipe
from flatquant.wiring.arch import Geometry, blocks_at
from flatquant.wiring.archs import arch_of


def check_model(model: PreTrainedModel, recipe: Recipe) -> None:
    """What can be said before any text is read: the family, the recipe's fit to the model, NaN in the weights."""
    arch = arch_of(model.config, model)
    blocks = blocks_of(model)
    open_experts(blocks)
    plan_for(recipe, arch, Geometry.of(model.config), blocks)
    for name, parameter in model.named_parameters():
        if not parameter.is_meta:
            check_finite(name, parameter, arch.blocks)


def blocks_of(model: PreTrainedModel) -> nn.ModuleList:
    return blocks_at(model, arch_of(model.config, model).blocks)


def check_finite(name: str, tensor: Tensor, blocks: str) -> None:
    if not bool(torch.isfinite(tensor).all()):
        match = re.fullmatch(re.escape(blocks) + r"\.(\d+)\.(.+)", name)
        where = f"block {match[1]}: {match[2]}" if match else name
        raise CalibrationError(
            f"{where} holds NaN or infinity; check the model file, fetch it again, or load it in float32"
        )


def check_tokens(what: str, tokens: Windows, model: PreTrainedModel) -> None:
    if isinstance(tokens, Samples):
        ids = tokens.ids(placeholder(model.config))
        check_ids(ids[ids != UNSCORED], model, f"{what} samples")
        return
    if tokens.ndim != 2 or tokens.dtype != torch.int64 or tokens.numel() == 0:
        raise DataError(f"{what} tokens must be (samples, seqlen) int64, not {tuple(tokens.shape)} {tokens.dtype}")
    check_ids(tokens, model, f"{what} windows")


def fit_dtype(model: PreTrainedModel, recipe: Recipe, device: torch.device) -> torch.dtype:
    """Half precision only on a GPU, and only for models that are stored in it.

    Gradients that are squared into Hessians are not left to float16: small ones would vanish there.
    """
    half = model.dtype in (torch.float16, torch.bfloat16)
    if device.type != "cuda" or not half:
        return torch.float32
    squared = recipe.hessian == "output_adaptive"
    return torch.float32 if squared and model.dtype == torch.float16 else model.dtype


def check_packed(report: Mapping[str, Any], output: Path) -> None:
    judged = report.get("verdict") or {}
    packed, own = judged.get("packed"), judged.get("kl")
    if packed is None or packed["equal"] or own is None:  # two models that are not finite cannot be compared
        return
    if packed["error"] is None or packed["error"] > PACKED_ERROR:
        raise ArtifactError(
            f"{output} was written, but read back it is not the model in memory: KL divergence {packed['kl']} on "
            f"{packed['tokens']} tokens; do not use it, and report this"
        )


@contextmanager
def stage(name: str, progress: Progress) -> Iterator[None]:
    """Tell the beginning and the end of a stage that counts nothing."""
    progress(name, 0, 1)
    yield
    progress(name, 1, 1)


def room_for_copy(model: PreTrainedModel, limits: Limits) -> bool:
    """Whether a float32 copy of a model in 16 bits takes less than half of the host memory that there is."""
    free = limits.host or free_host_bytes()
    return free is None or 2 * stored_bytes(model) < free // 2


@contextmanager
def copied_to(device: torch.device, model: PreTrainedModel) -> Iterator[None]:
    """Have a model compute on another device for a while. Its own tensors stay where they are: none is copied back."""
    data = [(p, p.data) for p in model.parameters()]
    modules = [(module, dict(module._parameters), dict(module._buffers)) for module in model.modules()]
    try:
        model.to(device)  # pyright: ignore[reportArgumentType]
        yield
    finally:
        for module, parameters, buffers in modules:
            module._parameters.update(parameters)
            module._buffers.update(buffers)
        for p, own in data:
            p.data = own


def stored_bytes(model: nn.Module) -> int:
    """Bytes of a model's tensors as they are stored: integers packed, shared tensors once."""
    unpacked = {f"{name}.{m.loose}": m for name, m in model.named_modules() if isinstance(m, Unpacked)}
    sizes: dict[int | str, int] = {}
    for name, tensor in model.state_dict().items():
        sizes[name if tensor.is_meta else tensor.data_ptr()] = (
            unpacked[name].packed_bytes if name in unpacked else tensor.nbytes
        )
    return sum(sizes.values())


def solved_tensor(state: RunState, plan: Plan, name: str) -> Tensor:
    """A tensor of a block that is kept solved, by its name in the model."""
    index, _, key = name.removeprefix(plan.blocks_path + ".").partition(".")
    return state.tensor(solved_name(int(index)), key)


def sha256(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()
