"""Which engines serve what of which method: they are asked to take a small packed Llama apart.

What `benchmarks.tables` writes into the docs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel

from flatquant import families
from flatquant.engines import parts
from flatquant.errors import ModelError, SpecError
from flatquant.recipes import RECIPES
from flatquant.runtime import fused
from flatquant.runtime.build import install
from flatquant.runtime.kernels import Unsupported
from flatquant.spec import Plan
from flatquant.wiring.arch import Geometry, blocks_at, submodule
from flatquant.wiring.archs import LLAMA
from flatquant.wiring.plan import make_plan


def engines_table() -> list[dict[str, str]]:
    """One row for each method: the schemes of `families.SCHEMES` at which each engine serves it on Llama, or `-`."""
    rows, llama = [], families.small("llama", {})
    for method in sorted(RECIPES):
        taken = [scheme for scheme in families.SCHEMES if _plan(method, scheme, llama) is not None]
        asked = {"modules": lambda model, plan: True, "fused": _is_fused, "vllm": _has_parts}
        named = {
            engine: [scheme for scheme in taken if _asked(takes, method, scheme)] for engine, takes in asked.items()
        }
        rows.append({"method": method} | {engine: ", ".join(named[engine]) or "-" for engine in families.ENGINES})
    return rows


def _plan(method: str, scheme: str, model: nn.Module) -> Plan | None:
    """The plan of a Llama, if the method takes the scheme."""
    config: Any = model.config
    blocks = blocks_at(model, LLAMA.blocks)
    try:
        return make_plan(RECIPES[method](scheme), LLAMA, Geometry.of(config), blocks)
    except SpecError:
        return None


def _asked(takes: Callable[[PreTrainedModel, Plan], bool], method: str, scheme: str) -> bool:
    """Whether an engine takes a small packed Llama."""
    model = families.small("llama", {})
    plan = _plan(method, scheme, model)
    assert plan is not None
    for block, planned in zip(submodule(model, plan.blocks_path).children(), plan.blocks, strict=True):
        install(block, plan.attention, planned, packed=True)
    return takes(cast(PreTrainedModel, model), plan)


def _is_fused(model: PreTrainedModel, plan: Plan) -> bool:
    """Whether the fused runtime takes a model apart."""
    try:
        fused.Fused(model)
    except Unsupported:
        return False
    return True


def _has_parts(model: PreTrainedModel, plan: Plan) -> bool:
    """Whether a model consists of what `engines.parts` gives other engines."""
    try:
        parts.check_parts(model, plan)
    except ModelError:
        return False
    return True
