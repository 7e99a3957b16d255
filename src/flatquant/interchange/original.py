"""The matrices of the original FlatQuant project, in."""

from __future__ import annotations

import dataclasses
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from flatquant import seams
from flatquant.calibrate.capture import BlockCall
from flatquant.calibrate.solve import make_solver, solve_block
from flatquant.errors import ArtifactError
from flatquant.quantizers import Dynamic, WeightGrid
from flatquant.quantizers.clip import LearnedClip
from flatquant.recipes import flatquant
from flatquant.runtime.artifact import Origin, adopt
from flatquant.spec import Plan, Recipe, to_dict
from flatquant.transforms import Compose, Diagonal, Kronecker, Written
from flatquant.transforms.factor import DirectFactor, Factor
from flatquant.wiring.arch import Geometry, blocks_at
from flatquant.wiring.archs import arch_of
from flatquant.wiring.fitted import FitBlock
from flatquant.wiring.fold import fold_block
from flatquant.wiring.plan import make_plan
from flatquant.wiring.wrap import wrap_block


@torch.no_grad()
def import_matrices(model: PreTrainedModel, path: Path, scheme: str = "w4a4kv4") -> tuple[Plan, Recipe, dict[str, Any]]:
    """Quantise a model in place with the matrices that the original project found for it; weights by RTN.

    Args:
        model: the unquantised model the matrices were made for: Llama, Mistral or Qwen2.
        path: `flat_matrices.pth`, or the folder it lies in.
        scheme: as the matrices were made for; the file does not say.

    Returns:
        The plan and recipe for `artifact.save`, and a report.

    Raises:
        ArtifactError: the file cannot be read, or does not fit the model.
    """
    matrices = read_matrices(path)
    recipe = _imported(flatquant(scheme))
    arch = arch_of(model.config, model)
    blocks = blocks_at(model, arch.blocks)
    if len(matrices) != len(blocks):
        raise ArtifactError(f"{path} has matrices for {len(matrices)} blocks, the model has {len(blocks)}")
    plan = make_plan(recipe, arch, Geometry.of(model.config), blocks)
    dtype, widest = next(model.parameters()).dtype, 0.0
    seams.use_attention(model, plan.attention)
    for index, (block, block_plan) in enumerate(zip(blocks, plan.blocks, strict=True)):
        reader = _Reader(matrices[index], f"{path}, block {index}")
        fit = wrap_block(block.float(), arch, block_plan, recipe, {}, torch.Generator())
        widest = max(widest, _fill(fit, reader))
        fold_block(fit, dense=dtype)
        block.to(dtype)
        solve_block(block, block_plan, make_solver(recipe.solver), BlockCall(args=(), kwargs={}), None, 1)
    report: dict[str, Any] = {
        "recipe": to_dict(recipe),
        "data": {"source": "imported matrices", "samples": 0, "seqlen": 0},
        "largest_clip_difference_within_a_site": widest,
    }
    adopt(model, Origin(plan=plan, scheme=str(recipe.scheme), recipe=to_dict(recipe), report=report))
    return plan, recipe, report


def _imported(recipe: Recipe) -> Recipe:
    """FlatQuant with nothing left to fit, starts that need no statistics, and no offset for keys."""
    fit = None if recipe.fit is None else dataclasses.replace(recipe.fit, epochs=0)
    transforms = {
        site: tuple(dataclasses.replace(part, init="identity") for part in parts)
        for site, parts in recipe.transforms.items()
    }
    scheme = dataclasses.replace(recipe.scheme, key_offset="none")
    return dataclasses.replace(recipe, name="flatquant (imported)", scheme=scheme, fit=fit, transforms=transforms)


def read_matrices(path: Path) -> dict[int, dict[str, Tensor]]:
    """`flat_matrices.pth`: a tensor by name, of every block. Nothing in the file is run.

    Raises:
        ArtifactError: missing, no such file, or one that holds more than tensors.
    """
    file = path / "flat_matrices.pth" if path.is_dir() else path
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols; what matters of them is an error
            data = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ArtifactError(f"cannot read {file}: {error.strerror or error}") from error
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        # Not torch's own words: they advise to open the file all the same.
        raise ArtifactError(f"{file} is damaged, or holds more than tensors, and is not opened") from error
    whole = isinstance(data, dict) and all(
        type(i) is int
        and isinstance(block, dict)
        and all(isinstance(k, str) and isinstance(v, Tensor) and v.is_floating_point() for k, v in block.items())
        for i, block in data.items()
    )
    if not whole or sorted(data) != list(range(len(data))):
        raise ArtifactError(f"{file} is not a flat_matrices.pth: it does not hold named tensors of blocks 0, 1, ..")
    return {i: {k: v.detach() for k, v in block.items()} for i, block in data.items()}


class _Reader:
    """One block's tensors, by name and expected shape."""

    def __init__(self, tensors: Mapping[str, Tensor], where: str) -> None:
        self.tensors, self.where = tensors, where

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A tensor, finite and of `shape`."""
        if name not in self.tensors:
            raise ArtifactError(f"{self.where}: no {name}; were the matrices made for this scheme and model?")
        tensor = self.tensors[name]
        if tensor.numel() != torch.Size(shape).numel() or not bool(torch.isfinite(tensor).all()):
            raise ArtifactError(f"{self.where}: {name} is {tuple(tensor.shape)}, not {shape}, or not finite")
        return tensor.reshape(shape)


_TRANSFORMS = {"attn_in": "self_attn.ln_trans", "mlp_in": "mlp.up_gate_trans", "mlp_mid": "mlp.down_trans"}


def _fill(fit: FitBlock, reader: _Reader) -> float:
    """Put their numbers in; the largest difference of two clips that became one."""
    widest = 0.0
    for name, site in fit.sites.items():
        for part in site.transform.parts if isinstance(site.transform, Compose) else [site.transform]:
            match part:
                case Diagonal():
                    scale = reader.get(f"{_TRANSFORMS[name]}.diag_scale", tuple(part.scale.shape))
                    if not bool((scale > 0).all()):
                        raise ArtifactError(f"{reader.where}: {_TRANSFORMS[name]}.diag_scale is not positive")
                    part.log_scale.copy_(scale.log())
                case Written(inner=Kronecker(right=Factor() as factor)):
                    _set(factor, reader, "self_attn.vcache_trans.matrix")
                case Kronecker() if name == "attn_out":
                    if part.left is not None:
                        _set(part.left, reader, "self_attn.o_trans.matrix")
                case Kronecker(left=Factor() as left, right=Factor() as right):
                    _set(left, reader, f"{_TRANSFORMS[name]}.matrix_left")
                    _set(right, reader, f"{_TRANSFORMS[name]}.matrix_right")
        readers = fit.plan.sites[name].readers
        if isinstance(site.grid, WeightGrid) and isinstance(site.grid.clip, LearnedClip):
            for ours, end in ((site.grid.clip.low_logit, "min"), (site.grid.clip.high_logit, "max")):
                theirs = [
                    reader.get(f"{path}.clip_factor_w_{end}", (rows, 1))
                    for path, rows in zip(readers, site.sizes, strict=True)
                ]
                ours.copy_(torch.cat(theirs))
        if isinstance(site.activations, Dynamic):
            widest = max(widest, _clip(site.activations, reader, [f"{path}.act_quantizer" for path in readers]))
    kv = fit.key_value
    if kv is not None:
        if kv.factor is not None:
            _set(kv.factor, reader, "self_attn.kcache_trans.matrix")
        for grid, name in ((kv.keys, "k"), (kv.values, "v")):
            if isinstance(grid, Dynamic):
                _clip(grid, reader, [f"self_attn.{name}_cache_quantizer"])
    return widest


def _set(factor: Factor, reader: _Reader, name: str) -> None:
    assert isinstance(factor, DirectFactor)
    factor.p.copy_(reader.get(name, tuple(factor.p.shape)))


def _clip(grid: Dynamic, reader: _Reader, names: list[str]) -> float:
    if not isinstance(grid.clip, LearnedClip):
        return 0.0
    widest = 0.0
    for ours, end in ((grid.clip.low_logit, "min"), (grid.clip.high_logit, "max")):
        theirs = torch.stack([reader.get(f"{name}.clip_factor_a_{end}", (1,)) for name in names])
        ours.copy_(theirs.mean(0).reshape(ours.shape))
        shares = torch.sigmoid(theirs)
        widest = max(widest, float(shares.max() - shares.min()))
    return widest
