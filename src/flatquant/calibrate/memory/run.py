"""What a run takes, under any layout."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from flatquant import distributed
from flatquant.calibrate.activations import Place
from flatquant.calibrate.lent import Lent
from flatquant.calibrate.memory import machine
from flatquant.calibrate.memory.block import RoundedEnds, Sizes, WeightBytes
from flatquant.calibrate.memory.layout import Estimate, full_step, needs_all_blocks, why_undivided
from flatquant.calibrate.memory.step import Step
from flatquant.spec import EndToEndSpec, FitMemory, Plan, Recipe
from flatquant.wiring.arch import submodule
from flatquant.wiring.plan import rotates_residual
from flatquant.wiring.residual import ROWS
from flatquant.writing import writing_bytes

MOST_TOGETHER = 6  # blocks, for their memory
# Host memory that libraries take after the run has started, and what the C library keeps of tensors that are gone.
LIBRARIES, _CUDA_LIBRARIES = 24 << 20, 1 << 30
_FRAGMENTS = 1.1
GATHERED = 4  # a block whose weights ranks divide: gathered with the next one, its gradient, and that as it is sent


class Count:
    """Bytes of one run, under any layout."""

    def __init__(
        self,
        model: PreTrainedModel,
        plan: Plan,
        recipe: Recipe,
        shape: tuple[int, int] | None,
        device: torch.device,
        dtype: torch.dtype,
        streamed: bool,
    ) -> None:
        blocks = list(submodule(model, plan.blocks_path).children())
        self.model, self.recipe, self.shape, self.device, self.streamed = model, recipe, shape, device, streamed
        self.sizes = [Sizes.of(block, p) for block, p in zip(blocks, plan.blocks, strict=True)]
        config = model.config.get_text_config()
        self.hidden, self.vocab = config.hidden_size, config.vocab_size
        # Between blocks a token has what these lend one another too; and all along what each is given of its own.
        self.stream = Lent.of(blocks, self.hidden)
        self.own = len(blocks) * (getattr(config, "hidden_size_per_layer_input", None) or 0)
        self.item = dtype.itemsize
        parameters = list(model.parameters())
        whole = sum(p.nbytes for p in parameters)
        present = sum(p.nbytes for p in parameters if p.device.type == "cpu")
        warm = device.type == "cuda" and torch.cuda.memory_reserved(device)
        libraries = _CUDA_LIBRARIES if device.type == "cuda" and not warm else LIBRARIES
        self.base = max(0, machine.resident_bytes() - present) + libraries
        ends = self.vocab * self.hidden
        # Both ends rotated, beside what they were, and the rows of one in float64.
        stored = 3 * ends * model.dtype.itemsize + 16 * min(ends, ROWS * self.hidden)
        self.rotation = stored if rotates_residual(recipe, plan, force=False) else 0
        self.fragments = 1.0 if streamed else _FRAGMENTS  # `return_freed_memory`
        self.dtype_changes = device.type == "cuda" or any(p.dtype != dtype for p in parameters)
        self.ends = whole - sum(s.stored for s in self.sizes)
        self.rounded_ends = RoundedEnds.of(model, plan)
        self.fused = device.type == "cuda"
        fit, self.end_to_end = recipe.block_fit, recipe.whole_fit
        end = self.end_to_end
        self.memories: list[FitMemory | None] = [None]
        if end is not None:
            auto: list[FitMemory | None] = ["full", "compact", *(() if why_undivided(recipe) else ("sharded",))]
            self.memories = auto if end.memory == "auto" else [end.memory]
        self.recomputes = self.end_to_end is not None and self.end_to_end.checkpoint
        self.learned = recipe.learned_rounding
        sites = [site for block in plan.blocks for site in block.sites.values()]
        rounds_inputs = any(site.activations is not None for site in sites)
        self.step = Step(fused=self.fused, item=self.item, hidden=self.hidden, rounds_inputs=rounds_inputs)
        batches = [spec.batch_size for spec in (fit, self.end_to_end, self.learned) if spec is not None]
        self.fits = fit is not None and recipe.needs_data
        self.moves_weights = fit is not None and fit.weight_lr > 0
        self.batch = max(batches, default=4)
        self.all_blocks = bool(needs_all_blocks(recipe))
        self.together = 1
        waits = recipe.feeds_fit or recipe.solver.hessian == "output_adaptive"
        if self.fused and shape is not None and not waits and not streamed:
            fill = full_step(shape[1], self.hidden) // self.batch
            self.together = max(1, min(MOST_TOGETHER, len(blocks), fill))

    def layout(
        self, place: Place, windows: int, side_by_side: int, *, recompute: bool, memory: FitMemory | None
    ) -> Estimate:
        """What the run needs, laid out so."""
        kept = self._streams(side_by_side) * self._stream + self._of_all(self.own)
        here = int(place == "device")
        peak = self._peak(windows, side_by_side, memory) + here * kept
        if self.end_to_end is not None:  # which sees the first hidden states and the last
            end = self._whole_fit(self.end_to_end, windows, memory, recompute=recompute)
            peak = max(peak, end + here * (2 * self._stream + self._of_all(self.own)))
        packed, rounded = sum(s.packed for s in self.sizes), sum(s.rounded for s in self.sizes)
        tables = self.rounded_ends
        host = self.base + self.ends + tables.rounded + self._copied(memory) + (kept if place == "host" else 0)
        ends = self.ends + tables.packed - tables.replaced
        # The file's pages stay in memory until the last of the model's own tensors is gone.
        blocks = sum(s.stored for s in self.sizes) + rounded
        host += 2 * max(s.stored for s in self.sizes) if self.streamed else blocks
        return Estimate(
            device=int(peak),
            host=int(host + (self.rotation if self.fused else max(self.fragments * peak, self.rotation))),
            disk=int(packed + rounded + ends + (kept if place == "disk" else 0)),
            place=place,
            windows=windows,
            side_by_side=side_by_side,
            streamed=self.streamed,
            shared=not self.fused,
            recompute=recompute,
            memory=memory,
            ranks=distributed.size(),
        )

    def with_text(self, layout: Estimate, written: int) -> Estimate:
        """The same layout, of a run that has the model write so many windows first."""
        assert self.shape is not None
        size = writing_bytes(self.model, self.device, written, self.shape[1])
        whole = self.ends + sum(s.stored for s in self.sizes)
        if self.fused:
            return replace(layout, device=max(layout.device, whole + size))
        return replace(layout, host=max(layout.host, int(self.base + whole + _FRAGMENTS * size)))

    def with_copy(self, layout: Estimate) -> Estimate:
        """The same layout, of a run that makes a float32 copy of the model."""
        whole = self.ends + sum(s.stored for s in self.sizes)
        copy = 4 * whole // self.model.dtype.itemsize
        return replace(layout, host=max(layout.host, int(self.base + whole + copy)))

    def _held(self, memory: FitMemory | None) -> WeightBytes:
        """What is kept of each weight on the device while all blocks are there."""
        if self.end_to_end is None or memory is None:
            return WeightBytes(stored=4)
        return WeightBytes.of(self.end_to_end, memory, self.model.dtype, distributed.size())

    def _copied(self, memory: FitMemory | None) -> int:
        """Of an end-to-end fit that moves weights, on the host: the weights before it, which may have to come back; and
        from a GPU what a state is written from."""
        if self.end_to_end is None or memory is None or not self.end_to_end.moves_weights(memory):
            return 0
        held = self._held(memory)
        if memory == "sharded":  # the first rank writes all of the state
            return int((held.stored + 12) * sum(s.weights for s in self.sizes))
        return int((held.stored + self.fused * (held.stored + held.moments)) * sum(s.weights for s in self.sizes))

    @property
    def _stream(self) -> int:
        """Hidden states of all windows, and what blocks lend behind them."""
        return self._of_all(self.hidden + self.stream.numbers)

    def _of_all(self, numbers: int) -> int:
        """Bytes of so many numbers for every token."""
        return 0 if self.shape is None else self.shape[0] * self.shape[1] * numbers * self.item

    def _streams(self, side_by_side: int) -> int:
        """How many of these there are at a time: a chain of inputs and targets, and what the quantised model has."""
        if self.shape is None:
            return 0
        q = int(self.recipe.quantised_stream)
        rounded = self.recipe.sees_original + (side_by_side if self.learned is not None else 1) + 2 * q
        return max(side_by_side + 1 + q, rounded) + int(self.end_to_end is not None)

    def _peak(self, windows: int, side_by_side: int, memory: FitMemory | None) -> float:
        """Of all stages but an end-to-end fit, activations between blocks apart."""
        tokens, divided = windows * (self.shape[1] if self.shape else 0), memory == "sharded"
        s = max(self.sizes, key=lambda s: s.weights)
        # Of weights that ranks divide, blocks that are not divided yet, and the one that is whole again.
        before, whole = (4 * s.weights * side_by_side * distributed.size(), 4 * s.weights) if divided else (0, 0)
        fold = 12 * s.weights + 22 * s.largest + whole  # float64, a site at a time
        solve = 4 * s.weights + 16 * s.largest + (16 * s.widest**2 if self.recipe.hessian else 0)
        passes = tokens * self.item * (2 * s.inputs + s.outputs)
        moved = 4 + 12 * self.moves_weights  # bytes a weight: with its gradient and both moments of AdamW
        fit = side_by_side * (moved * s.weights + self.step.kept(s, tokens) + self.step.made(s)) if self.fits else 0
        fit += before
        learn = self.step.learning(s, tokens) if self.learned is not None else 0
        return self._resident(memory) + max(fold, solve + passes, learn, fit, self.rounded_ends.made)

    def _resident(self, memory: FitMemory | None) -> float:
        """Weights of all blocks, where they are on the device at once."""
        return self._held(memory).stored * sum(b.weights for b in self.sizes) if self.all_blocks else 0

    def _whole_fit(self, end: EndToEndSpec, windows: int, memory: FitMemory | None, *, recompute: bool) -> float:
        """Of an end-to-end fit, likewise. Ranks divide its windows."""
        windows = min(windows, math.ceil(end.batch_size / distributed.size()))
        tokens, divided = windows * (self.shape[1] if self.shape else 0), memory == "sharded"
        s = max(self.sizes, key=lambda s: s.weights)
        weights, held = sum(b.weights for b in self.sizes), self._held(memory)
        chain = len(self.sizes) * tokens * self.hidden * self.item
        narrow = held.stored < 4 and not divided  # a step computes with a copy in float32
        kept = max(self.step.kept(b, tokens) + 4 * narrow * b.weights for b in self.sizes)
        left = 0.0 if recompute else sum(self.step.left(b, tokens) + 4 * narrow * b.weights for b in self.sizes)
        gradients = held.gradient * weights
        if held.moments and not held.gradient:  # of one site at a time, or of all where they add up
            gradients = 2 * (weights if windows < len(distributed.share(end.batch_size)) else s.largest)
            gradients += 4 * s.largest * (distributed.size() > 1)  # ranks sum it in float32
        # Where the model ends, with both moments; where its backward pass does, with gradients as well.
        top = self.step.copies.logits * tokens * self.vocab + left
        bottom = gradients + kept + self.step.made(s) + GATHERED * divided * 4 * s.weights
        fit = chain + held.moments * weights + max(top, bottom)
        if self.dtype_changes:
            fit += self.item * self.vocab * self.hidden  # the head's weight
        return self._resident(memory) + fit
