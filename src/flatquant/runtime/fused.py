"""The fused runtime: a packed model's forward pass in a dozen kernels a block, and a decode step in one CUDA graph.

It takes over where it can serve exactly what the model is - a block of one of `FAMILIES`, 4-bit weights with one scale
a row, symmetric 4-bit activations, asymmetric 4-bit keys and values - and where it can serve what was asked for.
Everything else runs through the modules that transformers calls, one by one. Of a model without kernels, a warning says
once why.
A call steps aside (`_takes`) for forward hooks on submodules, hidden states, masks other than padding on the left, and
gradients; its modules go on with the same `PackedCache`.

Threads and streams: all products of a model share scratch, so one call at a time runs on a device (`_Turn`). A cache
handed out by `cache_for` belongs to its caller; its room and graph serve again once the caller has dropped it.

A block, for one token:

    norm, transform, quantise | q k v in one product | turn, transform, quantise, store | attention over parts |
    merge, transform, quantise | o, plus residual | norm, transform, quantise | gate and up in one product |
    SwiGLU, transform, quantise | down, plus residual

Prompts take the same way, but for attention, which is PyTorch's, over the numbers that the stored integers stand for.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.generation.configuration_utils import GenerationMode
from transformers.modeling_outputs import CausalLMOutputWithPast

from flatquant import modules, seams
from flatquant.ops import int4_linear, kron_quantize, kv_cache
from flatquant.ops.kron_quantize import Site
from flatquant.ops.kron_quantize.reference import rms_norm
from flatquant.quantizers import Dynamic
from flatquant.rotary import Angles
from flatquant.runtime.build import SITES_SLOT
from flatquant.runtime.kernels import Product, Unsupported, kernel_site, packed_linear, ratios_of
from flatquant.runtime.keyvalue import FrozenKeyValue
from flatquant.runtime.linear import PackedLinear
from flatquant.runtime.packedcache import PackedCache, PackedLayer, Room, stream_of
from flatquant.seams import CACHE, attached, generation_cache_hook


@dataclass(frozen=True, kw_only=True)
class Family:
    """What blocks look like: x + attention(norm(x)), then x + down(act(gate) up) of its norm.

    Norms of queries and keys, multipliers, windows and scales of scores are read from the modules and the config.

    Attributes:
        qkv: the linears that write queries, keys and values, in this order.
        gate_up: those that write the gate, then what it multiplies.
        norms: in front of attention and of the MLP.
        after: behind them, before what they give is added to the stream; empty if there are none.
        norm_offset: norms multiply by this plus their weight.
        windowed: every block has the config's sliding window; otherwise those whose attention says so.
    """

    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    norms: tuple[str, str] = ("input_layernorm", "post_attention_layernorm")
    after: tuple[str, ...] = ()
    norm_offset: float = 0.0
    windowed: bool = False

    @property
    def readers(self) -> dict[str, tuple[str, ...]]:
        """The linears of every site."""
        out, down = ("self_attn.o_proj",), ("mlp.down_proj",)
        return {"attn_in": self.qkv, "attn_out": out, "mlp_in": self.gate_up, "mlp_mid": down}


FAMILIES = {
    "llama": Family(),
    "mistral": Family(windowed=True),
    "qwen2": Family(),
    "qwen3": Family(),
    "granite": Family(),
    "phi3": Family(qkv=("self_attn.qkv_proj",), gate_up=("mlp.gate_up_proj",), windowed=True),
    "gemma3_text": Family(
        norms=("input_layernorm", "pre_feedforward_layernorm"),
        after=("post_attention_layernorm", "post_feedforward_layernorm"),
        norm_offset=1.0,
    ),
}
_ROPES = ("default", "linear", "llama3", "yarn")  # of which angles depend on positions alone
_ACTIVATIONS: dict[type, kron_quantize.Activation] = {
    type(ACT2FN["silu"]): "silu",
    type(ACT2FN["gelu_pytorch_tanh"]): "gelu",
}
Masks = Mapping[int | None, Tensor]  # by window

_WRITERS = ("attn_out", "mlp_mid")  # sites whose products are added to the residual stream
_PLACES = 128  # caches have a multiple of
_PROGRAMS = 528  # that an H100 runs at once: four a multiprocessor
_SPARE = 2  # rooms kept for later calls
_GRAPHS = 16  # recorded steps kept: each holds the memory of a step


@dataclass(frozen=True)
class Norm:
    """An RMS norm."""

    gain: Tensor  # (n,)
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        """(.., n), in x's dtype"""
        if self.gain.dtype != x.dtype:
            return rms_norm(x, self.gain, self.eps).to(x.dtype)
        return F.rms_norm(x, (x.shape[-1],), self.gain, self.eps)


@dataclass(frozen=True)
class Block:
    """A decoder block."""

    norms: tuple[Norm, Norm]  # before attention, before the MLP
    sites: dict[str, Site]
    products: dict[str, Product]
    heads: kv_cache.Heads
    scaling: float
    window: int | None
    after: tuple[Norm, ...] = ()  # behind attention, behind the MLP
    activation: kron_quantize.Activation = "silu"
    turn: str | None = None  # the kind of rotary embedding, where there are several

    def _added(self, name: str, y: tuple[Tensor, Tensor], rows: Tensor, scratch: Tensor | None) -> Tensor:
        """The residual stream with what a site's product gives, after its norm if there is one.  # (B T, n)"""
        if not self.after:
            return self.products[name](*y, rows, rows.dtype, scratch)
        return rows + self.after[name == "mlp_mid"](self.products[name](*y, None, rows.dtype, scratch))

    def __call__(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        steps: Tensor,
        cache: PackedCache,
        layer: PackedLayer,
        masks: Masks,
        scratch: Tensor | None,
    ) -> Tensor:
        """The block's output, with keys and values stored.

        Args:
            x: hidden states, (B, T, n).
            cos, sin: (B or 1, T, head_dim).
            steps: see `kv_cache.Shortage`.
            masks: see `Fused.masks`.
            scratch: see `int4_linear.scratch`.
        """
        mask, room = masks.get(self.window), cache.room
        b, t, _ = x.shape
        form = int4_linear.form(b * t, x.device, x.dtype)
        rows = x.flatten(0, 1)
        y = kron_quantize.norm(rows, self.norms[0].gain, self.norms[0].eps, self.sites["attn_in"], form)
        qkv = self.products["attn_in"](*y, None, x.dtype, scratch).view(b, t, -1)
        keys, values = layer.stores
        q, k, v, amounts = kv_cache.append(qkv, cos, sin, self.heads, keys, values, room.used, dense=t > 1)
        site = self.sites["attn_out"]
        if t == 1:
            parts = max(1, _PROGRAMS // (b * self.heads.keys))
            short = None
            if amounts is not None:
                assert layer.angles is not None
                short = kv_cache.Shortage(amounts[:, :, 0], layer.angles, steps, room.gaps)
            z = kv_cache.attend(
                q[:, :, 0], keys, values, room.used, room.start, self.window, self.scaling, parts, short
            )
            y = kron_quantize.merge(*z, site, form)
        else:
            if room.length:  # a prompt that goes on: what came before counts too
                k, v = keys.read(room.length + t), values.read(room.length + t).to(x.dtype)
            if self.heads.offset is not None:
                assert layer.angles is not None
                k = k + self.heads.given_back(layer.angles[:, : room.length + t])
            k = k.to(x.dtype)
            if mask is not None:  # of the fast kernels, none takes both a mask and fewer heads of keys than of queries
                k, v = (s.repeat_interleave(q.shape[1] // s.shape[1], dim=1) for s in (k, v))
            z = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.scaling, enable_gqa=q.shape[1] != k.shape[1]
            )
            y = kron_quantize.plain(z.transpose(1, 2).reshape(b * t, -1), site, form)
        rows = self._added("attn_out", y, rows, scratch)
        y = kron_quantize.norm(rows, self.norms[1].gain, self.norms[1].eps, self.sites["mlp_in"], form)
        gate, up = self.products["mlp_in"](*y, None, x.dtype, scratch).chunk(2, dim=-1)
        y = kron_quantize.gate(up, gate, self.sites["mlp_mid"], form, self.activation)
        return self._added("mlp_mid", y, rows, scratch).view_as(x)


class Fused:
    """A packed model as blocks of kernels. Of tensors that the model does not hold it has half-precision factors, and
    scratch of products."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Take a packed model apart.

        Raises:
            Unsupported: something in it has no kernel.
        """
        config: Any = model.config
        family = FAMILIES.get(config.model_type)
        if family is None:
            raise Unsupported(
                f"blocks of {config.model_type} have no fused form (there is one for {', '.join(FAMILIES)})"
            )
        if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
            raise Unsupported("it lies on several devices")
        base: Any = model.base_model
        self.device = model.device
        ropes = getattr(base.rotary_emb, "rope_type", "default")
        for rope in ropes.values() if isinstance(ropes, dict) else (ropes,):
            if rope not in _ROPES:
                raise Unsupported(f"positions of kind {rope!r} depend on the length of the text")
        if getattr(config, "attn_logit_softcapping", None) or getattr(config, "final_logit_softcapping", None):
            raise Unsupported("its scores or logits are capped")
        if getattr(config, "use_bidirectional_attention", False):
            raise Unsupported("its attention is not causal")
        self.embedding: nn.Embedding = base.embed_tokens
        self.rotary = base.rotary_emb
        self.norm = _norm(base.norm, family)
        head: Any = model.get_output_embeddings()
        self.head: nn.Linear = head
        self.embedded = getattr(config, "embedding_multiplier", 1.0)
        self.divided = getattr(config, "logits_scaling", 1.0)
        turns = config.layer_types if isinstance(ropes, dict) else [None] * len(base.layers)
        self.blocks = [
            _block(layer, i, config, self.device, family, turn)
            for i, (layer, turn) in enumerate(zip(base.layers, turns, strict=True))
        ]
        largest = max(product.scratch_bytes for block in self.blocks for product in block.products.values())
        self.scratch = int4_linear.scratch(largest, self.device)
        self._offset = any(block.heads.offset is not None for block in self.blocks)
        self._turns = list(dict.fromkeys(block.turn for block in self.blocks))
        width = self.angles(torch.zeros(1, 1, dtype=torch.int64, device=self.device), torch.float32).cos.shape[-1]
        if width != self.blocks[0].heads.head_dim:
            raise Unsupported(f"{width} of {self.blocks[0].heads.head_dim} channels of a head are turned")
        self._steps_of = {turn: self._first_angles(turn) for turn in self._turns}
        self.first_angles = self._steps_of[self.blocks[0].turn]
        self.modules = _Modules(model)  # last: products have become the linears' tensors
        self._turn = _turn(self.device)
        self._steps: WeakKeyDictionary[Room, _Step] = WeakKeyDictionary()  # the latest last
        self._latest: weakref.ref[Room] | None = None  # that a step was taken for
        self._spare: deque[Room] = deque(maxlen=_SPARE)  # the latest last

    def cache_for(self, batch: int, places: int) -> PackedCache:
        """An empty cache, if possible in the room of a cache that was dropped, where its graph is still good."""
        with self._turn:
            room = self._take(batch, places) or self._room(batch, places)
        cache = PackedCache(room)
        weakref.finalize(cache, self._spare.append, room).atexit = False
        return cache

    def new_cache(self, batch: int, places: int) -> PackedCache:
        """An empty cache that fits, in a room of its own."""
        return PackedCache(self._room(batch, places))

    def _take(self, batch: int, places: int) -> Room | None:
        """A spare room that fits. Those of as many sequences that are too small are dropped.

        Rooms come back from any thread, also in the middle of this: a deque's own operations are atomic.
        """
        for _ in range(len(self._spare)):
            try:
                room = self._spare.pop()
            except IndexError:
                return None
            if room.batch != batch or room.stream != stream_of(self.device):
                self._spare.appendleft(room)
            elif room.places >= places:
                room.rewind(0)
                return room
        return None

    def _room(self, batch: int, places: int) -> Room:
        heads = self.blocks[0].heads
        return Room(
            blocks=len(self.blocks),
            batch=batch,
            heads=heads.keys,
            places=-(-places // _PLACES) * _PLACES,
            head_dim=heads.head_dim,
            device=self.device,
            angles=self._offset,
            turns=[self._turns.index(block.turn) for block in self.blocks],
        )

    def _first_angles(self, turn: str | None) -> Tensor:
        """See `kv_cache.Shortage.steps`: in float16, also for models in bfloat16, which has three bits less."""
        cos, sin = self.angles(torch.arange(kv_cache.STEPS, device=self.device)[None], torch.float32, turn)
        dtype = torch.float32 if self.embedding.weight.dtype == torch.float32 else torch.float16
        return (Angles(cos, sin).of_pairs("halves")[0] / cos[0, 0, 0]).to(dtype)  # the cosine of 0, scaled

    def angles(self, positions: Tensor, dtype: torch.dtype, turn: str | None = None) -> Angles:
        """Cosines and sines of positions, (B or 1, T); of the first block's kind if none is given."""
        turn = turn or self.blocks[0].turn
        kind = () if turn is None else (turn,)
        cos, sin = self.rotary(torch.empty(0, dtype=dtype, device=self.device), positions, *kind)
        return Angles(cos.contiguous(), sin.contiguous())

    def hidden(self, ids: Tensor, positions: Tensor, cache: PackedCache, masks: Masks) -> Tensor:
        """States after the last block, normalised.  # (B, T) -> (B, T, n)"""
        x = self.embedding(ids)
        x = x if self.embedded == 1 else x * self.embedded
        # What is taken from a key and given back to a score must be the same: more than 16 bits of a large number.
        dtype = torch.float32 if self._offset else x.dtype
        angles = {turn: self.angles(positions, dtype, turn) for turn in self._turns}
        for kind, turn in enumerate(self._turns):
            cache.room.turn(*angles[turn], positions, kind)
        for block, layer in zip(self.blocks, cache.packed, strict=True):
            x = block(x, *angles[block.turn], self._steps_of[block.turn], cache, layer, masks, self.scratch)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """What the model says.  # (.., n) -> (.., V)"""
        products = self.head(hidden)
        return products if self.divided == 1 else products / self.divided

    def prefill(self, ids: Tensor, positions: Tensor, cache: PackedCache, keep: int) -> Tensor:
        """Logits of the last `keep` tokens (0: of all), and their keys and values into the cache.  # (B, keep, V)"""
        with self._turn:
            return self._eager(ids, positions, cache, keep)

    def decode(self, ids: Tensor, positions: Tensor, cache: PackedCache) -> Tensor:
        """Logits of one token a sequence; on CUDA by replaying a graph.  # (B, 1) -> (B, 1, V)"""
        with self._turn:
            step = self._step(cache) if ids.device.type == "cuda" else None
            return self._eager(ids, positions, cache, 1) if step is None else step(ids, positions, cache.room)

    def _eager(self, ids: Tensor, positions: Tensor, cache: PackedCache, keep: int) -> Tensor:
        x = self.hidden(ids, positions, cache, self.masks(ids.shape[1], cache.room))
        cache.room.advance(ids.shape[1])
        return self.logits(x[:, -keep:])

    def _step(self, cache: PackedCache) -> _Step | None:
        """The recorded step of a cache, recorded now where there is none.

        None where as many are kept as may be, and the last token was another cache's: of many caches that take turns,
        recording for each token would take longer than all kernels.
        """
        room, latest = cache.room, self._latest
        self._latest = weakref.ref(room)
        step = self._steps.pop(room, None)
        if step is None or step.moved != room.moved:
            if len(self._steps) >= _GRAPHS:
                if latest is None or latest() is not room:
                    return None
                self._steps.pop(next(iter(self._steps), room), None)
            with torch.inference_mode(False), torch.no_grad():  # later calls may be in another mode
                step = _Step(self, cache)
        self._steps[room] = step
        return step

    def masks(self, tokens: int, room: Room) -> Masks:
        """Boolean attention masks of the next tokens, by the window of a block; none where causality is all there is.

        Padding sees itself: a softmax over nothing would be NaN, and spread.  # bool, (B or 1, 1, T, length + T)
        """
        if tokens == 1:  # attention over the cache needs no mask
            return {}
        total = room.length + tokens
        windows = {block.window for block in self.blocks}
        if not room.length and not room.padded:
            windows = {window for window in windows if window is not None and window < total}
        query = torch.arange(room.length, total, device=self.device)[:, None]
        place = torch.arange(total, device=self.device)[None]
        counts = (place <= query) & (place[None] >= room.start[:, None, None])  # (B, T, S)
        masks = {w: counts if w is None else counts & (place > query - w) for w in windows}
        return {window: (mask | (place == query))[:, None] for window, mask in masks.items()}


class _Step:
    """A decode step for one cache, recorded once and replayed. It holds no cache, and goes when the room goes."""

    def __init__(self, fused: Fused, cache: PackedCache) -> None:
        device = fused.device
        self.moved = cache.room.moved
        self.ids = torch.zeros((cache.room.batch, 1), dtype=torch.int64, device=device)
        self.positions = torch.zeros_like(self.ids)
        # Kernels are compiled and tuned outside of the recording; what these runs write, the first replay overwrites.
        now, stream = torch.cuda.current_stream(device), torch.cuda.Stream(device)
        stream.wait_stream(now)
        with torch.cuda.stream(stream), cache.room.rehearsed():
            for _ in range(2):
                fused.logits(fused.hidden(self.ids, self.positions, cache, {}))
        now.wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with _recording(self.graph, stream):
            self.logits = fused.logits(fused.hidden(self.ids, self.positions, cache, {}))
            cache.room.used += 1

    def __call__(self, ids: Tensor, positions: Tensor, room: Room) -> Tensor:
        self.ids.copy_(ids)
        self.positions.copy_(positions.expand_as(self.ids))
        self.graph.replay()
        room.length += 1
        return self.logits.clone()


@contextlib.contextmanager
def _recording(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream) -> Iterator[None]:
    """`torch.cuda.graph` beside threads that allocate memory and sample meanwhile.

    A recording takes part in the device's generator of random numbers: whoever else draws from it then gets an error.
    A step draws nothing, so it takes part in another generator.
    """
    torch.cuda.synchronize(stream.device)
    gc.collect()
    generator = torch.cuda.default_generators[stream.device.index]
    state = generator.graphsafe_get_state()
    with torch.cuda.stream(stream):
        generator.graphsafe_set_state(torch.Generator(stream.device))
        try:
            graph.capture_begin(capture_error_mode="thread_local")
        finally:
            generator.graphsafe_set_state(state)
        try:
            yield
        finally:
            graph.capture_end()


class _Turn:
    """One fused call at a time on a device, in the order of the device's streams, with the device as the current one.

    All calls of a model share its scratch: two at once would write over each other's.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._lock = threading.RLock()
        self._last: torch.cuda.Stream | None = None
        self._outer: list[int] = []  # the devices that were current

    def __enter__(self) -> None:
        self._lock.acquire()
        if self._device.type == "cuda":
            self._outer.append(torch.cuda.current_device())
            torch.cuda.set_device(self._device)
            stream = torch.cuda.current_stream(self._device)
            # A recording of the caller's may not wait for work outside of it.
            if stream != self._last and not torch.cuda.is_current_stream_capturing():
                if self._last is not None:
                    stream.wait_stream(self._last)
                self._last = stream

    def __exit__(self, *_: object) -> None:
        if self._outer:
            torch.cuda.set_device(self._outer.pop())
        self._lock.release()


@functools.cache
def _turn(device: torch.device) -> _Turn:
    return _Turn(device)


class _Modules:
    """The modules that kernels stand for: whether anyone listens to one, and whether they are still the same."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._children = [
            (module._modules, name, child)
            for module in (model, *_below(model))
            for name, child in module._modules.items()
        ]
        self._tensors = [
            (owner, name, tensor, _version(tensor))
            for module in _below(model)
            for owner in (module._buffers, module._parameters)
            for name, tensor in owner.items()
            if tensor is not None
        ]
        self._below = _below(model)
        self._seen = -1  # number of hooks ever registered, when last looked at
        self._heard = False

    def changed(self) -> bool:
        """Whether a module or a tensor was replaced, or a tensor written to."""
        return any(owner.get(name) is not child for owner, name, child in self._children) or any(
            owner.get(name) is not tensor or _version(tensor) != version
            for owner, name, tensor, version in self._tensors
        )

    def heard(self, *, again: bool = False) -> bool:
        """Whether a forward hook would not be called, or a replaced `forward`.

        Args:
            again: look even if no hook was registered anywhere since the last look.
        """
        registered = RemovableHandle.next_id  # that each hook of PyTorch's counts up
        if again or self._heard or registered != self._seen:
            self._heard = _hooked_everywhere() or any(map(_hooked, self._below))
            self._seen = registered
        return self._heard


def _below(model: nn.Module) -> list[nn.Module]:
    """All modules but the model itself, whose own hooks are called as ever."""
    return list(model.modules())[1:]


def _version(t: Tensor) -> int:
    return 0 if t.is_inference() else t._version


# Hooks that do nothing where the fused runtime serves: ours of attention modules and blocks, and transformers' own,
# which collect hidden states and attentions only in calls that ask for them.
_IDLE_HOOKS = (seams.__name__, modules.__name__, "transformers.utils.output_capturing")


def _hooked(module: nn.Module) -> bool:
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return "forward" in vars(module) or any(getattr(hook, "__module__", None) not in _IDLE_HOOKS for hook in hooks)


def _hooked_everywhere() -> bool:
    shared = torch.nn.modules.module
    return bool(shared._global_forward_pre_hooks or shared._global_forward_hooks)


# --------------------------------------------------------------------------------- from a model's modules


def _block(layer: Any, index: int, config: Any, device: torch.device, family: Family, turn: str | None) -> Block:
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
    before, mlp = (_norm(layer.get_submodule(path), family) for path in family.norms)
    factor = getattr(config, "residual_multiplier", 1.0)
    return Block(
        norms=(before, mlp),
        sites=sites,
        products={n: Product.of(several, factor if n in _WRITERS else 1.0) for n, several in linears.items()},
        heads=_heads(attention, family, config, index, device, layer.get_submodule(family.norms[0]).weight.dtype),
        scaling=attention.scaling,
        window=config.sliding_window if family.windowed else getattr(attention, "sliding_window", None),
        after=tuple(_norm(layer.get_submodule(path), family) for path in family.after),
        activation=activation,
        turn=turn,
    )


def _norm(module: Any, family: Family) -> Norm:
    eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
    return Norm(module.weight if not family.norm_offset else module.weight.float() + family.norm_offset, eps)


def _heads(
    attention: Any, family: Family, config: Any, index: int, device: torch.device, dtype: torch.dtype
) -> kv_cache.Heads:
    kv, head_dim = attached(attention), attention.head_dim
    normed = [_norm(m, family) for m in (attention.q_norm, attention.k_norm)] if hasattr(attention, "q_norm") else None
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


# --------------------------------------------------------------------------------- into a model

# Beside the models, not on them: a copy of a model finds its own.
_made: WeakKeyDictionary[PreTrainedModel, tuple[torch.device, torch.dtype, Fused | None]] = WeakKeyDictionary()
_making = threading.RLock()
_DEVICES = "flatquant_fused_devices"
_KNOWN = ("attention_mask", "position_ids", CACHE, "use_cache", "logits_to_keep", "return_dict")
_OUTPUTS = ("output_hidden_states", "output_attentions")  # asked for by keyword or by config
_FORMER_CACHE = "past_key_values"  # what callers may still say


def attach(model: PreTrainedModel, devices: tuple[str, ...] = ("cuda",)) -> None:
    """Let a packed model's forward pass and `generate` use the fused runtime on such devices.

    Whether it can is found out at the first call there; a model that it cannot serve stays as it is, after a warning.
    """
    ours: Any = model
    forward, prepare = type(ours).forward, generation_cache_hook(type(ours))

    @functools.wraps(forward)
    def fused_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = _forward(self, *args, **kwargs) if serves(self) and not _trained(self) else None
        return forward(self, *args, **kwargs) if output is None else output

    @functools.wraps(prepare)
    def fused_prepare(
        self: Any, config: Any, model_kwargs: dict[str, Any], mode: Any, batch_size: int, max_cache_length: int
    ) -> Any:
        fused = runtime(self, again=True) if serves(self) else None
        plain = mode in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE) and config.num_return_sequences == 1
        plain &= config.cache_implementation is None and config.use_cache is not False
        given = {name for name, value in model_kwargs.items() if value is not None}
        asked = any(getattr(config, name, False) for name in _OUTPUTS) or _asked(self, {})
        if fused is None or not plain or not given <= set(_KNOWN) - {CACHE} or asked or fused.modules.heard(again=True):
            return prepare(self, config, model_kwargs, mode, batch_size, max_cache_length)
        cache = fused.cache_for(batch_size, max_cache_length)
        cache.masks_grow = not config.return_dict_in_generate  # who gets to see the cache may give it any mask
        model_kwargs[CACHE] = cache
        return None

    setattr(ours, _DEVICES, devices)
    ours.forward = MethodType(fused_forward, model)
    ours._prepare_cache_for_generation = MethodType(fused_prepare, model)


def serves(model: PreTrainedModel) -> bool:
    """Whether the fused runtime was attached for the device that the model is on."""
    return model.device.type in getattr(model, _DEVICES, ())


def runtime(model: PreTrainedModel, *, again: bool = False) -> Fused | None:
    """The fused runtime of a model, made at the first call; None for one that it cannot serve, after one warning.

    Args:
        again: make it anew if the model's modules or tensors have changed.
    """
    known = _made.get(model)
    same = known is not None and known[:2] == (model.device, model.dtype)
    if known is not None and same and not (again and known[2] is not None and known[2].modules.changed()):
        return known[2]
    with _making:
        if _made.get(model) is known:  # nobody else has made it meanwhile
            _made[model] = (model.device, model.dtype, _fused(model))
        return _made[model][2]


def _fused(model: PreTrainedModel) -> Fused | None:
    try:
        return Fused(model)
    except Unsupported as reason:
        warnings.warn(f"slow: this model runs without fused kernels, since {reason}", stacklevel=4)
        return None


def _trained(model: PreTrainedModel) -> bool:
    """Whether a forward pass now has gradients, of which the kernels have none."""
    return torch.is_grad_enabled() and any(p.requires_grad for p in model.parameters())


def _asked(model: PreTrainedModel, kwargs: Mapping[str, Any]) -> bool:
    """Whether a call with such arguments returns hidden states or attentions."""
    return any(kwargs.get(name, getattr(model.config, name, False)) for name in _OUTPUTS)


@torch.no_grad()
def _forward(model: Any, input_ids: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
    """What transformers' forward pass would return, or None where it has to be asked."""
    given = {name: value for name, value in kwargs.items() if value is not None and name not in _OUTPUTS}
    if _FORMER_CACHE in given:
        given[CACHE] = given.pop(_FORMER_CACHE)
    cache = given.get(CACHE)
    if isinstance(cache, PackedCache) and input_ids is not None:
        cache.check(len(input_ids), input_ids.device)
    elif cache is not None or input_ids is None:
        return None
    if args or model.training or not set(given) <= set(_KNOWN) or _asked(model, kwargs):
        return None
    batch, tokens = input_ids.shape
    length = 0 if cache is None else cache.room.length
    one = tokens == 1 and length > 0
    fused = runtime(model, again=not one)
    if fused is None or fused.modules.heard(again=not one):
        return None
    if cache is None:
        cache = fused.new_cache(batch, tokens)
    if not _masked(cache, given.get("attention_mask"), length + tokens):
        return None
    if length + tokens > cache.room.places:
        cache.room.reserve(2 * (length + tokens))
    positions = given.get("position_ids")
    if positions is None:
        positions = torch.arange(length, length + tokens, device=input_ids.device)[None]
    if one:
        logits = fused.decode(input_ids, positions, cache)
    else:
        keep = given.get("logits_to_keep", 0)
        whole = isinstance(keep, Tensor)
        logits = fused.prefill(input_ids, positions, cache, 0 if whole else keep)
        logits = logits[:, keep] if whole else logits
    kept = CACHE in given or given.get("use_cache", model.config.use_cache)
    output = CausalLMOutputWithPast(logits=logits, **{CACHE: cache if kept else None})  # type: ignore[arg-type]
    return output if given.get("return_dict", model.config.return_dict) else output.to_tuple()


def _masked(cache: PackedCache, mask: Tensor | None, total: int) -> bool:
    """Note in a cache what padding a mask says; False for a mask of anything but padding on the left."""
    room = cache.room
    if mask is not None and mask.shape != (room.batch, total):
        return False
    if mask is not None and cache.masks_grow and room.length:
        return True
    if mask is None or bool(mask.all()):
        room.pad(None)
        return True
    if bool((mask[:, 1:] < mask[:, :-1]).any()) or not bool(mask[:, -1].all()):
        return False
    room.pad((mask == 0).sum(1))
    return True
