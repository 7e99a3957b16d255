"""Zero-shot tasks of SmolLM2-135M: original, RTN, FlatQuant in memory, FlatQuant packed, all W4A4KV4; six full sets.

    python -m benchmarks.zeroshot_smollm2                  # on a GPU; needs lm-eval and FLATQUANT_DATA with zeroshot/
    python -m benchmarks.zeroshot_smollm2 --limit 20 --windows 4 --preset quick    # a try on a CPU

Every score is written as it comes, and a second start goes on where the first stopped. The packed model must give the
same scores as the one in memory, where both compute alike; on a GPU kernels serve it, which round in other places, so
that a 4-bit activation here and there goes the other way, and with it answers that were even: two standard errors of a
difference are allowed. The benchmark says so, and fails otherwise.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import flatquant
from benchmarks.common import RESULTS, write_result
from flatquant.evaluate import TASKS, zero_shot
from flatquant.models import load_model

SCHEME = "w4a4kv4"
VARIANTS = ("original", "rtn", "flatquant", "flatquant packed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--output", type=Path, default=RESULTS / "zeroshot-smollm2.json")
    parser.add_argument("--folder", type=Path, help="of the quantised model, to be found again; else a temporary one")
    parser.add_argument("--preset", default="reference")
    parser.add_argument("--calibration", default="wikitext2")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--limit", type=int)
    parser.add_argument("--windows", type=int, help="calibration windows, fewer than the preset's")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()

    settings = {
        "model": "SmolLM2-135M-Instruct",
        "scheme": SCHEME,
        "preset": arguments.preset,
        "limit": arguments.limit,
    }
    result: dict[str, Any] = {"settings": settings, "scores": {}, "seconds": {}}
    if arguments.output.is_file():
        earlier = json.loads(arguments.output.read_text())
        if earlier.get("settings") != settings:
            raise SystemExit(f"{arguments.output} is of other settings; move it away")
        result = {key: earlier[key] for key in result}

    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary, "model")
        for variant in VARIANTS:
            done = result["scores"].setdefault(variant, {})
            missing = [task for task in arguments.tasks.split(",") if task not in done]
            if not missing:
                continue
            start = time.perf_counter()
            model, tokenizer = make(variant, folder, arguments)

            def keep(task: str, score: dict[str, Any], done: dict[str, Any] = done) -> None:
                done[task] = score
                write_result(arguments.output, "zeroshot-smollm2", **result)

            zero_shot(
                model.to(arguments.device),
                tokenizer,
                missing,
                limit=arguments.limit,
                batch_size=arguments.batch_size,
                keep=keep,
                quiet=False,
            )
            result["seconds"][variant] = result["seconds"].get(variant, 0.0) + round(time.perf_counter() - start, 1)
            write_result(arguments.output, "zeroshot-smollm2", **result)
            del model
    show(result["scores"])
    memory, packed = (result["scores"].get(v, {}) for v in VARIANTS[2:])
    allowed = 0.0 if arguments.device == "cpu" else 2.0
    differing = [
        task
        for task, score in memory.items()
        if task in packed
        and abs(score["value"] - packed[task]["value"]) > allowed * math.hypot(score["stderr"], packed[task]["stderr"])
    ]
    if differing:
        raise SystemExit(f"packed and in memory differ: {', '.join(differing)}")


def make(variant: str, folder: Path, arguments: argparse.Namespace) -> tuple[Any, Any]:
    """A variant's model and tokenizer."""
    model, tokenizer = load_model(arguments.model, dtype=None if arguments.device == "cpu" else torch.float16)
    if variant == "original":
        return model, tokenizer
    if variant == "rtn":
        rounded = flatquant.quantize(model, flatquant.recipes.rtn(SCHEME), device=arguments.device, verdict=False)
        return rounded.model, tokenizer
    if (folder / "config.json").is_file():  # made for the variant before, or by an earlier start
        return flatquant.load(folder, device=arguments.device), tokenizer
    recipe = flatquant.recipes.flatquant(SCHEME, arguments.preset)
    if arguments.windows:
        recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, samples=arguments.windows))
    made = flatquant.quantize(
        model, recipe, arguments.calibration, tokenizer=tokenizer, output=folder, device=arguments.device
    )
    return made.model, tokenizer


def show(scores: dict[str, dict[str, Any]]) -> None:
    for variant, found in scores.items():
        line = ", ".join(f"{task} {100 * s['value']:.2f} ± {100 * s['stderr']:.2f}" for task, s in found.items())
        mean = sum(s["value"] for s in found.values()) / max(len(found), 1)
        print(f"{variant}: {line}; mean {100 * mean:.2f}")


if __name__ == "__main__":
    main()
