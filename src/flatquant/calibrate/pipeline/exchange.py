"""Blocks that an earlier run has kept, or another rank has fitted or rounded; and warnings of other ranks."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from flatquant import distributed
from flatquant.calibrate.activations import Kept
from flatquant.calibrate.capture import BlockCall, run_block
from flatquant.calibrate.pipeline.run import Run, Wrapped
from flatquant.errors import FitWarning
from flatquant.runtime.build import install

END_TO_END = "end-to-end"


def fitted_name(index: int) -> str:
    """The state file of a fitted block."""
    return f"fitted-{index:05d}"


def solved_name(index: int) -> str:
    """The state file of a solved block."""
    return f"solved-{index:05d}"


def share_fit(run: Run, w: Wrapped, found: distributed.Message | None) -> None:
    """Give all ranks what came of a block's fit: its owner found it, or an earlier run kept it."""
    name = fitted_name(w.index)
    kept = name in run.kept
    if kept and run.state is not None:
        found = run.state.load(name)
    source = 0 if kept else w.owner
    tensors, run.notes[w.index] = distributed.broadcast(found, source)
    if w.fit is not None and (kept or source != distributed.rank()):
        w.fit.load_state(tensors)
    if not kept and run.state is not None:
        run.state.save(name, tensors, run.notes[w.index])


def take(run: Run, index: int, owner: int, calls: list[BlockCall], quantised: Kept | None) -> Kept | None:
    """A rounded block, of whoever rounded it; its outputs on the quantised stream, if needed.

    Args:
        owner: the rank that has rounded it, unless an earlier run did.
    """
    block, plan, name = run.blocks[index], run.plan.blocks[index], solved_name(index)
    run.progress("solve", index, len(run.plan.blocks))
    solved = name in run.kept
    source = 0 if solved else owner
    found = None
    if solved and run.state is not None:
        found = run.state.load(name)
    elif not solved and source == distributed.rank():
        found = block.state_dict(), {**run.notes[index], "told": run.told.pop(index, [])}
    if run.end_to_end is None:  # after an end-to-end fit, every rank has rounded every block
        tensors, note = distributed.broadcast(found, source)
        tell(note.pop("told", []))
        run.notes[index] = note
        if solved or source != distributed.rank():
            install(block, run.plan.attention, plan, packed=False)
            block.load_state_dict(tensors, assign=True)
            block.to(run.device)
        if not solved and run.state is not None:
            run.state.save(name, tensors, run.notes[index])
    if run.witness is not None:
        with run.clock("verdict"), torch.no_grad():
            run.witness.see_quantised(index, block, run.notes[index].get("alone"))
    if quantised is not None:
        with run.clock("quantised stream"):
            quantised = run_block(block, run.rotated(calls[index]), quantised, run.batch)
    run.put_back(index)
    run.progress("solve", index + 1, len(run.plan.blocks))
    return quantised


@contextmanager
def forwarded() -> Iterator[list[list[str]]]:
    """On a rank that does not speak, collect warnings for the one that does: (category, text)."""
    told: list[list[str]] = []
    if distributed.leads():
        yield told
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield told
    told += [[w.category.__name__, str(w.message)] for w in caught]


def tell(told: list[list[str]]) -> None:
    """On the rank that speaks, warn of what `forwarded` has collected on another."""
    for category, text in told if distributed.leads() else ():
        warnings.warn(text, FitWarning if category == FitWarning.__name__ else UserWarning, stacklevel=2)
