"""A model through all stages: capture, fit block by block, fit end to end, fold, solve; resumable after each block.

Two streams of hidden states run through the model: full precision (inputs and targets of the fit, targets of learned
rounding) and quantised (the inputs of solvers that use a Hessian, and of learned rounding). One block is on the device
at a time unless an end-to-end fit or a Hessian of the model's loss needs them all. With a checkpoint, one block is in
memory at all: its tensors are read when its turn comes, and forgotten when the state has it solved.

Several ranks (`flatquant.distributed`) divide the blocks among them, a group of neighbours at a time. Every rank runs
the original blocks itself; one of them fits and rounds a block, and the others receive it, as a resumed run receives
blocks from its state. So a block has the same bits on any number of ranks. An end-to-end fit has all blocks on every
rank, and a part of each step's windows.
"""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from flatquant import distributed, seams
from flatquant.calibrate.activations import Kept, mapped, room
from flatquant.calibrate.blockwise import (
    BlockFit,
    Fitted,
    HeldOut,
    autocast,
    fit_blocks,
    held_out_windows,
    named,
    safer,
    wide,
)
from flatquant.calibrate.capture import BlockCall, Observer, capture, run_block
from flatquant.calibrate.end2end import FittedModel, HeldOutModel, fit_end_to_end, stored_dtype
from flatquant.calibrate.gradients import output_hessians
from flatquant.calibrate.memory import (
    Estimate,
    Limits,
    WeightBytes,
    capped,
    check_streamable,
    estimate,
    full_step,
    splits,
)
from flatquant.calibrate.optimise import deterministic
from flatquant.calibrate.rounding import learn_rounding
from flatquant.calibrate.samples import Samples, Windows
from flatquant.calibrate.solve import make_solver, solve_block
from flatquant.calibrate.state import RunState
from flatquant.calibrate.witness import Witness
from flatquant.errors import CalibrationError, FitWarning, FlatQuantError
from flatquant.models import Checkpoint
from flatquant.modules import cast, in_float32
from flatquant.progress import Progress
from flatquant.runtime.build import install
from flatquant.runtime.experts import Experts, open_experts
from flatquant.spec import EndToEndSpec, FitMemory, Plan, QuantSpec, Recipe, RoundingSpec
from flatquant.wiring.arch import Geometry, logits, submodule
from flatquant.wiring.archs import arch_of
from flatquant.wiring.fitted import FitBlock, InputStatistics, observing, unrounded_weights
from flatquant.wiring.fold import fold_block
from flatquant.wiring.head import round_head, with_head
from flatquant.wiring.plan import make_plan, takes_mean
from flatquant.wiring.residual import residual_factor, rotate_ends
from flatquant.wiring.wrap import wrap_block


@dataclass(kw_only=True)
class Report:
    """What happened, for `flatquant_report.json`. Seconds are wall time, memory is peak bytes on the device."""

    blocks: list[dict[str, Any]] = field(default_factory=list)
    end_to_end: FittedModel | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory: int | None = None


@dataclass(kw_only=True)
class Clock:
    """Adds wall time to a report's stages."""

    seconds: dict[str, float]
    device: torch.device

    def __call__(self, stage: str) -> _Span:
        return _Span(self, stage)


@dataclass
class _Span:
    clock: Clock
    stage: str
    start: float = 0.0

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        if self.clock.device.type == "cuda":
            torch.cuda.synchronize(self.clock.device)
        elapsed = time.perf_counter() - self.start
        self.clock.seconds[self.stage] = self.clock.seconds.get(self.stage, 0.0) + elapsed


def calibrate(
    model: PreTrainedModel,
    recipe: Recipe,
    tokens: Windows | None,
    *,
    device: torch.device,
    dtype: torch.dtype,
    seed: int = 0,
    state: RunState | None = None,
    progress: Progress | None = None,
    graph: bool = True,
    side_by_side: int | None = None,
    limits: Limits | None = None,
    layout: Estimate | None = None,
    checkpoint: Checkpoint | None = None,
    witness: Witness | None = None,
    held_out: Windows | None = None,
) -> tuple[Plan, Report]:
    """Quantise `model` in place: its blocks end up with frozen linears, its attention with the quantised cache seam,
    its output layer with a frozen linear if the scheme has a grid for it.

    Args:
        tokens: calibration windows, int64, (N, T), or samples with images; None for recipes that need none.
        device: where blocks are fitted; the model returns to where it was.
        dtype: of matrix products during the fit (parameters are float32).
        state: finished blocks are kept there and taken from there. Of several ranks, the first has one.
        progress: called with (stage, done, total): "capture" counts windows, "fit" epochs of all blocks, "end to end"
            steps, "full precision", "fold" and "solve" blocks.
        graph: on CUDA, replay steps from CUDA graphs.
        side_by_side: blocks fitted at a time; by default as many as it takes to fill a GPU, and one on a CPU.
        limits: memory to stay within; by default what is free.
        layout: in memory, as `estimate` gave it; by default one within `limits`.
        checkpoint: where a block's tensors come from when its turn comes; the model's blocks are on the meta device,
            and are there again afterwards: `state` has them.
        witness: sends windows of its own through every block before and after.
        held_out: windows that no fit is trained on, int64, (M, T'): a fit that ends worse on them than it began is
            undone. By default the first of `tokens`. Too few tokens decide nothing.

    Raises:
        CalibrationError: NaN in a block (named); data missing; a memory limit that the estimate does not keep.
        ModelError, SpecError: the recipe does not fit the model.
    """
    arch = arch_of(model.config, model)
    blocks = submodule(model, arch.blocks)
    assert isinstance(blocks, nn.ModuleList)
    open_experts(blocks)
    blocks.requires_grad_(False)  # only transforms, scales and clips are fitted
    plan = with_head(make_plan(recipe, arch, Geometry.of(model.config), blocks), recipe.scheme, model)
    if recipe.needs_data and tokens is None:
        raise CalibrationError(f"the recipe {recipe.name} needs calibration text")
    if isinstance(tokens, Samples):
        _check_samples(recipe)
    if checkpoint is not None:
        assert state is not None or not distributed.leads(), "a streamed run keeps its blocks in a state"
        check_streamable(recipe)
    limits = limits or Limits()
    if layout is None:
        layout = estimate(
            model,
            plan,
            recipe,
            shape=None if tokens is None else (tokens.shape[0], tokens.shape[1]),
            device=device,
            dtype=dtype,
            limits=limits,
            streamed=checkpoint is not None,
            side_by_side=side_by_side if side_by_side or graph else 1,
        )
    progress = progress or (lambda *_: None)
    told = None
    if tokens is not None and recipe.fits:
        told = _held_out(tokens if held_out is None else held_out, len(tokens))
    run = _Run(
        model, recipe, plan, tokens, device, dtype, seed, state, progress, graph, layout, checkpoint, witness, told
    )
    with capped(device, limits):
        return plan, run()


def _check_samples(recipe: Recipe) -> None:
    """Raise CalibrationError if a recipe learns from how well tokens are predicted: an image's are not."""
    predicts = recipe.end_to_end is not None and recipe.end_to_end.objective == "cross_entropy"
    if predicts or recipe.solver.hessian == "output_adaptive":
        raise CalibrationError(
            f"the recipe {recipe.name} learns from the text's cross entropy, which samples with images do not have; "
            "calibrate it with text"
        )


def _held_out(windows: Windows, samples: int) -> Witness | None:
    """What tells whether fits have helped."""
    count = held_out_windows(samples, windows.shape[1])
    return Witness(windows[:count]) if count else None


@dataclass(frozen=True, kw_only=True)
class _Wrapped:
    """A block on its way: wrapped, its full-precision inputs and outputs.

    `fit` is None if an earlier run solved the block, or another rank fits it, or once it is rounded.
    """

    index: int
    owner: int  # the rank that fits and rounds it
    call: BlockCall
    fit: FitBlock | None
    inputs: Kept | None  # (N, T, h), None if the recipe reads no text
    targets: Kept | None
    second: Kept | None = None  # outputs on the inputs that the quantised blocks before give
    held_out: HeldOut | None = None


class _Run:
    """One calibration; holds what its stages share."""

    def __init__(
        self,
        model: PreTrainedModel,
        recipe: Recipe,
        plan: Plan,
        tokens: Windows | None,
        device: torch.device,
        dtype: torch.dtype,
        seed: int,
        state: RunState | None,
        progress: Progress,
        graph: bool,
        layout: Estimate,
        checkpoint: Checkpoint | None,
        witness: Witness | None,
        held_out: Witness | None,
    ) -> None:
        self.model, self.recipe, self.plan = model, recipe, plan
        self.witness, self.held_out = witness, held_out  # what the result, and what fits are measured on
        self.arch = arch_of(model.config, model)
        self.blocks = list(submodule(model, self.arch.blocks).children())
        self.tokens, self.device, self.dtype, self.seed = tokens, device, dtype, seed
        # A graph replays one shape and one mask: an expert's tokens differ from step to step, and samples' masks.
        graph = (
            graph
            and not isinstance(tokens, Samples)
            and not any(isinstance(m, Experts) for block in self.blocks for m in block.modules())
        )
        self.state, self.progress, self.graph = state, progress, graph
        self.home = next(model.parameters()).device
        self.model_dtype = next(model.parameters()).dtype
        self.told: dict[int, list[list[str]]] = {}  # warnings of blocks that this rank has rounded, for the first rank
        self.wide: dict[int, set[str]] = {}  # of each block on the device, what is in float32 for its own sake: routers
        generator = torch.Generator().manual_seed(seed * 1_000_003 + len(self.blocks))  # one that no block has
        self.residual = residual_factor(model, recipe, plan, generator)
        if self.residual is not None:
            self.residual.to(device)
        self.solver = make_solver(recipe.solver)
        self.layout, self.checkpoint, self.side_by_side = layout, checkpoint, layout.side_by_side
        self.report = Report()
        self.notes: dict[int, dict[str, Any]] = {}  # by block
        self.routed: dict[int, dict[str, Any]] = {}  # likewise, where there are experts
        self.clock = Clock(seconds=self.report.seconds, device=device)
        self.kept = set(distributed.broadcast(({}, [] if state is None else state.names()))[1])  # by an earlier run
        self.end_to_end = recipe.end_to_end if recipe.end_to_end and recipe.end_to_end.steps else None
        self.memory: FitMemory = layout.memory or "full"
        self.feeds_fit = recipe.fit is not None and recipe.fit.epochs > 0 and recipe.fit.inputs == "quantised"
        solver, rounds = recipe.solver, recipe.scheme.weights is not None
        self.learned = solver.learned if rounds and solver.learns else None
        self.sees_original = rounds and solver.inputs == "original"  # what Gram matrices are of
        grams = rounds and solver.needs_hessian and not self.sees_original
        self.quantised_stream = self.feeds_fit or grams or self.learned is not None
        self.output_adaptive = self.solver.needs_hessian and recipe.solver.hessian == "output_adaptive"
        self.output_adaptive &= recipe.scheme.weights is not None

    def __call__(self) -> Report:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            if self.end_to_end is not None:
                check_room(
                    resident_bytes(self.blocks, self.end_to_end, self.memory, self.recipe.scheme.weights),
                    torch.cuda.mem_get_info(self.device)[0],
                )
        seams.use_attention(self.model, self.plan.attention)
        together = 0 if self.tokens is None else self.batch * self.tokens.shape[1]
        for seen in (self.witness, self.held_out):
            if seen is not None:
                seen.begin(self.model, self.arch, self.device, self.dtype, together)
        first, calls = self._capture()
        if self.output_adaptive:
            for index in range(len(self.blocks)):
                self._bring(index)
        quantised = first if self.quantised_stream else None
        hidden = first
        fits: list[FitBlock | None] = []
        together = self.side_by_side * (1 if self.feeds_fit else distributed.size())
        for start in range(0, len(calls), together):
            group = range(start, min(start + together, len(calls)))
            wrapped, hidden = self._wrap(group, calls, hidden, quantised)
            self._fit(wrapped, quantised if self.feeds_fit else None)
            if self.end_to_end is None:
                for w in wrapped:
                    if w.fit is not None and w.inputs is not None:
                        self._observe(w.fit, w.call, w.inputs, keep=False)
            wrapped = [self._without_streams(w) for w in wrapped]
            if self.end_to_end is not None:
                fits += [self._stored(w.fit) for w in wrapped]
            else:
                first = None
                if not self.quantised_stream:  # no block waits for another: all ranks round theirs at a time
                    wrapped = [self._rounded(wrapped.pop(0), calls, None) for _ in group]
                while wrapped:
                    w = self._rounded(wrapped.pop(0), calls, quantised)
                    quantised = self._take(w.index, w.owner, calls, quantised)
        if self.end_to_end is not None:
            assert first is not None
            assert hidden is not None
            # Solved blocks are only kept on their own where no end-to-end fit follows: all are wrapped here.
            wrapped = [fit for fit in fits if fit is not None]
            rotated = [self._rotated(call) for call in calls]
            self._fit_end_to_end(self.end_to_end, wrapped, rotated, first, hidden)
            shown: Kept = first
            for index, fit in enumerate(wrapped):
                with _named(index):
                    if any(later.static_grids() for later in wrapped[index:]):
                        shown = self._observe(fit, calls[index], shown)
                    self._fold(index, fit)
            # No block is the original any more: what takes its place is the fitted model before it is rounded.
            inputs = first if self.sees_original or self.learned is not None else None
            for index in range(len(calls)):
                with _named(index):
                    targets = None
                    if inputs is not None:
                        targets = run_block(self.blocks[index], self._rotated(calls[index]), inputs, self.batch)
                    self._round(index, calls, quantised, inputs, targets)
                    quantised = self._take(index, distributed.rank(), calls, quantised)
                    inputs = targets
        self.report.blocks = [note for _, note in sorted(self.notes.items())]
        if self.residual is not None:
            rotate_ends(self.model, self.arch, self.residual)
        if self.plan.head is not None:
            with self.clock("solve"):
                round_head(self.model, self.plan.head, self.device)
            if self.witness is not None:
                self.witness.see_head(self.model, self.residual)
        if self.device.type == "cuda":
            self.report.peak_memory = torch.cuda.max_memory_allocated(self.device)
        return self.report

    def _stored(self, fit: FitBlock | None) -> FitBlock | None:
        """A block that waits for the end-to-end fit, its weights as that holds them."""
        assert self.end_to_end is not None
        dtype = stored_dtype(self.end_to_end, self.memory, self.model_dtype)
        if fit is not None and dtype is not None:
            fit.store_weights(dtype)
        return fit

    def _observe(self, fit: FitBlock, call: BlockCall, inputs: Kept, *, keep: bool = True) -> Kept:
        """Show static scales of activations what they are to cover; the block's outputs, if they are to be kept."""
        grids = fit.static_grids()
        if not grids and not keep:
            return inputs
        run = partial(_in_dtype, self.dtype, inputs.dtype, self._rotated(call).in_order(fit.block))
        with self.clock("static scales"), torch.no_grad(), autocast(self.device, self.dtype), observing(grids):
            if keep:
                return mapped(inputs, self.batch, run)
            for x in inputs.split(self.batch):
                run(x)
        return inputs

    def _without_streams(self, w: _Wrapped) -> _Wrapped:
        """A fitted block with what rounding it still needs."""
        inputs, targets = w.inputs if self.sees_original else None, w.targets if self.learned is not None else None
        return replace(w, inputs=inputs, targets=targets, second=None, held_out=None)

    def _room(self, shape: tuple[int, ...], _: torch.dtype) -> Kept:
        """For activations, in the dtype of the products: so they are kept between blocks."""
        folder = None if self.state is None else self.state.folder
        return room(shape, self.dtype, self.device, self.layout.place, folder)

    def _capture(self) -> tuple[Kept | None, list[BlockCall]]:
        if not self.recipe.needs_data:
            return None, [BlockCall(args=(), kwargs={})] * len(self.plan.blocks)
        assert self.tokens is not None
        with self.clock("capture"):
            progress = partial(self.progress, "capture")
            hidden, calls = capture(self.model, self.arch, self.tokens, self._room, progress)
            return hidden, [c.to(self.device) for c in calls]

    def _wrap(
        self, group: range, calls: list[BlockCall], hidden: Kept | None, quantised: Kept | None
    ) -> tuple[list[_Wrapped], Kept | None]:
        """Wrap the blocks of a group that no earlier run has solved; and the full-precision outputs of its last one."""
        wrapped, owners = [], self._owners(group)
        for index in group:
            ours = owners[index] == distributed.rank()
            with _named(index):
                self._bring(index)
                second = self._second(index, calls[index], quantised) if ours else None
                held_out = self._hold_out(index)
                fits = (ours or self.end_to_end is not None) and solved_name(index) not in self.kept
                inputs, (fit, hidden) = hidden, self._wrap_one(index, calls[index], hidden, fits)
                if not (ours or self.end_to_end is not None or self.output_adaptive):
                    self.blocks[index].to(self._home)
            wrapped.append(
                _Wrapped(
                    index=index,
                    owner=owners[index],
                    call=calls[index],
                    fit=fit,
                    inputs=inputs if ours else None,
                    targets=hidden if ours else None,
                    second=second,
                    held_out=held_out,
                )
            )
        return wrapped, hidden

    def _owners(self, group: range) -> dict[int, int]:
        """The rank of every block: neighbours together, and as many left to fit on one rank as on another."""
        fitted = [i for i in group if fitted_name(i) in self.kept]
        fresh = [i for i in group if fitted_name(i) not in self.kept]
        ranks = distributed.size()
        return {i: k * ranks // len(part) for part in (fresh, fitted) for k, i in enumerate(part)}

    @property
    def _home(self) -> torch.device | str:
        """Where blocks lie while nothing is done to them."""
        return self.home if self.checkpoint is None else "meta"

    def _bring(self, index: int) -> nn.Module:
        """A block onto the device, in a dtype that the fit's products take."""
        block = self.blocks[index]
        if self.checkpoint is not None:
            self.checkpoint.fill(block, f"{self.arch.blocks}.{index}.", self.device)
        block.to(self.device)
        self.wide.setdefault(index, in_float32(block))  # a block that is brought twice is in float32 by then
        if self.model_dtype != self.dtype:
            block.float()
        return block

    def _wrap_one(
        self, index: int, call: BlockCall, hidden: Kept | None, fits: bool
    ) -> tuple[FitBlock | None, Kept | None]:
        """A block wrapped, if this rank fits it, and its full-precision outputs."""
        block, plan = self.blocks[index], self.plan.blocks[index]
        targets, statistics = None, {}
        if self.witness is not None:
            with self.clock("verdict"), torch.no_grad(), autocast(self.device, self.dtype):
                self.witness.see_original(index, block)
            self.witness.rotate(index, self.residual)
        if hidden is not None:
            targets, statistics = self._full_precision(index, call, hidden, observed=fits)
            self.routed[index] = _routed(statistics)
        if not fits:
            return None, targets
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        fit = wrap_block(block, self.arch, plan, self.recipe, statistics, generator, residual=self.residual)
        if self.recipe.fit is not None and self.recipe.fit.weight_lr:
            fit.release_weights()
        return fit, targets

    def _hold_out(self, index: int) -> HeldOut | None:
        """What the original block makes of the windows that its fit is measured on."""
        if self.held_out is None:
            return None
        inputs = self.held_out.original
        with self.clock("full precision"), torch.no_grad(), autocast(self.device, self.dtype):
            self.held_out.see_original(index, self.blocks[index])
        self.held_out.rotate(index, self.residual)
        if self.feeds_fit:  # its inputs are others
            return None
        return HeldOut(call=self.held_out.calls[index], inputs=inputs, targets=self.held_out.original)

    def _second(self, index: int, call: BlockCall, quantised: Kept | None) -> Kept | None:
        """The original block's outputs on the quantised stream, if the fit minds them and is still to come."""
        done = fitted_name(index) in self.kept or solved_name(index) in self.kept
        if quantised is None or self.recipe.fit is None or not self.recipe.fit.both_targets or done:
            return None
        return self._full_precision(index, call, quantised, observed=False)[0]

    def _full_precision(
        self, index: int, call: BlockCall, hidden: Kept, *, observed: bool
    ) -> tuple[Kept, dict[str, InputStatistics]]:
        """What an original block gives, in a wider dtype if products overflow; its input statistics, if `observed`."""
        block, dtype = self.blocks[index], self.dtype
        plan = self.plan.blocks[index]
        offset = plan.key_offset if takes_mean(self.recipe, plan.keys) else None
        while True:
            observer = Observer(block, self.arch, offset) if observed else None
            run = partial(_in_dtype, dtype, hidden.dtype, call.in_order(block))
            try:
                with self._stage("full precision", index), autocast(self.device, dtype):
                    return mapped(hidden, self.batch, run), {} if observer is None else observer.close()
            except CalibrationError:
                if observer is not None:
                    observer.close()
                wider = safer(dtype, self.device)
                if wider is None:
                    raise
                warnings.warn(
                    f"block {index} overflows {named(dtype)}; what it is fitted to is computed in {named(wider)}",
                    stacklevel=2,
                )
                dtype = wider
                block.float()

    @contextmanager
    def _stage(self, name: str, index: int) -> Iterator[None]:
        """Time a stage's part on one block, and tell its beginning and end."""
        self.progress(name, index, len(self.blocks))
        with self.clock(name):
            yield
        self.progress(name, index + 1, len(self.blocks))

    def _rotated(self, call: BlockCall) -> BlockCall:
        """How a block is called once it is wrapped."""
        return replace(call, basis=self.residual)

    def _fit(self, wrapped: list[_Wrapped], quantised: Kept | None) -> None:
        """Fit the blocks that no earlier run has fitted, and tell all ranks what came of them.

        Args:
            quantised: inputs of the fit, then of one block at a time, if given.
        """
        if quantised is not None:
            wrapped = [replace(w, inputs=quantised) for w in wrapped]
        fresh = [w for w in wrapped if fitted_name(w.index) not in self.kept]
        ours = [w for w in fresh if w.owner == distributed.rank()]
        start = time.perf_counter()
        with _forwarded() as told:
            results = self._fit_blocks(ours, len(fresh))
        seconds = round((time.perf_counter() - start) / max(len(ours), 1), 3)
        found: dict[int, distributed.Message] = {}
        for w, fitted in zip(ours, results, strict=True):
            assert w.fit is not None
            note = {"block": w.index, "losses": fitted.losses, "seconds": seconds, **self.routed.get(w.index, {})}
            if fitted.held_out is not None:
                note |= measured(fitted)
            if fitted.dtype != self.dtype:
                note["dtype"] = named(fitted.dtype)
            found[w.index] = w.fit.state(), note
        for w in wrapped:
            if solved_name(w.index) not in self.kept:
                self._share_fit(w, found.get(w.index))
        for source in range(1, distributed.size()):
            _tell(distributed.broadcast(({}, told), source)[1])

    def _share_fit(self, w: _Wrapped, found: distributed.Message | None) -> None:
        """Give all ranks what came of a block's fit: its owner found it, or an earlier run kept it."""
        name = fitted_name(w.index)
        kept = name in self.kept
        if kept and self.state is not None:
            found = self.state.load(name)
        source = 0 if kept else w.owner
        tensors, self.notes[w.index] = distributed.broadcast(found, source)
        if w.fit is not None and (kept or source != distributed.rank()):
            w.fit.load_state(tensors)
        if not kept and self.state is not None:
            self.state.save(name, tensors, self.notes[w.index])

    def _fit_blocks(self, todo: list[_Wrapped], together: int) -> list[Fitted]:
        """Fit this rank's blocks of so many that all ranks fit at a time."""
        spec = self.recipe.fit
        blocks = [
            BlockFit(
                index=w.index,
                fit=w.fit,
                call=self._rotated(w.call),
                inputs=w.inputs,
                targets=w.targets,
                second=w.second,
                held_out=w.held_out,
            )
            for w in todo
            if w.fit is not None and w.inputs is not None and w.targets is not None
        ]
        if spec is None or not blocks:
            return [Fitted(dtype=self.dtype) for _ in todo]
        before, total = blocks[0].index * spec.epochs, spec.epochs * len(self.plan.blocks)
        pace = together / len(blocks)  # the other ranks are about as far
        self.progress("fit", before, total)
        with self.clock("fit"):
            return fit_blocks(
                blocks,
                spec,
                dtype=self.dtype,
                graph=self.graph,
                splits=splits(spec.batch_size, self.layout.windows),
                progress=lambda done, _: self.progress("fit", before + pace * done, total),
            )

    def _fit_end_to_end(
        self, spec: EndToEndSpec, fits: list[FitBlock], calls: list[BlockCall], inputs: Kept, targets: Kept
    ) -> None:
        start = None
        if END_TO_END in self.kept:
            tensors, note = distributed.broadcast(None if self.state is None else self.state.load(END_TO_END))
            start = (note["step"], note["losses"], tensors, getattr(torch, note["dtype"]))

        def save(step: int, losses: list[float], tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
            assert self.state is not None
            self.state.save(END_TO_END, tensors, {"step": step, "losses": losses, "dtype": named(dtype)})

        kept, held_targets = self.held_out, None if self.held_out is None else self.held_out.original
        if spec.objective == "cross_entropy":
            assert isinstance(self.tokens, Tensor)
            targets = self.tokens.to(self.device)
            held_targets = None if kept is None else kept.ids.to(self.device)
        held_out = None
        if kept is not None and held_targets is not None:
            held_out = HeldOutModel(calls=kept.calls, inputs=kept.first, targets=held_targets)
        self.progress("end to end", 0 if start is None else start[0], spec.steps)
        with self.clock("end to end"), unrounded_weights(() if spec.round_weights else fits):
            self.report.end_to_end = fit_end_to_end(
                fits,
                calls,
                self._head,
                inputs,
                targets,
                spec,
                dtype=self.dtype,
                graph=self.graph,
                windows=self.layout.windows,
                recompute=self.layout.recompute,
                memory=self.memory,
                seed=self.seed,
                held_out=held_out,
                start=start,
                save=None if self.state is None else save,
                progress=partial(self.progress, "end to end"),
            )

    @cached_property
    def _head(self) -> Callable[[Tensor], Tensor]:
        """Final norm and output embedding, (B, T, h) -> (B, T, V)."""
        norm = copy.deepcopy(submodule(self.model, self.arch.final_norm)).to(self.device).float().requires_grad_(False)
        output = self.model.get_output_embeddings()
        assert isinstance(output, nn.Linear)
        # Detached: a gradient of a model that is not frozen would run on a stream that no graph captures.
        weight = output.weight.detach().to(self.device, self.dtype)  # (V, h)
        bias = None if output.bias is None else output.bias.detach().to(self.device, self.dtype)

        def head(x: Tensor) -> Tensor:
            dtype = self.dtype
            if torch.is_autocast_enabled(x.device.type):
                dtype = torch.get_autocast_dtype(x.device.type)
            elif dtype != torch.float64:
                dtype = torch.float32  # a fit that overflowed what the weight is kept in
            y = F.linear(norm(x).to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
            return logits(self.model.config, y)

        return head

    def _rounded(self, w: _Wrapped, calls: list[BlockCall], quantised: Kept | None) -> _Wrapped:
        """Fold and round a block that this rank has fitted, if that is still to be done."""
        index, fit, inputs, targets = w.index, w.fit, w.inputs, w.targets
        w = replace(w, fit=None, inputs=None, targets=None)
        if fit is not None:
            with _named(index), _forwarded() as told:
                self._fold(index, fit)
                del fit  # with its float32 weights
                self._round(index, calls, quantised, inputs, targets)
            self.told[index] = told
        return w

    def _fold(self, index: int, fit: FitBlock) -> None:
        with self._stage("fold", index):
            fold_block(fit, dense=self.model_dtype)
            cast(self.blocks[index], self.model_dtype, besides=self.wide.pop(index, set()))
            for name, parameter in self.blocks[index].named_parameters():
                if not bool(torch.isfinite(parameter).all()):
                    raise CalibrationError(
                        f"{name} is not finite once the transforms are folded into it; try a lower --lr, other "
                        "calibration text, or the model in bfloat16 or float32"
                    )

    def _round(
        self,
        index: int,
        calls: list[BlockCall],
        quantised: Kept | None,
        inputs: Kept | None,
        targets: Kept | None,
    ) -> None:
        """Round a folded block.

        Args:
            inputs, targets: what the original block sees and gives, where rounding needs it.
        """
        block, plan, call = self.blocks[index], self.plan.blocks[index], self._rotated(calls[index])
        self.progress("solve", index, len(self.plan.blocks))
        hessians = None
        if self.output_adaptive:
            with self.clock("gradients"):
                hessians = self._output_hessians(index, calls, quantised)
        if self.witness is not None:
            with self.clock("verdict"), torch.no_grad():
                self.witness.see_unrounded(index, block, plan)
        with self.clock("solve"):
            rounds = self.recipe.branch.rounds if self.recipe.branch else 1
            seen = inputs if self.sees_original else quantised
            learns = self.learned is not None
            solve_block(block, plan, self.solver, call, seen, self.batch, hessians, rounds, learns)
        if self.learned is not None:
            assert quantised is not None
            assert targets is not None
            self._learn_rounding(self.learned, index, call, quantised, targets)
        if self.witness is not None:
            with self.clock("verdict"), torch.no_grad():
                alone = self.witness.see_rounded(index, block, plan)
            self.notes[index] = {**self.notes[index], "alone": alone}

    def _take(self, index: int, owner: int, calls: list[BlockCall], quantised: Kept | None) -> Kept | None:
        """A rounded block, of whoever rounded it; its outputs on the quantised stream, if needed.

        Args:
            owner: the rank that has rounded it, unless an earlier run did.
        """
        block, plan, name = self.blocks[index], self.plan.blocks[index], solved_name(index)
        self.progress("solve", index, len(self.plan.blocks))
        solved = name in self.kept
        source = 0 if solved else owner
        found = None
        if solved and self.state is not None:
            found = self.state.load(name)
        elif not solved and source == distributed.rank():
            found = block.state_dict(), {**self.notes[index], "told": self.told.pop(index, [])}
        if self.end_to_end is None:  # after an end-to-end fit, every rank has rounded every block
            tensors, note = distributed.broadcast(found, source)
            _tell(note.pop("told", []))
            self.notes[index] = note
            if solved or source != distributed.rank():
                install(block, self.plan.attention, plan, packed=False)
                block.load_state_dict(tensors, assign=True)
                block.to(self.device)
            if not solved and self.state is not None:
                self.state.save(name, tensors, self.notes[index])
        if self.witness is not None:
            with self.clock("verdict"), torch.no_grad():
                self.witness.see_quantised(index, block, self.notes[index].get("alone"))
        if quantised is not None:
            with self.clock("quantised stream"):
                quantised = run_block(block, self._rotated(calls[index]), quantised, self.batch)
        block.to(self._home)
        self.progress("solve", index + 1, len(self.plan.blocks))
        return quantised

    def _learn_rounding(self, spec: RoundingSpec, index: int, call: BlockCall, quantised: Kept, targets: Kept) -> None:
        total = len(self.plan.blocks)
        with self.clock("rounding"):
            before, after = learn_rounding(
                self.blocks[index],
                call,
                quantised,
                targets,
                spec,
                windows=self.batch,
                splits=partial(splits, windows=self.layout.windows),
                progress=lambda step: self.progress("solve", index + step / (spec.steps + 1), total),
            )
        self.notes[index] = {**self.notes[index], "learned_rounding": {"before": before, "after": after}}

    def _output_hessians(self, index: int, calls: list[BlockCall], quantised: Kept | None) -> dict[str, Tensor]:
        assert quantised is not None
        assert isinstance(self.tokens, Tensor)
        # After an end-to-end fit all blocks are folded, otherwise those that come later are as they were.
        after = calls[index + 1 :] if self.end_to_end is None else [self._rotated(c) for c in calls[index + 1 :]]

        def loss(hidden: Tensor, ids: Tensor) -> Tensor:
            """Cross entropy of a sequence, summed: a mean would underflow half precision on its way back."""
            with autocast(self.device, self.dtype):
                for block, call in zip(self.blocks[index + 1 :], after, strict=True):
                    hidden = call(block, hidden)
                scores = self._head(hidden)
            return F.cross_entropy(scores[0, :-1].float(), ids[0, 1:], reduction="sum")

        collect = partial(
            output_hessians,
            self.blocks[index],
            self.plan.blocks[index],
            self._rotated(calls[index]),
            loss,
            quantised,
            self.tokens.to(self.device),
            self.recipe.solver.gradients,
        )
        try:
            with deterministic():
                return collect()
        except RuntimeError as error:
            if "deterministic" not in str(error):
                raise
            return collect()  # a family may use an operation without such a kernel

    @property
    def batch(self) -> int:
        """Windows per forward pass outside the fit."""
        if self.device.type != "cuda" or self.tokens is None:
            return self.layout.windows
        return max(
            full_step(self.tokens.shape[1], self.model.config.get_text_config().hidden_size), self.layout.windows
        )


def resident_bytes(
    blocks: list[nn.Module], spec: EndToEndSpec, memory: FitMemory, grid: QuantSpec | None = None
) -> int:
    """What an end-to-end fit keeps on the device besides activations: weights; trained, with gradient and moments.

    A weight whose code a fit chooses has a position that trains.
    """
    parameters = [p for block in blocks for p in block.parameters()]
    weights, codes = sum(p.numel() for p in parameters), grid is not None and grid.is_fitted
    dtype = parameters[0].dtype
    held = WeightBytes.of(spec, memory, dtype)
    return int(weights * (held.stored + held.moments + held.gradient + 16 * codes))


def check_room(needed: int, free: int) -> None:
    """Refuse a fit that cannot fit, before any work.

    Raises:
        CalibrationError: fewer than `needed` bytes are free.
    """
    if needed > free:
        raise CalibrationError(
            f"the end-to-end fit keeps all blocks on the device, {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB "
            "are free; use --preset reference, which has one block there at a time, or a larger GPU"
        )


def measured(fitted: Fitted | FittedModel) -> dict[str, Any]:
    """What a fit came to on windows that it was not trained on, JSON-ready: before and after, None where not finite."""
    assert fitted.held_out is not None
    losses = [x if math.isfinite(x) else None for x in fitted.held_out]
    plain = fitted.plain if fitted.plain is not None and math.isfinite(fitted.plain) else None
    return {"held_out": losses, "plain": plain, "undone": fitted.undone}


END_TO_END = "end-to-end"


def fitted_name(index: int) -> str:
    """The state file of a fitted block."""
    return f"fitted-{index:05d}"


def solved_name(index: int) -> str:
    """The state file of a solved block."""
    return f"solved-{index:05d}"


def _in_dtype(dtype: torch.dtype, kept: torch.dtype, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Outputs as they are kept, of a block whose products are in `dtype`."""
    return run(wide(x, dtype)).to(kept)


@contextmanager
def _forwarded() -> Iterator[list[list[str]]]:
    """On a rank that does not speak, collect warnings for the one that does: (category, text)."""
    told: list[list[str]] = []
    if distributed.leads():
        yield told
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield told
    told += [[w.category.__name__, str(w.message)] for w in caught]


def _tell(told: list[list[str]]) -> None:
    """On the rank that speaks, warn of what `_forwarded` has collected on another."""
    for category, text in told if distributed.leads() else ():
        warnings.warn(text, FitWarning if category == FitWarning.__name__ else UserWarning, stacklevel=2)


@contextmanager
def _named(index: int) -> Iterator[None]:
    """Say in which block an error happened."""
    try:
        yield
    except FlatQuantError as error:
        raise type(error)(f"block {index}: {error}") from error


def _routed(statistics: Mapping[str, InputStatistics]) -> dict[str, Any]:
    """What a report says of a block's experts: the tokens that each saw, and which saw fewer than it has inputs."""
    seen = [s for s in statistics.values() if len(s.tokens) > 1]
    if not seen:
        return {}
    tokens, n = seen[0].tokens, max(len(s.absmax) for s in seen)
    return {"experts": {"tokens": list(tokens), "rare": [i for i, count in enumerate(tokens) if count < n]}}
