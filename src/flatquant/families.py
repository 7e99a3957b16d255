"""Which methods go with which families: found by planning every method on a small model of every family.

Nothing here knows a method or a family. A method is tried at the schemes of `SCHEMES`; what it refuses on
Llama too is the method's own limit, and says nothing about a family.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from flatquant.engines.vllm import support
from flatquant.errors import FamilyError, SpecError
from flatquant.models import quiet
from flatquant.recipes import RECIPES
from flatquant.runtime import fused
from flatquant.runtime.experts import open_experts
from flatquant.spec import Plan, Recipe
from flatquant.wiring.arch import Arch, Geometry, submodule
from flatquant.wiring.archs import ARCHS, LLAMA
from flatquant.wiring.plan import make_plan

SCHEMES = ("w4a4kv4", "w4a16")

# Of every family's models; a config takes what it does not know for a note.
_SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,  # among which is one of every kind
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 2,
    "num_local_experts": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
}


# What computes a quantised model: transformers' modules with our linears, the kernels of `runtime.fused`, vLLM.
ENGINES = ("modules", "fused", "vllm")


def engines(kind: str, fields: Mapping[str, Any] = MappingProxyType({})) -> tuple[str, ...]:
    """The engines that serve a family's models; `benchmarks/engines.py` asks of which methods.

    Args:
        fields: of a config, where a family has several kinds of blocks.
    """
    computed = all(fields.get(name, value) == value for name, value in support.WHEN.get(kind, {}).items())
    served = {"modules": True, "fused": kind in fused.FAMILIES, "vllm": kind in support.FAMILIES and computed}
    return tuple(engine for engine in ENGINES if served[engine])


def plan_for(recipe: Recipe, arch: Arch, geometry: Geometry, blocks: nn.ModuleList) -> Plan:
    """`make_plan`; where the method does not go with the family, the error says which do, at the same scheme.

    Raises:
        SpecError, ModelError: as `make_plan`.
    """
    try:
        return make_plan(recipe, arch, geometry, blocks)
    except FamilyError as error:
        scheme = str(recipe.scheme)
        others = [name for name in sorted(RECIPES) if _goes(name, scheme, arch, geometry, blocks)]
        listed = (
            f"methods that go with it at {scheme}: {', '.join(others)}" if others else f"no method goes at {scheme}"
        )
        raise FamilyError(f"{error}; {listed}") from error


def _goes(method: str, scheme: str, arch: Arch, geometry: Geometry, blocks: nn.ModuleList) -> bool:
    try:
        make_plan(RECIPES[method](scheme), arch, geometry, blocks)
    except SpecError:
        return False
    return True


def table() -> list[dict[str, str]]:
    """One row for each family: `family`, for each method `yes`, the schemes that go, or `-`, and `engines`."""
    own = _schemes("llama", LLAMA)
    rows = []
    for arch in ARCHS:
        for kind in filter(CONFIG_MAPPING.__contains__, arch.model_types):  # older releases of transformers lack some
            found = _schemes(kind, arch)
            name = kind + "".join(f", {field}={value}" for field, value in arch.when.items())
            cells = {m: _cell(found[m], own[m]) for m in sorted(RECIPES)}
            rows.append({"family": name, **cells, "engines": ", ".join(engines(kind, arch.when))})
    return sorted(rows, key=lambda row: row["family"])


def _cell(found: tuple[str, ...], own: tuple[str, ...]) -> str:
    return "yes" if found == own else ", ".join(found) or "-"


def _schemes(kind: str, arch: Arch) -> dict[str, tuple[str, ...]]:
    """By method, the schemes that it takes on a small model of a family."""
    model = small(kind, {**arch.when, **arch.example})
    kinds = {repr(arch.of(block)): block for block in submodule(model, arch.blocks).children()}
    blocks, geometry = nn.ModuleList(kinds.values()), Geometry.of(model.config)
    return {m: tuple(s for s in SCHEMES if _goes(m, s, arch, geometry, blocks)) for m in RECIPES}


def small(kind: str, fields: Mapping[str, Any]) -> nn.Module:
    """A model of a family, on the meta device."""
    computed = {name for name in _SMALL if isinstance(getattr(CONFIG_MAPPING[kind], name, None), property)}
    sizes = {name: size for name, size in _SMALL.items() if name not in computed}
    with torch.device("meta"), quiet():
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **fields))
    open_experts(model)
    return model
