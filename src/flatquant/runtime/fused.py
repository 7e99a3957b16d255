"""The fused runtime: a packed model's forward pass in a dozen kernels a block, and a decode step in one CUDA graph.

It takes over where it can serve exactly what the model is - a Llama-like block, 4-bit weights with one scale a row,
symmetric 4-bit activations, asymmetric 4-bit keys and values - and where it can serve what was asked for. Everything
else runs through the modules that transformers calls, one by one; a warning says once why.

A block, for one token:

    norm, transform, quantise | q k v in one product | turn, transform, quantise, store | attention over parts |
    merge, transform, quantise | o, plus residual | norm, transform, quantise | gate and up in one product |
    SwiGLU, transform, quantise | down, plus residual

Prompts take the same way, but for attention, which is PyTorch's, over the numbers that the stored integers stand for.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode
from transformers.modeling_outputs import CausalLMOutputWithPast

from flatquant.errors import ModelError
from flatquant.ops import int4_linear, kron_quantize, kv_cache
from flatquant.ops.kron_quantize import Site
from flatquant.quantizers import Dynamic
from flatquant.runtime.build import SITES_SLOT
from flatquant.runtime.keyvalue import FrozenKeyValue
from flatquant.runtime.linear import FrozenSite, PackedLinear
from flatquant.runtime.packedcache import PackedCache, PackedLayer
from flatquant.seams import CACHE, attached, generation_cache_hook
from flatquant.transforms import kronecker_split

# Families whose blocks are: x + attention(norm(x)), then x + down(silu(gate) up) of its norm; no other scale anywhere.
FAMILIES = ("llama", "mistral", "qwen2")
_ROPES = ("default", "linear", "llama3", "yarn")  # of which angles depend on positions alone
_READERS = {
    "attn_in": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn_out": ("self_attn.o_proj",),
    "mlp_in": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp_mid": ("mlp.down_proj",),
}
Masks = Mapping[int | None, Tensor]  # by window

_PART = 128  # places of the cache that a part of attention reads at least
_PROGRAMS = 528  # that an H100 runs at once: four a multiprocessor


class Unsupported(Exception):
    """Why a model cannot be fused; ends as the text of a warning."""


@dataclass(frozen=True)
class Product:
    """The linears of one site as one matrix."""

    packed: Tensor  # uint8, (o, n / 2)
    scale: Tensor  # float32, (o,)
    bias: Tensor | None  # float32, (o,)

    def __call__(self, x: Tensor, x_scale: Tensor, residual: Tensor | None, dtype: torch.dtype) -> Tensor:
        """(T, n) -> (T, o)"""
        return int4_linear.int4_linear(x, x_scale, self.packed, self.scale, self.bias, residual, dtype)

    @classmethod
    def of(cls, linears: list[PackedLinear]) -> Product:
        """Join linears; their own tensors become parts of the joined ones, so that nothing is held twice."""
        packed = torch.cat([m.packed for m in linears])
        scale = torch.cat([m.scale[:, 0] for m in linears]).contiguous()
        bias = None
        if any(m.bias is not None for m in linears):
            bias = torch.cat([scale.new_zeros(len(m.packed)) if m.bias is None else m.bias.float() for m in linears])
        at = 0
        for m in linears:
            rows = slice(at, at + len(m.packed))
            m.packed, m.scale = packed[rows], scale[rows, None]
            if m.bias is not None and bias is not None and m.bias.dtype == bias.dtype:
                m.bias = bias[rows]
            at = rows.stop
        return cls(packed, scale, bias)


@dataclass(frozen=True)
class Norm:
    """An RMS norm."""

    gain: Tensor  # (n,)
    eps: float


@dataclass(frozen=True)
class Block:
    """A decoder block."""

    norms: tuple[Norm, Norm]  # before attention, before the MLP
    sites: dict[str, Site]
    products: dict[str, Product]
    heads: kv_cache.Heads
    scaling: float
    window: int | None

    def __call__(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: PackedCache, layer: PackedLayer, masks: Masks
    ) -> Tensor:
        """The block's output, with keys and values stored.

        Args:
            x: hidden states, (B, T, n).
            cos, sin: (B or 1, T, head_dim).
            masks: see `Fused.masks`.
        """
        mask = masks.get(self.window)
        b, t, _ = x.shape
        form = int4_linear.form(b * t, x.device)
        rows = x.flatten(0, 1)
        y = kron_quantize.norm(rows, self.norms[0].gain, self.norms[0].eps, self.sites["attn_in"], form)
        qkv = self.products["attn_in"](*y, None, x.dtype).view(b, t, -1)
        keys, values = layer.stores
        q, k, v = kv_cache.append(qkv, cos, sin, self.heads, keys, values, cache.used, dense=t > 1)
        site = self.sites["attn_out"]
        if t == 1:
            count = max(1, min(cache.places // _PART, _PROGRAMS // (b * self.heads.keys)))
            parts = kv_cache.attend(q[:, :, 0], keys, values, cache.used, cache.start, self.window, self.scaling, count)
            y = kron_quantize.merge(*parts, site, form)
        else:
            if cache.length:  # a prompt that goes on: what came before counts too
                k, v = (s.read(cache.length + t).to(x.dtype) for s in (keys, values))
            if mask is not None:  # of the fast kernels, none takes both a mask and fewer heads of keys than of queries
                k, v = (s.repeat_interleave(q.shape[1] // s.shape[1], dim=1) for s in (k, v))
            z = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.scaling, enable_gqa=q.shape[1] != k.shape[1]
            )
            y = kron_quantize.plain(z.transpose(1, 2).reshape(b * t, -1), site, form)
        rows = self.products["attn_out"](*y, rows, x.dtype)
        y = kron_quantize.norm(rows, self.norms[1].gain, self.norms[1].eps, self.sites["mlp_in"], form)
        gate, up = self.products["mlp_in"](*y, None, x.dtype).chunk(2, dim=-1)
        y = kron_quantize.gate(up, gate, self.sites["mlp_mid"], form)
        return self.products["mlp_mid"](*y, rows, x.dtype).view_as(x)


class Fused:
    """A packed model as blocks of kernels. Holds no tensor that the model does not hold, but half-precision factors."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Take a packed model apart.

        Raises:
            Unsupported: something in it has no kernel.
        """
        config: Any = model.config
        if config.model_type not in FAMILIES:
            raise Unsupported(
                f"blocks of {config.model_type} have no fused form (there is one for {', '.join(FAMILIES)})"
            )
        if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
            raise Unsupported("it lies on several devices")
        base: Any = model.base_model
        self.device = model.device
        rope = getattr(base.rotary_emb, "rope_type", "default")
        if rope not in _ROPES:
            raise Unsupported(f"positions of kind {rope!r} depend on the length of the text")
        self.embedding: nn.Embedding = base.embed_tokens
        self.rotary = base.rotary_emb
        self.norm = _norm(base.norm)
        head: Any = model.get_output_embeddings()
        self.head: nn.Linear = head
        self.blocks = [_block(layer, i, config, self.device) for i, layer in enumerate(base.layers)]
        self._step: _Step | None = None
        self._spare: PackedCache | None = None

    def cache_for(self, batch: int, places: int, *, kept: bool) -> PackedCache:
        """An empty cache; unless it is `kept`, that of an earlier call where it fits, along with its graph."""
        spare = self._spare
        if kept or spare is None or spare.batch != batch or spare.places < places:
            made = self.new_cache(batch, places)
            if not kept:
                self._spare = made
            return made
        spare.rewind(0)
        return spare

    def new_cache(self, batch: int, places: int) -> PackedCache:
        """An empty cache that fits."""
        heads = self.blocks[0].heads
        return PackedCache(
            blocks=len(self.blocks),
            batch=batch,
            heads=heads.keys,
            places=-(-places // _PART) * _PART,
            head_dim=heads.head_dim,
            device=self.device,
        )

    def hidden(self, ids: Tensor, positions: Tensor, cache: PackedCache, masks: Masks) -> Tensor:
        """States after the last block, normalised.  # (B, T) -> (B, T, n)"""
        x = self.embedding(ids)
        cos, sin = (t.contiguous() for t in self.rotary(x, positions))
        for block, layer in zip(self.blocks, cache.packed, strict=True):
            x = block(x, cos, sin, cache, layer, masks)
        return F.rms_norm(x, (x.shape[-1],), self.norm.gain, self.norm.eps)

    def prefill(self, ids: Tensor, positions: Tensor, cache: PackedCache, keep: int) -> Tensor:
        """Logits of the last `keep` tokens (0: of all), and their keys and values into the cache.  # (B, keep, V)"""
        x = self.hidden(ids, positions, cache, self.masks(ids.shape[1], cache))
        cache.advance(ids.shape[1])
        return self.head(x[:, -keep:])

    def decode(self, ids: Tensor, positions: Tensor, cache: PackedCache) -> Tensor:
        """Logits of one token a sequence; on CUDA by replaying a graph.  # (B, 1) -> (B, 1, V)"""
        if ids.device.type != "cuda":
            return self.prefill(ids, positions, cache, 1)
        if self._step is None or self._step.cache is not cache or self._step.places != cache.places:
            self._step = _Step(self, cache)
        return self._step(ids, positions)

    def masks(self, tokens: int, cache: PackedCache) -> Masks:
        """Which places each of several tokens to come sees, by the window of a block; not where all up to its own are.

        Padding sees itself: a softmax over nothing would be NaN, and spread.  # bool, (B or 1, 1, T, length + T)
        """
        if tokens == 1:  # reads the cache, which knows
            return {}
        total = cache.length + tokens
        windows = {block.window for block in self.blocks}
        if not cache.length and not cache.padded:
            windows = {window for window in windows if window is not None and window < total}
        query = torch.arange(cache.length, total, device=self.device)[:, None]
        place = torch.arange(total, device=self.device)[None]
        counts = (place <= query) & (place[None] >= cache.start[:, None, None])  # (B, T, S)
        masks = {w: counts if w is None else counts & (place > query - w) for w in windows}
        return {window: (mask | (place == query))[:, None] for window, mask in masks.items()}


class _Step:
    """A decode step for one cache, recorded once and replayed."""

    def __init__(self, fused: Fused, cache: PackedCache) -> None:
        self.cache, self.places = cache, cache.places
        self.ids = torch.zeros((cache.batch, 1), dtype=torch.int64, device=fused.device)
        self.positions = torch.zeros_like(self.ids)
        # Kernels are compiled and tuned outside of the recording; what these runs write, the first replay overwrites.
        stream = torch.cuda.Stream(fused.device)
        stream.wait_stream(torch.cuda.current_stream(fused.device))
        with torch.cuda.stream(stream):
            for _ in range(2):
                fused.head(fused.hidden(self.ids, self.positions, cache, {}))
        torch.cuda.current_stream(fused.device).wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = fused.head(fused.hidden(self.ids, self.positions, cache, {}))
            cache.used += 1

    def __call__(self, ids: Tensor, positions: Tensor) -> Tensor:
        self.ids.copy_(ids)
        self.positions.copy_(positions.expand_as(self.ids))
        self.graph.replay()
        self.cache.length += 1
        return self.logits.clone()


# --------------------------------------------------------------------------------- from a model's modules


def _block(layer: Any, index: int, config: Any, device: torch.device) -> Block:
    frozen = getattr(layer, SITES_SLOT, None)
    if frozen is None or set(frozen) != set(_READERS):
        raise Unsupported(f"block {index} is not quantised as a whole")
    sites: dict[str, Site] = {}
    linears: dict[str, list[PackedLinear]] = {}
    for name, paths in _READERS.items():
        linears[name] = [_linear(layer.get_submodule(path), f"{index}.{path}") for path in paths]
        n = linears[name][0].n
        heads = n // layer.self_attn.head_dim if name == "attn_out" else None
        sites[name] = _site(frozen[name], n, heads, f"{index}.{name}", device)
        for linear in linears[name]:
            reason = int4_linear.unsupported(len(linear.packed), n, device)
            if reason is not None:
                raise Unsupported(f"there is no kernel for {reason} in block {index}")
    attention = layer.self_attn
    norms = (_norm(layer.input_layernorm), _norm(layer.post_attention_layernorm))
    return Block(
        norms=norms,
        sites=sites,
        products={name: Product.of(several) for name, several in linears.items()},
        heads=_heads(attached(attention), config, attention.head_dim, index, device, norms[0].gain.dtype),
        scaling=attention.scaling,
        window=_window(attention, config),
    )


def _norm(module: Any) -> Norm:
    return Norm(module.weight, module.variance_epsilon)


def _linear(module: nn.Module, where: str) -> PackedLinear:
    if not isinstance(module, PackedLinear):
        raise Unsupported(f"{where} is a {type(module).__name__}, not packed integers")
    if module.spec.bits != 4 or not module.spec.symmetric or module.scale.shape[1] != 1:
        raise Unsupported(f"the weights of {where} are not symmetric 4-bit integers with one scale a row")
    return module


def _site(site: FrozenSite, n: int, heads: int | None, where: str, device: torch.device) -> Site:
    """A site as kernels take it. Without factors any rows will do: heads, or as many as factors would have."""
    grid = site.activations
    if not isinstance(grid, Dynamic) or not grid.spec.symmetric:
        raise Unsupported(f"the activations of {where} are not on a symmetric grid a token")
    if site.down is not None:
        raise Unsupported(f"{where} has a low-rank branch")
    if site.shift is not None:
        raise Unsupported(f"{where} is shifted")
    if site.left is not None:
        n1 = site.left.shape[0]
    else:
        n1 = 1 if site.right is not None else heads or _rows(n)
    if site.right is not None and site.right.shape[0] * n1 != n:
        raise Unsupported(f"{where}: factors of another size")
    made = Site((n1, n // n1), site.left, site.right, _ratios(grid, device), grid.spec.bits)
    reason = made.unsupported() if device.type == "cuda" else None
    if reason is not None:
        raise Unsupported(f"there is no kernel for {reason} ({where})")
    return made


def _rows(n: int) -> int:
    """How many rows n channels make that have an even number of columns."""
    n1, n2 = kronecker_split(n)
    return n1 if n2 % 2 == 0 else kronecker_split(n // 2)[0]


def _ratios(grid: Dynamic, device: torch.device) -> Tensor:
    """Shares of a row's lower and upper end that the grid covers.  # float32, (2,)"""
    ratios = grid.clip.ratios()
    return torch.ones(2, device=device) if ratios is None else torch.stack(ratios).float().contiguous()


def _heads(kv: Any, config: Any, head_dim: int, index: int, device: torch.device, dtype: torch.dtype) -> kv_cache.Heads:
    if not isinstance(kv, FrozenKeyValue) or kv.keys is None or kv.values is None:
        raise Unsupported(f"keys and values of block {index} are not both quantised")
    if any(grid.spec.bits != 4 or grid.spec.symmetric for grid in (kv.keys, kv.values)):
        raise Unsupported(f"keys and values of block {index} are not on asymmetric 4-bit grids")
    if head_dim % 4 or head_dim > 256:
        raise Unsupported(f"heads of {head_dim} channels")
    matrices = None
    if kv.query_matrix is not None and kv.key_matrix is not None:
        matrices = torch.stack((kv.query_matrix, kv.key_matrix)).contiguous()
        if device.type == "cuda":
            matrices = matrices.to(dtype)
    return kv_cache.Heads(
        config.num_attention_heads,
        config.num_key_value_heads,
        head_dim,
        matrices,
        torch.stack((_ratios(kv.keys, device), _ratios(kv.values, device))),
    )


def _window(attention: Any, config: Any) -> int | None:
    if config.model_type == "mistral":
        return config.sliding_window
    return getattr(attention, "sliding_window", None)


# --------------------------------------------------------------------------------- into a model

# Beside the models, not on them: a copy of a model finds its own.
_made: WeakKeyDictionary[PreTrainedModel, tuple[torch.device, Fused | None]] = WeakKeyDictionary()
_DEVICES = "flatquant_fused_devices"
_KNOWN = ("attention_mask", "position_ids", CACHE, "use_cache", "logits_to_keep", "return_dict")
_FORMER_CACHE = "past_key_values"  # what callers may still say


def attach(model: PreTrainedModel, devices: tuple[str, ...] = ("cuda",)) -> None:
    """Let a packed model's forward pass and `generate` use the fused runtime on such devices.

    Whether it can is found out at the first call there; a model that it cannot serve stays as it is, after a warning.
    """
    ours: Any = model
    forward, prepare = type(ours).forward, generation_cache_hook(type(ours))

    @functools.wraps(forward)
    def fused_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = _forward(self, *args, **kwargs) if serves(self) else None
        return forward(self, *args, **kwargs) if output is None else output

    @functools.wraps(prepare)
    def fused_prepare(
        self: Any, config: Any, model_kwargs: dict[str, Any], mode: Any, batch_size: int, max_cache_length: int
    ) -> Any:
        fused = runtime(self) if serves(self) else None
        plain = mode in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE) and config.num_return_sequences == 1
        given = model_kwargs.get(CACHE) is not None or config.cache_implementation is not None
        if fused is None or not plain or given or config.use_cache is False:
            return prepare(self, config, model_kwargs, mode, batch_size, max_cache_length)
        kept = bool(config.return_dict_in_generate)  # the caller gets to see the cache, and may keep it
        model_kwargs[CACHE] = fused.cache_for(batch_size, max_cache_length, kept=kept)
        return None

    setattr(ours, _DEVICES, devices)
    ours.forward = MethodType(fused_forward, model)
    ours._prepare_cache_for_generation = MethodType(fused_prepare, model)


def serves(model: PreTrainedModel) -> bool:
    """Whether the fused runtime was attached for the device that the model is on."""
    return model.device.type in getattr(model, _DEVICES, ())


def runtime(model: PreTrainedModel) -> Fused | None:
    """The fused runtime of a model, made at the first call; None for one that it cannot serve, after one warning."""
    known = _made.get(model)
    if known is None or known[0] != model.device:
        try:
            known = (model.device, Fused(model))
        except Unsupported as reason:
            warnings.warn(f"slow: this model runs without fused kernels, since {reason}", stacklevel=2)
            known = (model.device, None)
        _made[model] = known
    return known[1]


@torch.no_grad()
def _forward(model: Any, input_ids: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
    """What transformers' forward pass would return, or None where it has to be asked."""
    given = {name: value for name, value in kwargs.items() if value is not None}
    if _FORMER_CACHE in given:
        given[CACHE] = given.pop(_FORMER_CACHE)
    cache, mask = given.get(CACHE), given.get("attention_mask")
    mine = isinstance(cache, PackedCache)
    simple = input_ids is not None and not args and not model.training and set(given) <= set(_KNOWN)
    simple &= mask is None or (mask.ndim == 2 and ((mine and cache.length > 0) or _padded_left(mask)))
    fused = runtime(model) if simple and (cache is None or mine) else None
    if fused is None or input_ids is None:
        if mine:
            raise ModelError(
                "a PackedCache serves token ids with padding on the left, and nothing else; give a QuantizedCache"
            )
        return None
    batch, tokens = input_ids.shape
    if cache is None:
        cache = fused.new_cache(batch, tokens)
    elif cache.batch != batch:
        raise ModelError(f"the cache was made for {cache.batch} sequences, not {batch}")
    if cache.length + tokens > cache.places:
        cache.reserve(2 * (cache.length + tokens))
    if not cache.length and mask is not None:
        cache.start.copy_((mask == 0).sum(1))
        cache.padded = bool(cache.start.any())
    positions = given.get("position_ids")
    if positions is None:
        positions = torch.arange(cache.length, cache.length + tokens, device=input_ids.device)[None]
    if tokens == 1 and cache.length:
        logits = fused.decode(input_ids, positions, cache)
    else:
        keep = given.get("logits_to_keep", 0)
        whole = isinstance(keep, Tensor)
        logits = fused.prefill(input_ids, positions, cache, 0 if whole else keep)
        logits = logits[:, keep] if whole else logits
    use_cache = given.get("use_cache", model.config.use_cache)
    output = CausalLMOutputWithPast(logits=logits, **{CACHE: cache if use_cache else None})  # type: ignore[arg-type]
    return output if given.get("return_dict", True) else output.to_tuple()


def _padded_left(mask: Tensor) -> bool:
    """Whether every row is zeros, then ones, and not zeros alone."""
    return bool((mask[:, 1:] >= mask[:, :-1]).all()) and bool(mask[:, -1].all())
