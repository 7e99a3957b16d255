"""Fit all blocks at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from flatquant import distributed
from flatquant.calibrate.activations import Kept
from flatquant.calibrate.blockwise import named
from flatquant.calibrate.capture import BlockCall
from flatquant.calibrate.end2end import HeldOutModel, fit_end_to_end, stored_dtype
from flatquant.calibrate.memory import WeightBytes
from flatquant.calibrate.pipeline.exchange import END_TO_END
from flatquant.calibrate.pipeline.run import Run
from flatquant.errors import CalibrationError
from flatquant.spec import EndToEndSpec, FitMemory, QuantSpec
from flatquant.wiring.fitted import FitBlock, unrounded_weights


def stored(run: Run, fit: FitBlock | None) -> FitBlock | None:
    """A block that waits for the end-to-end fit, its weights as that holds them."""
    assert run.end_to_end is not None
    dtype = stored_dtype(run.end_to_end, run.memory, run.model_dtype)
    if fit is not None and dtype is not None:
        fit.store_weights(dtype)
    if fit is not None and run.shards is not None:
        run.shards.add(fit)
    return fit


class _Told(Mapping[str, Tensor]):
    """Tensors that the first rank has. Each is sent when it is asked for; all ranks ask for the same, in one order."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        self.names: list[str] = distributed.broadcast(({}, list(tensors)))[1]

    def __getitem__(self, name: str) -> Tensor:
        return distributed.broadcast(({"": self.tensors[name]}, None) if distributed.leads() else None)[0][""]

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def fit_whole(
    run: Run, spec: EndToEndSpec, fits: list[FitBlock], calls: list[BlockCall], inputs: Kept, targets: Kept
) -> None:
    """Fit wrapped blocks end to end, from where an earlier run has stopped; the report has what came of it.

    Args:
        inputs, targets: hidden states before the first block and after the last, in full precision.
    """
    start = None
    if END_TO_END in run.kept:
        tensors, note = ({}, None) if run.state is None else run.state.load(END_TO_END)
        note = distributed.broadcast(({}, note))[1]
        start = (note["step"], note["losses"], _Told(tensors), getattr(torch, note["dtype"]))

    def save(step: int, losses: list[float], tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
        assert run.state is not None
        run.state.save(END_TO_END, tensors, {"step": step, "losses": losses, "dtype": named(dtype)})

    kept, held_targets = run.held_out, None if run.held_out is None else run.held_out.original
    if spec.objective == "cross_entropy":
        assert isinstance(run.tokens, Tensor)
        targets = run.tokens.to(run.device)
        held_targets = None if kept is None else kept.ids.to(run.device)
    held_out = None
    if kept is not None and held_targets is not None:
        held_out = HeldOutModel(calls=kept.calls, inputs=kept.first, targets=held_targets)
    run.progress("end to end", 0 if start is None else start[0], spec.steps)
    unrounded = unrounded_weights(() if spec.round_weights else fits)
    with run.clock("end to end"), unrounded, distributed.reaching_in_passes():
        run.report.end_to_end = fit_end_to_end(
            fits,
            calls,
            run.head,
            inputs,
            targets,
            spec,
            dtype=run.dtype,
            graph=run.graph,
            windows=run.layout.windows,
            recompute=run.layout.recompute,
            memory=run.memory,
            shards=run.shards,
            seed=run.seed,
            held_out=held_out,
            start=start,
            save=None if run.state is None else save,
            progress=partial(run.progress, "end to end"),
        )


def resident_bytes(
    blocks: list[nn.Module], spec: EndToEndSpec, memory: FitMemory, dtype: torch.dtype, grid: QuantSpec | None = None
) -> int:
    """What an end-to-end fit keeps on the device besides activations: weights; trained, with gradient and moments.

    A weight whose code a fit chooses has a position that trains.

    Args:
        dtype: the model's.
    """
    parameters = [p for block in blocks for p in block.parameters()]
    weights, codes = sum(p.numel() for p in parameters), grid is not None and grid.is_fitted
    held = WeightBytes.of(spec, memory, dtype, distributed.size())
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
