"""What each choice behind the `best` and `quick` presets is worth, one change at a time, several seeds, on any machine.

    OMP_NUM_THREADS=2 python -m benchmarks.ablation --data DATA --out benchmarks/results

A small version of what `best_preset.py` asks on a GPU: SmolLM2-135M at W4A4KV4, a dozen end-to-end steps of two windows
of 256 tokens; KL divergence to the original on the first windows of WikiText-2's test text and of the C4 sample.
Variants run one after another, all of them for one seed before the next; a run that is cut short goes on where it was.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.best_preset import variant
from benchmarks.common import RESULTS, commit, read_samples, write_result
from flatquant.calibrate.pipeline import calibrate
from flatquant.data import calibration_tokens, evaluation_windows
from flatquant.evaluate.divergence import divergence_from_logits, reference_logits
from flatquant.models import load_model
from flatquant.spec import DataSpec, EndToEndSpec, Recipe, to_dict

NAME = "ablation-small"
STEPS, BATCH, SEQLEN = 12, 2, 256
BASE: dict[str, Any] = {"epochs": 0, "clip_start": 1.75, "steps": STEPS, "lr": 3e-3, "clip_lr": 3e-2, "final_lr": 0.1}
VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    "weights trained, 1e-4": {"weight_lr": 1e-4},
    "weights trained, 3e-4": {"weight_lr": 3e-4},
    "scales of largest magnitudes": {"start": "absmax"},
    "Hadamard factors": {"kron": "hadamard"},
    "clips start at 0.98": {"clip_start": 4.0},
    "twice the rates": {"lr": 6e-3, "clip_lr": 6e-2},
    "GPTQ": {"solver": "gptq"},
    "cross entropy": {"objective": "cross_entropy"},
    "block-wise, 3 epochs": {"epochs": 3, "steps": 0},
    "nothing trained": {"steps": 0},
    "20 steps": {"steps": 20},
    "20 steps, Hadamard factors": {"steps": 20, "kron": "hadamard"},
    "20 steps, Hadamard factors, weights trained, 1e-4": {"steps": 20, "kron": "hadamard", "weight_lr": 1e-4},
    "asymmetric activations": {"symmetric": False},
    "OAC": {"solver": "gptq", "hessian": "output_adaptive"},
    "block-wise, 3 epochs, quantised inputs": {"epochs": 3, "steps": 0, "inputs": "quantised"},
}


def recipe_of(name: str, *, tiny: bool = False) -> Recipe:
    """A variant, of few short windows."""
    settings = BASE | VARIANTS[name]
    objective, symmetric = settings.pop("objective", "kl"), settings.pop("symmetric", True)
    hessian, inputs = settings.pop("hessian", "input_gram"), settings.pop("inputs", "original")
    made, _, _ = variant(**settings)
    end, fit, grid = made.end_to_end, made.fit, made.scheme.activations
    assert end is not None
    assert fit is not None
    assert grid is not None
    steps = min(end.steps, 1) if tiny else end.steps
    end = dataclasses.replace(end, steps=steps, batch_size=BATCH, objective=objective, eps=5e-6)
    data = DataSpec(samples=4, seqlen=32) if tiny else DataSpec(samples=max(STEPS, steps) * BATCH, seqlen=SEQLEN)
    epochs = min(fit.epochs, 1) if tiny else fit.epochs
    return dataclasses.replace(
        made,
        scheme=dataclasses.replace(made.scheme, activations=dataclasses.replace(grid, symmetric=symmetric)),
        fit=dataclasses.replace(fit, batch_size=BATCH, epochs=epochs, inputs=inputs),
        end_to_end=_or_none(end),
        solver=dataclasses.replace(made.solver, hessian=hessian),
        data=data,
    )


def _or_none(end: EndToEndSpec) -> EndToEndSpec | None:
    return end if end.steps else None


def summary(samples: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Means over seeds, and each."""
    rows: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(s["variant"] for s in samples):
        runs = [s for s in samples if s["variant"] == name]
        rows[name] = {"seeds": [r["seed"] for r in runs], "seconds": statistics.mean(r["seconds"] for r in runs)}
        for text in runs[0]["kl"]:
            each = [r["kl"][text] for r in runs]
            rows[name][text] = {"mean": statistics.mean(each), "each": each}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", default=str(RESULTS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1])
    parser.add_argument("--only", nargs="*", default=list(VARIANTS))
    parser.add_argument("--tiny", action="store_true", help="a dry run that measures nothing")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    original, tokenizer = load_model(args.model, dtype=torch.float32)
    data, path = Path(args.data), Path(args.out) / f"{NAME}.json"
    seqlen, count = (32, 1) if args.tiny else (512, 8)
    texts = {"wikitext2": data / "wikitext-2-raw" / "wiki.test.raw", "c4": data / "c4" / "c4-en-sample.jsonl"}
    windows = {n: evaluation_windows(f, tokenizer, seqlen=seqlen, windows=count) for n, f in texts.items()}
    original.to(device)
    logits = {name: reference_logits(original, w, batch_size=1) for name, w in windows.items()}
    original.to("cpu")
    for seed in args.seeds:
        for name in args.only:
            samples = read_samples(path)
            if any((s["variant"], s["seed"]) == (name, seed) for s in samples):
                continue
            recipe = recipe_of(name, tiny=args.tiny)
            tokens = calibration_tokens(
                data / "wikitext-2-raw" / "wiki.valid.raw",
                tokenizer,
                samples=recipe.data.samples,
                seqlen=recipe.data.seqlen,
                seed=seed,
            )
            model = copy.deepcopy(original)
            start = time.perf_counter()
            calibrate(model, recipe, tokens, device=device, dtype=torch.float32, seed=seed, graph=False)
            seconds = time.perf_counter() - start
            model.to(device)
            found = {t: divergence_from_logits(model, logits[t], windows[t], batch_size=1) for t in texts}
            sample: dict[str, Any] = {"variant": name, "seed": seed, "commit": commit(), "recipe": to_dict(recipe)}
            sample |= {"seconds": seconds, "kl": {t: d.kl for t, d in found.items()}}
            sample["top1"] = {t: d.top1 for t, d in found.items()}
            print(name, seed, sample["kl"], round(seconds, 1), flush=True)
            samples = [*samples, sample]
            metrics = {"rows": summary(samples), "windows": count, "window": seqlen}
            write_result(path, NAME, seeds=sorted({s["seed"] for s in samples}), metrics=metrics, samples=samples)


if __name__ == "__main__":
    main()
