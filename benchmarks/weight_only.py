"""Weights alone, in groups: roundings of ours beside those of peers, on the same text and windows.

    python -m benchmarks.weight_only --data DATA [--only VARIANT ..] [--device cuda] [--blocks N]
    python -m benchmarks.weight_only --data DATA --peer auto-round=PYTHON --peer llm-compressor=PYTHON --bits 4 3 2

16k tokens of WikiText-2's validation text to calibrate on, ten windows of 1,024 of its test text to measure on:
perplexity, and divergence from the original. A peer runs in an environment of its own, whose Python is given; the
weights that it leaves are measured in the same process as ours. Rows are written as they come; those that the file
already holds are not made again.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import itertools
import json
import math
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.common import RESULTS, commit, read_samples, write_result
from flatquant.calibrate.pipeline import calibrate
from flatquant.data import calibration_tokens, evaluation_windows
from flatquant.models import load_model, resolve
from flatquant.recipes import gptq, rtn
from flatquant.spec import Clip, DataSpec, Recipe, RoundingSpec, Scheme, to_dict

NAME = "weight-only"


KINDS = {"symmetric": {}, "signed": {"signed_scale": True}, "asymmetric": {"symmetric": False}}


def grid(bits: int, kind: str, clip: Clip = "none", group: int = 64) -> Scheme:
    """Weights alone on a uniform grid of a kind, in groups."""
    scheme = Scheme.parse(f"w{bits}g{group}a16", clip="none")
    assert scheme.weights is not None
    return dataclasses.replace(scheme, weights=dataclasses.replace(scheme.weights, clip=clip, **KINDS[kind]))


def solving(recipe: Recipe, **changes: Any) -> Recipe:
    """With other settings of the solver."""
    return dataclasses.replace(recipe, solver=dataclasses.replace(recipe.solver, **changes))


def variants() -> dict[str, Recipe]:
    """By name, the bits first."""
    found = {}
    for bits, kind, clip in itertools.product((4, 3, 2), KINDS, ("none", "search")):
        name = f"w{bits}g64 {kind}" + ", searched" * (clip == "search")
        scheme = grid(bits, kind, clip)
        own = {f"{name} rtn": rtn(scheme)}
        for order, damping in itertools.product((False, True), (0.01, 0.1)):
            settings = ", ordered" * order + f", damping {damping}" * (damping != 0.01)
            own[f"{name} gptq{settings}"] = solving(gptq(scheme, authors=True), act_order=order, damping=damping)
        original = solving(gptq(scheme, authors=True), act_order=True, inputs="original")
        learned = {
            f"{variant}, learned in {steps} steps": solving(recipe, learned=RoundingSpec(steps=steps))
            for variant, recipe in own.items()
            for steps in (50, 200)
        }
        found |= own | {f"{name} gptq, ordered, original inputs": original} | learned
    return found


VARIANTS = variants()


def quantised(model: PreTrainedModel, recipe: Recipe, tokens: Tensor, blocks: int | None, seed: int) -> PreTrainedModel:
    """A copy of the model with all blocks quantised, or the first ones."""
    ours = copy.deepcopy(model)
    rest = ours.model.layers[blocks:] if blocks else []
    ours.model.layers = ours.model.layers[:blocks]
    given = tokens if recipe.needs_data else None
    calibrate(ours, recipe, given, device=model.device, dtype=torch.float32, seed=seed)
    ours.model.layers.extend(rest)
    return ours


@torch.no_grad()
def measured(model: PreTrainedModel, original: list[Tensor], windows: Tensor) -> dict[str, Any]:
    """Every window's mean log-likelihood and divergence from the original's logits, and what they come to."""
    nll, kl = [], []
    for ids, want in zip(windows.to(model.device), original, strict=True):
        scores = model(ids[None], use_cache=False).logits[0].float().log_softmax(-1)  # (T, V)
        want = want.to(scores.device).float().log_softmax(-1)
        nll.append(float(F.nll_loss(scores[:-1], ids[1:])))
        kl.append(float((want.exp() * (want - scores)).sum(-1).mean()))
    return {"nll": nll, "kl_windows": kl, "perplexity": math.exp(sum(nll) / len(nll)), "kl": sum(kl) / len(kl)}


@torch.no_grad()
def logits_of(model: PreTrainedModel, windows: Tensor) -> list[Tensor]:
    """float16, (T, V), by window; shifted to a maximum of 0."""
    logits = (model(ids[None], use_cache=False).logits[0].float() for ids in windows.to(model.device))
    return [(x - x.amax(-1, keepdim=True)).clamp(min=-6e4).half().cpu() for x in logits]


def peer_weights(
    peer: str, python: str, model: str, tokens: Tensor, folder: Path, bits: int, args: argparse.Namespace
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What a peer makes of the model's weights, and what it says of itself."""
    torch.save(tokens, folder / "tokens.pt")
    script = Path(__file__).with_name("weight_only_peer.py")
    options = ["--bits", bits, "--seed", args.seed, "--device", args.device, "--steps", args.peer_steps]
    options += [] if args.blocks is None else ["--blocks", args.blocks]
    command = [python, script, peer, resolve(model), folder / "tokens.pt", folder, *options]
    subprocess.run([str(part) for part in command], check=True)
    return load_file(folder / "weights.safetensors"), json.loads((folder / "peer.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", default=str(RESULTS))
    parser.add_argument("--only", nargs="*", default=None, metavar="VARIANT")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON")
    parser.add_argument("--peer-steps", type=int, default=50, help="of a peer that learns")
    parser.add_argument("--bits", type=int, nargs="*", default=[4], help="that peers round to")
    parser.add_argument("--blocks", type=int, help="quantise only the first ones; written to a file of its own")
    parser.add_argument("--windows", type=int, default=10, help="to measure on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tiny", action="store_true", help="a dry run that measures nothing")
    args = parser.parse_args()
    data, seqlen, count = DataSpec(samples=32, seqlen=512), 1024, args.windows
    if args.tiny:
        data, seqlen, count = DataSpec(samples=2, seqlen=32), 32, 1
    model, tokenizer = load_model(args.model, dtype=torch.float32, device=args.device)
    text = Path(args.data) / "wikitext-2-raw"
    tokens = calibration_tokens(
        text / "wiki.valid.raw", tokenizer, samples=data.samples, seqlen=data.seqlen, seed=args.seed
    )
    windows = evaluation_windows(text / "wiki.test.raw", tokenizer, seqlen=seqlen, windows=count)
    original = logits_of(model, windows)
    name = NAME if args.blocks is None else f"{NAME}-{args.blocks}-blocks"
    path = Path(args.out) / f"{name}.json"

    def keep(variant: str, ours: PreTrainedModel, **told: Any) -> None:
        """Measure, and add a row to the file."""
        row = {"variant": variant, "model": args.model, "seed": args.seed, "commit": commit(), **told}
        samples = [*read_samples(path), row | measured(ours, original, windows)]
        metrics = {f"{s['model']} {s['variant']}": {k: s[k] for k in ("perplexity", "kl")} for s in samples}
        seeds = sorted({s["seed"] for s in samples})
        write_result(path, name, seeds=seeds, samples=samples, metrics=metrics)
        print(f"{variant:60s} {samples[-1]['perplexity']:8.2f} {samples[-1]['kl']:.4f}", flush=True)

    def done(variant: str) -> bool:
        key = (variant, args.model, args.seed)
        return any((s["variant"], s["model"], s["seed"]) == key for s in read_samples(path))

    chosen = [*VARIANTS] if args.only is None and not args.peer else args.only or []
    if not done("original"):
        keep("original", model)
    for variant in chosen:
        if done(variant):
            continue
        recipe = dataclasses.replace(VARIANTS[variant], data=data)
        start = time.perf_counter()
        ours = quantised(model, recipe, tokens, args.blocks, args.seed)
        seconds = time.perf_counter() - start
        keep(variant, ours, recipe=to_dict(recipe), seconds=seconds)
    for peer, _, python in (given.partition("=") for given in args.peer):
        for bits in args.bits:
            variant = f"w{bits}g64 {peer}"
            if done(variant):
                continue
            with tempfile.TemporaryDirectory() as folder:
                weights, told = peer_weights(peer, python, args.model, tokens, Path(folder), bits, args)
            ours = copy.deepcopy(model)
            ours.load_state_dict(weights, strict=False)
            keep(variant, ours, peer=told, seconds=told["seconds"])


if __name__ == "__main__":
    main()
