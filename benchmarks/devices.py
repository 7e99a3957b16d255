"""One GPU against several of the same host: time by stage, accuracy, and whether the bits are the same.

    python -m benchmarks.devices smollm2-135m
    python -m benchmarks.devices smollm2-135m --rungs reference:fit.epochs=1 --counts 1 2 --out /tmp/results
    python -m benchmarks.devices llama-3-8b --rungs reference    # whole runs of this shape

MODEL is what `flatquant.quantize` takes, or a shape: then a folder with random weights, planted outliers and biases of
keys is written first, with the tokenizer of SmolLM2. `--kept FOLDER` keeps outputs there; a run that was stopped goes
on with its state when the command is repeated, and its row is marked as resumed.

A row is one run of `flatquant.quantize` in processes of its own, one a GPU (on a machine without GPUs, on the
processor), from start to the folder. Times are those of the report, measured on the first rank after the processes have
found one another. Rungs are those of `benchmarks.ladder`. Rows are kept as they come.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from benchmarks import ladder
from benchmarks.calibration import LLAMA_8B, LLAMA_70B, TINY, Busy, random_llama
from benchmarks.common import RESULTS, commit, environment, read_samples, write_result
from flatquant import distributed, quantize
from flatquant.models import find_device, load_tokenizer, resolve

RUNGS = ("reference", "best:end_to_end.steps=150:data.samples=128")
SCHEME = "w4a4kv4"
SHAPES = {"llama-3-8b": LLAMA_8B, "llama-3-70b": LLAMA_70B, "tiny": TINY}
STEPS = "end_to_end_steps.json"  # seconds of every step of an end-to-end fit, beside the model
KEY_BIAS = 50.0  # about what Qwen2.5 has in its largest channels


def written(shape: str, blocks: int | None, folder: Path) -> str:
    """A folder with a random model of this shape, cut to the first `blocks`, and a tokenizer."""
    if not (folder / "config.json").exists():
        tokenizer = load_tokenizer(Path(resolve("smollm2-135m")))
        sizes = SHAPES[shape]
        dtype = torch.float32 if shape == "tiny" else torch.bfloat16
        model = random_llama(
            sizes, blocks or sizes[-1], dtype, find_device(), vocabulary=len(tokenizer), key_bias=KEY_BIAS
        )
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return str(folder)


def link_bytes() -> int | None:
    """What this host's GPUs have sent over NVLink so far; None where the driver does not count it."""
    if not shutil.which("nvidia-smi"):
        return None
    said = subprocess.run(["nvidia-smi", "nvlink", "-gt", "d"], capture_output=True, text=True, check=False).stdout
    counts = [int(n) for n in re.findall(r"Data Tx: (\d+) KiB", said)]
    return 1024 * sum(counts) if counts else None


def work(model: str, rung: str, seed: int, output: str) -> None:
    """What every rank does."""
    device, ends = find_device(), []

    def progress(stage: str, done: float, total: int) -> None:
        if stage == "end to end":
            ends.append(time.perf_counter())
            if distributed.leads():
                peak = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0.0
                print(f"step {done:.0f}: {ends[-1] - ends[0]:.2f} s, {peak:.1f} GB", flush=True)

    with distributed.joined(device):
        quantize(
            model,
            ladder.Job(rung, SCHEME, seed).recipe(),
            output=output,
            seed=seed,
            device=device,
            resume=True,
            progress=progress,
        )
        if distributed.leads():
            (Path(output) / STEPS).write_text(json.dumps([b - a for a, b in pairwise(ends)]))


def measured(model: str, rung: str, seed: int, count: int, kept: str | None = None) -> dict[str, Any]:
    """A row."""
    with contextlib.ExitStack() as stack:
        folder = kept or stack.enter_context(tempfile.TemporaryDirectory())
        output = str(Path(folder) / re.sub(r"\W+", "-", f"{Path(model).name}-{rung}-{seed}-{count}"))
        resumed = any(Path(folder).glob(f"{Path(output).name}*"))
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)] if count > 1 else []
        threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count))} | os.environ
        busy = [stack.enter_context(Busy(i)) for i in range(count if torch.cuda.is_available() else 0)]
        sent, start = link_bytes(), time.perf_counter()
        subprocess.run(
            [sys.executable, *launch, "-m", "benchmarks.devices", model, "--work", output, "--rungs", rung]
            + ["--seeds", str(seed)],
            check=True,
            env=threads,
        )
        seconds, now = time.perf_counter() - start, link_bytes()
        report = json.loads((Path(output) / "flatquant_report.json").read_text())
        config = json.loads((Path(output) / "config.json").read_text())
        steps = json.loads((Path(output) / STEPS).read_text())
    return {
        "rung": rung,
        "scheme": SCHEME,
        "seed": seed,
        "devices": count,
        "commit": commit(),
        "resumed": resumed,
        "seconds_with_start": seconds,
        "gpu_busy": [b.share for b in busy],
        "link_bytes": None if sent is None or now is None else now - sent,
        "end_to_end_steps": steps,
        "timing": report["timing"],
        "content_hash": config["quantization_config"]["content_hash"],
        "verdict": report["verdict"],
        "end_to_end": report.get("end_to_end"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help=f"what `flatquant.quantize` takes, or a shape: {', '.join(SHAPES)}")
    parser.add_argument("--blocks", type=int, help="of a shape; all by default")
    parser.add_argument("--kept", metavar="FOLDER", help="keep outputs there, and go on with what was stopped")
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
    with tempfile.TemporaryDirectory() as folder:
        if args.model in SHAPES:
            place = Path(args.kept or folder) / f"{args.model}-{args.blocks or SHAPES[args.model][-1]}"
            args.model = written(args.model, args.blocks, place)
        _rows(args, path)


def _rows(args: argparse.Namespace, path: Path) -> None:
    for seed in args.seeds:
        for rung in args.rungs:
            for count in args.counts:
                row = measured(args.model, rung, seed, count, args.kept)
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
        if later := s["end_to_end_steps"][len(s["end_to_end_steps"]) // 2 :]:
            row.setdefault("step_seconds", {})[str(s["devices"])] = statistics.median(later)
        row["hashes"][str(s["devices"])] = s["content_hash"]
        row["kl"][str(s["devices"])] = (s["verdict"] or {}).get("kl")
    for row in found.values():
        row["same_bits"] = len(set(row["hashes"].values())) == 1
    return found


if __name__ == "__main__":
    main()
