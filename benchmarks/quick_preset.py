"""What the `quick` preset should spend a laptop's minutes on: variants of one budget, evaluated alike.

    python benchmarks/quick_preset.py --model smollm2-135m --data DATA --out benchmarks/results

Every variant sees few short windows. Cost is counted in tokens passed forward and backward (`trained_tokens`), which is
what a CPU's time is proportional to, so that a GPU can do the search.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import time
from pathlib import Path

import torch

from benchmarks.common import print_result, run_jobs, started, write_result
from flatquant.calibrate.pipeline import calibrate
from flatquant.data import calibration_tokens, evaluation_windows
from flatquant.evaluate.perplexity import perplexity
from flatquant.models import load_model
from flatquant.recipes import flatquant
from flatquant.spec import DataSpec, EndToEndSpec, FitSpec, Recipe, SolverSpec


def variant(
    *,
    start: str = "second_moment",
    kron: str = "orthogonal",
    samples: int = 24,
    seqlen: int = 512,
    epochs: int = 0,
    fit_batch: int = 2,
    fit_lr: float = 1e-2,
    steps: int = 24,
    batch: int = 2,
    lr: float = 3e-3,
    clip_lr: float = 3e-2,
    solver: str = "rtn",
    source: str = "wikitext2",
) -> tuple[Recipe, str]:
    """A recipe within the quick budget, and where its text comes from."""
    base = flatquant("w4a4kv4", preset="reference")
    return (
        dataclasses.replace(
            base,
            transforms=started(base.transforms, start, kron),
            fit=FitSpec(epochs=epochs, batch_size=fit_batch, lr=fit_lr, clip_lr=10 * fit_lr),
            end_to_end=EndToEndSpec(
                steps=steps, batch_size=batch, lr=lr, clip_lr=clip_lr, checkpoint=False, final_lr=0.1
            ),
            solver=SolverSpec(kind=solver),
            data=DataSpec(samples=samples, seqlen=seqlen),
        ),
        source,
    )


VARIANTS: dict[str, dict] = {
    "base": {},
    "steps-48": {"steps": 48, "samples": 48},
    "batch-1": {"batch": 1, "steps": 48},
    "windows-256": {"seqlen": 256, "samples": 48, "steps": 48},
    "windows-128": {"batch": 4, "seqlen": 128, "samples": 96, "steps": 48},
    "lr-6e-3": {"lr": 6e-3, "clip_lr": 6e-2},
    "lr-1e-3": {"lr": 1e-3, "clip_lr": 1e-2},
    "clip-lr-0.1": {"clip_lr": 0.1},
    "self": {"source": "self"},
    "nothing-trained": {"steps": 0},
    "gptq": {"solver": "gptq"},
    "nothing-trained-gptq": {"steps": 0, "solver": "gptq"},
    "hadamard": {"kron": "hadamard"},
    "absmax": {"start": "absmax"},
    "blockwise-2": {"epochs": 2, "steps": 12, "samples": 12},
}


def job(args: argparse.Namespace) -> None:
    """One variant, one seed."""
    settings = dict(VARIANTS[args.job])
    if args.tiny:
        settings.update(samples=4, seqlen=32, steps=min(1, settings.get("steps", 1)), batch=1, fit_batch=1)
    recipe, source = variant(**settings)
    device = torch.device(args.device)
    model, tokenizer = load_model(args.model, dtype=torch.float32)
    data = Path(args.data)
    text = source if source == "self" else data / "wikitext-2-raw" / "wiki.valid.raw"
    tokens = calibration_tokens(
        text,
        tokenizer,
        samples=recipe.data.samples,
        seqlen=recipe.data.seqlen,
        seed=args.seed,
        model=model.to(device) if source == "self" else None,
    )
    model = copy.deepcopy(model.to("cpu"))
    start = time.perf_counter()
    _, report = calibrate(model, recipe, tokens, device=device, dtype=torch.float32, seed=args.seed, graph=False)
    seconds = time.perf_counter() - start
    model.to(device)
    windows = evaluation_windows(
        data / "wikitext-2-raw" / "wiki.test.raw", tokenizer, seqlen=64 if args.tiny else 2048, windows=20
    )
    fit, end = recipe.fit, recipe.end_to_end
    assert fit is not None
    assert end is not None
    out = {
        "variant": args.job,
        "seed": args.seed,
        "settings": settings,
        "seconds": seconds,
        "stages": report.seconds,
        "trained_tokens": recipe.data.seqlen * (fit.epochs * recipe.data.samples + end.steps * end.batch_size),
        "divergence": [report.end_to_end[0], report.end_to_end[-1]] if report.end_to_end else None,
        "perplexity": perplexity(model, windows).value,
    }
    print_result(out)


def write(args: argparse.Namespace, results: list[dict]) -> None:
    """The results so far."""
    name = "quick-preset"
    by_variant: dict[str, list[float]] = {}
    for r in results:
        by_variant.setdefault(r["variant"], []).append(r["perplexity"])
    mean = {variant: sum(values) / len(values) for variant, values in sorted(by_variant.items())}
    seeds = sorted({r["seed"] for r in results})
    write_result(Path(args.out) / f"{name}.json", name, seeds=seeds, metrics={"perplexity": mean}, samples=results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", default="benchmarks/results")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--parallel", type=int, default=8)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--tiny", action="store_true", help="a dry run that measures nothing")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        job(args)
        return
    common = ["--model", args.model, "--data", args.data, "--device", args.device, *(["--tiny"] * args.tiny)]
    results: list[dict] = []

    def keep(r: dict) -> None:
        results.append(r)
        print(r["variant"], r["seed"], round(r["perplexity"], 2), r["divergence"], round(r["seconds"]), flush=True)
        write(args, results)

    jobs = [["--job", name, "--seed", str(seed)] for name in args.only or VARIANTS for seed in range(args.seeds)]
    run_jobs("benchmarks.quick_preset", jobs, args.parallel, common, keep)


if __name__ == "__main__":
    main()
