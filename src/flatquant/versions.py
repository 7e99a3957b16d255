"""The releases of transformers that we are tested with, and the error for one that works differently.

It imports nothing: `runtime/hf.py` needs it while transformers itself is being imported.
"""

from __future__ import annotations

from importlib.metadata import version

from flatquant.errors import ModelError

TESTED = ("5.17", "5.24")  # the oldest and the newest minor release of transformers that the test suite passes with


def broken(what: str) -> ModelError:
    """The error for an assumption about transformers that does not hold."""
    low, high = TESTED
    return ModelError(
        f"{what}: transformers {version('transformers')} works differently from the tested releases, {low} to {high}; "
        f"install one of them: pip install 'transformers{bounds()}'"
    )


def bounds() -> str:
    """The tested releases as pip and pyproject.toml spell them."""
    low, high = TESTED
    major, minor = high.split(".")
    return f">={low},<{major}.{int(minor) + 1}"
