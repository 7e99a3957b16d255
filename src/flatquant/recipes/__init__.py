"""Methods as choices of parts: one small function each, returning a `Recipe`."""

from collections.abc import Callable

from flatquant.errors import SpecError
from flatquant.recipes.affinequant import affinequant
from flatquant.recipes.autoround import autoround
from flatquant.recipes.direct import direct
from flatquant.recipes.flatquant import flatquant
from flatquant.recipes.flattenquant import flattenquant
from flatquant.recipes.gptq import gptq
from flatquant.recipes.oac import oac
from flatquant.recipes.omniquant import omniquant
from flatquant.recipes.quarot import quarot
from flatquant.recipes.rtn import rtn
from flatquant.recipes.smoothquant import smoothquant
from flatquant.recipes.spinquant import spinquant
from flatquant.recipes.svdquant import svdquant
from flatquant.recipes.vptq import vptq
from flatquant.spec import Recipe

RECIPES: dict[str, Callable[..., Recipe]] = {
    "affinequant": affinequant,
    "autoround": autoround,
    "direct": direct,
    "flatquant": flatquant,
    "flattenquant": flattenquant,
    "gptq": gptq,
    "oac": oac,
    "omniquant": omniquant,
    "quarot": quarot,
    "rtn": rtn,
    "smoothquant": smoothquant,
    "spinquant": spinquant,
    "svdquant": svdquant,
    "vptq": vptq,
}


def recipe(method: str, scheme: str, preset: str = "reference") -> Recipe:
    """The recipe of a method by name.

    Raises:
        SpecError: an unknown method, scheme or preset.
    """
    if method not in RECIPES:
        raise SpecError(f"unknown method {method!r}; known: {', '.join(sorted(RECIPES))}")
    return RECIPES[method](scheme, preset=preset)


__all__ = [
    "RECIPES",
    "Recipe",
    "affinequant",
    "autoround",
    "direct",
    "flatquant",
    "flattenquant",
    "gptq",
    "oac",
    "omniquant",
    "quarot",
    "recipe",
    "rtn",
    "smoothquant",
    "spinquant",
    "svdquant",
    "vptq",
]
