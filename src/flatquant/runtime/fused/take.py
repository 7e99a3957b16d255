"""From a block's modules to its kernels."""

from __future__ import annotations

from typing import Any

import torch
from transformers.activations import ACT2FN

from flatquant.ops import kron_quantize, kv_cache
from flatquant.ops.kron_quantize import Site
from flatquant.quantizers import Dynamic
from flatquant.runtime.build import SITES_SLOT
from flatquant.runtime.fused.block import Block, Norm
from flatquant.runtime.fused.family import Family
from flatquant.runtime.kernels import Product, Unsupported, kernel_site, packed_linear, ratios_of
from flatquant.runtime.keyvalue import FrozenKeyValue
from flatquant.runtime.linear import PackedLinear
from flatquant.seams import attached

_ACTIVATIONS: dict[type, kron_quantize.Activation] = {
    type(ACT2FN["silu"]): "silu",
    type(ACT2FN["gelu_pytorch_tanh"]): "gelu",
}
_WRITERS = ("attn_out", "mlp_mid")  # sites whose products are added to the residual stream


def block_of(layer: Any, index: int, config: Any, device: torch.device, family: Family, turn: str | None) -> Block:
    frozen, readers = getattr(layer, SITES_SLOT, None), family.readers
    if frozen is None or set(frozen) != set(readers):
        raise Unsupported(f"block {index} is not quantised as a whole")
    sites: dict[str, Site] = {}
    linears: dict[str, list[PackedLinear]] = {}
    for name, paths in readers.items():
        linears[name] = [packed_linear(layer.get_submodule(path), f"{index}.{path}") for path in paths]
        n = linears[name][0].n
        heads = n // layer.self_attn.head_dim if name == "attn_out" else None
        sites[name] = kernel_site(frozen[name], n, heads, f"{index}.{name}", device)
    function = layer.mlp.activation_fn if hasattr(layer.mlp, "activation_fn") else layer.mlp.act_fn
    activation = _ACTIVATIONS.get(type(function))
    if activation is None:
        raise Unsupported(f"the MLP of block {index} has {type(function).__name__} where kernels have SiLU and GELU")
    attention = layer.self_attn
    before, mlp = (norm_of(layer.get_submodule(path), family) for path in family.norms)
    factor = getattr(config, "residual_multiplier", 1.0)
    return Block(
        norms=(before, mlp),
        sites=sites,
        products={n: Product.of(several, factor if n in _WRITERS else 1.0) for n, several in linears.items()},
        heads=heads_of(attention, family, config, index, device, layer.get_submodule(family.norms[0]).weight.dtype),
        scaling=attention.scaling,
        window=config.sliding_window if family.windowed else getattr(attention, "sliding_window", None),
        after=tuple(norm_of(layer.get_submodule(path), family) for path in family.after),
        activation=activation,
        turn=turn,
    )


def norm_of(module: Any, family: Family) -> Norm:
    eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
    return Norm(module.weight if not family.norm_offset else module.weight.float() + family.norm_offset, eps)


def heads_of(
    attention: Any, family: Family, config: Any, index: int, device: torch.device, dtype: torch.dtype
) -> kv_cache.Heads:
    kv, head_dim = attached(attention), attention.head_dim
    normed = (
        [norm_of(m, family) for m in (attention.q_norm, attention.k_norm)] if hasattr(attention, "q_norm") else None
    )
    if not isinstance(kv, FrozenKeyValue) or kv.keys is None or kv.values is None:
        raise Unsupported(f"keys and values of block {index} are not both quantised")
    grids = [grid for grid in (kv.keys, kv.values) if isinstance(grid, Dynamic)]
    if len(grids) < 2 or any(grid.spec.bits != 4 or grid.spec.symmetric for grid in grids):
        raise Unsupported(f"keys and values of block {index} are not on asymmetric 4-bit grids")
    if kv.key_offset is not None and kv.pairing != "halves":
        raise Unsupported(f"channels of keys are turned together as {kv.pairing}")
    if head_dim % 4 or head_dim > 256:
        raise Unsupported(f"heads of {head_dim} channels")
    matrices = back = None
    if kv.key_offset is not None:
        back = kv_cache.offset_matrix(kv.key_offset, kv.key_matrix)
    if kv.query_matrix is not None and kv.key_matrix is not None:
        matrices = torch.stack((kv.query_matrix, kv.key_matrix)).contiguous()
        if device.type == "cuda":
            matrices = matrices.to(dtype)
    return kv_cache.Heads(
        config.num_attention_heads,
        config.num_key_value_heads,
        head_dim,
        matrices,
        torch.stack([ratios_of(grid, device) for grid in grids]),
        kv.key_offset,
        back,
        None if normed is None else torch.stack([norm.gain.float() for norm in normed]).contiguous(),
        0.0 if normed is None else normed[0].eps,
    )
