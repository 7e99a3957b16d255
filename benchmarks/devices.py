"""One GPU against several of the same host: time by stage, accuracy, and whether the bits are the same.

    python -m benchmarks.devices smollm2-135m
    python -m benchmarks.devices smollm2-135m --rungs reference:fit.epochs=1 --counts 1 2 --out /tmp/results

A row is one run of `flatquant.quantize` in processes of its own, one a GPU (on a machine without GPUs, on the
processor), from start to the folder. Times are those of the report, measured on the first rank after the processes have
found one another. Rungs are those of `benchmarks.ladder`. Rows are kept as they come.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import ladder
from benchmarks.common import RESULTS, commit, environment, read_samples, write_result
from flatquant import distributed, quantize
from flatquant.models import find_device

RUNGS = ("reference", "best:end_to_end.steps=150:data.samples=128")
SCHEME = "w4a4kv4"


def work(model: str, rung: str, seed: int, output: str) -> None:
    """What every rank does."""
    device = find_device()
    with distributed.joined(device):
        quantize(model, ladder.Job(rung, SCHEME, seed).recipe(), output=output, seed=seed, device=device)


def measured(model: str, rung: str, seed: int, count: int) -> dict[str, Any]:
    """A row."""
    with tempfile.TemporaryDirectory() as folder:
        output = str(Path(folder) / "model")
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)] if count > 1 else []
        threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count))} | os.environ
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, *launch, "-m", "benchmarks.devices", model, "--work", output, "--rungs", rung]
            + ["--seeds", str(seed)],
            check=True,
            env=threads,
        )
        seconds = time.perf_counter() - start
        report = json.loads((Path(output) / "flatquant_report.json").read_text())
        config = json.loads((Path(output) / "config.json").read_text())
    return {
        "rung": rung,
        "scheme": SCHEME,
        "seed": seed,
        "devices": count,
        "commit": commit(),
        "seconds_with_start": seconds,
        "timing": report["timing"],
        "content_hash": config["quantization_config"]["content_hash"],
        "verdict": report["verdict"],
        "end_to_end": report.get("end_to_end"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--rungs", nargs="+", default=list(RUNGS))
    parser.add_argument("--counts", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--out", default=str(RESULTS))
    parser.add_argument("--work", metavar="FOLDER", help=argparse.SUPPRESS)  # a rank's part of a row
    args = parser.parse_args()
    if args.work:
        work(args.model, args.rungs[0], args.seeds[0], args.work)
        return
    path = Path(args.out) / f"devices-{Path(args.model).name.lower()}.json"
    print(environment(), flush=True)
    for seed in args.seeds:
        for rung in args.rungs:
            for count in args.counts:
                row = measured(args.model, rung, seed, count)
                print({name: row[name] for name in ("rung", "devices", "seconds_with_start", "timing")}, flush=True)
                samples = [*read_samples(path), row]
                write_result(
                    path,
                    path.stem,
                    seeds=sorted({s["seed"] for s in samples}),
                    metrics=summary(samples),
                    samples=samples,
                )


def summary(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """By rung and seed: stages on each number of devices, and whether the folder has the same bits."""
    found: dict[str, Any] = {}
    for s in samples:
        row = found.setdefault(f"{s['rung']}, seed {s['seed']}", {"stages": {}, "hashes": {}, "kl": {}})
        row["stages"][str(s["devices"])] = s["timing"]
        row["hashes"][str(s["devices"])] = s["content_hash"]
        row["kl"][str(s["devices"])] = (s["verdict"] or {}).get("kl")
    for row in found.values():
        row["same_bits"] = len(set(row["hashes"].values())) == 1
    return found


if __name__ == "__main__":
    main()
