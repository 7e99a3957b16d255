"""What text an end-to-end fit should see: the same windows again and again, other windows, or variants of them.

    python -m benchmarks.calibration_text smollm2-135m --texts code.txt
    python -m benchmarks.calibration_text smollm2-135m --tiny --device cpu --out /tmp/results    # a dry run

`best` with Hadamard starts at W4A4KV4, without block-wise epochs, on `wikitext2:1,c4:3`. A variant of a window has each
token, with a probability, replaced by one that the original draws in its place. KL divergence is measured on the first
windows of texts that calibration does not read. Rows are kept as they come.
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

from benchmarks.common import RESULTS, commit, environment, read_samples, write_result
from benchmarks.compare_smollm2 import Original
from flatquant.calibrate.pipeline import calibrate
from flatquant.data import calibration_windows, evaluation_windows
from flatquant.evaluate.divergence import divergence_from_logits, reference_logits
from flatquant.evaluate.perplexity import perplexity
from flatquant.recipes import flatquant
from flatquant.recipes.flatquant import BALANCED_SCALE, SHORT_FIT_CLIPS, transforms
from flatquant.spec import Recipe, Scheme

REAL = "wikitext2:1,c4:3"
# Real windows, copies of each, the probability that a token is replaced, windows that the model writes, AdamW's steps.
ROWS: dict[str, dict[str, Any]] = {
    "384": {"real": 384},
    "1536": {"real": 1536},
    "384, 3 variants at .15": {"real": 384, "copies": 3, "rate": 0.15},
    "384, 3 variants at .3": {"real": 384, "copies": 3, "rate": 0.3},
    "384, 3 variants at .6": {"real": 384, "copies": 3, "rate": 0.6},
    "768, 768 of the model's": {"real": 768, "own": 768},
    "768, 1 variant at .3, 768 of the model's": {"real": 768, "copies": 1, "rate": 0.3, "own": 768},
}


@torch.no_grad()
def varied(model: Any, windows: torch.Tensor, rate: float, generator: torch.Generator) -> torch.Tensor:
    """Windows in which tokens are replaced by what the model draws for their place.  # int64, (N, T)"""
    out = []
    for part in windows.split(8):
        part = part.to(model.device)
        logits = model(part, use_cache=False).logits[:, :-1].float()  # (n, T - 1, V)
        noise = torch.empty_like(logits).exponential_(generator=generator).log_()
        drawn = (logits - noise).argmax(-1)
        taken = torch.rand(drawn.shape, device=part.device, generator=generator) < rate
        out.append(torch.cat([part[:, :1], torch.where(taken, drawn, part[:, 1:])], 1).cpu())
    return torch.cat(out)


def recipe(steps: int) -> Recipe:
    best = flatquant("w4a4kv4", "best")
    assert best.fit is not None
    assert best.end_to_end is not None
    return dataclasses.replace(
        best,
        scheme=Scheme.parse("w4a4kv4", clip_starts=SHORT_FIT_CLIPS),
        transforms=transforms(BALANCED_SCALE, "hadamard"),
        fit=dataclasses.replace(best.fit, epochs=0),
        end_to_end=dataclasses.replace(best.end_to_end, steps=steps),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), metavar="ROW")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--texts", nargs="*", default=[], metavar="FILE")
    parser.add_argument("--windows", type=int, default=40, help="of each text, for perplexity")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", default=str(RESULTS))
    parser.add_argument("--tiny", action="store_true", help="a dry run of two blocks that measures nothing")
    args = parser.parse_args()
    seqlen, divide = (64, 96) if args.tiny else (2048, 1)
    loaded, tokenizer = Original(args.model, blocks=2 if args.tiny else None)()
    model: Any = loaded.to(dtype=torch.float16 if args.device == "cuda" else torch.float32)
    model.to(args.device)
    texts = {
        Path(name).name: evaluation_windows(name, tokenizer, seqlen=seqlen, windows=2 if args.tiny else args.windows)
        for name in ("wikitext2", "c4", *args.texts)
    }
    says = {name: reference_logits(model, w[:8], batch_size=4) for name, w in texts.items()}
    original = {name: perplexity(model, w, batch_size=4).value for name, w in texts.items()}
    path = Path(args.out) / f"calibration-text-{Path(args.model).name.lower()}.json"
    print(environment(), original, flush=True)
    for name in args.rows:
        settings = ROWS[name]
        start = time.perf_counter()
        count = settings["real"] // divide
        windows, kept = calibration_windows(REAL, tokenizer, samples=count, seqlen=seqlen, seed=args.seed, kept=8)
        generator = torch.Generator(args.device).manual_seed(args.seed)
        parts = [windows]
        for _ in range(settings.get("copies", 0)):
            parts.append(varied(model, windows, settings["rate"], generator))
        if own := settings.get("own", 0) // divide:
            parts.append(
                calibration_windows("self", tokenizer, samples=own, seqlen=seqlen, seed=args.seed, model=model)[0]
            )
        tokens = torch.cat(parts)
        tokens = tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(args.seed))]
        text_seconds = time.perf_counter() - start
        quantised = copy.deepcopy(model).cpu()
        model.cpu()
        start = time.perf_counter()
        _, report = calibrate(
            quantised,
            recipe(2 if args.tiny else args.steps),
            tokens,
            device=torch.device(args.device),
            dtype=torch.float16 if args.device == "cuda" else torch.float32,
            seed=args.seed,
            held_out=kept,
        )
        seconds = time.perf_counter() - start
        quantised.to(args.device)
        fitted = report.end_to_end
        assert fitted is not None
        twelfth = max(1, len(fitted.losses) // 12)
        row = {
            "row": name,
            "settings": settings | {"steps": args.steps, "windows": args.windows},
            "seed": args.seed,
            "commit": commit(),
            "tokens": tokens.numel(),
            "losses": [statistics.mean(fitted.losses[i : i + twelfth]) for i in range(0, len(fitted.losses), twelfth)],
            "held_out": fitted.held_out,
            "text_seconds": text_seconds,
            "seconds": seconds,
            "stages": report.seconds,
            "peak_bytes": report.peak_memory,
            "perplexity": {n: perplexity(quantised, w, batch_size=4).value for n, w in texts.items()},
            "kl": {n: divergence_from_logits(quantised, says[n], w[:8], batch_size=4).kl for n, w in texts.items()},
        }
        del quantised
        model.to(args.device)
        print({k: row[k] for k in ("row", "losses", "held_out", "seconds", "perplexity", "kl")}, flush=True)
        samples = [*read_samples(path), row]
        seeds = sorted({s["seed"] for s in samples})
        shown = ("perplexity", "kl", "held_out", "seconds", "text_seconds")
        rows = {s["row"]: {k: s[k] for k in shown} | {"last": s["losses"][-1]} for s in samples}
        write_result(path, path.stem, seeds=seeds, metrics={"original": original, "rows": rows}, samples=samples)


if __name__ == "__main__":
    main()
