"""What keys that are cached less a constant cost the fused runtime: a prompt and a step of decoding, with and without.

    python -m benchmarks.key_offset --shape llama-3-8b --layers 8 --out benchmarks/results

Random weights of true shapes. Both sides are checked against the references, then timed in turn as replayed graphs.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch

from benchmarks.common import write_result
from flatquant import bench

NAME = "key-offset-h200"
SIDES = {"without": False, "with": True}


@torch.no_grad()
def measure(shape: str, layers: int, prompt: int, batches: list[int], device: torch.device) -> list[dict[str, object]]:
    """Rows {what, batch, without, with, ratio}: milliseconds of the layers and the head."""
    config = bench.config_of(shape, layers)
    models = {side: bench.packed_model(config, device, key_offset=on) for side, on in SIDES.items()}
    runtimes = {side: bench.runtime_of(model) for side, model in models.items()}
    for side, runtime in runtimes.items():
        error = max(bench.kernels_error(runtime), bench.block_error(models[side], runtime) / bench.BLOCK_ERROR)
        if error > 1:
            raise SystemExit(f"{side} an offset, the kernels are {error:.2g} times their bound from the references")
    ids = torch.randint(0, config.vocab_size, (1, prompt), device=device)
    calls = {
        ("prefill", 1): [[partial(bench.prefill, r, ids, r.new_cache(1, prompt))] for r in runtimes.values()],
        **{("decode", b): [[bench.decoding(r, b, prompt)] for r in runtimes.values()] for b in batches},
    }
    rows = []
    for (what, batch), sides in calls.items():
        times = dict(zip(SIDES, bench.in_turn(sides, device, seconds=1.0), strict=True))
        row = {"what": what, "batch": batch, "prompt": prompt} | {s: t.median for s, t in times.items()}
        rows.append(row | {"ratio": times["with"].median / times["without"].median})
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-3-8b")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    rows = measure(args.shape, args.layers, args.prompt, args.batches, torch.device(args.device))
    settings = {"shape": args.shape, "layers": args.layers, "seeds": []}
    write_result(args.out / f"{NAME}.json", NAME, **settings, rows=rows)


if __name__ == "__main__":
    main()
