"""Round to nearest: no transform, full ranges, no data. The floor that every method is measured from."""

from flatquant.spec import Recipe, Scheme


def rtn(scheme: str | Scheme, preset: str = "reference") -> Recipe:
    """Plain rounding; presets make no difference."""
    scheme = Scheme.parse(scheme, clip="none") if isinstance(scheme, str) else scheme
    return Recipe(name="rtn", scheme=scheme)
