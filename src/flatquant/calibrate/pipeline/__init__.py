"""A model through all stages: capture, fit block by block, fit end to end, fold, solve; resumable after each block.

Two streams of hidden states run through the model: full precision (inputs and targets of the fit, targets of learned
rounding) and quantised (the inputs of solvers that use a Hessian, and of learned rounding). One block is on the device
at a time unless an end-to-end fit or a Hessian of the model's loss needs them all. With a checkpoint, one block is in
memory at all: its tensors are read when its turn comes, and forgotten when the state has it solved.

Several ranks (`flatquant.distributed`) divide the blocks among them, a group of neighbours at a time. Every rank runs
the original blocks itself; one of them fits and rounds a block, and the others receive it, as a resumed run receives
blocks from its state. So a block has the same bits on any number of ranks. An end-to-end fit has all blocks on every
rank, and a part of each step's windows.

`stages` has the order of the stages, and `run` what they share. The stages are `wrap` (capture, full precision, wrapped
blocks), `fit` (block by block), `end_to_end` and `fold` (folding and rounding). `exchange` keeps blocks in the state,
and takes them from it and from other ranks. `report` has what is reported.
"""

from __future__ import annotations

from flatquant.calibrate.pipeline.end_to_end import check_room, resident_bytes
from flatquant.calibrate.pipeline.exchange import solved_name
from flatquant.calibrate.pipeline.report import Report, measured
from flatquant.calibrate.pipeline.stages import calibrate

__all__ = ["Report", "calibrate", "check_room", "measured", "resident_bytes", "solved_name"]
