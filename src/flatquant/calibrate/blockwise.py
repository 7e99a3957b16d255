"""Block-wise reconstruction: each block's transforms, scales and clips against the full-precision block's outputs.

FlatQuant, section 3.1 (objective) and 4.1 (settings): inputs and targets are full-precision activations; the loss is
the mean squared error divided by its own detached value, which makes the learning rate scale-free.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from flatquant.calibrate.capture import BlockCall
from flatquant.calibrate.optimise import Optimiser
from flatquant.errors import CalibrationError
from flatquant.spec import FitSpec
from flatquant.transforms import shared_inverses
from flatquant.wiring.apply import FitBlock


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Matrix products in `dtype`; nothing changes for float32 and float64."""
    enabled = dtype in (torch.float16, torch.bfloat16)
    return torch.autocast(device.type, dtype=dtype if enabled else None, enabled=enabled, cache_enabled=False)


def fit_block(
    fit: FitBlock,
    call: BlockCall,
    inputs: Tensor,
    targets: Tensor,
    spec: FitSpec,
    *,
    dtype: torch.dtype,
    graph: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> list[float]:
    """Fit one wrapped block.

    Args:
        inputs: full-precision hidden states before the block, (N, T, h).
        targets: the full-precision block's outputs on them, (N, T, h).
        dtype: of the matrix products (parameters stay float32).
        graph: on CUDA, replay steps from a CUDA graph.
        progress: called with (epochs done, epochs).

    Returns:
        Mean loss (MSE) of every epoch.

    Raises:
        CalibrationError: the loss is not finite.
    """
    parameters = fit.parameters()
    per_epoch = inputs.shape[0] // spec.batch_size
    if not any(parameters.values()) or not spec.epochs:
        return []

    def loss_fn(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        with shared_inverses(fit.roots()), autocast(x.device, dtype):
            predicted = call(fit.block, x)
        loss = F.mse_loss(predicted.float(), y.float())
        return loss / loss.detach(), loss

    optimiser = Optimiser(
        parameters,
        {"transform": spec.lr, "scale": spec.lr, "clip": spec.clip_lr},
        floor=spec.lr * spec.final_lr,
        steps=spec.epochs * per_epoch,
        warmup=spec.warmup_steps,
        weight_decay=spec.weight_decay,
        loss_fn=loss_fn,
        graph=graph,
    )
    history: list[float] = []
    for epoch in range(spec.epochs):
        losses = []
        for i in range(per_epoch):
            rows = slice(i * spec.batch_size, (i + 1) * spec.batch_size)
            losses.append(optimiser.step(inputs[rows], targets[rows]))
        mean = float(torch.stack(losses).mean())
        if not mean < float("inf"):
            raise CalibrationError(
                f"the loss is {mean} in epoch {epoch + 1}; try --dtype float32, a lower --lr, or other calibration text"
            )
        history.append(mean)
        if progress:
            progress(epoch + 1, spec.epochs)
    fit.forget()
    return history
