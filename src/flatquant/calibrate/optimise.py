"""One optimiser for every fit: AdamW (Cayley SGD for rotations), a rate per group, a cosine, on a GPU a graph per step.

A calibration step of a small model is bound by launches, not by arithmetic. On CUDA the whole step - forward,
backward, update - is captured once per block in a CUDA graph and replayed; the first steps run eagerly and are real
steps, so nothing is warmed up twice. The loss stays on the device until the caller asks.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from flatquant.calibrate.cayley import CayleySGD
from flatquant.modules import Bounded, Group

MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # of AdamW; a rotation has none
EAGER_STEPS = 3  # before capture: lazily made workspaces and optimiser state must exist


def cosine(step: int, steps: int, warmup: int, lr: float, floor: float) -> float:
    """Learning rate of `step` (0-based): linear warm-up, then a half cosine from lr to floor over all steps."""
    ramp = min(1.0, 0.01 + 0.99 * step / warmup) if warmup else 1.0
    return ramp * (floor + (lr - floor) * 0.5 * (1 + math.cos(math.pi * step / steps)))


@contextmanager
def deterministic() -> Iterator[None]:
    """Choose kernels that give the same bits every time; attention's backward pass on CUDA has others.

    Raises:
        RuntimeError: torch meets an operation that has no such kernel.
    """
    # torch asks for this of cuBLAS, whose workspaces it could share between streams.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = getattr(torch.utils.deterministic, "fill_uninitialized_memory")  # noqa: B009 - a property pyright misses
    torch.use_deterministic_algorithms(True)
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        setattr(torch.utils.deterministic, "fill_uninitialized_memory", fill)  # noqa: B010


class Optimiser:
    """Runs `loss_fn` on batches and updates the parameters.

    Args:
        parameters: by group.
        rates: start learning rate by group.
        floors: learning rate at the end by group.
        steps: total number of steps (the cosine's length).
        loss_fn: maps static batch tensors to (objective to differentiate, loss to report), both scalars. On CUDA it
            must not synchronise.
        graph: capture steps in a CUDA graph.
        splits: parts that a batch is taken in, one after another, for their memory; it divides the batch. Gradients
            add up to those of the whole batch, in another order of sums.
        relative: an objective is its loss divided by the loss's own value, so that parts count as their losses do.
        bounded: settled after every step.
    """

    def __init__(
        self,
        parameters: Mapping[Group, list[nn.Parameter]],
        rates: Mapping[Group, float],
        *,
        floors: Mapping[Group, float],
        steps: int,
        warmup: int = 0,
        weight_decay: float = 0.0,
        eps: float = 1e-8,
        loss_fn: Callable[..., tuple[Tensor, Tensor]],
        graph: bool,
        splits: int = 1,
        relative: bool = False,
        bounded: Sequence[Bounded] = (),
    ) -> None:
        self.bounded = bounded
        self.parameters = [p for ps in parameters.values() for p in ps]
        device = self.parameters[0].device
        on_gpu = device.type == "cuda"
        self.groups: list[tuple[dict[str, Any], float, float]] = []  # with the rate at the start and at the end
        moved, turned = [], []
        for name, ps in parameters.items():
            if ps:
                group = {"params": ps, "lr": torch.tensor(rates[name], device=device)}
                self.groups.append((group, rates[name], floors[name]))
                (turned if name == "rotation" else moved).append(group)
        self.optimisers: list[torch.optim.Optimizer] = []
        if moved:
            self.optimisers.append(
                torch.optim.AdamW(moved, weight_decay=weight_decay, eps=eps, capturable=on_gpu, fused=on_gpu)
            )
        if turned:
            self.optimisers.append(CayleySGD(turned))
        self.steps, self.warmup = steps, warmup
        self.loss_fn = loss_fn
        self.splits, self.relative = splits, relative
        self.graph: torch.cuda.CUDAGraph | None = None
        self.static: tuple[Tensor, ...] = ()
        self.static_loss: Tensor | None = None
        self.stream = torch.cuda.Stream(device) if graph and on_gpu else None
        self.reproducible = True
        self.done = 0
        self.eager = 0

    def _set_rates(self) -> None:
        for group, rate, floor in self.groups:
            group["lr"].fill_(cosine(self.done - 1, self.steps, self.warmup, rate, floor))

    def _gradients(self, *batch: Tensor) -> Tensor:
        """Of a batch, left with the parameters; its loss, the mean over its parts."""
        total = last = None
        for part in zip(*(b.chunk(self.splits) for b in batch), strict=True):
            objective, loss = self.loss_fn(*part)
            loss = loss.detach()
            if last is not None and self.relative:
                self._scale_gradients(last / loss)  # from parts of the last loss to parts of this one
            objective.backward()
            last, total = loss, loss if total is None else total + loss
        assert last is not None
        assert total is not None
        if self.splits > 1 and self.relative:
            self._scale_gradients(last / total)
        return total if self.splits == 1 else total / self.splits

    def _scale_gradients(self, factor: Tensor) -> None:
        for p in self.parameters:
            if p.grad is not None:
                p.grad.mul_(factor)

    def _body(self, *batch: Tensor) -> Tensor:
        if self.reproducible:
            try:
                with deterministic():
                    loss = self._gradients(*batch)
            except RuntimeError as error:
                if "deterministic" not in str(error):
                    raise
                # A family may use an operation without such a kernel: fit it all the same. The first step shows it.
                self.reproducible = False
                self._forget_gradients()
        if not self.reproducible:
            loss = self._gradients(*batch)
        for optimiser in self.optimisers:
            optimiser.step()
        for module in self.bounded:
            module.settle()
        self._forget_gradients()
        return loss.detach()

    def _forget_gradients(self) -> None:
        for optimiser in self.optimisers:
            optimiser.zero_grad(set_to_none=True)

    def step(self, *batch: Tensor) -> Tensor:
        """One update on a batch; returns its loss, a scalar tensor that later steps do not overwrite.

        With a graph, the step runs on a stream of its own, so that several optimisers share a GPU side by side; `join`
        before reading losses or parameters.
        """
        self.done += 1
        if self.stream is None:
            self._set_rates()
            return self._body(*batch)
        self.stream.wait_stream(torch.cuda.current_stream())
        for b in batch:
            b.record_stream(self.stream)  # it may be gone for the caller before the copy below has run
        with torch.cuda.stream(self.stream):
            self._set_rates()
            return self._graphed(*batch)

    def _graphed(self, *batch: Tensor) -> Tensor:
        if not self.static:
            self.static = tuple(b.clone() for b in batch)
        for static, b in zip(self.static, batch, strict=True):
            static.copy_(b)
        if self.eager < EAGER_STEPS:
            self.eager += 1
            return self._body(*self.static)
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=self.stream):
                self.static_loss = self._body(*self.static)
        self.graph.replay()
        assert self.static_loss is not None
        return self.static_loss.clone()

    def join(self) -> None:
        """Make the current stream wait for all steps so far."""
        if self.stream is not None:
            torch.cuda.current_stream().wait_stream(self.stream)

    def state(self) -> dict[str, Tensor]:
        """Copies of parameters and moments, by position: all that the next step depends on."""
        out = {}
        for i, p in enumerate(self.parameters):
            out[f"{i}.value"] = p.detach().cpu().clone()
            for optimiser in self.optimisers:
                for name, moment in optimiser.state.get(p, {}).items():
                    out[f"{i}.{name}"] = moment.detach().cpu().clone()
        return out

    @torch.no_grad()
    def load_state(self, done: int, state: Mapping[str, Tensor]) -> None:
        """Go on after `done` steps from what `state` gave."""
        self.done = done
        for i, p in enumerate(self.parameters):
            p.copy_(state[f"{i}.value"])
            moments = {n: state[f"{i}.{n}"].to(p.device, copy=True) for n in MOMENTS if f"{i}.{n}" in state}
            if moments:
                self.optimisers[0].state[p] = moments
