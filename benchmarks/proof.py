"""A run as a user starts it, and what it says of itself: exit code, verdict, blame, proposal, and what that costs.

    python -m benchmarks.proof --model MODEL --name NAME --data DATA --out benchmarks/results [--propose] -- OPTIONS

The command line quantises MODEL with OPTIONS (`--preset reference`, ...) in a process of its own. With
`--propose`, a second run takes the scheme that the first one proposes. The perplexity of WikiText-2 test text follows,
which no run has seen, and with `--compare` the divergence from the original on windows of several texts. Each run is
added to `NAME.json` with its report's verdict and its seconds by stage.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import environment, read_samples, write_result
from flatquant import load
from flatquant.data import evaluation_windows
from flatquant.evaluate import divergence
from flatquant.evaluate.perplexity import perplexity
from flatquant.models import load_model, load_tokenizer
from flatquant.runtime.folder import REPORT_FILE, read_json

TEXT = "wikitext-2-raw/wiki.test.raw"
OVERHEAD = ("verdict", "texts", "blame", "held out")  # stages that only prove a run, beside preflight


def run(model: str, options: list[str], folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """One call of the command line, and what it left."""
    command = [sys.executable, "-m", "flatquant", "quantize", model, "--output", str(folder), *options]
    start = time.perf_counter()
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "FLATQUANT_DATA": args.data}, check=False
    )
    seconds = time.perf_counter() - start
    print(done.stdout, done.stderr[-4000:], f"exit {done.returncode}, {seconds:.1f} s", sep="\n", flush=True)
    sample: dict[str, Any] = {"options": options, "exit": done.returncode, "seconds": seconds}
    sample["said"] = done.stdout.replace(str(folder), "OUT")
    if not (folder / REPORT_FILE).is_file():
        return sample | {"error": done.stderr.splitlines()[-1:]}
    report = read_json(folder / REPORT_FILE)
    timing = report["timing"]
    sample |= {"verdict": report["verdict"], "timing": timing, "losses": [b.get("losses") for b in report["blocks"]]}
    quantised = load(folder, device=args.device)
    windows = evaluation_windows(
        Path(args.data) / TEXT, load_tokenizer(folder), seqlen=args.seqlen, windows=args.windows
    )
    sample["wikitext2"] = {"perplexity": perplexity(quantised, windows, batch_size=4).value, "windows": len(windows)}
    if args.compare:
        sample["texts"] = compared(model, quantised, folder, args)
    shown = ("exit", "seconds", "verdict", "timing", "wikitext2", "texts")
    print(json.dumps({k: sample[k] for k in shown if k in sample}), flush=True)
    return sample


def compared(model: str, quantised: Any, folder: Path, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """KL divergence, top-1 agreement and both perplexities on each text."""
    tokenizer = load_tokenizer(folder)
    original = load_model(model)[0].to(args.device)
    found = {}
    for text in args.compare:
        windows = evaluation_windows(text, tokenizer, seqlen=args.seqlen, windows=args.compare_windows)
        far = divergence(quantised, original, windows)
        before, after = (perplexity(m, windows, batch_size=4).value for m in (original, quantised))
        found[text] = {"kl": far.kl, "top1": far.top1, "original": before, "quantised": after, "windows": len(windows)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--name", required=True, help="of the results file")
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--windows", type=int, help="of the test text; by default all")
    parser.add_argument("--compare", nargs="*", default=[], help="texts: wikitext2, c4, files")
    parser.add_argument("--compare-windows", type=int, default=24)
    parser.add_argument("--propose", action="store_true", help="run again with the scheme that the verdict proposes")
    parser.add_argument("options", nargs="*", help="of flatquant quantize, after --")
    args = parser.parse_args()
    file = args.out / f"{args.name}.json"
    samples = read_samples(file)

    def keep(sample: dict[str, Any]) -> dict[str, Any]:
        samples.append(sample | {"commit": environment()["commit"]})
        write_result(file, args.name, seeds=[0], samples=samples, metrics=metrics(samples))
        return sample

    with tempfile.TemporaryDirectory() as scratch:
        first = keep(run(args.model, args.options, Path(scratch) / "first", args))
        proposal = (first.get("verdict") or {}).get("proposal")
        if args.propose and proposal:
            keep(run(args.model, [*args.options, "--scheme", proposal["scheme"]], Path(scratch) / "second", args))


def metrics(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the documents show of each run."""
    rows = []
    for sample in samples:
        verdict, timing = sample.get("verdict") or {}, sample.get("timing") or {}
        stages = {"preflight": (timing.get("preflight") or {}).get("seconds", 0.0), **timing.get("seconds", {})}
        spent = {stage: stages[stage] for stage in ("preflight", *OVERHEAD) if stage in stages}
        rows.append(
            {
                "options": " ".join(sample["options"]),
                "exit": sample["exit"],
                "word": verdict.get("word"),
                "kl": verdict.get("kl"),
                "blame": verdict.get("blame"),
                "proposal": verdict.get("proposal"),
                "wikitext2": (sample.get("wikitext2") or {}).get("perplexity"),
                "texts": sample.get("texts"),
                "total seconds": timing.get("total"),
                "proving seconds": spent,
            }
        )
    return rows


if __name__ == "__main__":
    main()
