"""What the `best` preset loses where its weights are held in less memory: full, compact and transforms, side by side.

    python -m benchmarks.bounded_memory smollm2-135m
    python -m benchmarks.bounded_memory ./Qwen2.5-Coder-1.5B-Instruct --seeds 0 1 2
    python -m benchmarks.bounded_memory smollm2-135m --tiny --device cpu --out /tmp/results    # a dry run

Rows are those of the ladder (`benchmarks.ladder`): rtn, the reference preset, and `best` in each way to hold weights
(`EndToEndSpec.memory`), with equal settings, text and seed. Each model has a results file, `bounded-memory-NAME.json`,
with rows as they are made, and what each way is in `metrics.memories`: KL divergence and perplexity on every text, the
seconds and the peak of the run, the estimate of that peak, and the share that it loses of the full fit's gain in KL
divergence over rtn and over the reference preset.
"""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks import ladder
from benchmarks.common import environment
from flatquant.spec import FitMemory

MEMORIES: tuple[FitMemory, ...] = ("full", "compact", "transforms")  # those of one device
BASES = ("rtn", "reference")


def rung(memory: FitMemory) -> str:
    """The ladder's name of `best` whose weights are held so."""
    return f"best:end_to_end.memory={memory}"


def summary(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """The ladder's, and for every scheme what each way to hold weights takes and loses."""
    found = ladder.summary(samples)
    rows = {name: row for name, row in found["rows"].items() if "error" not in row}
    schemes = dict.fromkeys(name.rpartition("/")[2] for name in rows)
    return found | {"memories": {scheme: _of_scheme(rows, scheme) for scheme in schemes}}


def _of_scheme(rows: dict[str, Any], scheme: str) -> dict[str, Any]:
    full = rows.get(f"{rung('full')}/{scheme}")
    found: dict[str, Any] = {}
    for memory in MEMORIES:
        row = rows.get(f"{rung(memory)}/{scheme}")
        if row is None:
            continue
        kept = ("kl", "perplexity", "seconds", "peak_bytes", "estimated_bytes")
        found[memory] = {name: row[name] for name in kept}
        bases = {base: rows[f"{base}/{scheme}"] for base in BASES if f"{base}/{scheme}" in rows}
        if full is not None:
            found[memory]["lost"] = {base: lost(worse["kl"], full["kl"], row["kl"]) for base, worse in bases.items()}
    return found


def lost(base: dict[str, float], full: dict[str, float], kl: dict[str, float]) -> dict[str, float | None]:
    """The share of a full fit's gain over `base` that is lost on every text; None where there is no gain."""
    return {text: (kl[text] - full[text]) / gain if (gain := base[text] - full[text]) > 0 else None for text in kl}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ladder.add_options(parser, prefix="bounded-memory", schemes=("w4a4kv4",))
    parser.add_argument("--memories", nargs="+", choices=MEMORIES, default=list(MEMORIES))
    args = parser.parse_args()
    rungs = [*BASES, *map(rung, args.memories)]
    print(environment(), flush=True)
    ladder.run(parser, args, rungs, summary=summary)


if __name__ == "__main__":
    main()
