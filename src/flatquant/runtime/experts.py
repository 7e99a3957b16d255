"""Mixtures of experts as linear layers: what transformers stacks into three dimensions, laid out one by one.

transformers holds all experts of a block in two parameters, `gate_up_proj` (E, 2 I, h) and `down_proj` (E, h, I), which
leave nothing that could be replaced, watched or rounded alone. `open_experts` puts an `Experts` there: the same
function of the same numbers, with a linear layer for each matrix, `experts.3.up_proj`. Some families hold the
transposed matrices, gate and up channel by channel, biases, or no gate.

All experts read one tensor, and all their inner activations are one tensor, row upon row: a site transforms and rounds
each of the two once, and multiplies the rows of all experts by their weights (`Site.product`). Rows go from expert to
expert, and back into the order of the tokens by one gather, so that sums have one order. Where a linear is watched, or
of a kind that has no grouped product, experts run one after another.

What was given up: the host waits for the experts' numbers of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from flatquant.modules import Site


class Expert(nn.Module):
    """x -> down(inner(gate(x), up(x))), or down(inner(up(x))) without a gate; its layers are linears of any stage."""

    def __init__(self, **linears: nn.Module) -> None:
        super().__init__()
        for name, linear in linears.items():
            setattr(self, name, linear)


@dataclass(frozen=True)
class Gated:
    """act(gate) up, or act(up) without a gate."""

    act: Callable[[Tensor], Tensor]

    def __call__(self, first: Tensor, up: Tensor | None = None) -> Tensor:
        return self.act(first) if up is None else self.act(first) * up


@dataclass(frozen=True)
class Clamped:
    """gate sigmoid(alpha gate) (up + 1), both within a limit (gpt_oss)."""

    alpha: float
    limit: float

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return gate * torch.sigmoid(self.alpha * gate) * (up + 1)


class Experts(nn.ModuleList):
    """The experts of a block; called as transformers calls its own."""

    def __init__(self, experts: list[Expert], inner: Gated | Clamped) -> None:
        super().__init__(experts)
        self.inner = inner

    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor | None = None, top_k_weights: Tensor | None = None
    ) -> Tensor:
        """The experts' outputs, weighted and summed for every token.

        Args:
            hidden_states: (tokens, h). Without an index, the inputs of every expert, one expert's behind the other's,
                0 where a token does not pass it (llama4).
            top_k_index: the experts of each token, int64, (tokens, k).
            top_k_weights: (tokens, k).

        Returns:
            (tokens, h); without an index, of every expert for itself.
        """
        if top_k_index is None or top_k_weights is None:
            tokens = len(hidden_states) // len(self)
            places = hidden_states.any(-1).nonzero()[:, 0]
            chosen = torch.div(places, tokens, rounding_mode="floor")
            x = hidden_states[places]
            out = self._pass(x, torch.arange(len(x), device=x.device), chosen)
            return torch.zeros_like(hidden_states).index_copy(0, places, out.to(hidden_states.dtype))
        k = top_k_index.shape[-1]
        chosen, order = top_k_index.flatten().sort(stable=True)  # pairs of token and expert, by expert
        out = self._pass(hidden_states, order // k, chosen)
        out = out[order.argsort()].unflatten(0, (-1, k)) * top_k_weights[..., None]  # (tokens, k, h)
        return out.sum(1).to(hidden_states.dtype)

    def _pass(self, x: Tensor, tokens: Tensor, chosen: Tensor) -> Tensor:
        """Rows of x through experts: row `tokens[i]` through expert `chosen[i]`, which ascends.  # (pairs, h)"""
        counts = torch.bincount(chosen, minlength=len(self)).tolist()
        first = cast(Expert, self[0])
        up = [name for name, _ in first.named_children() if name != "down_proj"]
        mid = self.inner(*self._outputs(up, x, tokens, counts))  # (pairs, I)
        return self._outputs(["down_proj"], mid, slice(None), counts)[0]

    def _outputs(self, names: list[str], x: Tensor, index: Tensor | slice, counts: list[int]) -> tuple[Tensor, ...]:
        """What linears of these names make of rows of x, those of each expert of its own, by name."""
        experts = [[expert.get_submodule(name) for name in names] for expert in self]
        site = getattr(experts[0][0], "site", None)
        if isinstance(site, Site) and not any(_watched(linear) for linears in experts for linear in linears):
            together = site.product(experts, x, index, counts)
            if together is not None:
                return together.chunk(len(names), dim=-1)
        found: list[tuple[Tensor, ...]] = []
        start = 0
        for linears, count in zip(experts, counts, strict=True):
            span = slice(start, start + count)
            start = span.stop
            if count:
                rows = _rows(linears[0], x, index[span] if isinstance(index, Tensor) else span)
                found.append(tuple(linear(rows) for linear in linears))
        return tuple(torch.cat(parts) for parts in zip(*found, strict=True)) if found else (x[:0],) * len(names)


def _watched(linear: nn.Module) -> bool:
    """Whether something wants a linear to be called: a hook, or what stands for its forward pass."""
    return bool(linear._forward_pre_hooks or linear._forward_hooks or "forward" in vars(linear))


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
    """Whether a module holds experts in a way that `open_experts` knows."""
    return _layout(module) is not None


@dataclass(frozen=True)
class _Layout:
    """How matrices are stacked.

    Attributes:
        up: the parameter with up, and with gate where both are in one.
        transposed: (inputs, outputs) instead of (outputs, inputs).
        pairs: gate and up alternate; otherwise gate comes first.
    """

    up: str
    gated: bool = True
    transposed: bool = False
    biased: bool = False

    @property
    def pairs(self) -> bool:
        return self.biased


def _layout(module: nn.Module) -> _Layout | None:
    held = {name: tuple(p.shape) for name, p in module.named_parameters(recurse=False)}
    down = held.get("down_proj", ())
    if len(down) != 3:
        return None
    e, a, b = down
    plain, clamped = hasattr(module, "act_fn"), hasattr(module, "alpha") and hasattr(module, "limit")
    biases = {"gate_up_proj_bias": (e, 2 * a), "down_proj_bias": (e, b)}
    known = [
        (plain, {"gate_up_proj": (e, 2 * b, a)}, _Layout("gate_up_proj")),
        (plain, {"gate_up_proj": (e, b, 2 * a)}, _Layout("gate_up_proj", transposed=True)),
        (plain, {"up_proj": (e, b, a)}, _Layout("up_proj", gated=False)),
        (clamped, {"gate_up_proj": (e, b, 2 * a), **biases}, _Layout("gate_up_proj", transposed=True, biased=True)),
    ]
    return next((layout for fits, other, layout in known if fits and held == {"down_proj": down, **other}), None)


def _opened(stacked: nn.Module) -> Experts:
    layout = _layout(stacked)
    assert layout is not None
    up = stacked.get_parameter(layout.up)
    grad = up.requires_grad
    weights = [up.detach(), stacked.get_parameter("down_proj").detach()]
    if layout.transposed:
        weights = [w.mT for w in weights]
    names = (f"{layout.up}_bias", "down_proj_bias")
    biases = [stacked.get_parameter(name).detach() if layout.biased else None for name in names]
    experts = []
    for e in range(len(up)):
        both, back = (
            (weight[e], None if bias is None else bias[e]) for weight, bias in zip(weights, biases, strict=True)
        )
        parts = {"up_proj": both, "down_proj": back}
        if layout.gated:
            gate, own = (tuple(None if t is None else _half(t, i, layout.pairs) for t in both) for i in range(2))
            parts = {"gate_proj": gate, "up_proj": own, "down_proj": back}
        experts.append(Expert(**{name: _linear(weight, bias, grad) for name, (weight, bias) in parts.items()}))
    held: Any = stacked
    inner = Clamped(held.alpha, held.limit) if layout.biased else Gated(held.act_fn)
    return Experts(experts, inner).train(stacked.training)


def _half(rows: Tensor, index: int, pairs: bool) -> Tensor:
    """Gate (0) or up (1) of both."""
    return rows[index::2] if pairs else rows.chunk(2)[index]


def _linear(weight: Tensor, bias: Tensor | None, requires_grad: bool) -> nn.Linear:
    """With a row's weights one beside the other in memory: where they were, if they were so."""
    o, n = weight.shape
    linear = nn.Linear(n, o, bias=bias is not None, device="meta", dtype=weight.dtype)
    if weight.stride(-1) != 1:
        weight = weight.contiguous()
    linear.weight = nn.Parameter(weight, requires_grad=requires_grad)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=requires_grad)
    return linear


def stacked_again(state: Mapping[str, Tensor], name: str, stacked: nn.Module) -> Tensor:
    """A stacked parameter, made from the tensors of opened experts.

    Args:
        state: tensors by name, `mlp.experts.0.gate_proj.weight` and so on.
        name: of the parameter, `mlp.experts.gate_up_proj` for example.
        stacked: the module that it belongs to.

    Raises:
        KeyError: there are no such experts.
    """
    root, _, leaf = name.rpartition(".")
    kind = "bias" if leaf.endswith("_bias") else "weight"
    leaf = leaf.removesuffix("_bias")
    parts = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else (leaf,)
    layout, experts = _layout(stacked), []
    while layout and f"{root}.{len(experts)}.{parts[0]}.{kind}" in state:
        found = [state[f"{root}.{len(experts)}.{part}.{kind}"] for part in parts]
        experts.append(torch.stack(found, 1).flatten(0, 1) if layout.pairs and len(found) > 1 else torch.cat(found))
    if not experts or layout is None:
        raise KeyError(name)
    tensor = torch.stack(experts)  # (E, o, n) or (E, o)
    return tensor.mT.contiguous() if layout.transposed and kind == "weight" else tensor
