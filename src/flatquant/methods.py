"""What every method is made of, read off its recipe: the table of `flatquant methods`.

Nothing here knows a method. What a recipe does not say (the cost while serving) is computed from the plan that it gives
for a block of the size of Llama-2-7B's.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from flatquant.errors import SpecError
from flatquant.recipes import RECIPES, recipe
from flatquant.spec import QuantSpec, Recipe, TransformSpec
from flatquant.wiring.arch import Geometry, linear_at
from flatquant.wiring.archs import arch_of
from flatquant.wiring.cost import online_flops
from flatquant.wiring.plan import make_plan

SCHEMES = ("w4a4kv4", "w4a16")  # a method is shown at the first that it takes


def describe(method: str, preset: str = "reference", schemes: Iterable[str] = SCHEMES) -> dict[str, Any]:
    """One method's row: JSON-ready, all of it but `online` as words.

    Raises:
        SpecError: the method takes none of the schemes.
    """
    error = SpecError(f"method {method}: no scheme to show it at")
    for scheme in schemes:
        try:
            found = recipe(method, scheme, preset)
        except SpecError as refused:
            error = refused
            continue
        return {
            "method": method,
            "scheme": str(found.scheme),
            "transform": _transform(found),
            "where": ", ".join(site for site, parts in found.transforms.items() if parts) or "-",
            "grid": _grids(found),
            "solver": _solver(found),
            "objective": _objective(found),
            "data": f"{found.data.samples} x {found.data.seqlen}" if found.needs_data else "-",
            "online": _online(found),
        }
    raise error


def table(preset: str = "reference") -> list[dict[str, Any]]:
    """`describe` of every method, in the order of their names."""
    return [describe(method, preset) for method in sorted(RECIPES)]


def _unique(words: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(words))


def _part(spec: TransformSpec) -> str:
    how = [word for word in (spec.parameters, spec.init) if word not in ("inverse", "identity")]
    kind = f"{spec.kind} of {spec.size}" if spec.size else spec.kind
    return kind + (f" ({', '.join(how)})" if how else "")


def _transform(found: Recipe) -> str:
    return " + ".join(_unique(_part(part) for parts in found.transforms.values() for part in parts)) or "-"


def _grids(found: Recipe) -> str:
    """Tensors with grids of one kind together: `w4 a4 symmetric, learned clip; k4 v4 asymmetric`."""
    scheme = found.scheme
    kinds: dict[str, list[str]] = {}
    for letter, spec in (("w", scheme.weights), ("a", scheme.activations), ("k", scheme.keys), ("v", scheme.values)):
        if spec is not None and letter == "w" and found.solver.codebook is not None:
            kinds[f"in codebooks of vectors of {found.solver.codebook.length}"] = [f"w{spec.bits}"]
        elif spec is not None:
            group = f"g{spec.group_size}" if spec.group_size else ""
            kinds.setdefault(_grid(spec), []).append(f"{letter}{spec.bits}{group}")
    return "; ".join(f"{' '.join(tensors)} {kind}" for kind, tensors in kinds.items()) or "-"


def _grid(spec: QuantSpec) -> str:
    if spec.kind != "uniform":
        return f"in {spec.kind}"
    kind = ("symmetric" if spec.symmetric else "asymmetric") + (" per tensor" if spec.scope == "tensor" else "")
    return kind if spec.clip == "none" else f"{kind}, {spec.clip} clip"


def _solver(found: Recipe) -> str:
    if found.scheme.weights is None:
        return "-"
    branch = f", branch of rank {found.branch.rank}" if found.branch else ""
    learned = found.solver.learned
    steps = f", learned in {learned.steps} steps" if learned is not None and found.solver.learns else ""
    return found.solver.kind + (f" ({found.solver.hessian})" if found.solver.needs_hessian else "") + branch + steps


def _objective(found: Recipe) -> str:
    parts = []
    if (fit := found.block_fit) is not None:
        seen = ", quantised inputs" if fit.inputs == "quantised" else ""
        parts.append(f"block outputs{seen}, {fit.epochs} epochs")
    if (whole := found.whole_fit) is not None:
        words = {"kl": "divergence", "cross_entropy": "cross entropy"}
        parts.append(f"{words[whole.objective]} of the model, {whole.steps} steps")
    return "; ".join(parts) or "-"


def _online(found: Recipe) -> float:
    """Operations that serving adds, as a share of those of the block's linears."""
    config = LlamaConfig(num_hidden_layers=1, vocab_size=8)  # the other defaults are Llama-2-7B's
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    arch, geometry = arch_of(model.config), Geometry.of(model.config)
    blocks = model.model.layers
    plan = make_plan(found, arch, geometry, blocks)
    own = sum(2 * linear_at(blocks[0], path).weight.numel() for edge in arch.edges for path in edge.readers)
    return online_flops(plan, geometry, blocks) / own
