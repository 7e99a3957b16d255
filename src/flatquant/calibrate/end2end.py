"""End-to-end fit: the same parameters, through all blocks at once, by what the model says.

Block-wise reconstruction weighs every direction of a block's output alike; the KL divergence weighs what the model
says. Nothing is added that costs at inference. The original's side is its last hidden states, kept from the block-wise
pass: its logits are one product away. The other objective, cross entropy with the text, needs no original (SpinQuant).

Where memory is short, weights are held in 5 bytes instead of 16 while they train (`EndToEndSpec.memory`).

Several ranks divide the windows of every step and add up their gradients. Sums then have another order, and the last
bits differ. Every rank has all parameters and moments, or a share of the weights with theirs (`sharding`).
"""

from __future__ import annotations

import math
import time
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flatquant import distributed
from flatquant.calibrate.activations import Kept, cyclic
from flatquant.calibrate.blockwise import UNDONE, autocast, grown, named, safer, wide
from flatquant.calibrate.capture import BlockCall
from flatquant.calibrate.memory import splits
from flatquant.calibrate.optimise import Optimiser
from flatquant.calibrate.rates import rates_of
from flatquant.calibrate.sharding import Shards, own
from flatquant.errors import CalibrationError, FitWarning
from flatquant.modules import Bounded, trainable_parameters
from flatquant.ops.divergence import kl_rows
from flatquant.spec import EndToEndSpec, FitMemory
from flatquant.transforms import shared_inverses
from flatquant.wiring.fitted import FitBlock

SAVE_EVERY = 8  # steps
NOTHING_LOST = 1e-3  # nats per token that plain rounding may lose without a fit
# What a token's loss counts on its way back. Not a mean: gradients in float16 would underflow. Of the text's cross
# entropy a share, since at few bits a weight's gradient, summed over tokens, would overflow. AdamW sees a difference in
# its eps alone.
_SHARES = {"kl": 1.0, "cross_entropy": 1 / 32}


@dataclass(frozen=True, kw_only=True)
class HeldOutModel:
    """A few windows that the model is measured on, and not trained; as the arguments of `fit_end_to_end`."""

    calls: Sequence[BlockCall]
    inputs: Tensor  # (M, T, h)
    targets: Tensor  # (M, T, h), or (M, T)


@dataclass(frozen=True, kw_only=True)
class FittedModel:
    """How the fit went: the loss of every step, nats per token; and before and after it, on held-out windows.

    `plain` is the loss of plain rounding there, if the parameters can be such. `undone`: the loss had grown, or was not
    less than that of plain rounding by more than chance, and that came back. Where plain rounding loses next to
    nothing, it is taken without a step.
    """

    losses: list[float]
    held_out: tuple[float, float] | None = None
    plain: float | None = None
    undone: bool = False


def fit_end_to_end(
    fits: Sequence[FitBlock],
    calls: Sequence[BlockCall],
    head: Callable[[Tensor], Tensor],
    inputs: Kept,
    targets: Kept,
    spec: EndToEndSpec,
    *,
    dtype: torch.dtype,
    graph: bool = True,
    windows: int | None = None,
    recompute: bool = False,
    memory: FitMemory = "full",
    shards: Shards | None = None,
    seed: int = 0,
    held_out: HeldOutModel | None = None,
    start: tuple[int, list[float], Mapping[str, Tensor], torch.dtype] | None = None,
    save: Callable[[int, list[float], dict[str, Tensor], torch.dtype], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> FittedModel:
    """Fit all wrapped blocks together.

    A step whose divergence or gradients overflow `dtype` has changed nothing, nor have steps that had begun by then: it
    is taken again, and all that follow, in a wider dtype, with a warning.

    Args:
        fits, calls: every block and how it is called.
        head: final norm and output embedding, (B, T, h) -> (B, T, V).
        inputs: hidden states before block 0, (N, T, h).
        targets: the original's hidden states after the last block, (N, T, h), or for cross entropy the tokens, (N, T).
        dtype: of the matrix products (parameters stay float32).
        held_out: where the loss on these windows has grown, the start comes back; where it is not less than that of
            plain rounding by more than chance, plain rounding does. Either with a warning. Where plain rounding
            diverges by less than `NOTHING_LOST` on them, nothing is fitted.
        start: (steps done, losses so far, state, dtype) to go on from, as `save` received them.
        graph: on CUDA, replay steps from a CUDA graph.
        windows: of a batch that are worked on at a time; by default all.
        recompute: each block in the backward pass, instead of keeping what it has computed in the forward pass.
        memory: how weights are held, see `EndToEndSpec`; they are in `stored_dtype` already.
        shards: has the weights of all blocks, where ranks divide them. They stay divided.
        seed: of the chance by which weights of a compact fit are rounded.
        save: keeps the state at the end, and every `SAVE_EVERY` steps unless that would slow the fit by more than a
            twentieth.
        progress: called with (steps done, steps).

    Raises:
        CalibrationError: the divergence is not finite, in float32 too.
    """
    moves_weights = spec.moves_weights(memory)
    consumes = moves_weights and memory == "compact"
    if moves_weights:
        for fit in fits:
            fit.release_weights()
    if shards is not None:
        shards.seal()
    roots = [root for fit in fits for root in fit.roots()]
    parameters = trainable_parameters(*roots)  # what blocks share, once
    if not any(parameters.values()):
        return FittedModel(losses=[])

    def through(call: BlockCall, block: nn.Module, x: Tensor) -> Tensor:
        if not recompute:
            return call(block, x)
        return cast(Tensor, checkpoint(call, block, x, use_reentrant=False, preserve_rng_state=False))

    def student(calls: Sequence[BlockCall], windows: Tensor, x: Tensor) -> Tensor:
        passes = [partial(through, call.of(windows), fit.block) for fit, call in zip(fits, calls, strict=True)]
        if shards is not None:
            return head(shards(x, passes))
        for run in passes:
            x = run(x)
        return head(x)

    def measure(calls: Sequence[BlockCall], windows: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Losses of tokens.  # (tokens,)"""
        with autocast(x.device, dtype):
            teacher = None
            if spec.objective == "kl":
                with torch.no_grad():
                    teacher = head(wide(y, dtype))
            logits = student(calls, windows, wide(x, dtype))
        if teacher is None:
            return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), y[:, 1:].flatten(), reduction="none")
        return kl_rows(teacher, logits).flatten()

    @torch.no_grad()
    def held_out_losses(held_out: HeldOutModel) -> Tensor:
        numbers = torch.arange(len(held_out.inputs)).split(1)
        windows = zip(numbers, held_out.inputs.split(1), held_out.targets.split(1), strict=True)
        with shared_inverses(roots):
            return torch.cat([measure(held_out.calls, *window) for window in windows]).cpu()

    def loss_fn(windows: Tensor, x: Tensor, y: Tensor, *counts: Tensor) -> tuple[Tensor, Tensor]:
        losses = measure(calls, windows, x, y)
        for count in counts:  # (B,)
            losses = losses.unflatten(0, (len(count), -1)) * count[:, None]
        loss = losses.mean()
        return loss * (_SHARES[spec.objective] * x.shape[0] * x.shape[1]), loss

    ours = distributed.share(spec.batch_size)  # windows of a batch
    # Ranks that gather weights for one another have equally many; those too many are others', and do not count.
    taken = len(ours) if shards is None else math.ceil(spec.batch_size / distributed.size())
    rates, floors = rates_of(spec, _SHARES[spec.objective] * spec.batch_size * inputs.shape[1])
    optimiser = Optimiser(
        parameters,
        rates,
        floors=floors,
        steps=spec.steps,
        eps=spec.eps,
        loss_fn=loss_fn,
        graph=graph,
        splits=splits(taken, windows or taken) if taken else 1,
        share=taken / spec.batch_size if distributed.size() > 1 else None,
        bounded=[m for root in roots for m in root.modules() if isinstance(m, Bounded)],
        around=lambda: shared_inverses(roots),
        consumes=consumes,
        sharded=shards is not None,
        halts=True,
        seed=seed,
    )
    losses: list[float] = []
    done, numbers = 0, torch.arange(inputs.shape[0], device=inputs.device)
    first = None if held_out is None else [own(p).cpu().clone() for p in optimiser.parameters]
    start_losses = None if held_out is None else held_out_losses(held_out)
    before = None if start_losses is None else float(start_losses.mean())

    def restore() -> None:
        assert first is not None
        with torch.no_grad():
            for p, value in zip(optimiser.parameters, first, strict=True):
                own(p).copy_(value)

    plain_losses = None
    if held_out is not None:
        if all(fit.become_plain() for fit in fits):
            plain_losses = held_out_losses(held_out)
            least = float(plain_losses.mean())
            if before is not None and spec.objective == "kl" and least < NOTHING_LOST:
                warnings.warn(
                    f"plain rounding loses {least:.2g} nats per token, and less than {NOTHING_LOST:.0e} are not worth "
                    "transforms; nothing was fitted end to end",
                    FitWarning,
                    stacklevel=2,
                )
                if progress:
                    progress(spec.steps, spec.steps)
                return FittedModel(losses=[], held_out=(before, least), plain=least, undone=True)
        restore()
    if start is not None:
        done, losses, state, reached = start
        optimiser.load_state(done, state)
        if reached != dtype:
            dtype = reached
            _widen(fits)

    counts = [] if shards is None else [(torch.arange(taken, device=inputs.device) < len(ours)).float()]

    def begun(step: int) -> _OnItsWay:
        count = max(taken, int(consumes))  # a rank without windows takes part in sums inside the backward pass
        rows = [cyclic(kept, step * spec.batch_size + ours.start, count) for kept in (numbers, inputs, targets)]
        value = optimiser.step(*rows, *counts)
        optimiser.join()
        return _OnItsWay(value)

    saved, cost = time.perf_counter(), 0.0

    def is_due(done: int) -> bool:
        """Whether the state after so many steps is kept. Of shards, all ranks have a part in it."""
        if done % SAVE_EVERY and done < spec.steps:
            return False
        due = save is not None and (done == spec.steps or time.perf_counter() - saved > 20 * cost)
        return due if shards is None else distributed.broadcast(({}, due))[1]

    ahead: deque[_OnItsWay] = deque()  # losses of steps that have begun
    keep = False  # the state after these
    while len(losses) < spec.steps:
        begin = len(losses) + len(ahead)
        if begin < spec.steps and not keep and len(ahead) <= optimiser.ahead:
            ahead.append(begun(begin))
            keep = is_due(begin + 1)
            continue
        step, loss = len(losses), ahead.popleft().read()
        if not loss < float("inf"):
            overflow = f"the end-to-end divergence or a gradient in {named(dtype)} is not finite at step {step + 1}"
            wider = safer(dtype, inputs.device)
            if wider is None and (before is None or not math.isfinite(before)):
                raise CalibrationError(f"{overflow}; try a lower learning rate, or other calibration text")
            if wider is None:  # what the fit has made of the model is undone
                break
            warnings.warn(f"{overflow}; the fit goes on in {named(wider)}", stacklevel=2)
            dtype = wider
            _widen(fits)
            ahead.clear()
            optimiser.restart(step)
            keep = False
            continue
        losses.append(loss)
        if keep and not ahead:
            now = time.perf_counter()
            state = optimiser.state()
            if save:
                save(step + 1, losses, state, dtype)
            del state
            saved = time.perf_counter()
            cost = saved - now
            keep = False
        if progress:
            progress(step + 1, spec.steps)
    if held_out is None or before is None or start_losses is None:
        return FittedModel(losses=losses)
    end_losses = held_out_losses(held_out) if len(losses) == spec.steps else torch.full_like(start_losses, math.nan)
    after = float(end_losses.mean())
    plain = None if plain_losses is None else float(plain_losses.mean())
    worse = grown(before, after)
    behind = plain_losses is not None and not _surely_less(start_losses if worse else end_losses, plain_losses)
    if worse or behind:
        restore()
        for fit in fits if behind else ():
            fit.become_plain()
        how = f"is not ahead of plain rounding, {plain:.3g} nats per token," if behind else "made the model worse"
        warnings.warn(f"the end-to-end fit ({before:.3g} -> {after:.3g}) {how} {UNDONE}", FitWarning, stacklevel=2)
    return FittedModel(losses=losses, held_out=(before, after), plain=plain, undone=worse or behind)


class _OnItsWay:
    """A number that a device has yet to compute; on CUDA, what is launched after it does not wait for who reads it."""

    def __init__(self, value: Tensor) -> None:
        self.event = None
        self.value = value
        if value.is_cuda:
            self.value = torch.empty((), dtype=value.dtype, pin_memory=True).copy_(value, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record(torch.cuda.current_stream(value.device))

    def read(self) -> float:
        if self.event is not None:
            self.event.synchronize()
        return float(self.value)


def stored_dtype(spec: EndToEndSpec, memory: FitMemory, model: torch.dtype) -> torch.dtype | None:
    """What blocks' weights are stored in before an end-to-end fit; None for as they are.

    Args:
        model: the dtype of its tensors.
    """
    if memory in ("full", "sharded"):
        return None
    if spec.moves_weights(memory):
        return torch.bfloat16
    return model if model.itemsize == 2 else None


def _surely_less(losses: Tensor, others: Tensor) -> bool:
    """Whether the mean over the same tokens is less by more than chance, two standard errors of the difference.

    Where nothing differs, or the others are not finite, it counts as less.
    """
    if not bool(others.isfinite().all()):
        return True
    difference = (losses - others).double()
    return bool(difference.mean() + 2 * difference.std() / math.sqrt(len(difference)) <= 0)


def _widen(fits: Sequence[FitBlock]) -> None:
    """Have what else blocks hold, norms above all, in float32 as what is fitted is."""
    for fit in fits:
        fit.block.float()
