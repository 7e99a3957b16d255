"""Weights at 2 to 4 bits without any fit: what grids, groups, Hessians and codebooks make of them, on a CPU.

    python -m benchmarks.low_bits --data DATA

Divergence of SmolLM2-135M from the original on the first windows of the test text, with its first three blocks
quantised: a CPU takes half a minute for a block's gradients of the loss. The last rows put activations on grids of 4
bits, and no weights. Rows are written as they come; those that the file already holds are not made again.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.common import RESULTS, commit, read_samples, write_result
from flatquant import recipes
from flatquant.calibrate.pipeline import calibrate
from flatquant.data import calibration_tokens, evaluation_windows
from flatquant.evaluate import divergence_from_logits, reference_logits
from flatquant.models import load_model
from flatquant.recipes import direct, oac, rtn, vptq
from flatquant.spec import SITES, Clip, DataSpec, Recipe, Scheme, SiteBits, to_dict

NAME = "low-bits"
BLOCKS = 3


def grid(bits: int, *, symmetric: bool = True, clip: Clip = "none", group: int | None = None) -> Scheme:
    """Weights alone on a uniform grid."""
    scheme = Scheme.parse(f"w{bits}a16", clip="none")
    assert scheme.weights is not None
    weights = dataclasses.replace(scheme.weights, symmetric=symmetric, clip=clip, group_size=group)
    return dataclasses.replace(scheme, weights=weights)


def first_blocks(recipe: Recipe, blocks: int) -> Recipe:
    """The recipe for the first of so many blocks; the others stay in 16 bit."""
    off = SiteBits(weights=16, activations=16)
    kept = {f"{block}.{site}": off for block in range(BLOCKS, blocks) for site in SITES}
    return dataclasses.replace(recipe, scheme=dataclasses.replace(recipe.scheme, overrides=kept))


def quantised(model: PreTrainedModel, recipe: Recipe, tokens: Tensor) -> PreTrainedModel:
    """A copy of the model with its first blocks quantised. Blocks behind them are passed through only where needed."""
    ours = copy.deepcopy(model)
    given = tokens if recipe.needs_data else None
    if recipe.solver.hessian == "output_adaptive":
        recipe = first_blocks(recipe, len(model.model.layers))
        calibrate(ours, recipe, given, device=torch.device("cpu"), dtype=torch.float32)
        return ours
    rest = ours.model.layers[BLOCKS:]
    ours.model.layers = ours.model.layers[:BLOCKS]
    calibrate(ours, recipe, given, device=torch.device("cpu"), dtype=torch.float32)
    ours.model.layers.extend(rest)
    return ours


def gptq(scheme: Scheme) -> Recipe:
    """With the settings of the authors, but for what a variant says."""
    return recipes.gptq(scheme, authors=True)


def unfitted(recipe: Recipe) -> Recipe:
    """As its fit starts."""
    return dataclasses.replace(recipe, end_to_end=None)


def solving(recipe: Recipe, **changes: float) -> Recipe:
    """With another setting of the solver."""
    return dataclasses.replace(recipe, solver=dataclasses.replace(recipe.solver, **changes))


def ordered(recipe: Recipe, **changes: float) -> Recipe:
    """Columns of large curvature first, as codebooks have them always."""
    return solving(recipe, act_order=True, **changes)


BEST = grid(2, symmetric=False, clip="search")
# In the order of their weight.
VARIANTS: dict[str, Recipe] = {
    "w2 rtn, symmetric": rtn(grid(2)),
    "w2 gptq, symmetric": gptq(grid(2)),
    "w2 gptq, symmetric, searched": gptq(grid(2, clip="search")),
    "w2 gptq, asymmetric": gptq(grid(2, symmetric=False)),
    "w2 gptq, asymmetric, searched": gptq(BEST),
    "w2 rtn, asymmetric, searched": rtn(BEST),
    "w2 vptq": vptq("w2a16"),
    "w2 gptq, asymmetric, searched, groups of 64": gptq(grid(2, symmetric=False, clip="search", group=64)),
    "w2 oac, asymmetric, searched": oac(BEST),
    "w2 oac, asymmetric, searched, groups of 64": oac(grid(2, symmetric=False, clip="search", group=64)),
    "w2 levels, not trained": unfitted(direct("w2a16")),
    "w3 rtn, symmetric": rtn(grid(3)),
    "w3 gptq, symmetric": gptq(grid(3)),
    "w3 gptq, asymmetric, searched": gptq(grid(3, symmetric=False, clip="search")),
    "w3 oac, asymmetric, searched": oac(grid(3, symmetric=False, clip="search")),
    "w3 vptq": vptq("w3a16"),
    "w2 gptq, asymmetric, searched, ordered": ordered(gptq(BEST)),
    "w2 gptq, asymmetric, searched, ordered, damping 0.1": ordered(gptq(BEST), damping=0.1),
    "w2 oac, asymmetric, searched, ordered": ordered(oac(BEST)),
    "w4 rtn, symmetric": rtn(grid(4)),
    "w4 rtn, symmetric, searched": rtn(grid(4, clip="search")),
    "w4 gptq, symmetric": gptq(grid(4)),
    "w4 gptq, symmetric, damping 0.1": solving(gptq(grid(4)), damping=0.1),
    "w4 gptq, symmetric, ordered": ordered(gptq(grid(4))),
    "w4 gptq, symmetric, searched": gptq(grid(4, clip="search")),
    "w4 gptq, asymmetric, searched": gptq(grid(4, symmetric=False, clip="search")),
    "w4 gptq, symmetric, searched, ordered, damping 0.1": ordered(gptq(grid(4, clip="search")), damping=0.1),
    "w4 vptq": vptq("w4a16"),
    "a4 rtn": rtn("w16a4"),
    "a4 levels by channel": unfitted(direct("w16a4")),
    "a4 levels in total": unfitted(direct("w16a4", by_channel=False)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", default=str(RESULTS))
    parser.add_argument("--only", nargs="*", default=list(VARIANTS))
    parser.add_argument("--tiny", action="store_true", help="a dry run that measures nothing")
    args = parser.parse_args()
    data, seqlen, windows = DataSpec(samples=8, seqlen=256), 512, 2
    if args.tiny:
        data, seqlen, windows = DataSpec(samples=2, seqlen=32), 32, 1
    model, tokenizer = load_model(args.model, dtype=torch.float32)
    text = Path(args.data) / "wikitext-2-raw"
    tokens = calibration_tokens(text / "wiki.valid.raw", tokenizer, samples=data.samples, seqlen=data.seqlen, seed=0)
    held_out = evaluation_windows(text / "wiki.test.raw", tokenizer, seqlen=seqlen, windows=windows)
    logits = reference_logits(model, held_out)
    path = Path(args.out) / f"{NAME}.json"
    for name in args.only:
        samples = read_samples(path)
        if any(s["variant"] == name for s in samples):
            continue
        recipe = dataclasses.replace(VARIANTS[name], data=data)
        start = time.perf_counter()
        ours = quantised(model, recipe, tokens)
        seconds = time.perf_counter() - start
        divergence = divergence_from_logits(ours, logits, held_out)
        row = {"variant": name, "kl": divergence.kl, "top1": divergence.top1, "seconds": seconds}
        print(row, flush=True)
        samples.append(row | {"commit": commit(), "recipe": to_dict(recipe)})
        metrics = {s["variant"]: s["kl"] for s in samples}
        write_result(path, NAME, seeds=[0], metrics=metrics, samples=samples)


if __name__ == "__main__":
    main()
