"""Mixtures of experts as linear layers: what transformers stacks into three dimensions, laid out one by one.

transformers holds all experts of a block in two parameters, `gate_up_proj` (E, 2 I, h) and `down_proj` (E, h, I), which
leave nothing that could be replaced, watched or rounded alone. `open_experts` puts an `Experts` there: the same
function of the same numbers, with a linear layer for each matrix, `experts.3.up_proj`.

All experts read one tensor, and all their inner activations are one tensor, row upon row: a site transforms and rounds
each of the two once, and every expert multiplies its rows of the result. Rows go from expert to expert, and back into
the order of the tokens by one gather, so that sums have one order.

What was given up: grouped products. Experts run one after another, and the host waits for their numbers of rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from flatquant.modules import Site


class Expert(nn.Module):
    """x -> down(act(gate(x)) * up(x)); its layers are linears of any stage."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def __init__(self, gate_proj: nn.Module, up_proj: nn.Module, down_proj: nn.Module) -> None:
        super().__init__()
        self.gate_proj = gate_proj
        self.up_proj = up_proj
        self.down_proj = down_proj


class Experts(nn.ModuleList):
    """The experts of a block; called as transformers calls its own."""

    def __init__(self, experts: list[Expert], act_fn: nn.Module) -> None:
        super().__init__(experts)
        self.activation = (act_fn,)  # in a tuple: a list of modules counts its children

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The experts' outputs, weighted and summed for every token.

        Args:
            hidden_states: (tokens, h).
            top_k_index: the experts of each token, int64, (tokens, k).
            top_k_weights: (tokens, k).
        """
        (act,), k = self.activation, top_k_index.shape[-1]
        chosen, order = top_k_index.flatten().sort(stable=True)  # pairs of token and expert, by expert
        tokens = order // k
        ends = torch.searchsorted(chosen, torch.arange(len(self), device=chosen.device), right=True).tolist()
        experts = cast(Iterable[Expert], self)
        spans = [(e, slice(a, b)) for e, a, b in zip(experts, [0, *ends[:-1]], ends, strict=True) if a < b]
        inner = []
        for expert, span in spans:
            x = _rows(expert.gate_proj, hidden_states, tokens[span])
            inner.append(act(expert.gate_proj(x)) * expert.up_proj(x))
        mid = torch.cat(inner)  # (tokens * k, I)
        out = torch.cat([expert.down_proj(_rows(expert.down_proj, mid, span)) for expert, span in spans])
        out = out[order.argsort()].unflatten(0, (-1, k)) * top_k_weights[..., None]  # (tokens, k, h)
        return out.sum(1).to(hidden_states.dtype)


def _rows(linear: nn.Module, x: Tensor, index: Tensor | slice) -> Tensor:
    """Rows of what a linear reads, known to its site as such."""
    site = getattr(linear, "site", None)
    return site.rows(x, index) if isinstance(site, Site) else x[index]


def open_experts(root: nn.Module) -> None:
    """Lay out all stacked experts inside a module, in place; their weights stay where they are in memory."""
    for name, module in list(root.named_modules()):
        if is_stacked(module):
            parent, _, leaf = name.rpartition(".")
            setattr(root.get_submodule(parent), leaf, _opened(module))


def is_stacked(module: nn.Module) -> bool:
    """Whether a module holds gated experts in two parameters, (E, 2 I, h) and (E, h, I), and nothing else."""
    held = dict(module.named_parameters(recurse=False))
    if held.keys() != {"gate_up_proj", "down_proj"} or not hasattr(module, "act_fn"):
        return False
    gate_up, down = held["gate_up_proj"].shape, held["down_proj"].shape
    return len(gate_up) == len(down) == 3 and gate_up == (down[0], 2 * down[2], down[1])


def _opened(stacked: nn.Module) -> Experts:
    gate_up, down = stacked.get_parameter("gate_up_proj"), stacked.get_parameter("down_proj")
    experts = []
    for both, back in zip(gate_up.detach(), down.detach(), strict=True):  # (2 I, h), (h, I)
        gate, up = both.chunk(2)
        experts.append(Expert(*(_linear(weight, gate_up.requires_grad) for weight in (gate, up, back))))
    act_fn = stacked.act_fn
    assert isinstance(act_fn, nn.Module)
    return Experts(experts, act_fn).train(stacked.training)


def _linear(weight: Tensor, requires_grad: bool) -> nn.Linear:
    o, n = weight.shape
    linear = nn.Linear(n, o, bias=False, device="meta", dtype=weight.dtype)
    linear.weight = nn.Parameter(weight, requires_grad=requires_grad)
    return linear


def stacked_again(state: Mapping[str, Tensor], name: str) -> Tensor:
    """A stacked parameter, made from the tensors of opened experts.

    Args:
        state: tensors by name, `mlp.experts.0.gate_proj.weight` and so on.
        name: `mlp.experts.gate_up_proj` or `mlp.experts.down_proj`.

    Raises:
        KeyError: there are no such experts.
    """
    root, _, leaf = name.rpartition(".")
    parts = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else (leaf,)
    experts = []
    while f"{root}.{len(experts)}.{parts[0]}.weight" in state:
        experts.append(torch.cat([state[f"{root}.{len(experts)}.{part}.weight"] for part in parts]))
    if not experts:
        raise KeyError(name)
    return torch.stack(experts)  # (E, o, n)
