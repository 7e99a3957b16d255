"""A wrapped block and the parts that are fitted in it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flatquant.modules import Group, Neutral, Trainable, trainable_parameters
from flatquant.quantizers import LiveBlocks
from flatquant.spec import BlockPlan
from flatquant.transforms import Factor
from flatquant.wiring.arch import Arch
from flatquant.wiring.keyvalue import FitKeyValue
from flatquant.wiring.linear import FitSite, JoinedWeight


@dataclass(frozen=True, kw_only=True)
class InputStatistics:
    """Statistics of one site's input over calibration tokens; or of keys before RoPE, for the site `qk`."""

    absmax: Tensor  # (n,)
    square: Tensor  # mean of x^2, (n,)
    mean: Tensor | None = None  # (n,)
    center: Tensor | None = None  # between the least and the largest x, (n,)
    rows: Tensor | None = None  # x of some tokens, (tokens, n)
    tokens: tuple[int, ...] = ()  # that each group of readers saw: those of one expert, or all


@dataclass(kw_only=True)
class FitBlock:
    """A wrapped block and the parts that are fitted in it."""

    block: nn.Module
    arch: Arch
    plan: BlockPlan
    sites: dict[str, FitSite]
    key_value: FitKeyValue | None

    def roots(self) -> list[nn.Module]:
        """The modules that hold what is fitted."""
        return [*self.sites.values(), *([self.key_value] if self.key_value else [])]

    def parameters(self) -> dict[Group, list[nn.Parameter]]:
        """The trainable parameters by group."""
        return trainable_parameters(*self.roots())

    def static_grids(self) -> list[LiveBlocks]:
        """Grids of activations, keys and values that will have a static scale, which is found when transforms are."""
        cached = [] if self.key_value is None else [self.key_value.keys, self.key_value.values]
        grids = [*(site.activations for site in self.sites.values()), *cached]
        return [grid for grid in grids if isinstance(grid, LiveBlocks) and grid.format.facts.tensor_scale]

    def release_weights(self) -> None:
        """Make the weights trainable too."""
        for site in self.sites.values():
            site.joined.requires_grad_(True)

    def store_weights(self, dtype: torch.dtype) -> None:
        """Have the weights in another dtype; a step computes with copies in float32."""
        for site in self.sites.values():
            site.joined.store(dtype)

    def become_plain(self) -> bool:
        """Round as without a method: identities, whole ranges. False, and unchanged, where a part cannot."""
        parts = [m for root in self.roots() for m in root.modules()]
        chosen = [m for m in parts if isinstance(m, Factor | Trainable) and not isinstance(m, JoinedWeight)]
        neutral = [m for m in chosen if isinstance(m, Neutral)]
        if len(neutral) < len(chosen):
            return False
        for module in neutral:
            module.neutralise()
        return True

    def state(self) -> dict[str, Tensor]:
        """Copies of all trainable parameters, by position: `transform.0`, `clip.3`."""
        return {f"{g}.{i}": p.detach().cpu().clone() for g, ps in self.parameters().items() for i, p in enumerate(ps)}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Undo `state`."""
        for group, parameters in self.parameters().items():
            for i, p in enumerate(parameters):
                p.copy_(state[f"{group}.{i}"])


@contextmanager
def observing(grids: Sequence[LiveBlocks]) -> Iterator[None]:
    """Let grids see what they round while this lasts: their static scales are made for it."""

    def see(grid: nn.Module, args: tuple[Tensor]) -> None:
        assert isinstance(grid, LiveBlocks)
        grid.observe(args[0])

    handles = [grid.register_forward_pre_hook(see) for grid in grids]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def unrounded_weights(fits: Iterable[FitBlock]) -> Iterator[None]:
    """Leave weights off their grids: fit for a solver that will deal with the weights' errors itself."""
    grids = [(site, site.grid) for fit in fits for site in fit.sites.values()]
    for site, _ in grids:
        site.grid = None
    try:
        yield
    finally:
        for site, grid in grids:
            site.grid = grid
