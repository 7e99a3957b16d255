"""One optimiser for every fit: AdamW with a learning rate per group, a cosine, and on a GPU one graph per step.

A calibration step of a small model is bound by launches, not by arithmetic. On CUDA the whole step - forward,
backward, update - is captured once per block in a CUDA graph and replayed; the first steps run eagerly and are real
steps, so nothing is warmed up twice. The loss stays on the device until the caller asks.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from flatquant.modules import Group

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
        loss_fn: Callable[..., tuple[Tensor, Tensor]],
        graph: bool,
    ) -> None:
        self.parameters = [p for ps in parameters.values() for p in ps]
        device = self.parameters[0].device
        self.rates = [(rates[g], floors[g]) for g, ps in parameters.items() if ps]
        groups = [{"params": ps, "lr": torch.tensor(rates[g], device=device)} for g, ps in parameters.items() if ps]
        on_gpu = device.type == "cuda"
        self.adamw = torch.optim.AdamW(groups, weight_decay=weight_decay, capturable=on_gpu, fused=on_gpu)
        self.steps, self.warmup = steps, warmup
        self.loss_fn = loss_fn
        self.graph: torch.cuda.CUDAGraph | None = None
        self.static: tuple[Tensor, ...] = ()
        self.static_loss: Tensor | None = None
        self.stream = torch.cuda.Stream(device) if graph and on_gpu else None
        self.reproducible = True
        self.done = 0
        self.eager = 0

    def _set_rates(self) -> None:
        for group, (rate, floor) in zip(self.adamw.param_groups, self.rates, strict=True):
            group["lr"].fill_(cosine(self.done - 1, self.steps, self.warmup, rate, floor))

    def _gradients(self, *batch: Tensor) -> Tensor:
        objective, loss = self.loss_fn(*batch)
        objective.backward()
        return loss

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
                self.adamw.zero_grad(set_to_none=True)
        if not self.reproducible:
            loss = self._gradients(*batch)
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        return loss.detach()

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
            moments = self.adamw.state[p]
            out[f"{i}.value"] = p.detach().cpu().clone()
            for name in ("exp_avg", "exp_avg_sq", "step"):
                out[f"{i}.{name}"] = moments[name].detach().cpu().clone()
        return out

    @torch.no_grad()
    def load_state(self, done: int, state: Mapping[str, Tensor]) -> None:
        """Go on after `done` steps from what `state` gave."""
        self.done = done
        for i, p in enumerate(self.parameters):
            p.copy_(state[f"{i}.value"])
            names = ("exp_avg", "exp_avg_sq", "step")
            self.adamw.state[p] = {n: state[f"{i}.{n}"].to(p.device, copy=True) for n in names}
