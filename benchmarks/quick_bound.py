"""What bounds a step of the quick preset on a CPU: its products, at the rate at which this machine multiplies.

    python -m benchmarks.quick_bound --data DATA

Steps are timed whole, one after another, without a profiler. Products are counted from shapes: those of tokens and of
the output embedding (forward and backward), and the transforms of all weights; their rate is that of one product of the
model's own shapes. What is left are passes over weights and activations: grids, clips, norms, optimiser.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from benchmarks.calibration import fit_operations
from benchmarks.common import RESULTS, write_result
from flatquant.calibrate.pipeline import calibrate
from flatquant.data import calibration_tokens
from flatquant.models import load_model
from flatquant.recipes import flatquant

NAME = "quick-bound"


def rate(tokens: int, n: int, o: int) -> float:
    """Operations a second of a product (tokens, n) x (n, o), the median of many."""
    x, w = torch.randn(tokens, n), torch.randn(o, n)
    times = []
    for _ in range(50):
        start = time.perf_counter()
        torch.mm(x, w.mT)
        times.append(time.perf_counter() - start)
    return 2 * tokens * n * o / statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", required=True, help="folder with wikitext-2-raw")
    parser.add_argument("--out", default=str(RESULTS))
    parser.add_argument("--steps", type=int, default=6)
    args = parser.parse_args()
    model, tokenizer = load_model(args.model, dtype=torch.float32)
    recipe = flatquant("w4a4kv4", "quick")
    assert recipe.end_to_end is not None
    recipe = dataclasses.replace(recipe, end_to_end=dataclasses.replace(recipe.end_to_end, steps=args.steps))
    assert recipe.end_to_end is not None
    text = Path(args.data) / "wikitext-2-raw" / "wiki.valid.raw"
    tokens = calibration_tokens(text, tokenizer, samples=recipe.data.samples, seqlen=recipe.data.seqlen, seed=0)
    per = fit_operations(model, recipe)
    c = model.config
    batch = recipe.end_to_end.batch_size * recipe.data.seqlen
    operations = {
        "tokens": c.num_hidden_layers * batch * per["token"],
        "transforms of weights": c.num_hidden_layers * per["step"],
        "output embedding": 3 * 2 * batch * c.hidden_size * c.vocab_size,  # the original's, and ours both ways
    }
    speed = rate(batch, c.hidden_size, c.intermediate_size)
    ends: list[float] = []

    def progress(stage: str, done: int, total: int) -> None:
        if stage.startswith("end"):
            ends.append(time.perf_counter())

    _, report = calibrate(model, recipe, tokens, device=torch.device("cpu"), dtype=torch.float32, progress=progress)
    steps = [b - a for a, b in pairwise(ends)]
    step = statistics.median(steps)
    products = sum(operations.values()) / speed
    metrics: dict[str, Any] = {
        "threads": torch.get_num_threads(),
        "product_rate": speed,
        "operations": operations,
        "step_seconds": step,
        "products_seconds": products,
        "products_share": products / step,
    }
    print(metrics)
    sample = metrics | {"steps": steps, "stages": report.seconds}
    write_result(Path(args.out) / f"{NAME}.json", NAME, seeds=[0], metrics=metrics, samples=[sample])


if __name__ == "__main__":
    main()
