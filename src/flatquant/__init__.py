"""flatquant: Hugging Face language models with 4-bit weights, activations and KV cache.

    import flatquant

    recipe = flatquant.recipes.flatquant("w4a4kv4", preset="quick")
    result = flatquant.quantize("smollm2-135m", recipe, "self", output="smollm2-w4a4kv4")
    model = flatquant.load("smollm2-w4a4kv4")

    # or, as everywhere: AutoModelForCausalLM.from_pretrained("smollm2-w4a4kv4")

Names are imported when first used, so that recipes can be written and compared on a machine without torch, and the
command line answers at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from flatquant.registration import register

if TYPE_CHECKING:
    from flatquant import recipes
    from flatquant.api import Quantized, load, quantize
    from flatquant.errors import FlatQuantError
    from flatquant.runtime.hf import FlatQuantConfig
    from flatquant.spec import Recipe, Scheme

__version__ = "0.1.0"

__all__ = [
    "FlatQuantConfig",
    "FlatQuantError",
    "Quantized",
    "Recipe",
    "Scheme",
    "__version__",
    "load",
    "quantize",
    "recipes",
]

_HOME = {
    "FlatQuantConfig": "flatquant.runtime.hf",
    "FlatQuantError": "flatquant.errors",
    "Quantized": "flatquant.api",
    "Recipe": "flatquant.spec",
    "Scheme": "flatquant.spec",
    "load": "flatquant.api",
    "quantize": "flatquant.api",
}


def __getattr__(name: str) -> Any:
    if name == "recipes":
        return importlib.import_module("flatquant.recipes")
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'flatquant' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


register()
