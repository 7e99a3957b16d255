"""What the stages of one calibration share, and what they pass on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from flatquant import distributed
from flatquant.calibrate.activations import Kept, room
from flatquant.calibrate.blockwise import HeldOut, wide
from flatquant.calibrate.capture import BlockCall
from flatquant.calibrate.memory import Estimate, full_step
from flatquant.calibrate.pipeline.report import Clock, Report
from flatquant.calibrate.samples import Samples, Windows
from flatquant.calibrate.sharding import Shards
from flatquant.calibrate.solve import make_solver
from flatquant.calibrate.state import RunState
from flatquant.calibrate.witness import Witness
from flatquant.errors import FlatQuantError
from flatquant.models import Checkpoint
from flatquant.modules import in_float32
from flatquant.progress import Progress
from flatquant.runtime.experts import Experts
from flatquant.spec import FitMemory, Plan, Recipe
from flatquant.wiring.arch import logits, submodule
from flatquant.wiring.archs import arch_of
from flatquant.wiring.fitted import FitBlock
from flatquant.wiring.residual import residual_factor


@dataclass(frozen=True, kw_only=True)
class Wrapped:
    """A block on its way: wrapped, its full-precision inputs and outputs.

    `fit` is None if an earlier run solved the block, or another rank fits it, or once it is rounded.
    """

    index: int
    owner: int  # the rank that fits and rounds it
    call: BlockCall
    fit: FitBlock | None
    inputs: Kept | None  # (N, T, h), None if the recipe reads no text
    targets: Kept | None
    second: Kept | None = None  # outputs on the inputs that the quantised blocks before give
    held_out: HeldOut | None = None


class Run:
    """One calibration; holds what its stages share."""

    def __init__(
        self,
        model: PreTrainedModel,
        recipe: Recipe,
        plan: Plan,
        tokens: Windows | None,
        device: torch.device,
        dtype: torch.dtype,
        seed: int,
        state: RunState | None,
        progress: Progress,
        graph: bool,
        layout: Estimate,
        checkpoint: Checkpoint | None,
        witness: Witness | None,
        held_out: Witness | None,
    ) -> None:
        self.model, self.recipe, self.plan = model, recipe, plan
        self.witness, self.held_out = witness, held_out  # what the result, and what fits are measured on
        self.arch = arch_of(model.config, model)
        self.blocks = list(submodule(model, self.arch.blocks).children())
        self.tokens, self.device, self.dtype, self.seed = tokens, device, dtype, seed
        # A graph replays one shape and one mask: an expert's tokens differ from step to step, and samples' masks. What
        # each window has its own of, it reads where that lies.
        graph = (
            graph
            and not isinstance(tokens, Samples)
            and not (self.arch.own and layout.place != "device")
            and not any(isinstance(m, Experts) for block in self.blocks for m in block.modules())
        )
        self.state, self.progress, self.graph = state, progress, graph
        self.home = next(model.parameters()).device
        self.model_dtype = next(model.parameters()).dtype
        self.told: dict[int, list[list[str]]] = {}  # warnings of blocks that this rank has rounded, for the first rank
        self.wide: dict[int, set[str]] = {}  # of each block on the device, what is in float32 for its own sake: routers
        generator = torch.Generator().manual_seed(seed * 1_000_003 + len(self.blocks))  # one that no block has
        self.residual = residual_factor(model, recipe, plan, generator)
        if self.residual is not None:
            self.residual.to(device)
        self.solver = make_solver(recipe.solver)
        self.layout, self.checkpoint, self.side_by_side = layout, checkpoint, layout.side_by_side
        self.report = Report()
        self.notes: dict[int, dict[str, Any]] = {}  # by block
        self.routed: dict[int, dict[str, Any]] = {}  # likewise, where there are experts
        self.clock = Clock(seconds=self.report.seconds, device=device)
        self.kept = set(distributed.broadcast(({}, [] if state is None else state.names()))[1])  # by an earlier run
        self.end_to_end = recipe.whole_fit
        self.memory: FitMemory = layout.memory or "full"
        self.shards = Shards(device) if layout.memory == "sharded" else None  # until the end-to-end fit has ended
        self.learned, self.output_adaptive = recipe.learned_rounding, recipe.hessian == "output_adaptive"

    def put_back(self, index: int) -> None:
        """A block to where it lies while nothing is done to it. Of a streamed model, what no file holds is kept."""
        block = self.blocks[index]
        if self.checkpoint is None:
            block.to(self.home)
            return
        computed = [
            (module, name, tensor.to(self.home))
            for module in block.modules()
            for name, tensor in module.named_buffers(recurse=False)
            if name in module._non_persistent_buffers_set
        ]
        block.to("meta")
        for module, name, tensor in computed:
            setattr(module, name, tensor)

    def bring(self, index: int) -> nn.Module:
        """A block onto the device, in a dtype that the fit's products take."""
        block = self.blocks[index]
        if self.checkpoint is not None:
            self.checkpoint.fill(block, f"{self.arch.blocks}.{index}.", self.device)
        block.to(self.device)
        self.wide.setdefault(index, in_float32(block))  # a block that is brought twice is in float32 by then
        if self.model_dtype != self.dtype:
            block.float()
        return block

    @contextmanager
    def stage(self, name: str, index: int) -> Iterator[None]:
        """Time a stage's part on one block, and tell its beginning and end."""
        self.progress(name, index, len(self.blocks))
        with self.clock(name):
            yield
        self.progress(name, index + 1, len(self.blocks))

    def rotated(self, call: BlockCall) -> BlockCall:
        """How a block is called once it is wrapped."""
        return replace(call, basis=self.residual)

    def room(self, shape: tuple[int, ...], _: torch.dtype) -> Kept:
        """For activations, in the dtype of the products: so they are kept between blocks."""
        folder = None if self.state is None else self.state.folder
        return room(shape, self.dtype, self.device, self.layout.place, folder)

    @cached_property
    def head(self) -> Callable[[Tensor], Tensor]:
        """Final norm and output embedding, (B, T, h) -> (B, T, V)."""
        norm = copy.deepcopy(submodule(self.model, self.arch.final_norm)).to(self.device).float().requires_grad_(False)
        output = self.model.get_output_embeddings()
        assert isinstance(output, nn.Linear)
        # Detached: a gradient of a model that is not frozen would run on a stream that no graph captures.
        weight = output.weight.detach().to(self.device, self.dtype)  # (V, h)
        bias = None if output.bias is None else output.bias.detach().to(self.device, self.dtype)

        width = self.model.config.get_text_config().hidden_size

        def head(x: Tensor) -> Tensor:
            x, dtype = x[..., :width], self.dtype  # behind the hidden states is what blocks lend
            if torch.is_autocast_enabled(x.device.type):
                dtype = torch.get_autocast_dtype(x.device.type)
            elif dtype != torch.float64:
                dtype = torch.float32  # a fit that overflowed what the weight is kept in
            y = F.linear(norm(x).to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
            return logits(self.model.config, y)

        return head

    @property
    def batch(self) -> int:
        """Windows per forward pass outside the fit."""
        if self.device.type != "cuda" or self.tokens is None:
            return self.layout.windows
        return max(
            full_step(self.tokens.shape[1], self.model.config.get_text_config().hidden_size), self.layout.windows
        )


def in_dtype(dtype: torch.dtype, kept: torch.dtype, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Outputs as they are kept, of a block whose products are in `dtype`."""
    return run(wide(x, dtype)).to(kept)


@contextmanager
def named_block(index: int) -> Iterator[None]:
    """Say in which block an error happened."""
    try:
        yield
    except FlatQuantError as error:
        raise type(error)(f"block {index}: {error}") from error
