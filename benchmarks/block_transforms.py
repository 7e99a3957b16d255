"""Which transforms go with formats whose scales are for short blocks: SmolLM2-135M on a CPU.

    python -m benchmarks.block_transforms --data DATA [--learned] [--clip none]

Perplexity and divergence with nothing, with Kronecker products and with block-diagonal matrices in front of every
linear: Hadamard matrices with plain rounding, or, with --learned, the quick preset trained from them. Scales of blocks
cover them, or are searched. Samples are added to those of earlier runs on the same machine.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import time
from pathlib import Path
from typing import Literal

import torch

from benchmarks.common import RESULTS, read_samples, write_result
from flatquant import formats
from flatquant.calibrate.pipeline import calibrate
from flatquant.data import calibration_tokens, evaluation_windows
from flatquant.evaluate import divergence_from_logits, perplexity, reference_logits
from flatquant.models import load_model
from flatquant.recipes import flatquant, rtn
from flatquant.spec import DataSpec, Recipe, Scheme, Transforms, TransformSpec

NAME = "block-transforms"
SITES = ("attn_in", "attn_out", "mlp_in", "mlp_mid")
SIZES = (16, 32, 64)  # 128 does not divide the model's 576 channels


def parts(transform: str, *, learned: bool) -> Transforms:
    """`none`, `kronecker`, or `blocks of 16`."""
    if transform == "none":
        return ()
    kind, _, size = transform.partition(" of ")
    how = "inverse" if learned else "fixed"
    return (TransformSpec(kind=kind, parameters=how, init="hadamard", size=int(size or 0)),)  # type: ignore[arg-type]


def recipe_for(scheme: str, transform: str, *, learned: bool, clip: Literal["none", "search"]) -> Recipe:
    """Plain rounding behind fixed matrices, or the quick preset with these matrices in place of its own."""
    ours = parts(transform, learned=learned)
    grids = Scheme.parse(scheme, clip="none" if clip == "none" else "learned")  # which formats search in the place of
    if not learned:
        return dataclasses.replace(
            rtn(grids), transforms=dict.fromkeys(SITES, ours), data=DataSpec(samples=8, seqlen=512)
        )
    base = flatquant(grids, preset="quick")
    kept = {site: tuple(p for p in base.transforms[site] if p.kind == "diagonal") for site in SITES}
    return dataclasses.replace(base, transforms={site: (*kept[site], *ours) for site in SITES})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--learned", action="store_true")
    parser.add_argument("--clip", choices=("none", "search"), default="search", help="how scales of blocks are found")
    parser.add_argument("--schemes", default=",".join(formats.names()))
    parser.add_argument("--transforms", default="none,kronecker," + ",".join(f"blocks of {size}" for size in SIZES))
    parser.add_argument("--windows", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    model, tokenizer = load_model(args.model, dtype=torch.float32)
    text = args.data / "wikitext-2-raw"
    windows = evaluation_windows(text / "wiki.test.raw", tokenizer, seqlen=512, windows=args.windows)
    logits, path = reference_logits(model, windows), args.out / f"{NAME}.json"
    original = {"perplexity": perplexity(model, windows).value}
    for scheme in args.schemes.split(","):
        for transform in args.transforms.split(","):
            recipe = recipe_for(scheme, transform, learned=args.learned, clip=args.clip)
            data = recipe.data
            tokens = calibration_tokens(
                text / "wiki.valid.raw", tokenizer, samples=data.samples, seqlen=data.seqlen, seed=0
            )
            quantised, start = copy.deepcopy(model), time.perf_counter()
            calibrate(quantised, recipe, tokens, device=torch.device("cpu"), dtype=torch.float32)
            seconds, found = time.perf_counter() - start, divergence_from_logits(quantised, logits, windows)
            row = {
                "scheme": scheme,
                "transform": transform,
                "learned": args.learned,
                "clip": args.clip,
                "kl": found.kl,
                "top1": found.top1,
            }
            row |= {"perplexity": perplexity(quantised, windows).value, "seconds": round(seconds, 1)}
            print(row, flush=True)
            same = ("scheme", "transform", "learned", "clip")
            others = [s for s in read_samples(path) if any(s[key] != row[key] for key in same)]
            write_result(path, NAME, seeds=[0], windows=args.windows, metrics=original, samples=[*others, row])


if __name__ == "__main__":
    main()
