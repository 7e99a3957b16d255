"""What separates QuaRot from SpinQuant at W4A4KV4: fixed clips of activations, or trained rotations?

    python -m benchmarks.rotation_clips --data DATA
    python -m benchmarks.rotation_clips --data DATA --untrained --windows 4    # fixed rotations alone, for a CPU

QuaRot cuts activations to 0.9 of their range and keys and values to 0.95; SpinQuant cuts nothing. Each is measured with
both, by the protocol of `compare_smollm2`.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, commit, read_samples, write_result
from benchmarks.compare_smollm2 import Original, tiny
from flatquant.compare import Bench, Settings
from flatquant.recipes import quarot, spinquant
from flatquant.spec import Recipe, Scheme, SolverSpec, to_dict

NAME = "rotation-clips"
WHOLE = Scheme.parse("w4a4kv4", clip="none").with_clips(weights="search")
CUT = Scheme.parse("w4a4kv4", clip="none").with_clips(weights="search", activations=0.9, cache=0.95)
VARIANTS: dict[str, Recipe] = {
    "quarot, clips": quarot(CUT),
    "quarot, no clips": quarot(WHOLE),
    "spinquant, no clips": spinquant(WHOLE),
    "spinquant, clips": spinquant(CUT),
}


def untrained(recipe: Recipe) -> Recipe:
    """Fixed rotations, plain rounding."""
    return dataclasses.replace(recipe, solver=SolverSpec(kind="rtn"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", required=True, help="folder with wikitext-2-raw")
    parser.add_argument("--out", default=str(RESULTS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--untrained", action="store_true", help="fixed rotations and plain rounding alone")
    parser.add_argument("--windows", type=int, help="of the test text; all if left out")
    parser.add_argument("--window", type=int, default=2048, help="tokens")
    parser.add_argument("--tiny", action="store_true", help="a dry run that measures nothing")
    args = parser.parse_args()
    name = f"{NAME}-untrained" if args.untrained else NAME
    path = Path(args.out) / f"{name}.json"
    variants = VARIANTS
    if args.untrained:
        variants = {v: untrained(recipe) for v, recipe in VARIANTS.items() if recipe.name == "quarot"}
    if args.tiny:
        variants = {v: tiny(recipe) for v, recipe in variants.items()}
    text = Path(args.data) / "wikitext-2-raw"
    original = Original(args.model, blocks=2 if args.tiny else None)
    for seed in args.seeds:
        settings = Settings(
            model=args.model,
            calibration=str(text / "wiki.valid.raw"),
            perplexity=(str(text / "wiki.test.raw"),),
            windows=2 if args.tiny else args.windows,
            window=64 if args.tiny else args.window,
            evaluation_batch=1 if args.tiny or args.windows else 8,
            seed=seed,
        )
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "rows").mkdir()
            bench = Bench(settings, Path(folder), load=original)
            for variant, recipe in variants.items():
                samples = read_samples(path)
                if any(s["variant"] == variant and s["seed"] == seed for s in samples):
                    continue
                row = bench.measure(recipe)
                (perplexity,) = row["perplexity"].values()
                sample: dict[str, Any] = {"variant": variant, "seed": seed, "commit": commit(), **row}
                samples.append(sample | {"perplexity": perplexity, "recipe": to_dict(recipe)})
                print(variant, seed, perplexity, row["kl"], round(row["seconds"], 1), flush=True)
                settings_of = {"windows": settings.windows, "window": settings.window}
                metrics = {**settings_of, "rows": [_brief(s) for s in samples], "original": bench.original()}
                write_result(path, name, seeds=sorted({s["seed"] for s in samples}), metrics=metrics, samples=samples)


def _brief(sample: dict[str, Any]) -> dict[str, Any]:
    return {key: sample[key] for key in ("variant", "seed", "perplexity", "kl")}


if __name__ == "__main__":
    main()
