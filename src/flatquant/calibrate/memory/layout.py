"""How a run is laid out in memory, and what a recipe leaves to choose of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from flatquant import distributed
from flatquant.calibrate.activations import Place
from flatquant.calibrate.memory.limits import size_text
from flatquant.errors import CalibrationError
from flatquant.spec import FitMemory, Recipe

FULL_STEP = 1 << 25  # hidden-state elements that fill a large GPU


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a run will need, in bytes counted from shapes, and how it is laid out.

    Attributes:
        device: peak on the device: tensors, without what libraries take for themselves.
        host: peak of the process: the libraries, the model (or its two ends and a block), and activations that lie
            there. Of a run on a CPU everything, `device` included.
        disk: the state and the output folder together, and activations that lie there.
        place: where activations lie between blocks.
        windows: of a batch that a fit works on at a time.
        side_by_side: blocks that are fitted at a time.
        recompute: an end-to-end fit computes each block again in the backward pass, and keeps nothing but its input.
        memory: how an end-to-end fit holds the weights (`EndToEndSpec.memory`); None without one.
        streamed: whether one block's tensors are in memory at a time.
        shared: whether the device is the host.
        ranks: processes that divide the run; the bytes on device and host are those of one.
        work: what each stage costs beside the others, in the unit of `calibrate.work`.
    """

    device: int
    host: int
    disk: int
    place: Place
    windows: int
    side_by_side: int
    streamed: bool
    shared: bool
    recompute: bool = False
    memory: FitMemory | None = None
    ranks: int = 1
    work: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        """One line for people."""
        batch = f"{self.windows} window{'s' if self.windows > 1 else ''} at a time"
        blocks = f"{self.side_by_side} blocks side by side" if self.side_by_side > 1 else "one block at a time"
        where = {"device": "on the device", "host": "in host memory", "disk": "in a file"}[self.place]
        memory = f"{size_text(self.host)} in memory"
        if not self.shared:
            memory = f"{size_text(self.device)} on the device, {size_text(self.host)} in host memory"
        weights = "" if self.memory in (None, "full") else f", {_HELD[self.memory]}"
        each = f" of each of {self.ranks} ranks" if self.ranks > 1 else ""
        return (
            f"estimate{each}, counted from shapes: {memory}, {size_text(self.disk)} on disk; {blocks}"
            f"{', streamed' if self.streamed else ''}, {batch}, activations {where}{weights}"
        )


_HELD: dict[FitMemory, str] = {
    "full": "weights trained in float32",
    "compact": "weights trained in 5 bytes each",
    "transforms": "weights not trained",
    "sharded": "weights trained in float32, divided among ranks",
}


def splits(batch: int, windows: int) -> int:
    """Equal parts that a batch is taken in, so that none has more than `windows`."""
    return next(k for k in range(1, batch + 1) if batch % k == 0 and batch // k <= max(windows, 1))


def full_step(seqlen: int, hidden: int) -> int:
    """Windows whose hidden states are enough work at a time for a GPU."""
    return max(1, FULL_STEP // (seqlen * hidden))


def check_streamable(recipe: Recipe) -> None:
    """Raise CalibrationError if a recipe cannot have one block in memory at a time."""
    if why := needs_all_blocks(recipe):
        raise CalibrationError(f"{why}, so that the model cannot be streamed; load it whole (--no-stream)")


def why_undivided(recipe: Recipe) -> str:
    """Why ranks cannot divide the weights of a recipe's end-to-end fit; empty if they can."""
    if distributed.size() == 1:
        return "sharded weights are divided among ranks, and there is one: start more (--devices), or take compact ones"
    if recipe.hessian == "output_adaptive":
        return "output-adaptive Hessians need all weights on every rank, which sharded ones are not"
    if recipe.scheme.weights is not None and recipe.scheme.weights.is_fitted:
        return "weights on levels train codes, which ranks do not divide: leave out sharded"
    return ""


def needs_all_blocks(recipe: Recipe) -> str:
    """Why a recipe cannot have one block in memory at a time; empty if it can."""
    if recipe.whole_fit is not None:
        return "an end-to-end fit runs through all blocks at once"
    if recipe.hessian == "output_adaptive":
        return "output-adaptive Hessians need the gradient through all blocks"
    return ""
