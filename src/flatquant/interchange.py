"""To and from other tools: the original project's matrices in, compressed-tensors and plain checkpoints out.

- `import_matrices`: `flat_matrices.pth` of github.com/ruikangliu/FlatQuant, by torch's weights-only reader. Their
  transforms, scales and clips mean what ours do; only that they clip the input of q, k and v (gate and up) three times
  (twice), and we once: the means of their logits are taken, and the largest difference is reported.
- `export_compressed`: results without online transforms, as compressed-tensors, which vLLM and transformers load:
  integers without grids for activations as `pack-quantized`, FP4 with or without them as `nvfp4-pack-quantized` and
  `mxfp4-pack-quantized`. (Results of RTN and GPTQ. Its `transform_config` has a place for
  matrices, but transformers ignores it; models with FlatQuant's transforms are refused.)
- `import_compressed`: FP4 models in these formats, with the same codes and scales.
- `export_dense`: an ordinary checkpoint with the rounded weights as numbers, in the original basis: x P Q(W P^-T)^T =
  x (Q(W P^-T) P^T)^T. For any tool. It knows nothing of grids for activations, keys and values.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedModel, PreTrainedTokenizerBase

from flatquant import formats, seams
from flatquant.calibrate.capture import BlockCall
from flatquant.calibrate.solve import make_solver, solve_block
from flatquant.errors import ArtifactError, ModelError, one_line
from flatquant.formats.base import SCALE, WHOLE, Codes
from flatquant.models import auto_class, quiet
from flatquant.ops.kron.reference import kron_matmul
from flatquant.quantizers import Dynamic, FrozenBlocks, WeightGrid
from flatquant.quantizers.clip import LearnedClip
from flatquant.recipes import flatquant, rtn
from flatquant.runtime.artifact import check_output, rebuild_buffers
from flatquant.runtime.branch import BranchedLinear
from flatquant.runtime.build import install
from flatquant.runtime.codes import CodeLinear
from flatquant.runtime.experts import stacked_again
from flatquant.runtime.hf import adopt
from flatquant.runtime.linear import FrozenSite, IntegerLinear, SiteLinear
from flatquant.spec import Plan, QuantSpec, Recipe, Scheme, to_dict
from flatquant.transforms import Compose, Diagonal, Kronecker, Written
from flatquant.transforms.factor import DirectFactor, Factor
from flatquant.wiring.apply import FitBlock, fold_block, wrap_block
from flatquant.wiring.arch import Geometry, submodule
from flatquant.wiring.archs import arch_of
from flatquant.wiring.plan import make_plan

# --------------------------------------------------------------------------------------------- in


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
    blocks = submodule(model, arch.blocks)
    assert isinstance(blocks, nn.ModuleList)
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
    adopt(model, plan, str(recipe.scheme), to_dict(recipe), report, None)
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


@dataclass(frozen=True, kw_only=True)
class _Theirs:
    """What compressed-tensors calls a format of ours, and how its scales are made and stored."""

    name: str
    scales: Mapping[str, Any]
    activations: Mapping[str, Any]  # besides: when scales of theirs are found
    scale_dtype: torch.dtype


_FORMATS = {
    "nvfp4": _Theirs(
        name="nvfp4-pack-quantized",
        scales={"strategy": "tensor_group", "scale_dtype": "torch.float8_e4m3fn"},
        activations={"dynamic": "local", "observer": "static_minmax"},
        scale_dtype=torch.float8_e4m3fn,
    ),
    "mxfp4": _Theirs(
        name="mxfp4-pack-quantized",
        scales={"strategy": "group", "scale_dtype": "torch.uint8"},
        activations={"dynamic": True},
        scale_dtype=torch.uint8,
    ),
}


def _their_numbers(name: str) -> dict[str, Any]:
    """How compressed-tensors describes the numbers of a format, and which of them share a scale."""
    facts = formats.facts(name)
    return {"num_bits": facts.bits, "type": "float", "symmetric": True, "group_size": facts.block}


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
    blocks = submodule(model, arch.blocks)
    assert isinstance(blocks, nn.ModuleList)
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
    adopt(model, plan, str(recipe.scheme), to_dict(recipe), report, None)
    return model, plan, recipe, report


def _their_scheme(path: Path, config: Any) -> str:
    """The scheme of a compressed-tensors folder, as ours are written."""
    quantisation = config.get("quantization_config") if isinstance(config, dict) else None
    if not isinstance(quantisation, dict):
        quantisation = {}
    ours = {theirs.name: name for name, theirs in _FORMATS.items()}
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
    for key, value in _their_numbers(name).items():
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
        return auto_class(made).from_config(made, dtype=made.dtype)


_NAMES = {"weight_packed": "packed", "weight_scale": SCALE, "weight_global_scale": WHOLE}  # theirs: ours


def _our_name(name: str) -> str:
    root, _, leaf = name.rpartition(".")
    return f"{root}.{_NAMES[leaf]}" if leaf in _NAMES else name


def _our_bytes(name: str, tensor: Tensor) -> Tensor:
    if name.endswith(".weight_scale"):
        return tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor
    return tensor.float().flatten() if name.endswith(".weight_global_scale") else tensor


# --------------------------------------------------------------------------------------------- out


@torch.no_grad()
def export_dense(
    model: PreTrainedModel,
    plan: Plan,
    output: Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    weights_only: bool = False,
) -> None:
    """Write an ordinary checkpoint: rounded weights as numbers, transforms folded back.

    Args:
        weights_only: leave out the grids of activations, keys and values, which such a checkpoint cannot hold.

    Raises:
        ModelError: there are such grids, and `weights_only` was not asked for.
        ArtifactError: something is in the way of `output`.
    """
    check_output(output)
    grids = [s.activations for b in plan.blocks for s in b.sites.values()]
    grids += [grid for b in plan.blocks for grid in (b.keys, b.values)]
    if any(grids) and not weights_only:
        raise ModelError(
            "an ordinary checkpoint cannot round activations, keys and values; with --weights-only it is written "
            "without their grids, and is then a better model than the quantised one"
        )
    if any(site.shift != "none" for block in plan.blocks for site in block.sites.values()):
        raise ModelError("an ordinary checkpoint has no place for a shift of channels")
    config = _plain_config(model)
    plain = auto_class(config).from_config(config, dtype=model.dtype)
    state = dict(model.state_dict())
    blocks = submodule(model, plan.blocks_path)
    for index, block_plan in enumerate(plan.blocks):
        prefix = f"{plan.blocks_path}.{index}."
        block = submodule(blocks, str(index))
        for name, site in block_plan.sites.items():
            frozen = submodule(block, f"flatquant.{name}")
            assert isinstance(frozen, FrozenSite)
            for path in site.readers:
                linear = submodule(block, path)
                assert isinstance(linear, SiteLinear | BranchedLinear)
                weight = linear.plain()
                runs: Any = frozen
                if block_plan.latent is not None and block_plan.attended and block_plan.latent.site == name:
                    runs = seams.attached(submodule(block, plan.attention))  # its factors run before the cache
                left, right = (None if f is None else f.mT for f in (runs.left, runs.right))
                if left is not None or right is not None:
                    weight = kron_matmul(weight, left, right)  # W P^T, with (P1 (x) P2)^T = P1^T (x) P2^T
                state[f"{prefix}{path}.weight"] = weight.to(model.dtype)
                if linear.bias is not None:
                    state[f"{prefix}{path}.bias"] = linear.bias.to(model.dtype)
    wanted = plain.state_dict()
    owners = {n: submodule(plain, n.rpartition(".")[0]) for n in wanted}
    plain.load_state_dict({n: state[n] if n in state else stacked_again(state, n, owners[n]) for n in wanted})
    plain.generation_config = copy.deepcopy(model.generation_config)
    with quiet():
        plain.save_pretrained(output)
    if tokenizer is not None:
        tokenizer.save_pretrained(output)


def _plain_config(model: PreTrainedModel) -> Any:
    config: Any = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config._attn_implementation = None
    return config


@torch.no_grad()
def export_compressed(
    model: PreTrainedModel, plan: Plan, output: Path, *, tokenizer: PreTrainedTokenizerBase | None = None
) -> list[str]:
    """Write a model in compressed-tensors' `pack-quantized`, `nvfp4-pack-quantized` or `mxfp4-pack-quantized`.

    Groups of integers are cut into those that vLLM's kernels take (`_their_group`); the parts have one scale.

    Returns:
        What of it vLLM does not serve on a CPU, one line each.

    Raises:
        ModelError: the model has online transforms, grids that differ, or experts; or grids for more than weights, but
            for FP4 activations beside FP4 weights.
        ArtifactError: something is in the way of `output`.
    """
    check_output(output)
    spec = _one_weight_grid(plan)
    ours = (".values", ".codes", ".packed", f".{SCALE}", ".zero", f".{WHOLE}")
    state = {n: t for n, t in model.state_dict().items() if not n.endswith(ours)}
    for name, linear in model.named_modules():
        if isinstance(linear, IntegerLinear):
            weight = linear.qweight()
            state[f"{name}.weight_packed"] = _packed_words(weight.values, spec.bits)
            parts = 1 if spec.group_size is None else spec.group_size // _their_group(spec.group_size)
            state[f"{name}.weight_scale"] = weight.scale.to(model.dtype).repeat_interleave(parts, dim=-1)
            state[f"{name}.weight_shape"] = torch.tensor(weight.shape, dtype=torch.int64)
        elif isinstance(linear, CodeLinear):
            state |= {f"{name}.{leaf}": t for leaf, t in _their_tensors(spec, linear.qweight(), linear.site).items()}
    ignored = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    config = _plain_config(model).to_diff_dict()
    config["dtype"] = str(model.dtype).removeprefix("torch.")
    config["architectures"] = [type(model).__name__]
    theirs = _FORMATS.get(spec.kind)
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized" if theirs is None else theirs.name,
        "quantization_status": "compressed",
        "ignore": ignored,
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "input_activations": _their_activations(plan, spec.kind),
                "output_activations": None,
                "weights": _their_weights(spec),
            }
        },
    }
    output.mkdir(parents=True, exist_ok=True)
    tied = {n for n, _ in model.named_parameters(remove_duplicate=False)} - {n for n, _ in model.named_parameters()}
    tensors = {n: t.detach().cpu().contiguous().clone() for n, t in state.items() if n not in tied}
    try:
        save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
        (output / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if model.generation_config is not None:
            model.generation_config.save_pretrained(output)
        if tokenizer is not None:
            tokenizer.save_pretrained(output)
    except OSError as error:
        raise ArtifactError(f"cannot write {output}: {error.strerror or error}") from error
    return [] if spec.kind in _FORMATS else _lacking(model, plan, spec)


def _their_group(group: int) -> int:
    """The largest group of 128, 64 and 32 columns that divides ours, or ours. vLLM's kernels for GPUs take no others,
    and a group has to divide a rank's columns."""
    return next((theirs for theirs in (128, 64, 32) if group % theirs == 0), group)


def _lacking(model: PreTrainedModel, plan: Plan, spec: QuantSpec) -> list[str]:
    """What vLLM's kernel for integers on a CPU (0.32, `CPUWNA16LinearKernel`) does not take, one line each."""
    found = []
    if spec.bits != 4:
        found.append(f"vLLM has no kernel for weights of {spec.bits} bits on a CPU")
    block = submodule(model, f"{plan.blocks_path}.0")
    for site in plan.blocks[0].sites.values():
        weights = [submodule(block, reader) for reader in site.readers]
        rows = sum(linear.qweight().shape[0] for linear in weights if isinstance(linear, IntegerLinear))
        columns = site.shape[0] * site.shape[1]
        if rows % 32 or columns % 32:
            found.append(
                f"vLLM takes multiples of 32 x 32 weights on a CPU; {site.readers[0]} reads {columns} channels"
            )
    return found


def _their_weights(spec: QuantSpec) -> dict[str, Any]:
    """What compressed-tensors is told of weights."""
    if spec.kind in _FORMATS:
        return {**_their_numbers(spec.kind), **_FORMATS[spec.kind].scales, "dynamic": False}
    group = None if spec.group_size is None else _their_group(spec.group_size)
    return {
        "num_bits": spec.bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group" if group else "channel",
        "group_size": group,
        "dynamic": False,
    }


def _their_activations(plan: Plan, kind: str) -> dict[str, Any] | None:
    """What compressed-tensors is told of activations beside weights of this kind; None for 16 bit."""
    if kind not in _FORMATS or not any(site.activations for block in plan.blocks for site in block.sites.values()):
        return None
    return {**_their_numbers(kind), **_FORMATS[kind].scales, **_FORMATS[kind].activations}


def _their_tensors(spec: QuantSpec, weight: Codes, site: FrozenSite) -> dict[str, Tensor]:
    """A linear in FP4 as compressed-tensors stores it, by name."""
    found = {
        "weight_packed": weight.packed(),
        "weight_scale": weight.parts[SCALE].view(_FORMATS[spec.kind].scale_dtype),
    }
    if WHOLE in weight.parts:
        found["weight_global_scale"] = weight.parts[WHOLE]
    if isinstance(site.activations, FrozenBlocks) and site.activations.tensor_scale is not None:
        found["input_global_scale"] = site.activations.tensor_scale
    return found


def _one_weight_grid(plan: Plan) -> QuantSpec:
    specs, inputs = set(), set()
    for block in plan.blocks:
        if any(len(site.groups) > 1 for site in block.sites.values()):
            raise ModelError("compressed-tensors takes no mixtures of experts here; export the dense checkpoint")
        inputs |= {site.activations for site in block.sites.values()}
        alike = all(
            site.activations is None or (site.weights and site.activations.kind == site.weights.kind)
            for site in block.sites.values()
        )
        rounded = any(spec is not None and spec.kind not in _FORMATS for spec in inputs)
        if block.keys or block.values or rounded or not alike or len(inputs) > 1:
            raise ModelError(
                "compressed-tensors takes weight-only models here, or FP4 alike for weights and activations; "
                "activations, keys or values have other grids"
            )
        if any(spec is not None and spec.clip == "search" for spec in inputs):
            raise ModelError(
                "compressed-tensors gives blocks of activations the scales that cover them, and this model searches "
                "theirs; quantise with --activation-clip none"
            )
        if any(site.left or site.right for site in block.sites.values()):
            raise ModelError(
                "online transforms are not written to compressed-tensors: transformers would load such a folder as "
                "another model; quantise with --method rtn or gptq, or export the dense checkpoint"
            )
        for s in block.sites.values():
            known = s.weights is None or s.weights.kind == "uniform" or s.weights.kind in _FORMATS
            uniform = s.codebook is None and known
            if not uniform or s.rank or s.shift != "none":
                raise ModelError(
                    "compressed-tensors holds integers on uniform grids and FP4 alone; export the dense checkpoint"
                )
        specs |= {site.weights for site in block.sites.values()}
    (spec, *others) = specs
    if others or spec is None or not spec.symmetric or spec.bits not in (4, 8):
        raise ModelError("compressed-tensors takes one symmetric grid of 4 or 8 bits, or one format, for all weights")
    return spec


def _packed_words(values: Tensor, bits: int) -> Tensor:
    """Integers, shifted to be positive, in 32-bit words, lowest first.  # int8 (o, n) -> int32, (o, words)"""
    per = 32 // bits
    shifted = values.to(torch.int64) + (1 << (bits - 1))
    shifted = nn.functional.pad(shifted, (0, -values.shape[1] % per)).unflatten(-1, (-1, per))  # (o, words, per)
    words = (shifted << (bits * torch.arange(per, device=values.device))).sum(-1)
    return (words - ((words >> 31) << 32)).to(torch.int32)  # as signed words
