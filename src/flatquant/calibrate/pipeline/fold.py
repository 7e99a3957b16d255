"""Fold a fitted block, and round it."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from flatquant.calibrate.activations import Kept
from flatquant.calibrate.blockwise import autocast
from flatquant.calibrate.capture import BlockCall
from flatquant.calibrate.deterministic import NoSuchKernel, deterministic
from flatquant.calibrate.gradients import output_hessians
from flatquant.calibrate.memory import splits
from flatquant.calibrate.pipeline.exchange import forwarded
from flatquant.calibrate.pipeline.run import Run, Wrapped, named_block
from flatquant.calibrate.rounding import learn_rounding
from flatquant.calibrate.solve import solve_block
from flatquant.errors import CalibrationError
from flatquant.modules import cast, widened
from flatquant.spec import RoundingSpec
from flatquant.wiring.fitted import FitBlock
from flatquant.wiring.fold import fold_block


def rounded(run: Run, w: Wrapped, calls: list[BlockCall], quantised: Kept | None) -> Wrapped:
    """Fold and round a block that this rank has fitted, if that is still to be done."""
    index, fit, inputs, targets = w.index, w.fit, w.inputs, w.targets
    w = replace(w, fit=None, inputs=None, targets=None)
    if fit is not None:
        with named_block(index), forwarded() as told:
            fold(run, index, fit)
            del fit  # with its float32 weights
            round_block(run, index, calls, quantised, inputs, targets)
        run.told[index] = told
    return w


def fold(run: Run, index: int, fit: FitBlock) -> None:
    """Fold a block's transforms into its weights.

    Raises:
        CalibrationError: a weight is not finite then.
    """
    with run.stage("fold", index):
        fold_block(fit, dense=run.model_dtype)
        cast(run.blocks[index], run.model_dtype, besides=run.wide.pop(index, set()))
        for name, parameter in run.blocks[index].named_parameters():
            if not bool(torch.isfinite(parameter).all()):
                raise CalibrationError(
                    f"{name} is not finite once the transforms are folded into it; try a lower --lr, other "
                    "calibration text, or the model in bfloat16 or float32"
                )


def round_block(
    run: Run,
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
    block, plan, call = run.blocks[index], run.plan.blocks[index], run.rotated(calls[index])
    run.progress("solve", index, len(run.plan.blocks))
    hessians = None
    if run.output_adaptive:
        with run.clock("gradients"):
            hessians = _output_hessians(run, index, calls, quantised)
    if run.witness is not None:
        with run.clock("verdict"), torch.no_grad():
            run.witness.see_unrounded(index, block, plan)
    with run.clock("solve"):
        rounds = run.recipe.branch.rounds if run.recipe.branch else 1
        seen = inputs if run.recipe.sees_original else quantised
        learns = run.learned is not None
        solve_block(block, plan, run.solver, call, seen, run.batch, hessians, rounds, learns)
    if run.learned is not None:
        assert quantised is not None
        assert targets is not None
        _learn_rounding(run, run.learned, index, call, quantised, targets)
    if run.witness is not None:
        with run.clock("verdict"), torch.no_grad():
            alone = run.witness.see_rounded(index, block, plan)
        run.notes[index] = {**run.notes[index], "alone": alone}


def _learn_rounding(run: Run, spec: RoundingSpec, index: int, call: BlockCall, quantised: Kept, targets: Kept) -> None:
    total = len(run.plan.blocks)
    with run.clock("rounding"):
        before, after = learn_rounding(
            run.blocks[index],
            call,
            quantised,
            targets,
            spec,
            windows=run.batch,
            splits=partial(splits, windows=run.layout.windows),
            progress=lambda step: run.progress("solve", index + step / (spec.steps + 1), total),
        )
    run.notes[index] = {**run.notes[index], "learned_rounding": {"before": before, "after": after}}


def _output_hessians(run: Run, index: int, calls: list[BlockCall], quantised: Kept | None) -> dict[str, Tensor]:
    assert quantised is not None
    assert isinstance(run.tokens, Tensor)
    tokens = run.tokens.to(run.device)
    # After an end-to-end fit all blocks are folded, otherwise those that come later are as they were.
    after = calls[index + 1 :] if run.end_to_end is None else [run.rotated(c) for c in calls[index + 1 :]]

    def loss(hidden: Tensor, window: Tensor) -> Tensor:
        """Cross entropy of a sequence, summed: a mean would underflow half precision on its way back."""
        with autocast(run.device, run.dtype):
            for block, call in zip(run.blocks[index + 1 :], after, strict=True):
                hidden = call.of(window)(block, hidden)
            scores = run.head(hidden)
        return F.cross_entropy(scores[0, :-1].float(), tokens[window][0, 1:], reduction="sum")

    collect = partial(
        output_hessians,
        run.blocks[index],
        run.plan.blocks[index],
        run.rotated(calls[index]),
        loss,
        quantised,
        run.recipe.solver.gradients,
    )
    with ExitStack() as stack:
        for block in run.blocks[index + 1 :]:
            stack.enter_context(widened(block, run.dtype))
        try:
            with deterministic():
                return collect()
        except NoSuchKernel:
            return collect()
