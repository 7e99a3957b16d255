"""Learn how a solved block rounds, by signed gradients of its output error (AutoRound, arXiv 2309.05516).

The block is what serving will run, but for its linears: transforms are folded, activations, keys and values are on
their grids. It is called on what the quantised blocks before it give, and is to give what the original block gave on
the original model's activations (section 3, figure 2).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatquant.calibrate.activations import Kept, cyclic
from flatquant.calibrate.capture import BlockCall
from flatquant.calibrate.optimise import Optimiser
from flatquant.calibrate.rates import linear
from flatquant.errors import CalibrationError
from flatquant.modules import widened
from flatquant.runtime.linear import FrozenLinear, FrozenSite, NumberLinear
from flatquant.solvers.rounding import LearnedRounding
from flatquant.spec import RoundingSpec
from flatquant.wiring.arch import replace_submodule


class RoundingLinear(NumberLinear):
    """A linear whose rounding trains."""

    def __init__(self, site: FrozenSite, rounding: LearnedRounding, bias: Tensor | None) -> None:
        super().__init__(site, bias)
        self.rounding = rounding

    @classmethod
    def of(cls, linear: FrozenLinear, w: Tensor) -> RoundingLinear:
        """From a solver's rounding of w, (o, n)."""
        return cls(linear.site, LearnedRounding(w, linear.qweight()), linear.bias)

    def numbers(self, dtype: torch.dtype) -> Tensor:
        return self.rounding().to(dtype)

    def frozen(self) -> FrozenLinear:
        """As it serves."""
        return FrozenLinear(self.site, self.rounding.frozen(), self.bias)


def learn_rounding(
    block: nn.Module,
    call: BlockCall,
    inputs: Kept,
    targets: Kept,
    spec: RoundingSpec,
    *,
    windows: int,
    splits: Callable[[int], int] = lambda _: 1,
    progress: Callable[[int], None] | None = None,
) -> tuple[float, float]:
    """Train the rounding of every `RoundingLinear` in a block, and replace it by the `FrozenLinear` that it ends as.

    Args:
        inputs: the block's in the quantised model, (N, T, h).
        targets: what it is to give, (N, T, h).
        windows: at a time, where nothing trains.
        splits: equal parts that a batch of so many windows is taken in, for their memory.
        progress: called with the number of steps done.

    Returns:
        The mean squared error of the block's output over all windows, before and after; it has not grown.

    Raises:
        CalibrationError: the error before the first step is not finite.
    """
    linears = {path: module for path, module in block.named_modules() if isinstance(module, RoundingLinear)}
    parts = [module.rounding for module in linears.values()]
    with widened(block, inputs.dtype) as work:
        error = partial(_error, block, call, inputs, targets, work, windows)
        before = after = error()
        if not math.isfinite(before):
            raise CalibrationError("the error of its rounded weights is not finite; try --dtype float32 or bfloat16")
        if parts:  # an override may leave this block its weights
            batch, numbers = min(spec.batch_size, inputs.shape[0]), torch.arange(inputs.shape[0], device=inputs.device)
            optimiser = _optimiser(block, call, parts, spec, work, splits(batch))

            def step(done: int) -> Tensor:
                if progress is not None:
                    progress(done)
                return optimiser.step(*(cyclic(kept, done * batch, batch) for kept in (numbers, inputs, targets)))

            after = _best(step, error, before, optimiser.parameters, spec)
    for path, module in linears.items():
        replace_submodule(block, path, module.frozen())
    return before, after


def _best(
    step: Callable[[int], Tensor],
    error: Callable[[], float],
    least: float,
    parameters: Sequence[nn.Parameter],
    spec: RoundingSpec,
) -> float:
    """Take all steps, and leave the parameters where a check found the least error, or where they were.

    Args:
        step: takes the step after so many; its loss.
        error: on all windows.
        least: the error before.

    Returns:
        The error there.
    """
    best, losses = [p.detach().clone() for p in parameters], []
    checks = {spec.steps * k // spec.checks for k in range(1, spec.checks + 1)}
    for done in range(spec.steps):
        losses.append(step(done))
        if done + 1 in checks and (now := error()) < least:
            best, least = [p.detach().clone() for p in parameters], now
    if skipped := int((~torch.isfinite(torch.stack(losses))).sum()):
        what = f"{skipped} of {spec.steps} steps of learned rounding overflowed, and changed nothing"
        warnings.warn(what, stacklevel=2)
    with torch.no_grad():
        for p, value in zip(parameters, best, strict=True):
            p.copy_(value)
    return least


def _optimiser(
    block: nn.Module,
    call: BlockCall,
    parts: Sequence[LearnedRounding],
    spec: RoundingSpec,
    work: torch.dtype,
    splits: int,
) -> Optimiser:
    def loss_fn(windows: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        y = call.states(y)
        loss = F.mse_loss(call.states(call.of(windows)(block, x.to(work))).float(), y.float())
        # Only signs count. The gradient of an output is made so large that half precision holds it.
        return loss / loss.detach().clamp(min=torch.finfo(loss.dtype).tiny) * y.numel() ** 0.5, loss

    first = 2 * spec.reach / (spec.steps + 1)  # the rates of all steps add up to `reach`
    return Optimiser(
        {"rounding": [p for part in parts for p in part.parameters()]},
        {"rounding": first},
        floors={"rounding": 0.0},
        steps=spec.steps,
        schedule=linear,
        loss_fn=loss_fn,
        graph=False,
        splits=splits,
        relative=True,
        bounded=parts,
    )


@torch.no_grad()
def _error(block: nn.Module, call: BlockCall, inputs: Kept, targets: Kept, work: torch.dtype, windows: int) -> float:
    """The mean squared error of a block's outputs."""
    total, run, count = torch.zeros((), dtype=torch.float64, device=inputs.device), call.in_order(block), 0
    for x, y in zip(inputs.split(windows), targets.split(windows), strict=True):
        out, y = call.states(run(x.to(work))), call.states(y)
        total, count = total + F.mse_loss(out.double(), y.double(), reduction="sum"), count + y.numel()
    return float(total) / count
