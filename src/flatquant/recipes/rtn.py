"""Round to nearest: no transform, full ranges, no data. The floor that every method is measured from."""

from flatquant.recipes.common import unclipped
from flatquant.spec import Recipe, Scheme


def rtn(scheme: str | Scheme, preset: str = "reference") -> Recipe:
    """Plain rounding; presets make no difference."""
    return Recipe(name="rtn", scheme=unclipped(scheme))
