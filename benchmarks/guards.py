"""What the guards cost in serving: the share of a decoding step that is spent in the hooks of the attention seams.

    python -m benchmarks.guards --out benchmarks/results

A random model of SmolLM2-135M's shape, W4A4KV4, writes token after token through the modules, where every forward pass
of every attention module is checked. (The fused runtime calls no attention module.) Time inside the hooks is taken by a
clock around each of them: it holds the clock's own cost too, and what the seam would do without any check.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from benchmarks.common import write_result
from flatquant import bench, seams
from flatquant.runtime import fused

NAME = "guards-cpu"
HOOKS = ("_begin", "_end", "_begin_masks", "_check_masks")
SHAPE = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
}


class Stopwatch:
    """Seconds spent in functions, and how often they were called."""

    def __init__(self) -> None:
        self.seconds, self.calls = 0.0, 0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start
                self.calls += 1

        return timed


def decode(model: Any, tokens: int, repeats: int, watch: Stopwatch) -> dict[str, Any]:
    """Through `generate`: milliseconds of a token, and in hooks; medians over repeats."""
    ids = torch.zeros((1, 1), dtype=torch.int64)
    length = {"min_new_tokens": tokens, "max_new_tokens": tokens, "do_sample": False}
    model.generate(ids, **length)  # makes room
    samples = []
    for _ in range(repeats):
        before, calls, start = watch.seconds, watch.calls, time.perf_counter()
        model.generate(ids, **length)
        seconds, spent = time.perf_counter() - start, watch.seconds - before
        samples.append({"token_ms": 1e3 * seconds / tokens, "hooks_ms": 1e3 * spent / tokens, "share": spent / seconds})
    medians = {name: statistics.median(sample[name] for sample in samples) for name in samples[0]}
    return {**medians, "calls_a_token": (watch.calls - calls) / tokens, "samples": samples}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    watch = Stopwatch()
    for name in HOOKS:
        setattr(seams, name, watch.around(getattr(seams, name)))
    config = LlamaConfig(**{**SHAPE, "num_hidden_layers": args.layers})
    model = bench.packed_model(config, torch.device("cpu"))
    fused.attach(model, ())
    found = decode(model, args.tokens, args.repeats, watch)
    print(found, flush=True)
    write_result(args.out / f"{NAME}.json", NAME, seeds=[], shape=SHAPE | {"num_hidden_layers": args.layers}, **found)


if __name__ == "__main__":
    main()
