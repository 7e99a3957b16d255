"""Round to nearest: no transform, full ranges, no data. The floor that every method is measured from."""

from dataclasses import replace

from flatquant.recipes.common import TEXT, unclipped
from flatquant.spec import Recipe, Scheme


def rtn(scheme: str | Scheme, preset: str = "reference") -> Recipe:
    """Plain rounding; a preset says how much text is read where a static scale of activations needs some."""
    recipe = Recipe(name="rtn", scheme=unclipped(scheme))
    return replace(recipe, data=TEXT.get(preset, TEXT["reference"])) if recipe.needs_data else recipe
