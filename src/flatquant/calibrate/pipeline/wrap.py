"""Capture and full precision: what the original blocks see and give; and blocks wrapped for their fit."""

from __future__ import annotations

import warnings
from functools import partial

import torch

from flatquant import distributed
from flatquant.calibrate.activations import Kept, mapped
from flatquant.calibrate.blockwise import HeldOut, autocast, named, safer
from flatquant.calibrate.capture import BlockCall, Observer, capture
from flatquant.calibrate.pipeline.exchange import fitted_name, solved_name
from flatquant.calibrate.pipeline.report import routed
from flatquant.calibrate.pipeline.run import Run, Wrapped, in_dtype, named_block
from flatquant.errors import CalibrationError
from flatquant.wiring.fitted import FitBlock, InputStatistics
from flatquant.wiring.plan import takes_mean
from flatquant.wiring.wrap import wrap_block


def captured(run: Run) -> tuple[Kept | None, list[BlockCall]]:
    """The first block's inputs, and how every block is called; no inputs for a recipe that reads no text."""
    if not run.recipe.needs_data:
        return None, [BlockCall(args=(), kwargs={})] * len(run.plan.blocks)
    assert run.tokens is not None
    with run.clock("capture"):
        progress = partial(run.progress, "capture")
        hidden, calls = capture(run.model, run.arch, run.tokens, run.room, progress)
        return hidden, [c.to(run.device) for c in calls]


def wrap(
    run: Run, group: range, calls: list[BlockCall], hidden: Kept | None, quantised: Kept | None
) -> tuple[list[Wrapped], Kept | None]:
    """Wrap the blocks of a group that no earlier run has solved; and the full-precision outputs of its last one."""
    wrapped, owners = [], _owners(run, group)
    for index in group:
        ours = owners[index] == distributed.rank()
        with named_block(index):
            run.bring(index)
            second = _second(run, index, calls[index], quantised) if ours else None
            held_out = _hold_out(run, index)
            fits = (ours or run.end_to_end is not None) and solved_name(index) not in run.kept
            inputs, (fit, hidden) = hidden, _wrap_one(run, index, calls[index], hidden, fits)
            if not (ours or run.end_to_end is not None or run.output_adaptive):
                run.put_back(index)
        wrapped.append(
            Wrapped(
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


def _owners(run: Run, group: range) -> dict[int, int]:
    """The rank of every block: neighbours together, and as many left to fit on one rank as on another."""
    fitted = [i for i in group if fitted_name(i) in run.kept]
    fresh = [i for i in group if fitted_name(i) not in run.kept]
    ranks = distributed.size()
    return {i: k * ranks // len(part) for part in (fresh, fitted) for k, i in enumerate(part)}


def _wrap_one(
    run: Run, index: int, call: BlockCall, hidden: Kept | None, fits: bool
) -> tuple[FitBlock | None, Kept | None]:
    """A block wrapped, if this rank fits it, and its full-precision outputs."""
    block, plan = run.blocks[index], run.plan.blocks[index]
    targets, statistics = None, {}
    if run.witness is not None:
        with run.clock("verdict"), torch.no_grad(), autocast(run.device, run.dtype):
            run.witness.see_original(index, block)
        run.witness.rotate(index, run.residual)
    if hidden is not None:
        targets, statistics = _full_precision(run, index, call, hidden, observed=fits)
        run.routed[index] = routed(statistics)
    if not fits:
        return None, targets
    generator = torch.Generator().manual_seed(run.seed * 1_000_003 + index)
    fit = wrap_block(block, run.arch, plan, run.recipe, statistics, generator, residual=run.residual)
    if run.recipe.fit is not None and run.recipe.fit.weight_lr:
        fit.release_weights()
    return fit, targets


def _hold_out(run: Run, index: int) -> HeldOut | None:
    """What the original block makes of the windows that its fit is measured on."""
    if run.held_out is None:
        return None
    inputs = run.held_out.original
    with run.clock("full precision"), torch.no_grad(), autocast(run.device, run.dtype):
        run.held_out.see_original(index, run.blocks[index])
    run.held_out.rotate(index, run.residual)
    if run.recipe.feeds_fit:  # its inputs are others
        return None
    return HeldOut(call=run.held_out.calls[index], inputs=inputs, targets=run.held_out.original)


def _second(run: Run, index: int, call: BlockCall, quantised: Kept | None) -> Kept | None:
    """The original block's outputs on the quantised stream, if the fit minds them and is still to come."""
    done = fitted_name(index) in run.kept or solved_name(index) in run.kept
    if quantised is None or run.recipe.fit is None or not run.recipe.fit.both_targets or done:
        return None
    return _full_precision(run, index, call, quantised, observed=False)[0]


def _full_precision(
    run: Run, index: int, call: BlockCall, hidden: Kept, *, observed: bool
) -> tuple[Kept, dict[str, InputStatistics]]:
    """What an original block gives, in a wider dtype if products overflow; its input statistics, if `observed`."""
    block, dtype = run.blocks[index], run.dtype
    plan = run.plan.blocks[index]
    offset = plan.key_offset if takes_mean(run.recipe, plan.keys) else None
    while True:
        observer = Observer(block, run.arch, offset) if observed else None
        forward = partial(in_dtype, dtype, hidden.dtype, call.in_order(block))
        try:
            with run.stage("full precision", index), autocast(run.device, dtype):
                return mapped(hidden, run.batch, forward), {} if observer is None else observer.close()
        except CalibrationError:
            if observer is not None:
                observer.close()
            wider = safer(dtype, run.device)
            if wider is None:
                raise
            warnings.warn(
                f"block {index} overflows {named(dtype)}; what it is fitted to is computed in {named(wider)}",
                stacklevel=2,
            )
            dtype = wider
            block.float()
