"""Weights of an end-to-end fit divided among ranks, by FSDP2 (`torch.distributed.fsdp.fully_shard`).

Each rank has a share of the rows of every weight, with its gradient and its moments. A block's weights are gathered for
its forward pass and for its backward pass, and freed after each. Gradients are summed by reduce-scatter, inside the
backward pass.

What else trains (transforms, scales, clips) is whole on every rank, and its gradients are summed by all-reduce. That is
two numbers for each row or group of a weight and small matrices. Inverses are taken of all matrices at once, and a
rotation's step needs all of it.

FSDP2 gathers what belongs to a module around its `forward`. That module is not the block, which goes on without FSDP2
after the fit: it has the block's weights for parameters, and its forward pass is given the block as a function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from flatquant import distributed
from flatquant.wiring.fitted import FitBlock

_foreach_norm = torch._foreach_norm  # pyright: ignore[reportPrivateImportUsage]

Pass = Callable[[Tensor], Tensor]


class _Block(nn.Module):
    """The weights of a wrapped block, which are whole while its pass lasts."""

    def __init__(self, fit: FitBlock) -> None:
        super().__init__()
        self.weights = nn.ModuleList(site.joined for site in fit.sites.values())

    def forward(self, x: Tensor, run: Pass) -> Tensor:
        """(B, T, h) -> (B, T, h)"""
        return run(x)


class Shards(nn.Module):
    """The weights of wrapped blocks, divided among all ranks."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        from torch.distributed.device_mesh import init_device_mesh

        self.blocks = nn.ModuleList()
        self.mesh = init_device_mesh(device.type, (distributed.size(),))

    def add(self, fit: FitBlock) -> None:
        """Keep this rank's share of a block's weights, which are the same on every rank, and free the rest.

        Every rank calls it.
        """
        from torch.distributed.fsdp import fully_shard

        block = fully_shard(_Block(fit), mesh=self.mesh, reshard_after_forward=True)
        block.set_gradient_divide_factor(1.0)  # a sum, not a mean
        block.set_force_sum_reduction_for_comms(True)  # gloo has no other reduction
        self.blocks.append(cast(nn.Module, block))

    def seal(self) -> None:
        """Called once, after the last block: what several passes share, buffers above all, is theirs together."""
        from torch.distributed.fsdp import fully_shard

        fully_shard(self, mesh=self.mesh)

    def forward(self, x: Tensor, passes: Sequence[Pass]) -> Tensor:
        """Through all blocks. Every rank calls it.  # (B, T, h) -> (B, T, h)"""
        for block, run in zip(self.blocks, passes, strict=True):
            x = block(x, run)
        return x


@torch.no_grad()
def gather(fit: FitBlock) -> None:
    """Have a block's weights whole on every rank again, for good. Every rank calls it."""
    for site in fit.sites.values():
        value = site.joined.value
        site.joined.value = nn.Parameter(whole(value), requires_grad=value.requires_grad)


def is_shard(tensor: Tensor) -> bool:
    """Whether a tensor is this rank's share of one that all ranks have."""
    if distributed.size() == 1:
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def own(tensor: Tensor) -> Tensor:
    """What this rank has of a tensor: the same memory, without a gradient."""
    tensor = tensor.detach()
    return tensor.to_local() if is_shard(tensor) else tensor  # type: ignore[operator]


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, without a gradient. Of a shard every rank calls it."""
    tensor = tensor.detach()
    return tensor.full_tensor() if is_shard(tensor) else tensor  # type: ignore[operator]


def placed(tensor: Tensor, like: Tensor) -> Tensor:
    """A copy of a whole tensor where another one is; of the same shape as a shard's, this rank's share of it."""
    if not is_shard(like) or tensor.shape != like.shape:
        return tensor.to(like.device, copy=True)
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    share = distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
    return torch.empty_like(like.detach()).copy_(share)  # not a view, which would keep all of it


def norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The norm of every tensor, those of shards last. Of shards every rank calls it, with the same ones."""
    wholes = [t for t in tensors if not is_shard(t)]
    shards = [own(t) for t in tensors if is_shard(t)]
    found = list(_foreach_norm(wholes)) if wholes else []
    if shards:
        squares = torch.stack([n.float() for n in _foreach_norm(shards)]).square()
        found += distributed.summed(squares).sqrt().unbind()
    return found
