"""compressed-tensors, out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flatquant.errors import ArtifactError, ModelError
from flatquant.formats.base import SCALE, WHOLE, Codes
from flatquant.interchange.dense import plain_config
from flatquant.interchange.theirs import FORMATS, their_numbers
from flatquant.modules import tied_names
from flatquant.quantizers import FrozenBlocks
from flatquant.runtime.artifact import check_output
from flatquant.runtime.codes import CodeLinear
from flatquant.runtime.linear import FrozenSite, IntegerLinear
from flatquant.spec import EMBEDDING, Plan, QuantSpec
from flatquant.wiring.arch import submodule

_INTEGERS = "pack-quantized"  # their name of the format


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
            for FP4 activations beside FP4 weights. Of an output layer, it takes weights of 4 or 8 bits beside integers.
        ArtifactError: something is in the way of `output`.
    """
    check_output(output)
    spec = _one_weight_grid(plan)
    ours = (".values", ".codes", ".packed", f".{SCALE}", ".zero", f".{WHOLE}")
    state = {n: t for n, t in model.state_dict().items() if not n.endswith(ours)}
    for name, linear in model.named_modules():
        if isinstance(linear, IntegerLinear):
            weight, group = linear.qweight(), linear.spec.group_size
            state[f"{name}.weight_packed"] = _packed_words(weight.values, linear.spec.bits)
            parts = 1 if group is None else group // _their_group(group)
            state[f"{name}.weight_scale"] = weight.scale.to(model.dtype).repeat_interleave(parts, dim=-1)
            state[f"{name}.weight_shape"] = torch.tensor(weight.shape, dtype=torch.int64)
        elif isinstance(linear, CodeLinear):
            state |= {f"{name}.{leaf}": t for leaf, t in _their_tensors(spec, linear.qweight(), linear.site).items()}
    ignored = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    config = plain_config(model).to_diff_dict()
    config["dtype"] = str(model.dtype).removeprefix("torch.")
    config["architectures"] = [type(model).__name__]
    theirs = FORMATS.get(spec.kind)
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": _INTEGERS if theirs is None else theirs.name,
        "quantization_status": "compressed",
        "ignore": ignored,
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "input_activations": _their_activations(plan, spec.kind),
                "output_activations": None,
                "weights": _their_weights(spec),
            },
            **_their_head(plan),
        },
    }
    output.mkdir(parents=True, exist_ok=True)
    tied = tied_names(model)
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
    return [] if spec.kind in FORMATS else _lacking(model, plan, spec)


def _their_head(plan: Plan) -> dict[str, Any]:
    """What compressed-tensors is told of a rounded output layer, by the layer's name, which goes before its class."""
    if plan.head is None:
        return {}
    none = {"input_activations": None, "output_activations": None}
    weights = _their_weights(plan.head.weights)
    return {"group_1": {"targets": [plan.head.path], "format": _INTEGERS, "weights": weights, **none}}


def _their_group(group: int) -> int:
    """The largest group of 128, 64 and 32 columns that divides ours, or ours. vLLM's kernels for GPUs take no others,
    and a group has to divide a rank's columns."""
    return next((theirs for theirs in (128, 64, 32) if group % theirs == 0), group)


def _lacking(model: PreTrainedModel, plan: Plan, spec: QuantSpec) -> list[str]:
    """What vLLM's kernel for integers on a CPU (0.32, `CPUWNA16LinearKernel`) does not take, one line each."""
    found = ["vLLM was not tried with a rounded output layer"] if plan.head is not None else []
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
    if spec.kind in FORMATS:
        return {**their_numbers(spec.kind), **FORMATS[spec.kind].scales, "dynamic": False}
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
    if kind not in FORMATS or not any(site.activations for block in plan.blocks for site in block.sites.values()):
        return None
    return {**their_numbers(kind), **FORMATS[kind].scales, **FORMATS[kind].activations}


def _their_tensors(spec: QuantSpec, weight: Codes, site: FrozenSite) -> dict[str, Tensor]:
    """A linear in FP4 as compressed-tensors stores it, by name."""
    found = {
        "weight_packed": weight.packed(),
        "weight_scale": weight.parts[SCALE].view(FORMATS[spec.kind].scale_dtype),
    }
    if WHOLE in weight.parts:
        found["weight_global_scale"] = weight.parts[WHOLE]
    if isinstance(site.activations, FrozenBlocks) and site.activations.tensor_scale is not None:
        found["input_global_scale"] = site.activations.tensor_scale
    return found


def _one_weight_grid(plan: Plan) -> QuantSpec:
    if plan.embedding is not None:
        raise ModelError(f"compressed-tensors takes an embedding in 16 bit here; quantise without {EMBEDDING}=")
    if plan.head is not None and (plan.head.weights.bits not in (4, 8) or plan.head.site.activations is not None):
        raise ModelError("compressed-tensors takes an output layer of 4 or 8 bits here, with its input in 16 bit")
    specs, inputs = set(), set()
    for block in plan.blocks:
        if any(len(site.groups) > 1 for site in block.sites.values()):
            raise ModelError("compressed-tensors takes no mixtures of experts here; export the dense checkpoint")
        inputs |= {site.activations for site in block.sites.values()}
        alike = all(
            site.activations is None or (site.weights and site.activations.kind == site.weights.kind)
            for site in block.sites.values()
        )
        rounded = any(spec is not None and spec.kind not in FORMATS for spec in inputs)
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
            known = s.weights is None or s.weights.kind == "uniform" or s.weights.kind in FORMATS
            uniform = s.codebook is None and known
            if not uniform or s.rank or s.shift != "none":
                raise ModelError(
                    "compressed-tensors holds integers on uniform grids and FP4 alone; export the dense checkpoint"
                )
        specs |= {site.weights for site in block.sites.values()}
    (spec, *others) = specs
    if others or spec is None or not spec.symmetric or spec.bits not in (4, 8):
        raise ModelError("compressed-tensors takes one symmetric grid of 4 or 8 bits, or one format, for all weights")
    if plan.head is not None and spec.kind in FORMATS:
        raise ModelError("compressed-tensors takes an output layer in integers beside integers only here")
    return spec


def _packed_words(values: Tensor, bits: int) -> Tensor:
    """Integers, shifted to be positive, in 32-bit words, lowest first.  # int8 (o, n) -> int32, (o, words)"""
    per = 32 // bits
    shifted = values.to(torch.int64) + (1 << (bits - 1))
    shifted = nn.functional.pad(shifted, (0, -values.shape[1] % per)).unflatten(-1, (-1, per))  # (o, words, per)
    words = (shifted << (bits * torch.arange(per, device=values.device))).sum(-1)
    return (words - ((words >> 31) << 32)).to(torch.int32)  # as signed words
