"""The output layer on a grid: planned beside the blocks, and rounded to the nearest once they are done.

It has no transform: its weights have more bits than those of blocks, and only logits come after it. Where it shares the
embedding's matrix, it gets a rounded copy, and the embedding stays as it was.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn
from transformers import PreTrainedModel

from flatquant.errors import ModelError, SpecError
from flatquant.quantizers import WeightGrid
from flatquant.runtime.build import install_head
from flatquant.runtime.linear import FrozenLinear
from flatquant.spec import HEAD, HeadPlan, Plan, Scheme, SitePlan
from flatquant.wiring.arch import submodule
from flatquant.wiring.residual import ROWS


def with_head(plan: Plan, scheme: Scheme, model: PreTrainedModel) -> Plan:
    """A plan with the model's output layer, if the scheme has a grid for it.

    Raises:
        ModelError: the model has no linear output layer.
        SpecError: a group size that does not divide its inputs.
    """
    if scheme.head is None:
        return plan
    output = model.get_output_embeddings()
    path = next((name for name, module in model.named_modules() if module is output), None)
    if not isinstance(output, nn.Linear) or path is None:
        raise ModelError(f"{type(model).__name__} has no linear output layer; leave {HEAD}={scheme.head} out")
    n, group = output.in_features, scheme.head.weights.group_size
    if group and n % group:
        raise SpecError(f"group size {group} does not divide the {n} inputs of {path}")
    grids = scheme.head
    site = SitePlan(readers=(path,), shape=(1, n), weights=grids.weights, activations=grids.activations)
    tied = output.weight is model.get_input_embeddings().weight
    return replace(plan, head=HeadPlan(site=site, tied=tied))


@torch.no_grad()
def round_head(model: PreTrainedModel, head: HeadPlan, device: torch.device) -> None:
    """Put a `FrozenLinear` in the place of a model's output layer.

    Args:
        device: that rounds, some rows at a time; the layer stays where it is.
    """
    output = submodule(model, head.path)
    assert isinstance(output, nn.Linear)
    weight, grid = output.weight.detach(), WeightGrid(head.weights)
    o, n = weight.shape
    state = {
        "values": weight.new_empty((o, n), dtype=torch.int8),
        "scale": weight.new_empty((o, n // (head.weights.group_size or n)), dtype=torch.float32),
    }
    for start in range(0, o, ROWS):
        rows = slice(start, start + ROWS)
        part = grid.nearest(weight[rows].to(device).float())
        state["values"][rows], state["scale"][rows] = part.values, part.scale
    if output.bias is not None:
        state["bias"] = output.bias.detach()
    install_head(model, head, packed=False)
    rounded = submodule(model, head.path)
    assert isinstance(rounded, FrozenLinear)
    rounded.load_state_dict(state, assign=True)
    model.config.tie_word_embeddings = False
