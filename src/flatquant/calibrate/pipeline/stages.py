"""The order of the stages."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from flatquant import distributed, seams
from flatquant.calibrate.activations import Kept
from flatquant.calibrate.blockwise import held_out_windows
from flatquant.calibrate.capture import BlockCall, run_block
from flatquant.calibrate.memory import Estimate, Limits, capped, check_streamable, estimate
from flatquant.calibrate.pipeline.end_to_end import check_room, fit_whole, resident_bytes, stored
from flatquant.calibrate.pipeline.exchange import take
from flatquant.calibrate.pipeline.fit import fit_group, observe, without_streams
from flatquant.calibrate.pipeline.fold import fold, round_block, rounded
from flatquant.calibrate.pipeline.report import Report
from flatquant.calibrate.pipeline.run import Run, named_block
from flatquant.calibrate.pipeline.wrap import captured, wrap
from flatquant.calibrate.samples import Samples, Windows
from flatquant.calibrate.sharding import gather
from flatquant.calibrate.state import RunState
from flatquant.calibrate.witness import Witness
from flatquant.errors import CalibrationError
from flatquant.models import Checkpoint
from flatquant.progress import Progress
from flatquant.runtime.experts import open_experts
from flatquant.spec import Plan, Recipe
from flatquant.wiring.arch import Geometry, blocks_at
from flatquant.wiring.archs import arch_of
from flatquant.wiring.fitted import FitBlock
from flatquant.wiring.head import round_embedding, round_head, with_ends
from flatquant.wiring.plan import make_plan
from flatquant.wiring.residual import rotate_ends


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
    blocks = blocks_at(model, arch.blocks)
    open_experts(blocks)
    blocks.requires_grad_(False)  # only transforms, scales and clips are fitted
    plan = with_ends(make_plan(recipe, arch, Geometry.of(model.config), blocks), recipe, model)
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
    run = Run(
        model, recipe, plan, tokens, device, dtype, seed, state, progress, graph, layout, checkpoint, witness, told
    )
    with capped(device, limits):
        return plan, _stages(run)


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


def _stages(run: Run) -> Report:
    """Blocks group by group: wrapped, fitted, folded, rounded; or wrapped and fitted, and then all at once."""
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(run.device)
        if run.end_to_end is not None:
            check_room(
                resident_bytes(run.blocks, run.end_to_end, run.memory, run.model_dtype, run.recipe.scheme.weights),
                torch.cuda.mem_get_info(run.device)[0],
            )
    seams.use_attention(run.model, run.plan.attention)
    together = 0 if run.tokens is None else run.batch * run.tokens.shape[1]
    if run.witness is not None:
        run.witness.begin(run.model, run.arch, run.device, run.dtype, together)
    if run.plan.embedding is not None:
        round_embedding(run.model, run.plan.embedding, run.device)
        if run.witness is not None:
            run.witness.see_embedding(run.model)
    if run.held_out is not None:
        run.held_out.begin(run.model, run.arch, run.device, run.dtype, together)
    first, calls = captured(run)
    if run.output_adaptive:
        for index in range(len(run.blocks)):
            run.bring(index)
    quantised = first if run.recipe.quantised_stream else None
    hidden = first
    fits: list[FitBlock | None] = []
    together = run.side_by_side * (1 if run.recipe.feeds_fit else distributed.size())
    for start in range(0, len(calls), together):
        group = range(start, min(start + together, len(calls)))
        wrapped, hidden = wrap(run, group, calls, hidden, quantised)
        fit_group(run, wrapped, quantised if run.recipe.feeds_fit else None)
        if run.end_to_end is None:
            for w in wrapped:
                if w.fit is not None and w.inputs is not None:
                    observe(run, w.fit, w.call, w.inputs, keep=False)
        wrapped = [without_streams(run, w) for w in wrapped]
        if run.end_to_end is not None:
            fits += [stored(run, w.fit) for w in wrapped]
        else:
            first = None
            if not run.recipe.quantised_stream:  # no block waits for another: all ranks round theirs at a time
                wrapped = [rounded(run, wrapped.pop(0), calls, None) for _ in group]
            while wrapped:
                w = rounded(run, wrapped.pop(0), calls, quantised)
                quantised = take(run, w.index, w.owner, calls, quantised)
    if run.end_to_end is not None:
        assert first is not None
        assert hidden is not None
        # Solved blocks are only kept on their own where no end-to-end fit follows: all are wrapped here.
        _all_at_once(run, [fit for fit in fits if fit is not None], calls, first, hidden, quantised)
    run.report.blocks = [note for _, note in sorted(run.notes.items())]
    if run.residual is not None:
        rotate_ends(run.model, run.arch, run.residual)
    if run.plan.head is not None:
        with run.clock("solve"):
            round_head(run.model, run.plan, run.device)
        if run.witness is not None:
            run.witness.see_head(run.model, run.residual)
    if run.device.type == "cuda":
        run.report.peak_memory = torch.cuda.max_memory_allocated(run.device)
    return run.report


def _all_at_once(
    run: Run, fits: list[FitBlock], calls: list[BlockCall], first: Kept, last: Kept, quantised: Kept | None
) -> None:
    """Fit all blocks at once, then fold and round them one after another.

    Args:
        first, last: hidden states before the first block and after the last, in full precision.
        quantised: the first block's inputs, if rounding needs what quantised blocks give.
    """
    assert run.end_to_end is not None
    rotated = [run.rotated(call) for call in calls]
    fit_whole(run, run.end_to_end, fits, rotated, first, last)
    shown: Kept = first
    for index, fit in enumerate(fits):
        with named_block(index):
            if run.shards is not None:
                gather(fit)
            if any(later.static_grids() for later in fits[index:]):
                shown = observe(run, fit, calls[index], shown)
            fold(run, index, fit)
            if run.shards is not None:
                run.put_back(index)  # all of them may not fit on the device
    run.shards = None
    # No block is the original any more: what takes its place is the fitted model before it is rounded.
    inputs = first if run.recipe.sees_original or run.learned is not None else None
    for index in range(len(calls)):
        with named_block(index):
            run.blocks[index].to(run.device)
            targets = None
            if inputs is not None:
                targets = run_block(run.blocks[index], run.rotated(calls[index]), inputs, run.batch)
            round_block(run, index, calls, quantised, inputs, targets)
            quantised = take(run, index, distributed.rank(), calls, quantised)
            inputs = targets
