"""What the `best` preset should be made of: variants of one recipe, one change at a time, evaluated alike.

    python -m benchmarks.best_preset --model smollm2-135m --data DATA --out benchmarks/results

W4A4KV4, calibrated on 128 windows of 2,048 tokens of wiki.valid.raw unless a variant says otherwise; perplexity on all
of WikiText-2's test text and on the first half of the C4 sample's documents (the second half is for calibration), KL
divergence to the original on the first 16 windows of each. Variants run one after another in one process: their seconds
are comparable. Results are written as they come.
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

from benchmarks.common import commit, read_samples, started, write_result
from flatquant.calibrate.pipeline import calibrate
from flatquant.data import calibration_tokens, evaluation_windows
from flatquant.evaluate.divergence import divergence_from_logits, reference_logits
from flatquant.evaluate.perplexity import perplexity
from flatquant.models import load_model
from flatquant.recipes import flatquant
from flatquant.spec import DataSpec, EndToEndSpec, FitSpec, Recipe, Scheme, SolverSpec, to_dict

TEXTS = ("wikitext2", "c4")
WEIGHTS = 0.19  # root mean square of SmolLM2's; the names of variants have absolute rates of learning


def halves(file: Path, folder: Path) -> tuple[Path, Path]:
    """The documents of a .jsonl file in two files, for evaluation and for calibration."""
    lines = file.read_text().splitlines(keepends=True)
    places = folder / "c4-evaluation.jsonl", folder / "c4-calibration.jsonl"
    middle = len(lines) // 2
    for place, part in zip(places, (lines[:middle], lines[middle:]), strict=True):
        place.write_text("".join(part))
    return places


def variant(
    *,
    start: str = "second_moment",
    kron: str = "orthogonal",
    clip_start: float = 4.0,
    epochs: int = 3,
    steps: int = 200,
    batch: int = 4,
    lr: float = 2e-3,
    clip_lr: float = 2e-2,
    weight_lr: float = 0.0,
    final_lr: float = 0.0,
    solver: str = "rtn",
    dtype: str = "float16",
    source: str = "wiki.valid",
    seqlen: int = 2048,
    preset: str | None = None,
) -> tuple[Recipe, str, str]:
    """A recipe, the dtype of its products, and where its text comes from."""
    if preset is not None:
        return flatquant("w4a4kv4", preset=preset), dtype, source
    base = flatquant("w4a4kv4", preset="reference")
    recipe = dataclasses.replace(
        base,
        scheme=Scheme.parse("w4a4kv4", clip_starts=(clip_start,) * 7),
        transforms=started(base.transforms, start, kron),
        fit=FitSpec(epochs=epochs, batch_size=4),
        end_to_end=EndToEndSpec(
            steps=steps,
            batch_size=batch * 2048 // seqlen,
            lr=lr,
            clip_lr=clip_lr,
            weight_lr=weight_lr / WEIGHTS,
            final_lr=final_lr,
            checkpoint=False,
        ),
        solver=SolverSpec(kind=solver),
        data=DataSpec(samples=128 * 2048 // seqlen, seqlen=seqlen),
    )
    return recipe, dtype, source


VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    "weights-1e-5": {"weight_lr": 1e-5},
    "weights-3e-5": {"weight_lr": 3e-5},
    "weights-1e-4": {"weight_lr": 1e-4},
    "weights-3e-4": {"weight_lr": 3e-4},
    "steps-96": {"steps": 96},
    "steps-400": {"steps": 400},
    "steps-400-weights-1e-4": {"steps": 400, "weight_lr": 1e-4},
    "steps-800-weights-1e-4": {"steps": 800, "weight_lr": 1e-4},
    "epochs-0-steps-400-weights-1e-4": {"epochs": 0, "clip_start": 1.75, "steps": 400, "weight_lr": 1e-4},
    "steps-400-weights-3e-4": {"steps": 400, "weight_lr": 3e-4},
    "lr-1e-3": {"lr": 1e-3, "clip_lr": 1e-2},
    "lr-4e-3": {"lr": 4e-3, "clip_lr": 4e-2},
    "bfloat16": {"dtype": "bfloat16"},
    "epochs-1": {"epochs": 1},
    "epochs-0": {"epochs": 0},
    "epochs-0-clip-0.85": {"epochs": 0, "clip_start": 1.75},
    "clip-0.85": {"clip_start": 1.75},
    "absmax": {"start": "absmax"},
    "hadamard": {"kron": "hadamard"},
    "gptq": {"solver": "gptq"},
    "windows-512": {"seqlen": 512},
    "best": {"preset": "best"},
    "best-c4": {"preset": "best", "source": "c4"},
    "best-self": {"preset": "best", "source": "self"},
}


class Bench:
    """One model, its texts, and what the original says about them."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.device = args, torch.device(args.device)
        self.model, self.tokenizer = load_model(args.model, dtype=torch.float16 if args.device == "cuda" else None)
        wikitext, c4 = Path(args.data) / "wikitext-2-raw", Path(args.data) / "c4" / "c4-en-sample.jsonl"
        evaluation, calibration = halves(c4, folder)
        self.sources = {"self": "self", "wiki.valid": wikitext / "wiki.valid.raw", "c4": calibration}
        seqlen, windows = (64, 2) if args.tiny else (2048, None)
        self.windows = {
            name: evaluation_windows(file, self.tokenizer, seqlen=seqlen, windows=windows)
            for name, file in zip(TEXTS, (wikitext / "wiki.test.raw", evaluation), strict=True)
        }
        self.model.to(self.device)
        self.logits = {name: reference_logits(self.model, w[:16], batch_size=4) for name, w in self.windows.items()}
        self.original = {name: perplexity(self.model, w, batch_size=8).value for name, w in self.windows.items()}
        self.model.to("cpu")
        self.tokens: dict[tuple, torch.Tensor] = {}

    def text(self, source: str, data: DataSpec, seed: int) -> torch.Tensor:
        """Calibration tokens; kept, since several variants read the same."""
        key = (source, data, seed)
        if key not in self.tokens:
            model = copy.deepcopy(self.model).to(self.device) if source == "self" else None
            self.tokens[key] = calibration_tokens(
                self.sources[source], self.tokenizer, samples=data.samples, seqlen=data.seqlen, seed=seed, model=model
            )
        return self.tokens[key]

    def run(self, name: str, seed: int) -> dict[str, Any]:
        """One variant, one seed."""
        recipe, dtype, source = variant(**VARIANTS[name])
        if self.args.tiny:
            recipe = tiny(recipe)
        if self.args.device == "cpu":
            dtype = "float32"
        before = time.perf_counter()
        tokens = self.text(source, recipe.data, seed)
        text_seconds = time.perf_counter() - before
        model = copy.deepcopy(self.model)
        start = time.perf_counter()
        _, report = calibrate(model, recipe, tokens, device=self.device, dtype=getattr(torch, dtype), seed=seed)
        seconds = time.perf_counter() - start
        model.to(self.device)
        out: dict[str, Any] = {
            "variant": name,
            "seed": seed,
            "commit": commit(),
            "settings": VARIANTS[name],
            "recipe": to_dict(recipe),
            "dtype": dtype,
            "calibration_seconds": seconds,
            "text_seconds": text_seconds,
            "stages": report.seconds,
            "peak_memory_bytes": report.peak_memory,
            "end_to_end": report.end_to_end,
            "last_losses": [b["losses"][-1] if b["losses"] else None for b in report.blocks],
            "perplexity": {n: perplexity(model, w, batch_size=8).value for n, w in self.windows.items()},
        }
        for text, windows in self.windows.items():
            d = divergence_from_logits(model, self.logits[text], windows[:16], batch_size=4)
            out.setdefault("kl", {})[text], out.setdefault("top1", {})[text] = d.kl, d.top1
        return out


def tiny(recipe: Recipe) -> Recipe:
    """The same in seconds; measures nothing."""
    fit, end = recipe.fit, recipe.end_to_end
    return dataclasses.replace(
        recipe,
        data=DataSpec(samples=4, seqlen=64),
        fit=fit and dataclasses.replace(fit, epochs=min(fit.epochs, 1)),
        end_to_end=end and dataclasses.replace(end, steps=min(end.steps, 2), batch_size=2),
    )


def summary(samples: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Means over seeds by variant."""
    rows: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(s["variant"] for s in samples):
        runs = [s for s in samples if s["variant"] == name]
        rows[name] = {
            "seeds": [r["seed"] for r in runs],
            **{n: statistics.mean(r["perplexity"][n] for r in runs) for n in TEXTS},
            **{f"kl-{n}": statistics.mean(r["kl"][n] for r in runs) for n in TEXTS},
            "seconds": statistics.mean(r["calibration_seconds"] for r in runs),
        }
    return rows


def search(args: argparse.Namespace, bench: Bench) -> None:
    """Run what was asked for, and write after each."""
    print("original", bench.original, flush=True)
    path = Path(args.out) / f"{args.name}.json"
    for seed in args.seeds:
        for name in args.only:
            result = bench.run(name, seed)
            kl = {n: round(v, 4) for n, v in result["kl"].items()}
            ppl = {n: round(v, 3) for n, v in result["perplexity"].items()}
            print(name, seed, ppl, kl, round(result["calibration_seconds"], 1), flush=True)
            samples = [*read_samples(path), result]
            write_result(
                path,
                args.name,
                seeds=sorted({s["seed"] for s in samples}),
                metrics={"original": bench.original, "mean": summary(samples)},
                samples=samples,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", default="benchmarks/results")
    parser.add_argument("--name", default="best-preset", help="of the results file")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--only", nargs="*", default=list(VARIANTS))
    parser.add_argument("--tiny", action="store_true", help="a dry run that measures nothing")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        search(args, Bench(args, Path(folder)))


if __name__ == "__main__":
    main()
