"""How large the weights of models are: the root mean square of the linears of every kind, over blocks.

    python -m benchmarks.weight_sizes MODEL ..

`EndToEndSpec.weight_lr` is relative to that.
"""

from __future__ import annotations

import argparse
import math
import re
from pathlib import Path

from torch import nn

from benchmarks.common import RESULTS, write_result
from flatquant.models import load_model


def sizes(model: nn.Module) -> dict[str, list[float]]:
    """By the name of a linear inside its block, the root mean square of its weights in every block."""
    found: dict[str, list[float]] = {}
    for name, module in model.named_modules():
        inside = re.search(r"\.\d+\.(.+)$", name)
        if inside and isinstance(module, nn.Linear):
            weight = module.weight.detach().float()
            found.setdefault(inside[1], []).append(float(weight.norm()) / math.sqrt(weight.numel()))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--out", default=str(RESULTS))
    args = parser.parse_args()
    samples = [{"model": Path(name).name, "sizes": sizes(load_model(name)[0])} for name in args.models]
    metrics = {
        s["model"]: {
            "mean": sum(map(sum, s["sizes"].values())) / sum(map(len, s["sizes"].values())),
            "kinds": {kind: sum(values) / len(values) for kind, values in s["sizes"].items()},
        }
        for s in samples
    }
    write_result(Path(args.out) / "weight-sizes.json", "weight-sizes", seeds=[], metrics=metrics, samples=samples)
    print(metrics)


if __name__ == "__main__":
    main()
