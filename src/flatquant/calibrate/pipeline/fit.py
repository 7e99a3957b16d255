"""Fit blocks one by one, and show static scales what they are to cover."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial

import torch

from flatquant import distributed
from flatquant.calibrate.activations import Kept, mapped
from flatquant.calibrate.blockwise import BlockFit, Fitted, autocast, fit_blocks, named
from flatquant.calibrate.capture import BlockCall
from flatquant.calibrate.memory import splits
from flatquant.calibrate.pipeline.exchange import fitted_name, forwarded, share_fit, solved_name, tell
from flatquant.calibrate.pipeline.report import measured
from flatquant.calibrate.pipeline.run import Run, Wrapped, in_dtype
from flatquant.wiring.fitted import FitBlock, observing


def fit_group(run: Run, wrapped: list[Wrapped], quantised: Kept | None) -> None:
    """Fit the blocks that no earlier run has fitted, and tell all ranks what came of them.

    Args:
        quantised: inputs of the fit, then of one block at a time, if given.
    """
    if quantised is not None:
        wrapped = [replace(w, inputs=quantised) for w in wrapped]
    fresh = [w for w in wrapped if fitted_name(w.index) not in run.kept]
    ours = [w for w in fresh if w.owner == distributed.rank()]
    start = time.perf_counter()
    with forwarded() as told:
        results = _fit_ours(run, ours, len(fresh))
    seconds = round((time.perf_counter() - start) / max(len(ours), 1), 3)
    found: dict[int, distributed.Message] = {}
    for w, fitted in zip(ours, results, strict=True):
        assert w.fit is not None
        note = {"block": w.index, "losses": fitted.losses, "seconds": seconds, **run.routed.get(w.index, {})}
        if fitted.held_out is not None:
            note |= measured(fitted)
        if fitted.dtype != run.dtype:
            note["dtype"] = named(fitted.dtype)
        found[w.index] = w.fit.state(), note
    for w in wrapped:
        if solved_name(w.index) not in run.kept:
            share_fit(run, w, found.get(w.index))
    for source in range(1, distributed.size()):
        tell(distributed.broadcast(({}, told), source)[1])


def _fit_ours(run: Run, todo: list[Wrapped], together: int) -> list[Fitted]:
    """Fit this rank's blocks of so many that all ranks fit at a time."""
    spec = run.recipe.fit
    blocks = [
        BlockFit(
            index=w.index,
            fit=w.fit,
            call=run.rotated(w.call),
            inputs=w.inputs,
            targets=w.targets,
            second=w.second,
            held_out=w.held_out,
        )
        for w in todo
        if w.fit is not None and w.inputs is not None and w.targets is not None
    ]
    if spec is None or not blocks:
        return [Fitted(dtype=run.dtype) for _ in todo]
    before, total = blocks[0].index * spec.epochs, spec.epochs * len(run.plan.blocks)
    pace = together / len(blocks)  # the other ranks are about as far
    run.progress("fit", before, total)
    with run.clock("fit"):
        return fit_blocks(
            blocks,
            spec,
            dtype=run.dtype,
            graph=run.graph,
            splits=splits(spec.batch_size, run.layout.windows),
            progress=lambda done, _: run.progress("fit", before + pace * done, total),
        )


def observe(run: Run, fit: FitBlock, call: BlockCall, inputs: Kept, *, keep: bool = True) -> Kept:
    """Show static scales of activations what they are to cover; the block's outputs, if they are to be kept."""
    grids = fit.static_grids()
    if not grids and not keep:
        return inputs
    forward = partial(in_dtype, run.dtype, inputs.dtype, run.rotated(call).in_order(fit.block))
    with run.clock("static scales"), torch.no_grad(), autocast(run.device, run.dtype), observing(grids):
        if keep:
            return mapped(inputs, run.batch, forward)
        for x in inputs.split(run.batch):
            forward(x)
    return inputs


def without_streams(run: Run, w: Wrapped) -> Wrapped:
    """A fitted block with what rounding it still needs."""
    inputs, targets = w.inputs if run.recipe.sees_original else None, w.targets if run.learned is not None else None
    return replace(w, inputs=inputs, targets=targets, second=None, held_out=None)
