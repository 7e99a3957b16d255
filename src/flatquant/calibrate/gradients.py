"""Output-adaptive Hessians: what the model's loss says about each weight matrix of a folded block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from flatquant.calibrate.activations import Kept
from flatquant.calibrate.capture import BlockCall
from flatquant.modules import widened
from flatquant.qtensor import QTensor
from flatquant.runtime.linear import DenseLinear
from flatquant.solvers import OutputAdaptive, blended
from flatquant.spec import BlockPlan, is_experts
from flatquant.wiring.arch import submodule


@torch.enable_grad()
def output_hessians(
    block: nn.Module,
    plan: BlockPlan,
    call: BlockCall,
    loss: Callable[[Tensor, Tensor], Tensor],
    inputs: Kept,
    per: Literal["sequence", "token"],
) -> dict[str, Tensor]:
    """The Hessian of every linear that will be rounded, (n, n) by path, from one pass over all sequences.

    All linears of the block are seen at once, before any of them is rounded, at the weights that will be: the blocks
    before are quantised, those after are not. Activations on a grid pass gradients straight through. Readers of one
    site have the same inputs, but not the same Hessian.

    Args:
        block: folded, its linears dense.
        loss: (the block's outputs (1, T, h), the sequence's number (1,)) -> what is to be preserved: its cross entropy.
        inputs: the block's inputs in the quantised model, (N, T, h).
    """
    paths = [path for site in plan.sites.values() if site.weights for path in site.readers]
    if not paths:
        return {}
    found: dict[str, OutputAdaptive] = {}
    handles = []

    def watch(path: str, linear: DenseLinear) -> None:
        found[path] = OutputAdaptive(linear.weight.shape[1], linear.weight.device, per)

        def see(module: nn.Module, args: tuple[Tensor], out: Tensor) -> None:
            x = linear.site(args[0])
            assert not isinstance(x, QTensor), "integers carry no gradient"
            # One sequence at a time; an expert sees some of its rows.
            out.register_hook(lambda delta: found[path].add(*(t.reshape(1, -1, t.shape[-1]) for t in (x, delta))))

        handles.append(linear.register_forward_hook(see))

    for path in paths:
        linear = submodule(block, path)
        assert isinstance(linear, DenseLinear), f"{path} is not folded"
        watch(path, linear)
    try:
        with widened(block, inputs.dtype) as work:
            for i, x in enumerate(inputs.split(1)):
                x, window = x.detach().to(work, copy=True).requires_grad_(), torch.tensor([i])
                # The hooks see what they need on its way.
                torch.autograd.grad(loss(call.of(window)(block, x), window), x)
    finally:
        for handle in handles:
            handle.remove()
    hessians = {path: h.hessian() for path, h in found.items()}
    for site in plan.sites.values():
        if site.weights and site.experts:
            for alike in zip(*filter(is_experts, site.groups), strict=True):  # the same layer of every expert
                total = max(sum(found[path].tokens for path in alike), 1)
                mean = torch.zeros_like(found[alike[0]].sum)
                for path in alike:
                    mean += found[path].sum / total
                hessians |= {path: blended(found[path], mean) for path in alike}
    return hessians
