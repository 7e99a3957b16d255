"""What decides a run, and what it reports."""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
import transformers

from flatquant import __version__
from flatquant.api.checks import stored_bytes
from flatquant.calibrate.blockwise import named
from flatquant.calibrate.end2end import FittedModel
from flatquant.calibrate.memory import (
    peak_resident_bytes,
)
from flatquant.calibrate.pipeline import Report, measured
from flatquant.runtime import artifact
from flatquant.spec import FitMemory, Plan, to_dict

if TYPE_CHECKING:
    from flatquant.api.run import Run

# What the report says of a block beside its losses, where there is such.
_OF_A_BLOCK = ("experts", "dtype", "held_out", "plain", "undone", "learned_rounding")


def identity_of(run: Run, data: Mapping[str, Any] | None, model_hash: str) -> dict[str, Any]:
    """Everything that decides the result."""
    versions = {"flatquant": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    config = {k: v for k, v in run.model.config.to_diff_dict().items() if not k.endswith("name_or_path")}
    return {
        "recipe": to_dict(run.recipe),
        "data": None if data is None else dict(data),
        "model": model_hash,
        "config": hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest(),
        "seed": run.seed,
        "dtype": named(run.dtype),
        "windows": run.layout.windows,
        **({} if run.layout.memory is None else {"memory": run.layout.memory}),
        "device": run.device.type,
        "versions": versions,
    }


def report_of(
    run: Run,
    identity: Mapping[str, Any],
    plan: Plan,
    data: Mapping[str, Any] | None,
    original: Mapping[str, Any],
    calibration: Report,
    text_seconds: float,
) -> dict[str, Any]:
    blocks = [
        {"block": b["block"]} | _course(b["losses"]) | {key: b[key] for key in _OF_A_BLOCK if key in b}
        for b in calibration.blocks
    ]
    whole = calibration.end_to_end
    seconds = {"calibration text": text_seconds, **calibration.seconds, **run.seconds}
    return {
        "recipe": to_dict(run.recipe),
        "data": data,
        "model": {
            "name": run.name,
            "title": run.title,
            "architecture": type(run.model).__name__,
            "dtype": named(run.model.dtype),
            "sha256": original["sha256"],
        },
        "seed": run.seed,
        "dtype": named(run.dtype),
        "device": _device_name(run.device),
        "versions": {**identity["versions"], "python": platform.python_version()},
        "blocks": blocks,
        "end_to_end": None if whole is None else _whole_fit(whole, run.layout.memory),
        "sizes": {
            "original_bytes": original["bytes"],
            "quantised_bytes": stored_bytes(run.model),
            "unquantised_bytes": artifact.unquantised(run.model, plan),
            "untied": original["tied"] and not artifact.is_tied(run.model),
            **artifact.rounded_ends_of(run.model, plan),
        },
        "run": run_hash(identity),
        "timing": {
            "seconds": {stage: round(value, 3) for stage, value in seconds.items()},
            "blocks": [b.get("seconds") for b in calibration.blocks],
            # Rounding errors, whose last bits depend on the machine.
            "preflight": None if run.preflight is None else asdict(run.preflight),
            "total": round(time.perf_counter() - run.start, 3),
            "peak_device_bytes": calibration.peak_memory,
            "peak_host_bytes": peak_resident_bytes(),
            "estimate": asdict(run.layout),
        },
    }


def run_hash(identity: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _whole_fit(fitted: FittedModel, memory: FitMemory | None) -> dict[str, Any] | None:
    """What a report says of an end-to-end fit; None where nothing was fitted."""
    if not (fitted.losses or fitted.held_out):
        return None
    found = _course(fitted.losses) | {"memory": memory}
    return found if fitted.held_out is None else found | measured(fitted)


def _course(losses: list[float]) -> dict[str, Any]:
    """A fit's losses, and those that it began and ended with."""
    first, last = (losses[0], losses[-1]) if losses else (None, None)
    return {"before": first, "after": last, "losses": losses}


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()
