"""Block-wise reconstruction: each block's transforms, scales and clips against the full-precision block's outputs.

FlatQuant, section 3.1 (objective) and 4.1 (settings): inputs and targets are full-precision activations; the loss is
the mean squared error divided by its own detached value, which makes the learning rate scale-free.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from flatquant.calibrate.activations import Kept
from flatquant.calibrate.capture import BlockCall
from flatquant.calibrate.optimise import Optimiser
from flatquant.errors import CalibrationError
from flatquant.modules import Bounded, Group, Scheduled
from flatquant.spec import FitSpec
from flatquant.transforms import shared_inverses
from flatquant.wiring.apply import FitBlock


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Matrix products in `dtype`; nothing changes for float32 and float64."""
    enabled = dtype in (torch.float16, torch.bfloat16)
    return torch.autocast(device.type, dtype=dtype if enabled else None, enabled=enabled, cache_enabled=False)


@dataclass(frozen=True, kw_only=True)
class BlockFit:
    """One wrapped block, how it is called, its inputs (N, T, h), and the original's outputs on full-precision ones.

    `second` are the original's outputs on these very inputs, where the fit minds them too.
    """

    index: int
    fit: FitBlock
    call: BlockCall
    inputs: Kept
    targets: Kept
    second: Kept | None = None


def fit_blocks(
    blocks: Sequence[BlockFit],
    spec: FitSpec,
    *,
    dtype: torch.dtype,
    graph: bool = True,
    splits: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[float]]:
    """Fit wrapped blocks, each on its own, all side by side.

    Where inputs are full-precision activations, no block waits for another's fit. A step of a small model
    leaves most of a GPU idle: on CUDA every block's steps run on a stream of their own.

    Args:
        dtype: of the matrix products (parameters stay float32).
        graph: on CUDA, replay steps from a CUDA graph.
        splits: parts that a batch is taken in, to need less memory; it divides the batch size.
        progress: called with (epochs done of all blocks, their number).

    Returns:
        Mean loss (MSE) of every epoch, block by block; none for a block without parameters.

    Raises:
        CalibrationError: a block's loss is not finite.
    """
    running = [
        (block, _optimiser(block, spec, dtype, graph, splits))
        for block in blocks
        if any(block.fit.parameters().values())
    ]
    history: dict[int, list[float]] = {block.index: [] for block in blocks}
    per_epoch = _steps_per_epoch(blocks[0], spec)
    for epoch in range(spec.epochs if running else 0):
        for block, _ in running:
            for module in (m for root in block.fit.roots() for m in root.modules()):
                if isinstance(module, Scheduled):
                    module.begin_epoch(epoch, spec.epochs)
        losses: dict[int, list[Tensor]] = {block.index: [] for block, _ in running}
        for i in range(per_epoch):
            rows = slice(i * spec.batch_size, (i + 1) * spec.batch_size)
            for block, optimiser in running:
                more = () if block.second is None else (block.second[rows],)
                losses[block.index].append(optimiser.step(block.inputs[rows], block.targets[rows], *more))
        for block, optimiser in running:
            optimiser.join()
            mean = float(torch.stack(losses[block.index]).mean())
            if not mean < float("inf"):
                raise CalibrationError(
                    f"block {block.index}: the loss is {mean} in epoch {epoch + 1}; "
                    "try --dtype float32, a lower --lr, or other calibration text"
                )
            history[block.index].append(mean)
        if progress:
            progress((epoch + 1) * len(blocks), spec.epochs * len(blocks))
    return list(history.values())


def _steps_per_epoch(block: BlockFit, spec: FitSpec) -> int:
    return block.inputs.shape[0] // spec.batch_size


def _optimiser(block: BlockFit, spec: FitSpec, dtype: torch.dtype, graph: bool, splits: int) -> Optimiser:
    fit, call = block.fit, block.call

    def loss_fn(x: Tensor, *targets: Tensor) -> tuple[Tensor, Tensor]:
        with shared_inverses(fit.roots()), autocast(x.device, dtype):
            predicted = call(fit.block, x)
        fit.forget()  # what a site remembers would be held beside the graph that is captured next
        loss = torch.stack([F.mse_loss(predicted.float(), y.float()) for y in targets]).sum()
        return loss / loss.detach(), loss

    rates: dict[Group, float] = {
        "transform": spec.lr, "scale": spec.lr, "clip": spec.clip_lr, "rotation": spec.rotation_lr,
        "code": spec.code_lr,
    }  # fmt: skip
    floors: dict[Group, float] = {g: spec.final_lr * (spec.lr if g == "clip" else rate) for g, rate in rates.items()}
    return Optimiser(
        fit.parameters(),
        rates,
        floors=rates if spec.schedule == "constant" else floors,
        steps=spec.epochs * _steps_per_epoch(block, spec),
        warmup=spec.warmup_steps,
        weight_decay=spec.weight_decay,
        loss_fn=loss_fn,
        graph=graph,
        splits=splits,
        relative=True,
        bounded=[m for root in fit.roots() for m in root.modules() if isinstance(m, Bounded)],
    )
