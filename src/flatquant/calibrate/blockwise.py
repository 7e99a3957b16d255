"""Block-wise reconstruction: each block's transforms, scales and clips against the full-precision block's outputs.

FlatQuant, section 3.1 (objective) and 4.1 (settings): inputs and targets are full-precision activations; the loss is
the mean squared error divided by its own detached value, which makes the learning rate scale-free.

A fit does not leave a block worse than it found it, nor worse than plain rounding: where the error is more, on windows
that it was not trained on, the block gets the parameters back that it began with, or identities and whole ranges.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from flatquant.calibrate.activations import Kept, cyclic
from flatquant.calibrate.capture import BlockCall
from flatquant.calibrate.optimise import Optimiser
from flatquant.calibrate.rates import rates_of
from flatquant.errors import CalibrationError, FitWarning
from flatquant.modules import Bounded, Scheduled
from flatquant.spec import FitSpec
from flatquant.transforms import shared_inverses
from flatquant.wiring.fitted import FitBlock

UNDONE = "on windows that it was not trained on, and was undone; more calibration text or a lower --lr may help"
_FEWEST_TOKENS = 256  # with fewer, chance decides whether a fit has helped


def held_out_windows(samples: int, seqlen: int) -> int:
    """How many windows a fit on so many is measured on before and after; none where they are too short to tell."""
    count = min(4, max(1, samples // 32))
    return count if count * seqlen >= _FEWEST_TOKENS else 0


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Matrix products in `dtype`; nothing changes for float32 and float64."""
    enabled = dtype in (torch.float16, torch.bfloat16)
    return torch.autocast(device.type, dtype=dtype if enabled else None, enabled=enabled, cache_enabled=False)


def safer(dtype: torch.dtype, device: torch.device) -> torch.dtype | None:
    """The dtype for products that overflow in `dtype`; None after float32."""
    if dtype == torch.float16 and (device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)):
        return torch.bfloat16
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else None


def named(dtype: torch.dtype) -> str:
    """`float16` for torch.float16."""
    return str(dtype).removeprefix("torch.")


def wide(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Hidden states as a fit in `dtype` takes them: those kept in 16 bits of another kind, in float32."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) and x.dtype != dtype else x


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Windows that a block is measured on, and not trained: how it is called, inputs, the original's outputs."""

    call: BlockCall
    inputs: Tensor  # (M, T, h)
    targets: Tensor  # (M, T, h)


@dataclass(frozen=True, kw_only=True)
class BlockFit:
    """One wrapped block, how it is called, its inputs (N, T, h), and the original's outputs on full-precision ones.

    `second` are the original's outputs on these very inputs, where the fit minds them too. Without `held_out`, the
    first windows that the block is trained on tell whether the fit has helped.
    """

    index: int
    fit: FitBlock
    call: BlockCall
    inputs: Kept
    targets: Kept
    second: Kept | None = None
    held_out: HeldOut | None = None

    def kept(self) -> tuple[Kept, ...]:
        """What a step reads: numbers of windows, inputs, targets, and the second targets where there are any."""
        windows = torch.arange(self.inputs.shape[0], device=self.inputs.device)
        return (windows, self.inputs, self.targets, *(() if self.second is None else (self.second,)))


@dataclass(kw_only=True)
class Fitted:
    """How a block's fit went: the mean loss (MSE) of every epoch, and the dtype of its products.

    `held_out` is the loss before and after the fit, on windows that it was not trained on, and `plain` that of plain
    rounding, if the parameters can be such. `undone`: one of these was less than after the fit, and came back.
    """

    dtype: torch.dtype
    losses: list[float] = field(default_factory=list)
    held_out: tuple[float, float] | None = None
    plain: float | None = None
    undone: bool = False


def fit_blocks(
    blocks: Sequence[BlockFit],
    spec: FitSpec,
    *,
    dtype: torch.dtype,
    graph: bool = True,
    splits: int = 1,
    progress: Callable[[float, int], None] | None = None,
) -> list[Fitted]:
    """Fit wrapped blocks, each on its own, all side by side.

    Where inputs are full-precision activations, no block waits for another's fit. A step of a small model
    leaves most of a GPU idle: on CUDA every block's steps run on a stream of their own. A block whose loss or gradients
    overflow `dtype` starts anew in a wider one, with a warning.

    Args:
        dtype: of the matrix products (parameters stay float32).
        graph: on CUDA, replay steps from a CUDA graph.
        splits: parts that a batch is taken in, to need less memory; it divides the batch size.
        progress: called with (epochs done of all blocks, their number). On a CPU after every step, with a fraction of
            an epoch; on a GPU a step that was launched is not done.

    Returns:
        Block by block; no losses for a block without parameters.

    Raises:
        CalibrationError: a block's loss is not finite, in float32 too.
    """
    done: dict[int, Fitted] = {}
    todo, starts = list(blocks), {block.index: block.fit.state() for block in blocks}
    while todo:
        wider = safer(dtype, todo[0].inputs.device)
        fitted = _Pass(todo, spec, dtype, graph, splits, last=wider is None).run(progress)
        _undo_worse([block for block in todo if block.index in fitted], fitted, starts)
        done |= fitted
        todo = [block for block in todo if block.index not in fitted]
        if not todo:
            break
        progress = None  # it has counted these blocks' epochs
        for block in todo:
            overflow = f"block {block.index}: the loss or a gradient in {named(dtype)} is not finite"
            if wider is None:
                raise CalibrationError(f"{overflow}; try a lower --lr, or other calibration text")
            warnings.warn(f"{overflow}; the block is fitted in {named(wider)}", stacklevel=2)
            block.fit.load_state(starts[block.index])
            block.fit.block.float()
        assert wider is not None
        dtype = wider
    return [done[block.index] for block in blocks]


def _undo_worse(
    blocks: Sequence[BlockFit], fitted: Mapping[int, Fitted], starts: Mapping[int, Mapping[str, Tensor]]
) -> None:
    """Give blocks that their fit left worse than it might have the parameters that they began with, or plain ones."""
    undone: list[str] = []
    plain: list[str] = []
    for block in blocks:
        found = fitted[block.index]
        if found.held_out is None:
            continue
        before, after = found.held_out
        better = found.plain is not None and grown(found.plain, min(before, after, key=finite_first))
        found.undone = better or grown(before, after)
        if found.undone:
            block.fit.load_state(starts[block.index])
            (plain if better else undone).append(str(block.index))
        if better:
            block.fit.become_plain()
    if undone:
        warnings.warn(
            f"block {', '.join(undone)}: the fit made the outputs worse {UNDONE}",
            FitWarning,
            stacklevel=3,
        )
    if plain:
        warnings.warn(
            f"block {', '.join(plain)}: the fit is behind plain rounding {UNDONE}",
            FitWarning,
            stacklevel=3,
        )


def finite_first(loss: float) -> float:
    """A key that puts losses that are not finite last."""
    return loss if math.isfinite(loss) else math.inf


def grown(before: float, after: float) -> bool:
    """Whether a loss has grown. Anything is better than one that was not finite, if it is."""
    return not after <= before if math.isfinite(before) else not math.isfinite(after)


class _Pass:
    """One pass of a fit, over blocks side by side, in one dtype."""

    def __init__(
        self, blocks: Sequence[BlockFit], spec: FitSpec, dtype: torch.dtype, graph: bool, splits: int, *, last: bool
    ) -> None:
        """`last`: there is no wider dtype."""
        self.blocks, self.spec, self.last = blocks, spec, last
        self.dtype = dtype
        self.fitted = {block.index: Fitted(dtype=dtype) for block in blocks}
        self.running = [
            (block, _optimiser(block, spec, dtype, graph, splits))
            for block in blocks
            if any(block.fit.parameters().values())
        ]

    def run(self, progress: Callable[[float, int], None] | None) -> dict[int, Fitted]:
        """All epochs; what came of blocks whose losses stayed finite, and in the last dtype of those that began so."""
        epochs, count = self.spec.epochs if self.running else 0, len(self.blocks)

        def tell(done: float) -> None:
            if progress:
                progress(done * count, epochs * count)

        before = {block.index: _held_out_loss(block, self.dtype) for block, _ in self.running}
        plain = {block.index: _plain_loss(block, self.dtype) for block, _ in self.running}
        begun = [block for block, _ in self.running]
        for epoch in range(epochs):
            self._epoch(epoch, tell)
            tell(epoch + 1)
        for block in begun:
            start = before[block.index]
            if block.index in self.fitted:
                end = _held_out_loss(block, self.dtype)
            elif self.last and start is not None and math.isfinite(start):  # what the fit has made of it is undone
                self.fitted[block.index], end = Fitted(dtype=self.dtype), math.nan
            else:
                continue
            if start is not None and end is not None:
                self.fitted[block.index].held_out = start, end
                self.fitted[block.index].plain = plain[block.index]
        return self.fitted

    def _epoch(self, epoch: int, tell: Callable[[float], None]) -> None:
        for block, _ in self.running:
            for module in (m for root in block.fit.roots() for m in root.modules()):
                if isinstance(module, Scheduled):
                    module.begin_epoch(epoch, self.spec.epochs)
        losses: dict[int, list[Tensor]] = {block.index: [] for block, _ in self.running}
        steps = _steps_per_epoch(self.blocks[0], self.spec)
        on_gpu = self.blocks[0].inputs.device.type == "cuda"
        for step in range(epoch * steps, (epoch + 1) * steps):
            start, count = step * self.spec.batch_size, self.spec.batch_size
            for block, optimiser in self.running:
                losses[block.index].append(optimiser.step(*(cyclic(rows, start, count) for rows in block.kept())))
            if not on_gpu and (step + 1) % steps:
                tell((step + 1) / steps)
        for block, optimiser in self.running:
            optimiser.join()
            mean = float(torch.stack(losses[block.index]).mean())
            if mean < float("inf"):
                self.fitted[block.index].losses.append(mean)
            else:
                del self.fitted[block.index]
        self.running = [(block, optimiser) for block, optimiser in self.running if block.index in self.fitted]


def _steps_per_epoch(block: BlockFit, spec: FitSpec) -> int:
    """So many that every window is seen; the last batch goes on with the first windows."""
    return math.ceil(block.inputs.shape[0] / spec.batch_size)


def _loss(fit: FitBlock, call: BlockCall, dtype: torch.dtype, windows: Tensor, x: Tensor, *targets: Tensor) -> Tensor:
    """The mean squared error, summed over the kinds of targets."""
    with shared_inverses(fit.roots()), autocast(x.device, dtype):
        predicted = call.of(windows)(fit.block, wide(x, dtype))
    predicted = call.states(predicted).float()
    return torch.stack([F.mse_loss(predicted, call.states(y).float()) for y in targets]).sum()


@torch.no_grad()
def _held_out_loss(block: BlockFit, dtype: torch.dtype) -> float | None:
    """The loss on windows that are not trained on; without any, on the first that are; None where these are short."""
    call, kept = block.call, block.kept()
    count = held_out_windows(*block.inputs.shape[:2])
    if block.held_out is not None:
        count = block.held_out.inputs.shape[0]
        call, kept = block.held_out.call, (torch.arange(count), block.held_out.inputs, block.held_out.targets)
    losses = [_loss(block.fit, call, dtype, *(rows[i : i + 1] for rows in kept)) for i in range(count)]
    return float(torch.stack(losses).mean()) if losses else None


def _plain_loss(block: BlockFit, dtype: torch.dtype) -> float | None:
    """`_held_out_loss` with the parameters of plain rounding, if there are such."""
    kept = block.fit.state()
    loss = _held_out_loss(block, dtype) if block.fit.become_plain() else None
    block.fit.load_state(kept)
    return loss


def _optimiser(block: BlockFit, spec: FitSpec, dtype: torch.dtype, graph: bool, splits: int) -> Optimiser:
    fit, call = block.fit, block.call

    def loss_fn(windows: Tensor, x: Tensor, *targets: Tensor) -> tuple[Tensor, Tensor]:
        loss = _loss(fit, call, dtype, windows, x, *targets)
        return loss / loss.detach().clamp(min=torch.finfo(loss.dtype).tiny), loss  # no error: nothing to learn, not NaN

    rates, floors = rates_of(spec)
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
