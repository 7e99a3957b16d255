"""How a run is laid out in memory: what it will need, counted from shapes before it starts, and what it does about it.

The count follows the stages (text, fit, fold, round) of the largest block and takes the largest. Of a fit it knows how
many copies of weights and of activations the passes of `FitSite` and of a transformer block leave for the backward
pass; those factors are counted from the code and held to measured peaks by tests. Host memory is that of the process:
what it has when the run starts (Python, torch, transformers) is measured, not counted. It is an estimate: a family with
wider attention, or a library that needs workspace, is off by that.

Where a limit is short, in this order: blocks are computed again in an end-to-end fit's backward pass; fewer blocks side
by side; activations in host memory, else in a file; a batch in parts; weights in an end-to-end fit in 5 bytes instead
of 16, if the recipe leaves that to us. All but the last two leave every bit as it is.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flatquant import distributed
from flatquant.calibrate.activations import Place
from flatquant.errors import CalibrationError, SpecError
from flatquant.ops.adam import BLOCK
from flatquant.spec import BlockPlan, EndToEndSpec, FitMemory, Plan, Recipe
from flatquant.wiring.arch import submodule
from flatquant.wiring.plan import rotates_residual
from flatquant.wiring.residual import ROWS
from flatquant.writing import writing_bytes

FULL_STEP = 1 << 25  # hidden-state elements that fill a large GPU
MOST_TOGETHER = 6  # blocks, for their memory
SPENT_ON_SPEED = 3  # an end-to-end fit keeps what blocks compute where that fits in a third of the free memory
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_MMAP_THRESHOLD = -3  # of glibc's malloc.h
# Host memory that libraries take after the run has started, and what the C library keeps of tensors that are gone.
_LIBRARIES, _CUDA_LIBRARIES = 24 << 20, 1 << 30
_FRAGMENTS = 1.1
_DECIMAL = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def parse_bytes(text: str) -> int:
    """`20GiB`, `800MB` or a number of bytes.

    Raises:
        SpecError: something else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?", text.strip().upper())
    size = 0
    if match is not None and (match[2] or not match[3]):
        size = int(float(match[1]) * (_UNITS if match[3] else _DECIMAL)[match[2]])
    if size < 1:
        raise SpecError(f"memory {text!r}: give something like 20GiB, 800MB, or bytes")
    return size


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bytes to stay within; None is what is free when the run starts. On a CPU, the device is the host."""

    device: int | None = None
    host: int | None = None


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a run will need, in bytes counted from shapes, and how it is laid out.

    Attributes:
        device: peak on the device: tensors, without what libraries take for themselves.
        host: peak of the process: the libraries, the model (or its two ends and a block), and activations that lie
            there. Of a run on a CPU everything, `device` included.
        disk: the state and the output folder together, and activations that lie there.
        place: where activations lie between blocks.
        windows: of a batch that a fit works on at a time.
        side_by_side: blocks that are fitted at a time.
        recompute: an end-to-end fit computes each block again in the backward pass, and keeps nothing but its input.
        memory: how an end-to-end fit holds the weights (`EndToEndSpec.memory`); None without one.
        streamed: whether one block's tensors are in memory at a time.
        shared: whether the device is the host.
        ranks: processes that divide the run; the bytes on device and host are those of one.
        work: what each stage costs beside the others, in the unit of `calibrate.work`.
    """

    device: int
    host: int
    disk: int
    place: Place
    windows: int
    side_by_side: int
    streamed: bool
    shared: bool
    recompute: bool = False
    memory: FitMemory | None = None
    ranks: int = 1
    work: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        """One line for people."""
        batch = f"{self.windows} window{'s' if self.windows > 1 else ''} at a time"
        blocks = f"{self.side_by_side} blocks side by side" if self.side_by_side > 1 else "one block at a time"
        where = {"device": "on the device", "host": "in host memory", "disk": "in a file"}[self.place]
        memory = f"{_size(self.host)} in memory"
        if not self.shared:
            memory = f"{_size(self.device)} on the device, {_size(self.host)} in host memory"
        weights = "" if self.memory in (None, "full") else f", {_HELD[self.memory]}"
        each = f" of each of {self.ranks} ranks" if self.ranks > 1 else ""
        return (
            f"estimate{each}, counted from shapes: {memory}, {_size(self.disk)} on disk; {blocks}"
            f"{', streamed' if self.streamed else ''}, {batch}, activations {where}{weights}"
        )


_HELD: dict[FitMemory, str] = {
    "full": "weights trained in float32",
    "compact": "weights trained in 5 bytes each",
    "transforms": "weights not trained",
}


def _size(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 1 << 30 else f"{size / 2**20:.1f} MiB"


def splits(batch: int, windows: int) -> int:
    """Equal parts that a batch is taken in, so that none has more than `windows`."""
    return next(k for k in range(1, batch + 1) if batch % k == 0 and batch // k <= max(windows, 1))


def full_step(seqlen: int, hidden: int) -> int:
    """Windows whose hidden states are enough work at a time for a GPU."""
    return max(1, FULL_STEP // (seqlen * hidden))


def check_streamable(recipe: Recipe) -> None:
    """Raise CalibrationError if a recipe cannot have one block in memory at a time."""
    if why := needs_all_blocks(recipe):
        raise CalibrationError(f"{why}, so that the model cannot be streamed; load it whole (--no-stream)")


def needs_all_blocks(recipe: Recipe) -> str:
    """Why a recipe cannot have one block in memory at a time; empty if it can."""
    if recipe.end_to_end is not None and recipe.end_to_end.steps:
        return "an end-to-end fit runs through all blocks at once"
    if recipe.solver.hessian == "output_adaptive" and recipe.scheme.weights is not None:
        return "output-adaptive Hessians need the gradient through all blocks"
    return ""


# ------------------------------------------------------------------------------------------------- counting


@dataclass(frozen=True, kw_only=True)
class _Sizes:
    """Numbers of a block: elements, but for `stored`, which are bytes."""

    weights: int  # of linears that are fitted
    largest: int  # of these, at one site
    widest: int  # inputs of a site
    inputs: int  # of all sites, a token
    outputs: int  # of all sites, a token
    dense: int  # n^2 of the sites whose transform becomes one matrix on a GPU
    stored: int  # as a model's tensors
    packed: int  # as it is saved
    rounded: int  # as the state has it: an integer a byte

    @classmethod
    def of(cls, block: nn.Module, plan: BlockPlan) -> _Sizes:
        widths = [site.shape[0] * site.shape[1] for site in plan.sites.values()]
        weights = linear_weights(block, plan)
        rows = [w // n for w, n in zip(weights, widths, strict=True)]
        stored = sum(p.nbytes for p in block.parameters())
        item = min(p.element_size() for p in block.parameters())  # routers may be in float32
        grids = [
            o * (n // (site.weights.group_size or n)) * 4 if site.weights else 0
            for o, n, site in zip(rows, widths, plan.sites.values(), strict=True)
        ]
        rest = stored - item * sum(weights)
        bits = [site.weights.bits if site.weights else 8 * item for site in plan.sites.values()]
        whole = [8 if site.weights else b for b, site in zip(bits, plan.sites.values(), strict=True)]
        factors = sum(4 * (s.shape[0] ** 2 * s.left + s.shape[1] ** 2 * s.right) for s in plan.sites.values())
        return cls(
            weights=sum(weights),
            largest=max(weights),
            widest=max(widths),
            inputs=sum(widths),
            outputs=sum(rows),
            dense=sum(n * n for n in widths if n <= 2048),
            stored=stored,
            packed=rest + factors + sum(grids) + sum(w * b // 8 for w, b in zip(weights, bits, strict=True)),
            rounded=rest + factors + sum(grids) + sum(w * b // 8 for w, b in zip(weights, whole, strict=True)),
        )


@dataclass(frozen=True, kw_only=True)
class _Head:
    """Bytes of a rounded output layer."""

    rounded: int = 0  # an integer a byte
    packed: int = 0
    replaced: int = 0  # of the matrix that is gone then: none where it is the embeddings

    @classmethod
    def of(cls, model: PreTrainedModel, plan: Plan) -> _Head:
        if plan.head is None:
            return cls()
        weight, spec = submodule(model, plan.head.path).weight, plan.head.weights
        assert isinstance(weight, Tensor)
        grids = 4 * weight.numel() // (spec.group_size or weight.shape[1])
        return cls(
            rounded=weight.numel() + grids,
            packed=weight.numel() * spec.bits // 8 + grids,
            replaced=0 if plan.head.tied else weight.nbytes,
        )


def linear_weights(block: nn.Module, plan: BlockPlan) -> list[int]:
    """Weights of the linears at every site of a block."""
    rows = [
        sum(int(getattr(submodule(block, path), "out_features")) for path in site.readers)  # noqa: B009
        for site in plan.sites.values()
    ]
    return [o * site.shape[0] * site.shape[1] for o, site in zip(rows, plan.sites.values(), strict=True)]


@dataclass(frozen=True, kw_only=True)
class WeightBytes:
    """What an end-to-end fit keeps of each weight on the device, in bytes."""

    stored: float
    moments: float = 0.0  # and what else its optimiser keeps
    gradient: float = 0.0  # of all weights at once

    @classmethod
    def of(cls, spec: EndToEndSpec, memory: FitMemory, model: torch.dtype) -> WeightBytes:
        """Of weights that are held so; `model` is the dtype of its tensors."""
        moves = spec.moves_weights(memory)
        if memory == "full":
            return cls(stored=4, moments=8 * moves, gradient=4 * moves)
        if moves:
            return cls(stored=2, moments=3 + 8 / BLOCK)
        return cls(stored=min(4, model.itemsize))


# Copies of a number that the backward pass of a fit keeps, and that its largest step makes besides. Fused: one kernel
# rounds, products are in half precision.
@dataclass(frozen=True, kw_only=True)
class _Copies:
    kept: float  # of a weight, 4 bytes each
    made: float  # of a weight of the largest site, 4 bytes each
    inputs: float  # of a site's input
    outputs: float  # of a site's output
    hidden: float  # of the residual stream, 4 bytes each
    saved: float = 1.0  # share of these that the forward pass alone leaves
    logits: float = 28.0  # bytes a logit of an end-to-end fit


_EAGER = _Copies(kept=4, made=6, inputs=5, outputs=3, hidden=10)
# Of seven whole runs on an H100 (calibration-h100.json, proof-*.json), the estimate is 1.01 to 1.18 times the peak; of
# four end-to-end fits on an H200 (ladder-*.json, two at other commits), 1.07 to 1.14 times.
_FUSED = _Copies(kept=2.5, made=3.5, inputs=3, outputs=2, hidden=8, saved=0.5, logits=11.0)
# Of a folded block whose rounding is learned, with weights alone on a grid, and with activations too.
_LEARNED = _Copies(kept=2, made=1, inputs=1, outputs=1, hidden=5)
_ROUNDED = replace(_LEARNED, inputs=4)


def estimate(
    model: PreTrainedModel,
    plan: Plan,
    recipe: Recipe,
    *,
    shape: tuple[int, int] | None,
    device: torch.device,
    dtype: torch.dtype,
    limits: Limits,
    streamed: bool = False,
    side_by_side: int | None = None,
    windows: int | None = None,
    memory: FitMemory | None = None,
    written: int = 0,
    copied: bool = False,
) -> Estimate:
    """Count what a run will need, and lay it out within limits.

    Args:
        shape: of the calibration tokens, (N, T); None for a recipe that reads none.
        dtype: of the fit's products.
        limits: what is not given is what is free now.
        side_by_side, windows, memory: fixed, where given.
        written: calibration windows that the model writes before anything else; no limit holds for that.
        copied: whether a float32 copy of the model writes the report's texts; nor for that.

    Raises:
        CalibrationError: a given limit is less than the least that the run needs.
    """
    device_limit = free_device(device) if limits.device is None else limits.device  # first: this loads CUDA
    count = _Count(model, plan, recipe, shape, device, dtype, streamed)
    most = count.batch if windows is None else windows
    parts = [most] if windows is not None else [w for w in range(most, 0, -1) if count.batch % w == 0]
    together = [side_by_side or count.together]
    if side_by_side is None:
        together = list(range(count.together, 0, -1))
    on_gpu = device.type == "cuda"
    if not on_gpu:  # all is the host's
        given = [limit for limit in (limits.device, limits.host) if limit is not None]
        limits = Limits(host=min(given, default=None))
        device_limit = None
    host_limit = limits.host
    if host_limit is None and (free := free_host_bytes()) is not None:
        host_limit = free + resident_bytes()
    places: tuple[Place, ...] = ("device", "host", "disk") if on_gpu else ("device", "disk")

    def with_text(layout: Estimate) -> Estimate:
        layout = count.with_text(layout, written) if written else layout
        return count.with_copy(layout) if copied else layout

    memories: list[FitMemory | None] = count.memories if memory is None else [memory]
    if count.recomputes:
        roomy = count.layout("device", parts[0], together[0], recompute=False, memory=memories[0])
        # What is free is for others too, unless a limit says otherwise.
        share = 1 if (limits.device if on_gpu else limits.host) is not None else SPENT_ON_SPEED
        fits = _within(share * roomy.device, device_limit) if on_gpu else _within(share * roomy.host, host_limit)
        if fits and _within(roomy.host, host_limit):
            return with_text(roomy)
    least: Estimate | None = None
    # What is given up first varies fastest.
    for held in memories:
        for w, place, k in product(parts, places, together):
            if place != "device" and k != together[-1]:
                continue  # blocks side by side read one another's rows: they would be brought twice
            least = count.layout(place, w, k, recompute=count.recomputes, memory=held)
            if _within(least.device, device_limit) and _within(least.host, host_limit):
                return with_text(least)
    assert least is not None
    # What is free is taken as a wish: an estimate must not stop a run that might go well.
    if not (_within(least.device, limits.device) and _within(least.host, limits.host)):
        raise CalibrationError(
            f"by an estimate from shapes the run needs at least {_size(least.device)} on the device and "
            f"{_size(least.host)} in host memory, more than was allowed; raise the limit, or use a smaller --seqlen"
            + ("" if streamed or needs_all_blocks(recipe) else ", or --stream")
        )
    return with_text(least)


def _within(size: int, limit: int | None) -> bool:
    return limit is None or size <= limit


class _Count:
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
        self.sizes = [_Sizes.of(block, p) for block, p in zip(blocks, plan.blocks, strict=True)]
        config = model.config.get_text_config()
        self.hidden, self.vocab = config.hidden_size, config.vocab_size
        self.item = dtype.itemsize
        parameters = list(model.parameters())
        whole = sum(p.nbytes for p in parameters)
        present = sum(p.nbytes for p in parameters if p.device.type == "cpu")
        warm = device.type == "cuda" and torch.cuda.memory_reserved(device)
        libraries = _CUDA_LIBRARIES if device.type == "cuda" and not warm else _LIBRARIES
        self.base = max(0, resident_bytes() - present) + libraries
        ends = self.vocab * self.hidden
        # Both ends rotated, beside what they were, and the rows of one in float64.
        stored = 3 * ends * model.dtype.itemsize + 16 * min(ends, ROWS * self.hidden)
        self.rotation = stored if rotates_residual(recipe, plan, force=False) else 0
        self.fragments = 1.0 if streamed else _FRAGMENTS  # `return_freed_memory`
        self.dtype_changes = device.type == "cuda" or any(p.dtype != dtype for p in parameters)
        self.ends = whole - sum(s.stored for s in self.sizes)
        self.head = _Head.of(model, plan)
        self.fused = device.type == "cuda"
        self.copies = _FUSED if self.fused else _EAGER
        fit = recipe.fit if recipe.fit is not None and recipe.fit.epochs else None
        self.end_to_end = recipe.end_to_end if recipe.end_to_end is not None and recipe.end_to_end.steps else None
        end = self.end_to_end
        self.memories: list[FitMemory | None] = [None]
        if end is not None:
            self.memories = ["full", "compact"] if end.memory == "auto" else [end.memory]
        rounds = recipe.scheme.weights is not None
        self.recomputes = self.end_to_end is not None and self.end_to_end.checkpoint
        self.learned = recipe.solver.learned if rounds and recipe.solver.learns else None
        self.rounds_inputs = any(site.activations is not None for block in plan.blocks for site in block.sites.values())
        batches = [spec.batch_size for spec in (fit, self.end_to_end, self.learned) if spec is not None]
        self.fits = fit is not None and recipe.needs_data
        self.moves_weights = fit is not None and fit.weight_lr > 0
        self.batch = max(batches, default=4)
        feeds = fit is not None and fit.inputs == "quantised"
        hessian = recipe.solver.needs_hessian and rounds
        self.sees_original = rounds and recipe.solver.inputs == "original"
        grams = hessian and not self.sees_original
        self.quantised, self.all_blocks = feeds or grams or self.learned is not None, bool(needs_all_blocks(recipe))
        self.hessian = hessian
        self.together = 1
        waits = feeds or recipe.solver.hessian == "output_adaptive"
        if self.fused and shape is not None and not waits and not streamed:
            fill = full_step(shape[1], self.hidden) // self.batch
            self.together = max(1, min(MOST_TOGETHER, len(blocks), fill))

    def layout(
        self, place: Place, windows: int, side_by_side: int, *, recompute: bool, memory: FitMemory | None
    ) -> Estimate:
        """What the run needs, laid out so."""
        kept = self._streams(side_by_side) * self._stream
        peak = self._peak(windows, side_by_side, recompute, memory) + (kept if place == "device" else 0)
        packed, rounded = sum(s.packed for s in self.sizes), sum(s.rounded for s in self.sizes)
        host = self.base + self.ends + self.head.rounded + self._copied(memory) + (kept if place == "host" else 0)
        ends = self.ends + self.head.packed - self.head.replaced
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
        return WeightBytes.of(self.end_to_end, memory, self.model.dtype)

    def _copied(self, memory: FitMemory | None) -> int:
        """Of an end-to-end fit that moves weights, on the host: the weights before it, which may have to come back; and
        from a GPU what a state is written from."""
        if self.end_to_end is None or memory is None or not self.end_to_end.moves_weights(memory):
            return 0
        held = self._held(memory)
        return int((held.stored + self.fused * (held.stored + held.moments)) * sum(s.weights for s in self.sizes))

    @property
    def _stream(self) -> int:
        """Hidden states of all windows."""
        return 0 if self.shape is None else self.shape[0] * self.shape[1] * self.hidden * self.item

    def _streams(self, side_by_side: int) -> int:
        """How many of these there are at a time: a chain of inputs and targets, and what the quantised model has."""
        if self.shape is None:
            return 0
        q = int(self.quantised)
        rounded = self.sees_original + (side_by_side if self.learned is not None else 1) + 2 * q
        return max(side_by_side + 1 + q, rounded) + int(self.end_to_end is not None)

    def _peak(self, windows: int, side_by_side: int, recompute: bool, memory: FitMemory | None) -> float:
        tokens = windows * (self.shape[1] if self.shape else 0)
        s = max(self.sizes, key=lambda s: s.weights)
        weights, held = sum(b.weights for b in self.sizes), self._held(memory)
        resident = held.stored * weights if self.all_blocks else 0
        fold = 12 * s.weights + 22 * s.largest  # float64, a site at a time
        solve = 4 * s.weights + 16 * s.largest + (16 * s.widest**2 if self.hessian else 0)
        passes = tokens * self.item * (2 * s.inputs + s.outputs)
        moved = 4 + 12 * self.moves_weights  # bytes a weight: with its gradient and both moments of AdamW
        fit = side_by_side * (moved * s.weights + self._kept(s, tokens) + self._made(s)) if self.fits else 0
        learn = self._learning(s, tokens) if self.learned is not None else 0
        end = 0
        if self.end_to_end is not None:
            chain = len(self.sizes) * tokens * self.hidden * self.item
            narrow = held.stored < 4  # a step computes with a copy in float32
            kept = [self._kept(b, tokens) + 4 * narrow * b.weights for b in self.sizes]
            left = 0 if recompute else self.copies.saved * sum(kept)
            gradients = held.gradient * weights
            if held.moments and not held.gradient:  # of one site at a time, or of all where they add up
                gradients = 2 * (weights if windows < self.end_to_end.batch_size else s.largest)
            # Where the model ends, with both moments; where its backward pass does, with gradients as well.
            top = self.copies.logits * tokens * self.vocab + left
            bottom = gradients + max(kept) + self._made(s)
            end = chain + held.moments * weights + max(top, bottom)
            if self.dtype_changes:
                end += self.item * self.vocab * self.hidden  # the head's weight
        return resident + max(fold, solve + passes, learn, fit, end)

    def _kept(self, s: _Sizes, tokens: int) -> float:
        """What a block's forward pass leaves for its backward pass."""
        c = self.copies
        return 4 * (s.weights * c.kept + (3 * s.dense if self.fused else 0)) + tokens * self._a_token(c, s)

    def _learning(self, s: _Sizes, tokens: int) -> float:
        """A step of learned rounding: beside the weights their offsets, the gradients of these, and the best so far."""
        c = _ROUNDED if self.rounds_inputs else _LEARNED
        return 4 * (s.weights * (4 + c.kept) + s.largest * c.made) + tokens * self._a_token(c, s)

    def _a_token(self, c: _Copies, s: _Sizes) -> float:
        """What a step keeps of each token's activations in a block."""
        return self.item * (c.inputs * s.inputs + c.outputs * s.outputs) + 4 * c.hidden * self.hidden

    def _made(self, s: _Sizes) -> float:
        """What the largest step of a backward pass makes."""
        return 4 * s.largest * self.copies.made


# ------------------------------------------------------------------------------------------------- what there is


def resident_bytes() -> int:
    """Host memory that the process has now; 0 where the system does not say."""
    return _status("VmRSS")


def peak_resident_bytes() -> int | None:
    """The most host memory that the process has had; None where the system does not say."""
    if found := _status("VmHWM"):
        return found
    try:
        import resource
    except ImportError:  # Windows
        return None
    # On Linux this would count what the parent had when it started the process.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _status(key: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), 0)


def free_host_bytes() -> int | None:
    """Host memory that can be had: the least of what the kernel and the process's control group say.

    Ranks on one host have equal parts of it.
    """
    found = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    except (OSError, ValueError, IndexError):
        pass
    try:
        group = Path("/sys/fs/cgroup")
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        if limit != "max":
            # Pages of files count as used, and are given up when memory is short.
            cached = dict(line.split() for line in (group / "memory.stat").read_text().splitlines()).get("file", "0")
            found.append(max(0, int(limit) - int(used) + int(cached)))
    except (OSError, ValueError):
        pass
    if not found and hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(found) // distributed.local_size() if found else None


def return_freed_memory() -> None:
    """From now on, let the C library return the memory of large tensors to the kernel as soon as they are freed.

    Left to itself, it keeps more and more of it, between what lives: a process that streams a model grows by half of
    every block.
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library has no such function
            ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 1 << 18)


def free_device(device: torch.device) -> int | None:
    """Bytes that tensors on a CUDA device may still take; None on the host."""
    if device.type != "cuda":
        return None
    ours = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch's, and free again
    return torch.cuda.mem_get_info(device)[0] + ours


@contextmanager
def capped(device: torch.device, limits: Limits) -> Iterator[None]:
    """Make torch refuse device memory beyond a limit, so that it is one."""
    if device.type != "cuda" or limits.device is None:
        yield
        return
    index = torch.cuda.current_device() if device.index is None else device.index
    total = torch.cuda.mem_get_info(index)[1]
    torch.cuda.set_per_process_memory_fraction(min(1.0, limits.device / total), index)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, index)
