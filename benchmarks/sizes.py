"""Bytes of weights, packed and in bfloat16, by shape and by what is rounded: counted from shapes, on no device.

    python -m benchmarks.sizes

The packed models are those whose speed `benchmarks.runtime` measures. Scales, factors, clips, norms and what stays in
bfloat16 are counted.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.common import RESULTS, write_result
from flatquant import bench

SHAPES = ("llama-3-8b", "llama-3-8b-head8", "llama-3-8b-ends8", "qwen3-8b", "qwen3-8b-head8", "qwen3-8b-ends8")


def counted(shape: str) -> dict[str, Any]:
    """The scheme of a shape, its bytes, and those of the same model in bfloat16."""
    config, scheme, device = bench.config_of(shape), bench.shape_of(shape).scheme, torch.device("meta")
    packed = bench.packed_model(config, device, scheme=scheme)
    with device:
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return {
        "shape": shape,
        "scheme": scheme,
        "weights": sum(t.nbytes for t in packed.state_dict().values()),
        "bf16_weights": sum(p.nbytes for p in plain.parameters()),
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES))
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    samples = [counted(shape) for shape in given.shapes]
    metrics = {s["shape"]: round(s["weights"] / s["bf16_weights"], 4) for s in samples}
    print(metrics)
    write_result(given.out / "sizes.json", "sizes", seeds=[], metrics=metrics, samples=samples)


if __name__ == "__main__":
    main()
