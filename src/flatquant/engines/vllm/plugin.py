"""The plugin: vLLM's linears, experts and attention layers, computed by the serving modules of a folder.

vLLM builds its own model of the family and loads what we leave alone: embeddings, norms, routers, output layer. For
what the plan quantises it asks `FlatQuantConfig` for a method. Ours holds no parameter of vLLM's: after the weights are
loaded it takes the serving modules from `Parts`, which reads them from the folder, and calls them. Names of tensors
that belong to them are hidden from vLLM's loader.

Linears and the change of basis before attention are one custom operator each, so that torch.compile sees an operator
with a shape, and never our modules. On CUDA a linear's operator calls `kron_quantize` and `int4_linear` where they have
kernels. The operators find their layer by name in the forward context, as vLLM's own do.

Keys and values: queries, keys and values are changed before they reach the attention backend, so that every backend,
and its cache, holds exactly the numbers that were calibrated, in 16 bits. A key's offset depends on its position, which
is read off the batch's metadata. `cache.py` has the backend that holds their integers instead.
"""
# pyright: reportMissingImports=false
# vLLM brings its own torch and is not part of the environment of development.

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
)
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, RoutedExperts
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod
from vllm.model_executor.models.utils import WeightsMapper, extract_layer_index
from vllm.platforms import current_platform
from vllm.utils.torch_utils import LayerNameType, _encode_layer_name, _resolve_layer_name

from flatquant.engines.parts import Joined, Linear, Parts, columns_of, positions, rows_of, share, site_of
from flatquant.engines.vllm import support
from flatquant.errors import ModelError
from flatquant.rotary import Angles
from flatquant.runtime.build import SITES_SLOT
from flatquant.runtime.folder import METHOD, Folder
from flatquant.runtime.kernels import Unsupported
from flatquant.runtime.keyvalue import FrozenKeyValue

KERNELS = {"cuda"}  # types of devices where linears are the operators that have kernels, if there are any
_KEY_VALUE = "flatquant::key_value"
_SLOT = "flatquant"  # attribute of a vLLM layer that holds our module
_log = init_logger(f"vllm.{__name__}")
# What most of vLLM's models join; not all of them say so in time.
_JOINED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
_EXPERT = ("gate_proj", "up_proj", "down_proj")


@register_quantization_config(METHOD)
class FlatQuantConfig(QuantizationConfig):
    """What vLLM asks how each layer is computed.

    It is pickled to the processes of the engine; each of them builds the serving modules for itself.
    """

    folder: Folder

    def __init__(self) -> None:
        super().__init__()
        self.taken: set[str] = set()  # linears that layers of vLLM's will compute

    def get_name(self) -> str:
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> FlatQuantConfig:
        return cls()

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """What vLLM calls first, with the folder's path.

        Raises:
            ArtifactError: the folder is damaged.
            ModelError: vLLM's release or the folder's family was not tested.
        """
        support.check_version(support.installed())
        self.folder = support.open_folder(model_name)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "parts"}

    @cached_property
    def parts(self) -> Parts:
        _check_engine(self.folder)
        return Parts(self.folder)

    def get_cache_scale_mapper(self) -> WeightsMapper:
        """Hides our tensors from vLLM's loader, and calls others as vLLM's model does.

        Both releases apply it to all tensors. What it was made for, scales of a cache, no folder of ours has.

        Raises:
            ModelError: nothing of vLLM's model computes what some of them belong to.
        """
        plan = self.folder.plan
        linears = {
            f"{plan.blocks_path}.{index}.{reader}"
            for index, block in enumerate(plan.blocks)
            for site in block.sites.values()
            for reader in site.readers
        }
        if lost := linears - self.taken:
            raise ModelError(f"vLLM's model has no layer for {min(lost)} ({len(lost)} in all); it is not served")
        ours = {f"{SITES_SLOT}.", f"{plan.attention}.flatquant_kv."}
        ours |= {f"{path.removeprefix(plan.blocks_path).split('.', 2)[2]}." for path in linears}
        start = rf"^{re.escape(plan.blocks_path)}\.\d+\."
        hidden = re.compile(f"{start}(?:{'|'.join(map(re.escape, sorted(ours)))})")
        return WeightsMapper(orig_to_new_regex={hidden: None}, orig_to_new_substr=self._names)

    @property
    def _names(self) -> dict[str, str]:
        return support.FAMILIES[self.folder.config["model_type"]]

    def _path(self, prefix: str) -> str:
        """A layer of vLLM's model in the folder's own names."""
        for ours, theirs in self._names.items():
            prefix = prefix.replace(theirs, ours)
        return prefix

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """The method for a layer, or None for an embedding.

        Raises:
            ModelError: the layer cannot be served as it is asked for.
        """
        plan = self.parts.plan
        if isinstance(layer, Attention):
            index = extract_layer_index(prefix)
            return KeyValueMethod(self, index) if plan.blocks[index].attended else None
        if isinstance(layer, RoutedExperts):
            path = self._path(prefix)
            path = path[: path.index(".experts") + len(".experts")]
            if site_of(plan, f"{path}.0.gate_proj") is None:
                return None
            moe = cast(Any, layer.moe_config)
            self.taken |= {f"{path}.{index}.{name}" for index in range(moe.num_experts) for name in _EXPERT}
            return ExpertsMethod(moe, self, path)
        if not isinstance(layer, LinearBase):
            return None
        path = self._path(prefix)
        parent, _, leaf = path.rpartition(".")
        joined = [f"{parent}.{name}" for name in (_JOINED | self.packed_modules_mapping).get(leaf, [leaf])]
        paths = joined if site_of(plan, path) is None else [path]
        sites = {None if found is None else found[0] for found in (site_of(plan, path) for path in paths)}
        if len(sites) > 1:
            raise ModelError(f"{prefix}: vLLM joins {', '.join(paths)}, which do not read one site")
        if sites == {None}:
            return UnquantizedLinearMethod()
        self.taken |= set(paths)
        return LinearMethod(self, paths)


def _check_engine(folder: Folder) -> None:
    """Raise ModelError for what vLLM is asked to do and we have not tried."""
    config = get_current_vllm_config()
    parallel, speculative, stored = config.parallel_config, config.speculative_config, config.cache_config.cache_dtype
    support.check_older(folder, support.check_version(support.installed()), stored)
    support.check_cut(folder, parallel.tensor_parallel_size)
    if stored == support.PACKED:
        support.check_packed(folder)
    asked = {
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "data parallelism": parallel.data_parallel_size > 1,
        "expert parallelism": parallel.enable_expert_parallel,
        "LoRA adapters": config.lora_config is not None,
        f"a cache of {stored}": stored not in ("auto", "float32", "float16", "bfloat16", support.PACKED),
        "speculation other than n-grams": speculative is not None and speculative.method != "ngram",
    }
    for what in (what for what, found in asked.items() if found):
        raise ModelError(f"{folder.path} is not served with {what}; leave that out")


def _enter(layer: nn.Module, name: str) -> None:
    """Let our operators find a layer."""
    context = get_current_vllm_config().compilation_config.static_forward_context
    if not name or context.get(name, layer) is not layer:
        raise ModelError(f"vLLM's model has two layers named {name!r}; this family is not served")
    context[name] = layer


def _layer(name: LayerNameType) -> Any:
    """The layer that one of our operators is called for."""
    return get_forward_context().no_compile_layers[_resolve_layer_name(name)]


# --------------------------------------------------------------------------------------------- linears


class LinearMethod(LinearMethodBase):
    """Linears that read one site, as one layer of vLLM's."""

    def __init__(self, config: FlatQuantConfig, paths: list[str]) -> None:
        self.config, self.paths = config, paths

    def create_weights(
        self,
        layer: LinearBase,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        """No parameters; only checks."""
        if layer.skip_bias_add or not getattr(layer, "input_is_parallel", True):
            raise ModelError(f"{layer.prefix}: vLLM gives its input or adds its bias elsewhere; it is not served")
        self.rows, self.dtype = output_partition_sizes, params_dtype
        _enter(layer, layer.prefix)

    def process_weights_after_loading(self, layer: LinearBase) -> None:
        """Take the serving modules."""
        device, rank, ranks = torch.device(current_platform.device_type), layer.tp_rank, layer.tp_size
        linears = [self.config.parts.linear(path, device, self.dtype) for path in self.paths]
        if ranks > 1 and isinstance(layer, RowParallelLinear):
            found = site_of(self.config.parts.plan, self.paths[0])
            assert found is not None
            gather = tensor_model_parallel_all_gather
            linears = [columns_of(linear, found[1], gather, rank, ranks) for linear in linears]
        elif ranks > 1:
            pairs = zip(linears, self.rows, strict=True)
            linears = [rows_of(linear, rows, rank, ranks) for linear, rows in pairs]
        setattr(layer, _SLOT, self._computing(linears, device))

    def _computing(self, linears: list[Linear], device: torch.device) -> nn.Module:
        """Operators where the device has kernels of them, else the modules, after a warning for each reason."""
        if device.type in KERNELS:
            try:
                return self.config.parts.kernels(linears, self.paths[0].split(".", 3)[-1])
            except Unsupported as reason:
                _log.warning_once("Some linears run as PyTorch operations, which unpack weights: %s", str(reason))
        return Joined(linears)

    def apply(self, layer: LinearBase, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(.., n) -> (.., o). The serving modules have the bias, in float32; vLLM's own is never filled."""
        return torch.ops.flatquant.linear(x, sum(self.rows), _encode_layer_name(layer.prefix))


def _linear(x: Tensor, out_features: int, name: LayerNameType) -> Tensor:
    return getattr(_layer(name), _SLOT)(x)


def _linear_fake(x: Tensor, out_features: int, name: LayerNameType) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


# --------------------------------------------------------------------------------------------- experts


class ExpertsMethod(FusedMoEMethodBase):
    """The experts of a block. vLLM routes, and calls this inside an operator of its own."""

    def __init__(self, moe: Any, config: FlatQuantConfig, path: str) -> None:
        super().__init__(moe)
        self.config, self.path = config, path

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        """No parameters; only checks."""
        self.dtype = params_dtype

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> None:
        return None

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """Take the serving modules."""
        device = torch.device(current_platform.device_type)
        setattr(layer, _SLOT, self.config.parts.experts(self.path, device, self.dtype))

    def apply(
        self,
        layer: RoutedExperts,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any = None,
        shared_experts_input: Tensor | None = None,
    ) -> Tensor:
        """The experts' outputs, weighted and summed.  # (tokens, h)"""
        return getattr(layer, _SLOT)(x, topk_ids.long(), topk_weights)


# --------------------------------------------------------------------------------------------- keys and values


class KeyValueMethod(BaseKVCacheMethod):
    """Queries, keys and values of one block, as the cache and attention get them."""

    def __init__(self, config: FlatQuantConfig, block: int) -> None:
        super().__init__(config)
        self.config, self.block = config, block

    def create_weights(self, layer: Attention) -> None:
        super().create_weights(layer)
        if layer.kv_cache_dtype == support.PACKED:
            _packed().take_over(layer)
        else:
            layer.register_forward_pre_hook(_before_attention)
            # CUDA graphs of the pieces between these are captured without the metadata that positions are read off.
            offset = self.config.parts.plan.blocks[self.block].key_offset
            turned = offset is not None and offset.pairing != "none"
            split = get_current_vllm_config().compilation_config.splitting_ops
            if turned and split and _KEY_VALUE not in split:
                split.append(_KEY_VALUE)

    def process_weights_after_loading(self, layer: Attention) -> None:
        super().process_weights_after_loading(layer)
        device = torch.device(current_platform.device_type)
        parts = self.config.parts
        kv = parts.key_value(self.block, device)
        angles = None
        if kv.key_offset is not None:
            rank, ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
            kv.key_offset = kv.key_offset[share(len(kv.key_offset), layer.num_kv_heads, rank, ranks)]
            angles = None if kv.pairing == "none" else parts.angles(self.block, device)
        basis = _packed().PackedBasis if layer.kv_cache_dtype == support.PACKED else _Basis
        setattr(layer, _SLOT, basis(kv, angles))


def _packed() -> Any:
    """The module of the cache in 4 bits, whose interfaces the older release lacks: imported where it is asked for."""
    return importlib.import_module("flatquant.engines.vllm.cache")


class _Basis(nn.Module):
    """`FrozenKeyValue` on vLLM's layout: tokens of all requests in one row.  # (T, heads * head_dim)"""

    def __init__(self, kv: FrozenKeyValue, angles: Any) -> None:
        super().__init__()
        self.kv, self.angles = kv, angles

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layer: Attention) -> tuple[Tensor, Tensor, Tensor]:
        at: Angles | None = None
        if self.angles is not None:
            at = self.angles(_positions(layer.layer_name, k.shape[0], k.device), k.dtype)
        new = (
            self.kv.query(_heads(q, layer.num_heads)),
            self.kv.key(_heads(k, layer.num_kv_heads), at),
            self.kv.value(_heads(v, layer.num_kv_heads)),
        )
        q, k, v = (
            torch.empty_like(old, memory_format=torch.contiguous_format).copy_(_joined(x, old))
            for x, old in zip(new, (q, k, v), strict=True)
        )
        return q, k, v


def _heads(x: Tensor, heads: int) -> Tensor:
    """(T, heads * d) or (T, heads, d) -> (1, heads, T, d)"""
    return x.reshape(x.shape[0], heads, -1).transpose(0, 1)[None]


def _joined(x: Tensor, like: Tensor) -> Tensor:
    return x[0].transpose(0, 1).reshape(like.shape)


def _positions(layer: str, tokens: int, device: torch.device) -> Tensor:
    """Positions of a batch's tokens in their requests; 0 in a pass without requests.  # int64, (T,)"""
    metadata = get_forward_context().attn_metadata
    if not metadata:
        return torch.zeros(tokens, dtype=torch.long, device=device)
    batch = metadata[layer]
    return positions(batch.query_start_loc.to(device), batch.seq_lens.to(device), tokens)


def _before_attention(layer: Attention, args: tuple) -> tuple:
    """Forward pre-hook."""
    q, k, v, *rest = args
    return (*torch.ops.flatquant.key_value(q, k, v, _encode_layer_name(layer.layer_name)), *rest)


def _key_value(q: Tensor, k: Tensor, v: Tensor, name: LayerNameType) -> tuple[Tensor, Tensor, Tensor]:
    layer = _layer(name)
    return getattr(layer, _SLOT)(q, k, v, layer)


def _key_value_fake(q: Tensor, k: Tensor, v: Tensor, name: LayerNameType) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return q, k, v


_library = torch.library.Library("flatquant", "FRAGMENT")
for _name, _op, _fake in (("linear", _linear, _linear_fake), ("key_value", _key_value, _key_value_fake)):
    _library.define(_name + torch.library.infer_schema(_op, mutates_args=()))
    _library.impl(_name, _op, dispatch_key=current_platform.dispatch_key)
    _library._register_fake(_name, _fake)
