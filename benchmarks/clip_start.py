"""Where learned clips should start when there is no time to train them: nothing is trained here.

    python -m benchmarks.clip_start --data DATA

Perplexity and divergence of SmolLM2-135M at W4A4KV4 for several starting shares of the range, on a CPU.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import math
from pathlib import Path

import torch

from benchmarks.common import RESULTS, write_result
from flatquant.calibrate.pipeline import calibrate
from flatquant.data import calibration_tokens, evaluation_windows
from flatquant.evaluate import divergence_from_logits, perplexity, reference_logits
from flatquant.models import load_model
from flatquant.recipes import flatquant
from flatquant.spec import DataSpec, QuantSpec

# (weights, activations and cache): share of the range that a clip starts with
SHARES = ((0.982, 0.982), (0.9, 0.982), (0.8, 0.982), (0.982, 0.9), (0.982, 0.8), (0.85, 0.85))


def _start(spec: QuantSpec | None, share: float) -> QuantSpec:
    assert spec is not None
    return dataclasses.replace(spec, clip_start=math.log(share / (1 - share)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", default=str(RESULTS))
    parser.add_argument("--windows", type=int, default=5)
    args = parser.parse_args()
    model, tokenizer = load_model(args.model, dtype=torch.float32)
    text = Path(args.data) / "wikitext-2-raw"
    tokens = calibration_tokens(text / "wiki.valid.raw", tokenizer, samples=8, seqlen=512, seed=0)
    windows = evaluation_windows(text / "wiki.test.raw", tokenizer, seqlen=512, windows=args.windows)
    logits = reference_logits(model, windows)
    samples = []
    for weights, others in SHARES:
        recipe = flatquant("w4a4kv4", preset="quick")
        scheme = dataclasses.replace(
            recipe.scheme,
            weights=_start(recipe.scheme.weights, weights),
            activations=_start(recipe.scheme.activations, others),
            keys=_start(recipe.scheme.keys, others),
            values=_start(recipe.scheme.values, others),
        )
        recipe = dataclasses.replace(recipe, scheme=scheme, end_to_end=None, data=DataSpec(samples=8, seqlen=512))
        quantised = copy.deepcopy(model)
        calibrate(quantised, recipe, tokens, device=torch.device("cpu"), dtype=torch.float32)
        divergence = divergence_from_logits(quantised, logits, windows)
        row = {"weights": weights, "others": others, "kl": divergence.kl, "top1": divergence.top1}
        samples.append({**row, "perplexity": perplexity(quantised, windows).value})
        print(samples[-1], flush=True)
    original = {"perplexity": perplexity(model, windows).value}
    write_result(Path(args.out) / "clip-start.json", "clip-start", seeds=[0], metrics=original, samples=samples)


if __name__ == "__main__":
    main()
