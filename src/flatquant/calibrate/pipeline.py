"""A model through all stages: capture, fit block by block, fit end to end, fold, solve; resumable after each block.

Two streams of hidden states run through the model: full precision (inputs and targets of the fit) and quantised (the
inputs of solvers that use a Hessian). One block is on the device at a time unless an end-to-end fit needs them all.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from flatquant import seams
from flatquant.calibrate.blockwise import autocast, fit_block
from flatquant.calibrate.capture import BlockCall, Observer, capture, run_block
from flatquant.calibrate.end2end import fit_end_to_end
from flatquant.calibrate.solve import make_solver, solve_block
from flatquant.calibrate.state import RunState
from flatquant.errors import CalibrationError, FlatQuantError
from flatquant.runtime.build import install
from flatquant.spec import EndToEndSpec, Plan, Recipe
from flatquant.wiring.apply import FitBlock, fold_block, wrap_block
from flatquant.wiring.arch import Geometry, submodule
from flatquant.wiring.archs import arch_of
from flatquant.wiring.plan import make_plan

# (stage, done, total): "fit" counts epochs of all blocks, "end-to-end" steps, "solve" blocks.
Progress = Callable[[str, int, int], None]


@dataclass(kw_only=True)
class Report:
    """What happened, for `flatquant_report.json`. Seconds are wall time, memory is peak bytes on the device."""

    blocks: list[dict[str, Any]] = field(default_factory=list)
    end_to_end: list[float] = field(default_factory=list)
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
    tokens: Tensor | None,
    *,
    device: torch.device,
    dtype: torch.dtype,
    seed: int = 0,
    state: RunState | None = None,
    progress: Progress | None = None,
    graph: bool = True,
) -> tuple[Plan, Report]:
    """Quantise `model` in place: its blocks end up with frozen linears, its attention with the quantised cache seam.

    Args:
        tokens: calibration windows, int64, (N, T); None for recipes that need none.
        device: where blocks are fitted; the model returns to where it was.
        dtype: of matrix products during the fit (parameters are float32).
        state: finished blocks are kept there and taken from there.
        progress: called with (stage, done, total).
        graph: on CUDA, replay the block-wise fit's steps from a CUDA graph.

    Raises:
        CalibrationError: NaN in a block (named); data missing.
        ModelError, SpecError: the recipe does not fit the model.
    """
    arch = arch_of(model.config)
    blocks = submodule(model, arch.blocks)
    assert isinstance(blocks, nn.ModuleList)
    blocks.requires_grad_(False)  # only transforms, scales and clips are fitted
    plan = make_plan(recipe, arch, Geometry.of(model.config), blocks)
    if recipe.needs_data and tokens is None:
        raise CalibrationError(f"the recipe {recipe.name} needs calibration text")
    run = _Run(model, recipe, plan, tokens, device, dtype, seed, state, progress or (lambda *_: None), graph)
    return plan, run()


class _Run:
    """One calibration; holds what its stages share."""

    def __init__(
        self,
        model: PreTrainedModel,
        recipe: Recipe,
        plan: Plan,
        tokens: Tensor | None,
        device: torch.device,
        dtype: torch.dtype,
        seed: int,
        state: RunState | None,
        progress: Progress,
        graph: bool,
    ) -> None:
        self.model, self.recipe, self.plan = model, recipe, plan
        self.arch = arch_of(model.config)
        self.blocks = list(submodule(model, self.arch.blocks).children())
        self.tokens, self.device, self.dtype, self.seed = tokens, device, dtype, seed
        self.state, self.progress, self.graph = state, progress, graph
        self.home = next(model.parameters()).device
        self.model_dtype = next(model.parameters()).dtype
        self.solver = make_solver(recipe.solver)
        self.report = Report()
        self.clock = Clock(seconds=self.report.seconds, device=device)
        self.end_to_end = recipe.end_to_end if recipe.end_to_end and recipe.end_to_end.steps else None
        self.quantised_stream = self.solver.needs_hessian and recipe.scheme.weights is not None

    def __call__(self) -> Report:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        seams.use_attention(self.model)
        first, calls = self._capture()
        quantised = first if self.quantised_stream else None
        hidden = first
        fits: list[FitBlock | None] = []
        for index, call in enumerate(calls):
            with _named(index):
                fit, hidden = self._fit(index, call, hidden)
                fits.append(fit)
                if self.end_to_end is None:
                    quantised = self._solve(index, call, fit, quantised)
        if self.end_to_end is not None:
            assert first is not None
            assert hidden is not None
            # Solved blocks are only kept on their own where no end-to-end fit follows: all are wrapped here.
            self._fit_end_to_end(self.end_to_end, [f for f in fits if f is not None], calls, first, hidden)
            for index, (fit, call) in enumerate(zip(fits, calls, strict=True)):
                with _named(index):
                    quantised = self._solve(index, call, fit, quantised)
        if self.device.type == "cuda":
            self.report.peak_memory = torch.cuda.max_memory_allocated(self.device)
        return self.report

    def _capture(self) -> tuple[Tensor | None, list[BlockCall]]:
        if not self.recipe.needs_data:
            return None, [BlockCall(args=(), kwargs={})] * len(self.plan.blocks)
        assert self.tokens is not None
        with self.clock("capture"):
            hidden, calls = capture(self.model, self.arch, self.tokens)
            # Between blocks, activations are kept in the dtype of the products.
            return hidden.to(self.device, self.dtype), [c.to(self.device) for c in calls]

    def _fit(self, index: int, call: BlockCall, hidden: Tensor | None) -> tuple[FitBlock | None, Tensor | None]:
        """Wrap and fit a block, unless an earlier run solved it; and the full-precision block's outputs."""
        block, plan = self.blocks[index], self.plan.blocks[index]
        block.to(self.device)
        if self.model_dtype != self.dtype:
            block.float()
        targets, statistics = None, {}
        if hidden is not None:
            with self.clock("full precision"), autocast(self.device, self.dtype):
                observer = Observer(block, self.arch)
                targets = run_block(block, call, hidden, self.batch)
                statistics = observer.close()
            _check_finite(targets)
        if self.state is not None and self.state.has(solved_name(index)):
            return None, targets
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        fit = wrap_block(block, self.arch, plan, self.recipe, statistics, generator)
        if self.state is not None and self.state.has(fitted_name(index)):
            tensors, note = self.state.load(fitted_name(index))
            fit.load_state(tensors)
        else:
            note = self._fit_block(fit, index, call, hidden, targets)
            if self.state is not None:
                self.state.save(fitted_name(index), fit.state(), note)
        self.report.blocks.append(note)
        return fit, targets

    def _fit_block(
        self, fit: FitBlock, index: int, call: BlockCall, hidden: Tensor | None, targets: Tensor | None
    ) -> dict[str, Any]:
        spec, start = self.recipe.fit, time.perf_counter()
        losses: list[float] = []
        if spec is not None and hidden is not None and targets is not None:
            total = spec.epochs * len(self.plan.blocks)

            def progress(done: int, _: int) -> None:
                self.progress("fit", index * spec.epochs + done, total)

            with self.clock("fit"):
                losses = fit_block(
                    fit, call, hidden, targets, spec, dtype=self.dtype, graph=self.graph, progress=progress
                )
        return {"block": index, "losses": losses, "seconds": round(time.perf_counter() - start, 3)}

    def _fit_end_to_end(
        self, spec: EndToEndSpec, fits: list[FitBlock], calls: list[BlockCall], inputs: Tensor, targets: Tensor
    ) -> None:
        start = None
        if self.state is not None and self.state.has(END_TO_END):
            tensors, note = self.state.load(END_TO_END)
            start = (note["step"], note["losses"], tensors)

        def save(step: int, losses: list[float], tensors: dict[str, Tensor]) -> None:
            if self.state is not None:
                self.state.save(END_TO_END, tensors, {"step": step, "losses": losses})

        norm = copy.deepcopy(submodule(self.model, self.arch.final_norm)).to(self.device).float()
        output = self.model.get_output_embeddings()
        assert isinstance(output, nn.Linear)
        weight = output.weight.to(self.device, self.dtype)  # (V, h)
        bias = None if output.bias is None else output.bias.to(self.device, self.dtype)
        with self.clock("end to end"):
            self.report.end_to_end = fit_end_to_end(
                fits,
                calls,
                lambda x: F.linear(norm(x).to(self.dtype), weight, bias),
                inputs,
                targets,
                spec,
                dtype=self.dtype,
                start=start,
                save=save,
                progress=lambda done, total: self.progress("end to end", done, total),
            )

    def _solve(self, index: int, call: BlockCall, fit: FitBlock | None, quantised: Tensor | None) -> Tensor | None:
        """Fold and round a fitted block; its outputs on the quantised stream, where one is needed."""
        block, plan = self.blocks[index], self.plan.blocks[index]
        if fit is None:
            assert self.state is not None
            tensors, note = self.state.load(solved_name(index))
            self.report.blocks.append(note)
            install(block, self.arch.attention, plan, packed=False)
            block.load_state_dict(tensors, assign=True)
            block.to(self.device)
        else:
            with self.clock("solve"):
                fold_block(fit, dense=self.model_dtype)
                block.to(self.model_dtype)
                solve_block(block, plan, self.solver, call, quantised, self.batch)
            if self.state is not None and self.end_to_end is None:
                self.state.save(solved_name(index), block.state_dict(), self.report.blocks[index])
        if quantised is not None:
            with self.clock("quantised stream"):
                quantised = run_block(block, call, quantised, self.batch)
            _check_finite(quantised)
        block.to(self.home)
        self.progress("solve", index + 1, len(self.plan.blocks))
        return quantised

    @property
    def batch(self) -> int:
        """Windows per forward pass outside the fit."""
        return self.recipe.fit.batch_size if self.recipe.fit else 4


END_TO_END = "end-to-end"


def fitted_name(index: int) -> str:
    """The state file of a fitted block."""
    return f"fitted-{index:05d}"


def solved_name(index: int) -> str:
    """The state file of a solved block."""
    return f"solved-{index:05d}"


@contextmanager
def _named(index: int) -> Iterator[None]:
    """Say in which block an error happened."""
    try:
        yield
    except FlatQuantError as error:
        raise type(error)(f"block {index}: {error}") from error


def _check_finite(hidden: Tensor) -> None:
    if not bool(torch.isfinite(hidden).all()):
        raise CalibrationError(
            "its outputs are not finite (NaN or infinity in the weights, or an overflow of the 16-bit format); "
            "check the model file, or try --dtype float32 or bfloat16"
        )
