"""Make transformers know us, without importing it.

transformers has no entry point for quantisers: its table lives in `transformers.quantizers.auto`, and somebody has to
write into it. Where that module is loaded already, `register` does so now; otherwise once it is, so that
`import flatquant` stays instant and needs no torch.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_TABLE = "transformers.quantizers.auto"
_OURS = "flatquant.runtime.hf"


class _WhenLoaded(MetaPathFinder):
    """Finds the table where everybody finds it, and adds our line to it once it has run."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if fullname != _TABLE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            importlib.import_module(_OURS)

        spec.loader.exec_module = exec_module
        return spec


def register() -> None:
    """Have `from_pretrained` find `quant_method: flatquant`, now or when transformers is imported."""
    if _TABLE in sys.modules:
        importlib.import_module(_OURS)
    elif not any(isinstance(finder, _WhenLoaded) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenLoaded())
