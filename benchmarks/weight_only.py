"""Weights alone, in groups: roundings of ours beside those of peers, on the same text and windows.

    python -m benchmarks.weight_only smollm2-135m --schemes w4g64a16 w3g64a16 --rows rtn gptq autoround best
    python -m benchmarks.weight_only ./MODEL --device cuda --dtype bfloat16 --schemes w4g64a16 \\
        --rows autoround:solver.learned.steps=800 auto-round:iters=200 --peer auto-round=PACKAGES

A row of ours is one of `ROWS`, with changes of its recipe if any (`benchmarks.ladder`). One of a peer is its name, with
changes of its settings if any; PACKAGES is a folder with the peer's packages for this Python, or another Python that
has them. What it leaves is measured in the same process as ours.

Every row rounds the same weights and is calibrated on the same 16k tokens of WikiText-2's validation text, but those of
`OWN_TEXT`, which read their recipe's own. Measured: perplexity, and divergence from the original, on ten windows of
1,024 of WikiText-2's test text and as many of C4. Rows are written as they come, several processes may add to one file,
and rows that it holds are not made again.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import fcntl
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.common import RESULTS, commit, read_samples, write_result
from benchmarks.compare_smollm2 import tiny
from benchmarks.ladder import changed
from flatquant.calibrate.pipeline import calibrate
from flatquant.data import calibration_tokens, evaluation_windows
from flatquant.models import load_model, resolve
from flatquant.recipes import recipe
from flatquant.spec import DataSpec, Recipe, Scheme, to_dict

TEXTS = ("wikitext2", "c4")
DATA = DataSpec(samples=32, seqlen=512)
PEERS = ("auto-round", "llm-compressor")
# Without transforms a fit leaves ordinary integers, as roundings do.
NO_TRANSFORMS = ("transforms={}", "fit=null")
ASYMMETRIC = ("scheme.weights.symmetric=false", "scheme.weights.signed_scale=false")
FEW_TOKENS = ("end_to_end.steps=200", "end_to_end.batch_size=8")
# Method, preset, and changes.
ROWS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "rtn": ("rtn", "reference", ()),
    "gptq": ("gptq", "reference", ()),
    "autoround": ("autoround", "reference", ()),
    "autoround-best": ("autoround", "best", ()),
    "best": ("flatquant", "best", ()),
    "distilled": ("flatquant", "best", NO_TRANSFORMS),
    "distilled-16k": ("flatquant", "best", (*NO_TRANSFORMS, *FEW_TOKENS)),
}
ROWS |= {f"{name}-asymmetric": (method, preset, (*own, *ASYMMETRIC)) for name, (method, preset, own) in ROWS.items()}
OWN_TEXT = ("best", "autoround-best", "distilled", "best-asymmetric", "distilled-asymmetric")


def made(row: str, scheme: str) -> Recipe:
    """The recipe of a row of ours.

    Raises:
        SpecError: the method does not take the scheme, or has no such field.
    """
    name, *changes = row.split(":")
    method, preset, own = ROWS[name]
    found = recipe(method, scheme, preset)
    if name not in OWN_TEXT:
        found = dataclasses.replace(found, data=DATA)
    return changed(found, (*own, *changes))


def quantised(
    model: PreTrainedModel, found: Recipe, tokens: Tensor | None, dtype: torch.dtype, blocks: int | None, seed: int
) -> PreTrainedModel:
    """A copy of the model with all blocks quantised, or the first ones."""
    ours = copy.deepcopy(model)
    rest = ours.model.layers[blocks:] if blocks else []
    ours.model.layers = ours.model.layers[:blocks]
    calibrate(ours, found, tokens, device=model.device, dtype=dtype, seed=seed)
    ours.model.layers.extend(rest)
    return ours


class Windows:
    """A text to measure on, and what the original says of it."""

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, ids: Tensor) -> None:
        """`ids` are int64, (N, T)."""
        self.ids = ids.to(model.device)
        logits = (model(row[None], use_cache=False).logits[0].float() for row in self.ids)
        self.original = [(x - x.amax(-1, keepdim=True)).clamp(min=-6e4).half() for x in logits]  # (T, V) each

    @torch.no_grad()
    def measured(self, model: PreTrainedModel) -> dict[str, Any]:
        """Every window's mean log-likelihood and divergence from the original, and what they come to."""
        nll, kl = [], []
        for ids, logits in zip(self.ids, self.original, strict=True):
            scores = model(ids[None], use_cache=False).logits[0].float().log_softmax(-1)  # (T, V)
            want = logits.float().log_softmax(-1)
            nll.append(float(F.nll_loss(scores[:-1], ids[1:])))
            kl.append(float((want.exp() * (want - scores)).sum(-1).mean()))
        return {"nll": nll, "kl_windows": kl, "perplexity": math.exp(sum(nll) / len(nll)), "kl": sum(kl) / len(kl)}


def of_peer(
    row: str, scheme: str, tokens: Tensor, where: Path, args: argparse.Namespace
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What a peer makes of the model's weights, and what it says of itself."""
    name, *changes = row.split(":")
    weights = Scheme.parse(scheme).weights
    assert weights is not None
    environ, python = dict(os.environ), where
    if where.is_dir():
        environ["PYTHONPATH"], python = str(where), Path(sys.executable)
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        torch.save(tokens, folder / "tokens.pt")
        script = Path(__file__).with_name("weight_only_peer.py")
        options = ["--bits", weights.bits, "--group", weights.group_size, "--seed", args.seed, "--device", args.device]
        options += [] if args.blocks is None else ["--blocks", args.blocks]
        command = [python, script, name, resolve(args.model), folder / "tokens.pt", folder, *options, "--set", *changes]
        subprocess.run([str(part) for part in command], check=True, env=environ)
        return load_file(folder / "weights.safetensors"), json.loads((folder / "peer.json").read_text())


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """One process at a time."""
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


class Bench:
    """The model, the texts, and the file of results."""

    def __init__(self, args: argparse.Namespace) -> None:
        """Load the model, and see what it says of the texts."""
        self.args = args
        self.model, self.tokenizer = load_model(args.model, dtype=torch.float32, device=args.device)
        length, count = (32, 1) if args.tiny else (1024, args.windows)
        self.texts = {
            text: Windows(self.model, evaluation_windows(text, self.tokenizer, seqlen=length, windows=count))
            for text in TEXTS
        }
        blocks = "" if args.blocks is None else f"-{args.blocks}-blocks"
        out = Path(args.out)
        out.mkdir(parents=True, exist_ok=True)
        self.path = out / f"weight-only-{Path(args.model).name.removesuffix('.gguf').lower()}{blocks}.json"

    def text(self, data: DataSpec, *, own: bool) -> Tensor:
        """Calibration windows: the 16k tokens, or a recipe's own."""
        if own:
            source: str | Path = data.text
        else:
            source = Path(os.environ["FLATQUANT_DATA"]) / "wikitext-2-raw" / "wiki.valid.raw"
        seed = self.args.seed
        return calibration_tokens(source, self.tokenizer, samples=data.samples, seqlen=data.seqlen, seed=seed)

    def __call__(self, row: str, scheme: str) -> None:
        """Make a row, unless the file holds it."""
        key = {"row": row, "scheme": scheme, "model": Path(self.args.model).name, "seed": self.args.seed}
        if any(all(s[k] == v for k, v in key.items()) for s in read_samples(self.path)):
            return
        model, told = self.made(row, scheme)
        new = {**key, **told, **{text: windows.measured(model) for text, windows in self.texts.items()}}
        with alone(self.path.parent):
            samples = [*read_samples(self.path), {**new, "commit": commit()}]
            brief = ("perplexity", "kl")
            metrics = {
                f"{s['row']} {s['scheme']} seed {s['seed']}": {text: {k: s[text][k] for k in brief} for text in TEXTS}
                for s in samples
            }
            seeds = sorted({s["seed"] for s in samples})
            write_result(self.path, self.path.stem, seeds=seeds, metrics=metrics, samples=samples)
        shown = "".join(f" {new[text]['perplexity']:9.2f} {new[text]['kl']:.4f}" for text in TEXTS)
        print(f"{row:45s} {scheme:9s}{shown} {told.get('seconds', 0):8.1f} s", flush=True)

    def made(self, row: str, scheme: str) -> tuple[PreTrainedModel, dict[str, Any]]:
        """The model as a row leaves it, and what is to be said of the row."""
        args, name = self.args, row.split(":")[0]
        if row == "original":
            return self.model, {}
        if name in PEERS:
            weights, told = of_peer(row, scheme, self.text(self.data(DATA), own=False), Path(args.peer[name]), args)
            ours = copy.deepcopy(self.model)
            ours.load_state_dict(weights, strict=False)
            return ours, {"peer": told, "seconds": told["seconds"]}
        found = made(row, scheme)
        if args.tiny:
            found = tiny(found)
        tokens = self.text(self.data(found.data), own=name in OWN_TEXT) if found.needs_data else None
        start = time.perf_counter()
        ours = quantised(self.model, found, tokens, getattr(torch, args.dtype), args.blocks, args.seed)
        return ours, {"recipe": to_dict(found), "dtype": args.dtype, "seconds": time.perf_counter() - start}

    def data(self, data: DataSpec) -> DataSpec:
        """How much text."""
        return dataclasses.replace(data, samples=4, seqlen=32) if self.args.tiny else data


def collect(paths: list[Path], out: Path) -> None:
    """Put the rows of files of one model into one file; of a row that several have, the last."""
    results = [json.loads(path.read_text()) for path in paths]
    key = ("row", "scheme", "model", "seed")
    samples = {tuple(s[k] for k in key): s for result in results for s in result["samples"]}
    metrics = {name: value for result in results for name, value in result["metrics"].items()}
    seeds = sorted({s["seed"] for s in samples.values()})
    whole = results[-1] | {"seeds": seeds, "metrics": metrics, "samples": [*samples.values()]}
    (out / paths[-1].name).write_text(json.dumps(whole, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="hub id, local folder, GGUF file, or smollm2-135m")
    parser.add_argument("--schemes", nargs="+", default=["w4g64a16"], metavar="SCHEME")
    parser.add_argument("--rows", nargs="+", default=["rtn", "gptq", "autoround"], metavar="ROW")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PACKAGES")
    parser.add_argument("--blocks", type=int, help="round only the first ones; written to a file of its own")
    parser.add_argument("--windows", type=int, default=10, help="of each text, to measure on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", help="of our fits' matrix products")
    parser.add_argument("--out", default=str(RESULTS))
    parser.add_argument("--collect", nargs="+", type=Path, metavar="FILE", help="only put the rows of these into OUT")
    parser.add_argument("--tiny", action="store_true", help="a dry run that measures nothing")
    args = parser.parse_args()
    args.peer = dict(given.split("=", 1) for given in args.peer)
    if args.collect:
        collect(args.collect, Path(args.out))
        return
    for row in args.rows:
        name = row.split(":")[0]
        if name not in (*ROWS, *PEERS):
            parser.error(f"unknown row {name}; known: {', '.join((*ROWS, *PEERS))}")
        if name in PEERS and name not in args.peer:
            parser.error(f"{name} needs --peer {name}=PACKAGES")
    bench = Bench(args)
    bench("original", "-")
    for scheme in args.schemes:
        for row in args.rows:
            try:
                bench(row, scheme)
            except (RuntimeError, subprocess.CalledProcessError) as error:  # the rows after it are made all the same
                print(f"{row} {scheme} failed: {error}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
