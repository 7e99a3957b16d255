"""The `quick` preset against plain rounding on tiny random models of all families, at schemes where little is lost.

    python -m benchmarks.quick_families --out benchmarks/results

Random tokens to calibrate on, to hold out, and to measure on; KL divergence from the original. It measures the guard of
fits (docs/experiments.md, "A fit that ends worse than it began"): in random models transforms find no outliers.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from pathlib import Path

import torch

import flatquant
from benchmarks.common import RESULTS, write_result
from flatquant import recipes
from flatquant.ops.divergence import kl_rows

NAME = "quick-families"
SCHEMES = ("w8a8", "w4a8", "w4a16", "w3a16", "kv8")


def rows(seed: int) -> list[dict[str, object]]:
    """Rows {family, scheme, rtn, quick}: nats per token; `quick` also says what its fit was measured to be."""
    from tests.tiny_models import FAMILIES, tiny_family  # beside the package, not in it

    found = []
    for name in FAMILIES:
        model = tiny_family(name, dtype=torch.float32)
        g = torch.Generator().manual_seed(seed)
        draw = [
            torch.randint(3, model.config.vocab_size, size, generator=g) for size in ((40, 256), (4, 256), (8, 128))
        ]
        text, held_out, seen = draw
        with torch.no_grad():
            want = model(seen).logits
        for scheme in SCHEMES:
            row: dict[str, object] = {"family": name, "scheme": scheme, "seed": seed}
            for label, recipe in (("rtn", recipes.rtn(scheme)), ("quick", recipes.flatquant(scheme, preset="quick"))):
                given = {"calibration": text, "held_out": held_out} if recipe.needs_data else {}
                made = flatquant.quantize(copy.deepcopy(model), recipe, device="cpu", verdict=False, **given)
                with torch.no_grad():
                    row[label] = float(kl_rows(want, made.model(seen).logits).mean())
                if recipe.fits:
                    row["end to end"] = made.report["end_to_end"]
            found.append(row)
            print(row["family"], scheme, f"{row['rtn']:.3e} {row['quick']:.3e}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    args = parser.parse_args()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        samples = [row for seed in args.seeds for row in rows(seed)]
    ratios = [row["quick"] / row["rtn"] for row in samples]
    worse = [ratio for ratio in ratios if ratio > 1]
    metrics = {"rows": len(samples), "worse": len(worse), "worse by a tenth": sum(r > 1.1 for r in worse)}
    metrics |= {"median ratio": float(torch.tensor(ratios).median()), "largest ratio": max(ratios)}
    print(metrics)
    write_result(args.out / f"{NAME}.json", NAME, seeds=args.seeds, metrics=metrics, samples=samples)


if __name__ == "__main__":
    main()
