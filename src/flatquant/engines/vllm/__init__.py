"""vLLM serves quantised folders: `flatquant serve DIR`, or `vllm serve DIR`.

`register` is the entry point `vllm.general_plugins`: every process of vLLM calls it, once or several times. It is the
only way to `plugin.py`, the one module of the package that imports vllm.
"""

from __future__ import annotations

import importlib


def register() -> None:
    """Make vLLM know `quant_method: flatquant`."""
    importlib.import_module("flatquant.engines.vllm.plugin")
