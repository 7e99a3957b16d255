"""SmolLM2-135M under FlatQuant's reference preset: perplexity and calibration time of every scheme.

    python -m benchmarks.smollm2_reference --model smollm2-135m --data DATA --out benchmarks/results

Calibrated on wiki.valid.raw, perplexity of wiki.test.raw and of the C4 sample in windows of 2,048 tokens. All runs
happen one after another in one process, so that each has the device to itself; the fit of a configuration and seed is
made once and handed from solver to solver. Results are written as they come, and added to what the file already holds.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import commit, read_samples, write_result
from flatquant.calibrate.pipeline import calibrate
from flatquant.calibrate.state import RunState
from flatquant.data import calibration_tokens, evaluation_windows
from flatquant.evaluate.perplexity import perplexity
from flatquant.models import load_model
from flatquant.recipes import flatquant, gptq, rtn
from flatquant.spec import DataSpec, Recipe, Scheme, SolverSpec, to_dict

NAME = "smollm2-reference"
CONFIGURATIONS: dict[str, Recipe] = {
    "w4a4kv4": flatquant("w4a4kv4"),
    "w4a16": flatquant("w4a16"),
    "w3a16": flatquant("w3a16"),
    "kv4": flatquant("kv4"),
    "w4a4kv4-plain": rtn("w4a4kv4"),
    "w4a16-plain": gptq("w4a16"),
    "w3a16-plain": gptq(Scheme.parse("w3a16", clip="none")),  # symmetric and whole, as the others
}
# configuration/solver, or configuration/solver/seed, in the order of their weight
RUNS = (
    *(f"w4a4kv4/{solver}/{seed}" for seed in range(3) for solver in ("rtn", "gptq")),
    "w4a16/rtn",
    "w3a16/rtn",
    "kv4/rtn",
    "w4a4kv4-plain/rtn",
    "w3a16/gptq",
    "w4a16/gptq",
    "w3a16-plain/gptq",
    "w4a16-plain/gptq",
)
TEXTS = {"wikitext2": "wikitext-2-raw/wiki.test.raw", "c4": "c4/c4-en-sample.jsonl"}


class Bench:
    """One model, its texts, and the fits that were made."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder, self.device = args, folder, torch.device(args.device)
        self.dtype = torch.float16 if self.device.type == "cuda" else torch.float32
        self.model, self.tokenizer = load_model(args.model, dtype=self.dtype)
        seqlen, windows = (64, 2) if args.tiny else (2048, None)
        self.windows = {
            name: evaluation_windows(Path(args.data) / file, self.tokenizer, seqlen=seqlen, windows=windows)
            for name, file in TEXTS.items()
        }
        self.original = self.evaluate(copy.deepcopy(self.model))

    def evaluate(self, model) -> dict[str, float]:
        """Perplexity on both texts."""
        model.to(self.device)
        return {name: perplexity(model, w, batch_size=8).value for name, w in self.windows.items()}

    def run(self, configuration: str, solver: str, seed: int) -> dict[str, Any]:
        """One result."""
        recipe = dataclasses.replace(CONFIGURATIONS[configuration], solver=SolverSpec(kind=solver))
        if self.args.tiny:
            fit = recipe.fit and dataclasses.replace(recipe.fit, epochs=1)
            recipe = dataclasses.replace(recipe, data=DataSpec(samples=4, seqlen=64), fit=fit)
        tokens = calibration_tokens(
            Path(self.args.data) / "wikitext-2-raw" / "wiki.valid.raw",
            self.tokenizer,
            samples=recipe.data.samples,
            seqlen=recipe.data.seqlen,
            seed=seed,
        )
        kept = self.folder / f"{configuration}-{seed}"
        state = RunState(kept, {"recipe": configuration, "seed": seed}, resume=True)
        fitted = any(kept.glob("fitted-*"))
        for file in kept.glob("solved-*"):  # by another solver
            file.unlink()
        model = copy.deepcopy(self.model)
        start = time.perf_counter()
        _, report = calibrate(model, recipe, tokens, device=self.device, dtype=self.dtype, seed=seed, state=state)
        seconds = time.perf_counter() - start
        return {
            "configuration": configuration,
            "solver": solver,
            "seed": seed,
            "commit": commit(),
            "recipe": to_dict(recipe),
            "fit_reused": fitted,  # its seconds are those of folding and rounding
            "calibration_seconds": seconds,
            "stages": report.seconds,
            "peak_memory_bytes": report.peak_memory,
            "first_losses": [b["losses"][0] if b["losses"] else None for b in report.blocks],
            "last_losses": [b["losses"][-1] if b["losses"] else None for b in report.blocks],
            "perplexity": self.evaluate(model),
        }


def summary(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds by configuration and solver."""
    rows = []
    for configuration, solver in dict.fromkeys((s["configuration"], s["solver"]) for s in samples):
        runs = [s for s in samples if (s["configuration"], s["solver"]) == (configuration, solver)]
        row = {"configuration": configuration, "solver": solver, "seeds": len(runs)}
        rows.append(row | {text: statistics.mean(r["perplexity"][text] for r in runs) for text in TEXTS})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", default="benchmarks/results")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="*", default=RUNS, help="configuration/solver[/seed]")
    parser.add_argument("--tiny", action="store_true", help="a dry run that measures nothing")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, Path(folder))
        print("original", bench.original, flush=True)
        path = Path(args.out) / f"{NAME}.json"
        for run in args.only:
            configuration, solver, *seed = run.split("/")
            result = bench.run(configuration, solver, int(seed[0]) if seed else 0)
            brief = {k: round(v, 3) for k, v in result["perplexity"].items()}
            print(run, brief, round(result["calibration_seconds"], 1), result["stages"], flush=True)
            samples = [*read_samples(path), result]
            write_result(
                path,
                NAME,
                seeds=sorted({s["seed"] for s in samples}),
                metrics={"original": bench.original, "mean": summary(samples)},
                samples=samples,
            )


if __name__ == "__main__":
    main()
