"""A packed model as blocks of kernels, with its rooms for caches and its recorded steps."""

from __future__ import annotations

import weakref
from collections import deque
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flatquant.ops import int4_linear, kv_cache
from flatquant.rotary import Angles
from flatquant.runtime.embedding import RoundedEmbedding
from flatquant.runtime.fused.block import Masks
from flatquant.runtime.fused.family import FAMILIES
from flatquant.runtime.fused.lock import device_lock
from flatquant.runtime.fused.step import Step
from flatquant.runtime.fused.take import block_of, norm_of
from flatquant.runtime.fused.watch import Modules
from flatquant.runtime.kernels import OutputLayer, Unsupported
from flatquant.runtime.linear import PackedLinear
from flatquant.runtime.packedcache import PackedCache, Room, stream_of

_ROPES = ("default", "linear", "llama3", "yarn")  # of which angles depend on positions alone
_PLACES = 128  # caches have a multiple of
_SPARE = 2  # rooms kept for later calls
_GRAPHS = 16  # recorded steps kept: each holds the memory of a step


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
        self.embedding: nn.Embedding | RoundedEmbedding = base.embed_tokens
        self.rotary = base.rotary_emb
        self.norm = norm_of(base.norm, family)
        head: Any = model.get_output_embeddings()
        self.head: nn.Linear | OutputLayer = OutputLayer.of(head) if isinstance(head, PackedLinear) else head
        self.embedded = getattr(config, "embedding_multiplier", 1.0)
        self.divided = getattr(config, "logits_scaling", 1.0)
        turns = config.layer_types if isinstance(ropes, dict) else [None] * len(base.layers)
        self.blocks = [
            block_of(layer, i, config, self.device, family, turn)
            for i, (layer, turn) in enumerate(zip(base.layers, turns, strict=True))
        ]
        largest = max(product.scratch_bytes for block in self.blocks for product in block.products.values())
        self.scratch = int4_linear.scratch(largest, self.device)
        self._offset = any(block.heads.offset is not None for block in self.blocks)
        self.turns = list(dict.fromkeys(block.turn for block in self.blocks))
        width = self.angles(torch.zeros(1, 1, dtype=torch.int64, device=self.device), torch.float32).cos.shape[-1]
        if width != self.blocks[0].heads.head_dim:
            raise Unsupported(f"{width} of {self.blocks[0].heads.head_dim} channels of a head are turned")
        self._steps_of = {turn: self._first_angles(turn) for turn in self.turns}
        self.first_angles = self._steps_of[self.blocks[0].turn]
        self.modules = Modules(model)  # last: products have become the linears' tensors
        self._lock = device_lock(self.device)
        self._steps: WeakKeyDictionary[Room, Step] = WeakKeyDictionary()  # the latest last
        self._latest: weakref.ref[Room] | None = None  # that a step was taken for
        self._spare: deque[Room] = deque(maxlen=_SPARE)  # the latest last

    def cache_for(self, batch: int, places: int) -> PackedCache:
        """An empty cache, if possible in the room of a cache that was dropped, where its graph is still good."""
        with self._lock:
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
            turns=[self.turns.index(block.turn) for block in self.blocks],
        )

    def _first_angles(self, turn: str | None) -> Tensor:
        """See `kv_cache.Shortage.steps`: in float16, also for models in bfloat16, which has three bits less."""
        cos, sin = self.angles(torch.arange(kv_cache.STEPS, device=self.device)[None], torch.float32, turn)
        embedding = self.embedding
        kept = embedding.dtype if isinstance(embedding, RoundedEmbedding) else embedding.weight.dtype
        dtype = torch.float32 if kept == torch.float32 else torch.float16
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
        angles = {turn: self.angles(positions, dtype, turn) for turn in self.turns}
        for kind, turn in enumerate(self.turns):
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
        with self._lock:
            return self._eager(ids, positions, cache, keep)

    def decode(self, ids: Tensor, positions: Tensor, cache: PackedCache) -> Tensor:
        """Logits of one token a sequence; on CUDA by replaying a graph.  # (B, 1) -> (B, 1, V)"""
        with self._lock:
            step = self._step(cache) if ids.device.type == "cuda" else None
            return self._eager(ids, positions, cache, 1) if step is None else step(ids, positions, cache.room)

    def _eager(self, ids: Tensor, positions: Tensor, cache: PackedCache, keep: int) -> Tensor:
        x = self.hidden(ids, positions, cache, self.masks(ids.shape[1], cache.room))
        cache.room.advance(ids.shape[1])
        return self.logits(x[:, -keep:])

    def _step(self, cache: PackedCache) -> Step | None:
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
                step = Step(self, cache)
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
