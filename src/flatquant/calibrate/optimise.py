"""One optimiser for every fit: AdamW (Cayley SGD for rotations, signs of gradients for rounding), a rate per group, a
schedule, on a GPU a graph per step.

A calibration step of a small model is bound by launches, not by arithmetic. On CUDA the whole step is captured once per
block in two CUDA graphs, forward and backward in one, the update in the other, and replayed; the first steps run
eagerly and are real steps, so nothing is warmed up twice. The loss stays on the device until the caller asks.

Two things can go wrong in a step, and are told apart. A graph may compute something else than the eager step: when it
is captured, its loss and gradients are compared with those of an eager pass over the same batch and parameters, before
anything is updated, and a graph that differs is dropped. And numbers may overflow: a step whose loss or gradients are
not finite leaves parameters and moments as they are, and its loss is NaN. So the parameters stay good, and a fit can
go on from them in a wider dtype. Weights that move in the backward pass (`consuming`) are the exception: those whose
gradients came before the first that is not finite have moved.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flatquant import distributed
from flatquant.calibrate.cayley import CayleySGD
from flatquant.calibrate.consuming import ConsumingAdam
from flatquant.calibrate.deterministic import NoSuchKernel, deterministic
from flatquant.calibrate.rates import cosine, in_units
from flatquant.calibrate.sharding import is_shard, norms, placed, whole
from flatquant.modules import Bounded, Group

MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # of AdamW; a rotation has none
EAGER_STEPS = 3  # before capture: lazily made workspaces and optimiser state must exist
# How far a graph's loss and norms of gradients may be from an eager pass, relative to the loss and to the largest norm.
# cuBLAS may choose other kernels while a graph is captured, which sum in another order; in 16 bits that is 1e-3.
SAME_LOSS, SAME_NORMS = 1e-2, 5e-2

# Records what a function does, on tensors at fixed addresses, without doing it; calling the result does it.
Recorder = Callable[[Callable[[], None]], Callable[[], None]]


class SignSGD(torch.optim.Optimizer):
    """p -= lr sign(gradient). `lr` may be a tensor; nothing moves where `found_inf`, as in `CayleySGD`, is 1."""

    found_inf: Tensor | None = None

    def __init__(self, params: Iterable[dict], lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            lr = group["lr"] if self.found_inf is None else group["lr"] * (1 - self.found_inf)
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad.sign() * lr)


class GraphRecorder:
    """Records functions in CUDA graphs that share a memory pool: they are replayed in the order of recording."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.stream = stream
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream, pool=self.pool):
            function()
        return graph.replay


@dataclass(frozen=True)
class _Recorded:
    """A step: forward and backward pass, and the update."""

    gradients: Callable[[], None]
    update: Callable[[], None]


class Optimiser:
    """Runs `loss_fn` on batches and updates the parameters.

    Args:
        parameters: by group.
        rates: start learning rate by group; of weights, relative to the root mean square of each matrix at the start.
        floors: learning rate at the end by group, likewise.
        steps: total number of steps (the schedule's length).
        schedule: `cosine` or `linear`.
        loss_fn: maps static batch tensors to (objective to differentiate, loss to report), both scalars. On CUDA it
            must not synchronise.
        graph: capture steps in a CUDA graph.
        splits: parts that a batch is taken in, one after another, for their memory; it divides the batch. Gradients
            add up to those of the whole batch, in another order of sums.
        relative: an objective is its loss divided by the loss's own value, so that parts count as their losses do.
        bounded: settled after every step.
        around: gives a context that lasts through a part's forward and backward pass.
        share: that this rank's batches are of the whole batch, where ranks divide it. Objectives are then sums: their
            gradients are added up over ranks, and losses averaged. Where other ranks have all of it, batches are empty;
            if gradients are consumed, they are of some windows, which count for nothing.
        consumes: weights, which are in bfloat16, move in the backward pass (`ConsumingAdam`). Several ranks then sum
            their gradients inside of it, which no CUDA graph records.
        sharded: passes gather weights that ranks divide (`sharding`): no graph records them, and none may end halfway.
        halts: after a step that is not finite, none changes anything until `restart`. So a step may begin before the
            loss of the last is read.
        seed: of the chance by which consumed weights are rounded.
    """

    def __init__(
        self,
        parameters: Mapping[Group, list[nn.Parameter]],
        rates: Mapping[Group, float],
        *,
        floors: Mapping[Group, float],
        steps: int,
        schedule: Callable[[int, int, int, float, float], float] = cosine,
        warmup: int = 0,
        weight_decay: float = 0.0,
        eps: float = 1e-8,
        loss_fn: Callable[..., tuple[Tensor, Tensor]],
        graph: bool,
        splits: int = 1,
        relative: bool = False,
        bounded: Sequence[Bounded] = (),
        around: Callable[[], AbstractContextManager[None]] = nullcontext,
        share: float | None = None,
        consumes: bool = False,
        sharded: bool = False,
        halts: bool = False,
        seed: int = 0,
    ) -> None:
        assert not (consumes and (relative or weight_decay))
        self.bounded, self.around, self.share = bounded, around, share
        self.parameters = [p for ps in parameters.values() for p in ps]
        device = self.parameters[0].device
        on_gpu = device.type == "cuda"
        self.groups: list[tuple[dict[str, Any], float, float]] = []  # with the rate at the start and at the end
        moved, turned, signed, consumed = [], [], [], []
        for name, unit, ps in in_units(parameters):
            if ps:
                rate, floor = rates[name] * unit, floors[name] * unit
                group = {"params": ps, "lr": torch.tensor(rate, device=device)}
                self.groups.append((group, rate, floor))
                own = {"rotation": turned, "rounding": signed} | ({"weight": consumed} if consumes else {})
                own.get(name, moved).append(group)
        self.optimisers: list[torch.optim.Optimizer] = []
        if moved:
            self.optimisers.append(
                torch.optim.AdamW(moved, weight_decay=weight_decay, eps=eps, capturable=on_gpu, fused=on_gpu)
            )
        if turned:
            self.optimisers.append(CayleySGD(turned))
        if signed:
            self.optimisers.append(SignSGD(signed))
        self.consuming = ConsumingAdam(consumed, eps=eps, seed=seed) if consumed else None
        # What has a gradient after a backward pass.
        self.plain = [p for p in self.parameters if self.consuming is None or p not in self.consuming.state]
        # What every rank has all of. The backward pass itself sums the gradients of shards.
        self.alike = [p for p in self.plain if not is_shard(p)]
        self.steps, self.warmup, self.schedule = steps, warmup, schedule
        self.loss_fn = loss_fn
        self.splits, self.relative = splits, relative
        # A rank without a share has no gradients that a record could hold; nor is a sum over ranks recorded.
        recordable = share is None or (share != 0 and self.consuming is None and not sharded)
        self.halts = halts
        # How many steps it pays to begin before the loss of the last is read: the processor launches a record's kernels
        # one by one, in a third of the time that a GPU takes to run them. Alike on all ranks, which sum in one order.
        self.ahead = int(halts and graph and on_gpu and self.consuming is None and not sharded)
        self.stream = torch.cuda.Stream(device) if graph and on_gpu and recordable else None
        self.recorder: Recorder | None = None if self.stream is None else GraphRecorder(self.stream)
        self.recorded: _Recorded | None = None
        self.static: tuple[Tensor, ...] = ()
        self.static_loss = torch.zeros((), device=device)
        self.skipped = torch.zeros((), device=device)  # 1 where this step's loss or gradients are not finite
        self.fused = on_gpu
        self.reproducible = True
        self.strict = not sharded
        self.rehearsed = self.consuming is None
        self.done = 0
        self.eager = 0

    def _set_rates(self) -> None:
        for group, rate, floor in self.groups:
            group["lr"].fill_(self.schedule(self.done - 1, self.steps, self.warmup, rate, floor))

    def _gradients(self, *batch: Tensor) -> Tensor:
        """Of a batch, left with the parameters; its loss, the mean over its parts."""
        if not len(batch[0]):
            return torch.zeros_like(self.static_loss)
        total = last = None
        for number, part in enumerate(zip(*(b.chunk(self.splits) for b in batch), strict=True), start=1):
            with self.around():
                objective, loss = self.loss_fn(*part)
                loss = loss.detach()
                if last is not None:
                    self._rescale(last, loss)  # from parts of the last loss to parts of this one
                if self.consuming is None:
                    objective.backward()
                else:
                    self._consume(self.consuming, objective, loss, last=number == self.splits)
            last = loss if last is None else torch.where(loss > 0, loss, last)
            total = loss if total is None else total + loss
        assert last is not None
        assert total is not None
        if self.splits == 1:
            return total
        self._rescale(last, total)
        return total / self.splits

    def _consume(self, consuming: ConsumingAdam, objective: Tensor, loss: Tensor, *, last: bool) -> None:
        """The backward pass of a batch's part; weights move in that of the last part."""
        counts = 0.0 if self.share == 0 else 1.0
        factor = torch.where(torch.isfinite(loss), counts, torch.nan)  # then no gradient is finite, on any rank
        if last:
            consuming.begin()
        try:
            (objective * factor).backward()
            if last:
                consuming.end()
        finally:
            consuming.stop()

    @contextmanager
    def _holding(self) -> Iterator[None]:
        """Let backward passes move nothing."""
        if self.consuming is None:
            yield
            return
        self.consuming.hold.fill_(1.0)
        try:
            yield
        finally:
            self.consuming.hold.zero_()

    def _rescale(self, last: Tensor, loss: Tensor) -> None:
        """Turn gradients of objectives relative to one loss into relative to another; zero has no gradients."""
        if not self.relative:
            return
        factor = torch.where(loss > 0, last / loss, 1.0)
        for p in self.parameters:
            if p.grad is not None:
                p.grad.mul_(factor)

    def _backward(self, *batch: Tensor) -> Tensor:
        """Loss of a batch; gradients are left with the parameters."""
        self._forget_gradients()
        if self.reproducible:
            try:
                with deterministic(strict=self.strict):
                    if not self.rehearsed:  # what moves weights must not end halfway
                        with self._holding():
                            self._gradients(*batch)
                        self._forget_gradients()
                        self.rehearsed = True
                    return self._gradients(*batch)
            except NoSuchKernel:  # fit the family all the same; the first step shows it
                self.reproducible = False
                self._forget_gradients()
        return self._gradients(*batch)

    def _added_up(self, loss: Tensor) -> Tensor:
        """The loss of the whole batch; gradients of all ranks are left with the parameters."""
        return loss if self.share is None else distributed.sum_gradients(self.alike, self.share * loss)

    def _norms(self) -> Tensor:
        """Of every gradient there is, or was and is consumed.  # float32, (gradients,)"""
        found = norms([p.grad for p in self.plain if p.grad is not None])
        found += [] if self.consuming is None else list(self.consuming.norms)
        return torch.stack([n.float() for n in found]) if found else torch.zeros(1, device=self.skipped.device)

    @torch.no_grad()
    def _update(self, loss: Tensor) -> Tensor:
        """Move the parameters, unless the loss or a gradient is not finite; the loss, NaN in that case."""
        finite = torch.isfinite(loss) & torch.isfinite(self._norms()).all()
        if self.halts:
            finite = finite & (self.skipped == 0)
        self.skipped.copy_(~finite)
        if self.fused or bool(finite):  # on a CPU one may look; on CUDA that would wait for the device
            for optimiser in self.optimisers:
                if self.fused:
                    optimiser.found_inf = self.skipped  # type: ignore[attr-defined]
                optimiser.step()
            for module in self.bounded:
                module.settle()
        return torch.where(finite, loss, torch.nan)

    def _body(self, *batch: Tensor) -> Tensor:
        loss = self._update(self._added_up(self._backward(*batch)))
        self._forget_gradients()
        return loss

    @property
    def _all(self) -> list[torch.optim.Optimizer]:
        return [*self.optimisers, *(() if self.consuming is None else (self.consuming,))]

    def _forget_gradients(self) -> None:
        for optimiser in self._all:
            optimiser.zero_grad(set_to_none=True)

    def step(self, *batch: Tensor) -> Tensor:
        """One update on a batch; returns its loss, a scalar tensor that later steps do not overwrite.

        The loss is NaN, and nothing has changed but consumed weights, where it or a gradient is not finite. With a
        graph, the step runs on a stream of its own, so that several optimisers share a GPU side by side; `join` before
        reading losses or parameters.
        """
        self.done += 1
        if self.stream is None:
            self._set_rates()
            return self._run(*batch)
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        for b in batch:
            b.record_stream(self.stream)  # it may be gone for the caller before the copy below has run
        with torch.cuda.stream(self.stream):
            self._set_rates()
            return self._run(*batch)

    def _run(self, *batch: Tensor) -> Tensor:
        if self.recorder is None:
            return self._body(*batch)
        if not self.static:
            self.static = tuple(b.clone() for b in batch)
        for static, b in zip(self.static, batch, strict=True):
            static.copy_(b)
        if self.eager < EAGER_STEPS:
            self.eager += 1
            return self._body(*self.static)
        if self.recorded is None:
            self.recorded = self._record(self.recorder)
        if self.recorded is None:
            self.recorder = None
            return self._body(*self.static)
        self.recorded.gradients()
        self.static_loss.copy_(self._added_up(self.static_loss))
        self.recorded.update()
        return self.static_loss.clone()

    def _record(self, recorder: Recorder) -> _Recorded | None:
        """Record a step; None, with a warning, if the record computes something else than the step."""

        def gradients() -> None:
            self.static_loss.copy_(self._backward(*self.static))

        def update() -> None:
            self.static_loss.copy_(self._update(self.static_loss))

        with self._holding():
            gradients()
            want, norms = self.static_loss.clone(), self._norms()
            self._forget_gradients()
            replay = recorder(gradients)
            self.static_loss.fill_(torch.nan)  # what a replay that does nothing would leave is no loss
            replay()
        why = _difference(want, self.static_loss, norms, self._norms())
        if why:
            self._forget_gradients()
            warnings.warn(
                f"a recorded step is not the step it was recorded from ({why}); steps run eagerly", stacklevel=2
            )
            return None
        return _Recorded(replay, recorder(update))

    def restart(self, done: int) -> None:
        """Go on after `done` steps with a `loss_fn` that computes differently, which is recorded anew."""
        self.done, self.recorded, self.eager = done, None, 0
        self.skipped.zero_()

    def join(self) -> None:
        """Make the current stream wait for all steps so far."""
        if self.stream is not None:
            torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)

    def state(self) -> dict[str, Tensor]:
        """Parameters and moments on the host, by position: all that the next step depends on, until it is taken.

        Of shards every rank calls it, and the first has what they make up.
        """
        out = {}
        for i, p in enumerate(self.parameters):
            moments = {name: m for optimiser in self._all for name, m in optimiser.state.get(p, {}).items()}
            for name, tensor in {"value": p, **moments}.items():
                tensor = whole(tensor)
                if distributed.leads():
                    out[f"{i}.{name}"] = tensor.cpu()
        return out

    @torch.no_grad()
    def load_state(self, done: int, state: Mapping[str, Tensor]) -> None:
        """Go on after `done` steps from what `state` gave."""
        self.done = done
        for i, p in enumerate(self.parameters):
            p.copy_(placed(state[f"{i}.value"], p))
            if self.consuming is not None and p in self.consuming.state:
                self.consuming.load(p, {n: state[f"{i}.{n}"] for n in self.consuming.state[p]})
                continue
            moments = {n: placed(state[f"{i}.{n}"], p) for n in MOMENTS if f"{i}.{n}" in state}
            if moments:
                self.optimisers[0].state[p] = moments


def _difference(loss: Tensor, got: Tensor, norms: Tensor, got_norms: Tensor) -> str:
    """What two passes over one batch differ in; empty if nothing.

    A loss that is not finite is no fault of the record: then nothing is compared, nor is a norm that is not.
    """
    if not bool(torch.isfinite(loss)):
        return ""
    if not bool((got - loss).abs() <= SAME_LOSS * loss.abs()):
        return f"its loss is {float(got):.6g}, not {float(loss):.6g}"
    if len(got_norms) != len(norms):
        return f"it has {len(got_norms)} gradients, not {len(norms)}"
    finite = torch.isfinite(norms)
    off = (got_norms - norms)[finite].abs()
    largest = norms[finite].amax() if bool(finite.any()) else norms.new_zeros(())
    if not bool((off <= SAME_NORMS * largest).all()):
        return f"a gradient's norm is off by {float(off.max()):.3g}, and the largest norm is {float(largest):.3g}"
    return ""
