"""Whether the fused runtime computes what its references do."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from flatquant.bench.kernels import PRODUCT_ERROR, SITE_ERROR, in_order, relative_error, site_error
from flatquant.ops import int4_linear, kron_quantize, kv_cache
from flatquant.ops.int4_linear import reference as product_reference
from flatquant.ops.int8_linear import reference as head_reference
from flatquant.ops.kron_quantize import reference as site_reference
from flatquant.ops.kron_quantize.reference import of_rows
from flatquant.ops.kv_cache import reference as cache_reference
from flatquant.runtime import fused
from flatquant.runtime.kernels import OutputLayer
from flatquant.runtime.keyvalue import FrozenKeyValue
from flatquant.runtime.linear import FrozenSite

SCALE_ERROR = 2**-7  # of a token: four roundings to bfloat16
BLOCK_ERROR = 1.15  # see `block_error`: right blocks of 64 to 512 channels give .99 to 1.06
_ATTENTION_ERROR = 0.02  # of the largest element


def kernels_error(runtime: fused.Fused) -> float:
    """How far sites and products of the first block lie from their references on the same inputs, in what they may."""
    block, device, dtype = runtime.blocks[0], runtime.device, runtime.norm.gain.dtype
    shares = [_attention_error(runtime, block, dtype) / _ATTENTION_ERROR]
    for tokens in (1, 16, 80):  # each has its own kernel of a product
        form = int4_linear.form(device, dtype)
        for name, site in block.sites.items():
            n = site.shape[0] * site.shape[1]
            x, gate = (torch.randn(tokens, n, device=device, dtype=dtype) for _ in range(2))
            if name == "attn_out":
                parts = torch.randn(tokens, block.heads.queries, 3, block.heads.head_dim, device=device)
                lse = torch.randn(parts.shape[:3], device=device)
                calls = [
                    (x, kron_quantize.plain(x, site, form)),
                    (site_reference.merged(parts, lse), kron_quantize.merge(parts, lse, site, form)),
                ]
            elif name == "mlp_mid":
                exact = site_reference.gated(x, gate, block.activation)
                calls = [(exact, kron_quantize.gate(x, gate, site, form, block.activation))]
            else:
                norm = block.norms[name == "mlp_in"]
                exact = site_reference.rms_norm(x, norm.gain, norm.eps)
                calls = [(exact, kron_quantize.norm(x, norm.gain, norm.eps, site, form))]
            for exact, (integers, scale) in calls:
                want = site_reference.kron_quantize(exact, site.left, site.right, site.ratios, site.bits, "float8")[1]
                shares.append(site_error(exact, in_order(integers, form), site) / SITE_ERROR)
                shares.append(((scale - want) / want).abs().max().item() / SCALE_ERROR)
        for product in block.products.values():
            x = torch.randint(-8, 8, (tokens, 2 * product.packed.shape[1]), device=device, dtype=torch.int8)
            x = x.float().to(torch.float8_e4m3fn) if of_rows(form, tokens) == "float8" else x
            s = torch.rand(tokens, 1, device=device) + 0.5
            weights = (product.packed, product.scale, product.bias)
            exact = product_reference.int4_linear(x, s, *weights, None, torch.float32)
            got = int4_linear.int4_linear(x, s, *weights, None, dtype, runtime.scratch)
            shares.append(relative_error(got, exact) / PRODUCT_ERROR)
        if isinstance(runtime.head, OutputLayer):
            head = runtime.head
            x = torch.randn(tokens, head.packed.shape[1], device=device, dtype=dtype)
            exact = head_reference.int8_linear(x.float(), head.packed, head.scale, head.bias)
            shares.append(relative_error(head(x), exact) / PRODUCT_ERROR)
    return max(shares)


def random_store(batch: int, heads: int, places: int, head_dim: int, device: torch.device) -> kv_cache.Store:
    """Keys or values of random integers."""
    shape = (batch, heads, places)
    packed = torch.randint(0, 256, (*shape, head_dim // 2), device=device, dtype=torch.uint8)
    zero = torch.randint(0, 16, shape, device=device, dtype=torch.uint8)
    return kv_cache.Store(packed, torch.rand(shape, device=device) * 0.1, zero)


def _attention_error(runtime: fused.Fused, block: fused.Block, dtype: torch.dtype) -> float:
    """How far one token's attention over 300 places of two sequences lies from the reference's."""
    heads, places, device = block.heads, 300, runtime.device
    keys, values = (random_store(2, heads.keys, places, heads.head_dim, device) for _ in range(2))
    q = torch.randn(2, heads.queries, heads.head_dim, device=device, dtype=dtype)
    last, start = torch.tensor([places - 1], device=device), torch.tensor([0, 7], device=device)
    given = (q, keys, values, last, start, block.window, block.scaling)
    shortages: list[kv_cache.Shortage | None] = [None]
    if heads.offset is not None:
        turns = runtime.angles(torch.arange(places, device=device)[None], torch.float32)
        angles = turns.of_pairs("halves").expand(2, -1, -1).contiguous()
        amounts = heads.shortage(q[:, :, None])[:, :, 0]
        gaps = torch.tensor([0, 1], dtype=torch.int32, device=device)  # each way to get at angles
        shortages.append(kv_cache.Shortage(amounts, angles, runtime.first_angles, gaps))
    return max(
        relative_error(
            site_reference.merged(*kv_cache.attend(*given, 3, short)),
            site_reference.merged(*cache_reference.attend(*given, short)),
        )
        for short in shortages
    )


def block_error(model: PreTrainedModel, runtime: fused.Fused) -> float:
    """The error that 4-bit activations, keys and values make in the first block's kernels, over that in its modules.

    The truth is the block with all of these in 16 bits. Two right ways to round to 4 bits are equally far from it,
    though they are nearly as far from each other: single roundings go the other way, and the sites that follow amplify
    them. A wrong block is farther.
    """
    inner: Any = model.base_model
    exact = _without_grids(inner.layers[0])
    ratios = []
    for tokens in (48, 80):  # either side of where products change their kernel
        x = torch.randn(1, tokens, model.config.hidden_size, device=model.device, dtype=model.dtype)
        places = torch.arange(tokens, device=model.device)[None]
        cos, sin = runtime.angles(places, x.dtype)
        cache = runtime.new_cache(1, tokens)
        cache.room.turn(cos, sin, places)
        masks = runtime.masks(tokens, cache.room)
        got = runtime.blocks[0](x, cos, sin, runtime.first_angles, cache, cache.packed[0], masks, runtime.scratch)
        given: dict[str, Any] = {"position_embeddings": (cos, sin), "position_ids": places}
        given["attention_mask"] = masks.get(runtime.blocks[0].window)
        truth = exact(x, **given)
        ratios.append(((got - truth).float().norm() / (inner.layers[0](x, **given) - truth).float().norm()).item())
    return max(ratios)


def _without_grids(block: nn.Module) -> nn.Module:
    """A copy with the same weights, of which activations, keys and values are not quantised."""
    made = copy.deepcopy(block)
    for module in made.modules():
        if isinstance(module, FrozenSite):
            module.activations = None
        elif isinstance(module, FrozenKeyValue):
            module.keys = module.values = None
    return made
