"""What `quantize` returns, and what the verdict is measured on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import PreTrainedModel

from flatquant.calibrate.samples import Windows
from flatquant.spec import Plan


@dataclass(frozen=True)
class Quantized:
    """A quantised model, what sits where in it, and how it came about (the content of `flatquant_report.json`).

    A streamed run leaves the model on the disk: there `model` is read when it is first asked for.
    """

    plan: Plan
    report: dict[str, Any]
    make: Callable[[], PreTrainedModel]

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model, ready to generate."""
        return self.make()

    @property
    def verdict(self) -> dict[str, Any] | None:
        """How good it is: the report's entry `verdict` (docs/verdict.md); None if it was not asked for."""
        return self.report.get("verdict")


@dataclass(frozen=True)
class Judged:
    """The windows that the verdict is measured on, where they come from, and that they were not trained on."""

    tokens: Windows  # int64, (N, T), or samples
    source: str
    kept_back: bool
