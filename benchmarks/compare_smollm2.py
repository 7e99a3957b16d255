"""Every method on SmolLM2-135M, by one protocol: perplexity, divergence, time, memory and size of every scheme.

    python -m benchmarks.compare_smollm2 --data DATA --budget 1200
    python -m benchmarks.compare_smollm2 --data DATA --share S --out A    # and once more, on another GPU, to B; then
    python -m benchmarks.compare_smollm2 --merge A B

Calibrated on wiki.valid.raw; perplexity of all of wiki.test.raw in windows of 2,048 tokens, divergence from the
original on the first eight of them; measured on the folder that a method has written, read back (`flatquant.compare`).
Jobs run one after another in one process, in the order of their weight, and a row is written the moment it exists: a
run that is cut short has lost the job it was at, and the next one goes on after it. A budget keeps jobs from starting
that would not end in time.

Recipes are the methods' own (`--preset reference`) but where a job says so in its `note`: OmniQuant's and AffineQuant's
20 to 40 epochs of single windows, 5,120 steps a block at 2 bits, become 10 epochs of four, OmniQuant's at twice the
rates; the gradients of OAC are of 32 sequences, not 128; Direct Quantization takes half its steps.

Give every process a share of the processor's cores (OMP_NUM_THREADS): several that each start a thread a core wait for
each other, and everything that is not on the GPU takes five to ten times as long.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.common import RESULTS, commit, environment, read_samples, write_result
from flatquant.compare import Bench, Settings
from flatquant.errors import FlatQuantError
from flatquant.models import load_model
from flatquant.recipes import RECIPES, recipe
from flatquant.spec import Recipe, Scheme, to_dict

NAME = "compare-smollm2"
SEED = 0


def few_epochs(made: Recipe, times: float = 1) -> Recipe:
    """A block-wise fit of single windows, over many epochs, as one of batches, at so many times its rates."""
    assert made.fit is not None
    rates = {"lr": times * made.fit.lr, "clip_lr": times * made.fit.clip_lr}
    return dataclasses.replace(made, fit=dataclasses.replace(made.fit, epochs=10, batch_size=4, **rates))


def few_sequences(made: Recipe) -> Recipe:
    """Gradients of a quarter of the text."""
    return made.tuned(samples=32)


def half_the_steps(made: Recipe) -> Recipe:
    """An end-to-end fit of half as many steps."""
    assert made.end_to_end is not None
    return dataclasses.replace(made, end_to_end=dataclasses.replace(made.end_to_end, steps=made.end_to_end.steps // 2))


# What is not the method's own recipe, and what the row says about it.
CHANGES: dict[str, tuple[Callable[[Recipe], Recipe], str]] = {
    "omniquant": (partial(few_epochs, times=2), "10 epochs in batches of 4 at twice the rates"),
    "affinequant": (few_epochs, "10 epochs in batches of 4"),  # at twice the rates, a fit at 3 bits diverges
    "oac": (few_sequences, "gradients of 32 sequences"),
    "direct": (half_the_steps, "200 steps"),
}


@dataclass(frozen=True)
class Job:
    """One row: a method, a scheme, and a guess at its seconds on an H100, evaluation included."""

    method: str
    scheme: str
    seconds: float

    @property
    def name(self) -> str:
        return f"{self.method}/{self.scheme}"

    def recipe(self) -> Recipe:
        """The method's recipe, changed where `CHANGES` says so."""
        made = recipe(self.method, self.scheme)
        return CHANGES[self.method][0](made) if self.method in CHANGES else made


def _jobs() -> list[Job]:
    """All of them: four bits everywhere first, then weights alone, the harder ones before the easier."""
    seconds = {
        "rtn": 12, "gptq": 20, "smoothquant": 16, "quarot": 24, "flattenquant": 24, "flatquant": 66, "spinquant": 60,
        "omniquant": 60, "affinequant": 70, "svdquant": 60, "oac": 80, "vptq": 90, "direct": 60, "autoround": 240,
    }  # fmt: skip
    everything = ("flatquant", "rtn", "quarot", "spinquant", "smoothquant", "gptq", "omniquant", "svdquant", "direct")
    everything += ("flattenquant", "affinequant")
    weights = ("rtn", "gptq", "flatquant", "quarot", "omniquant", "vptq", "oac", "spinquant", "direct", "affinequant")
    weights += ("svdquant", "smoothquant", "flattenquant", "autoround")
    pairs = [(method, "w4a4kv4") for method in everything]
    # A method's row at 4 bits is not far from the original's: the last of them tell least.
    for part in (weights[:7], weights[7:]):
        pairs += [(method, scheme) for scheme in ("w3a16", "w2a16", "w4a16") for method in part]
    return [Job(method, scheme, seconds[method]) for method, scheme in pairs]


JOBS = _jobs()


def tiny(made: Recipe) -> Recipe:
    """Hardly any text, steps or epochs: every part runs, nothing is measured."""
    fit, end_to_end = made.fit, made.end_to_end
    if fit is not None:
        fit = dataclasses.replace(fit, epochs=1, batch_size=2)
    if end_to_end is not None:
        end_to_end = dataclasses.replace(end_to_end, steps=2, batch_size=2)
    data = dataclasses.replace(made.data, samples=4, seqlen=32)
    return dataclasses.replace(made, fit=fit, end_to_end=end_to_end, data=data)


class Original:
    """The model, loaded once and copied for every job."""

    def __init__(self, name: str, *, blocks: int | None = None) -> None:
        """The first `blocks` of the model `name`, or all of them."""
        self.model, self.tokenizer = load_model(name)
        if blocks is not None:
            self.model.model.layers = self.model.model.layers[:blocks]
            self.model.config.num_hidden_layers = blocks
            if getattr(self.model.config, "layer_types", None):
                self.model.config.layer_types = self.model.config.layer_types[:blocks]

    def __call__(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        return copy.deepcopy(self.model), self.tokenizer


def measure(
    jobs: list[Job],
    bench: Bench,
    path: Path,
    *,
    prepare: Callable[[Recipe], Recipe] = lambda made: made,
    left: Callable[[], float] = lambda: float("inf"),
    share: Path | None = None,
    alone: bool = True,
) -> None:
    """Make the rows that `path` does not hold yet.

    Args:
        prepare: changes every recipe.
        left: seconds that remain; a job that would take longer does not start.
        share: a folder with a file for every job that this or another process took.
        alone: on its device; the times of a row count only then.
    """
    done = {s["job"] for s in read_samples(path)}
    for job in jobs:
        if job.name in done:
            continue
        if job.seconds > left():
            print(f"{job.name}: no time", flush=True)
            continue
        if share is not None and not claimed(share, job):
            continue
        made = prepare(job.recipe())
        row: dict[str, Any] = {"job": job.name, "method": job.method, "scheme": str(Scheme.parse(job.scheme))}
        row["alone"] = alone
        row["note"] = CHANGES[job.method][1] if job.method in CHANGES else ""
        start = time.perf_counter()
        try:
            row |= bench.measure(made)
        except (FlatQuantError, torch.OutOfMemoryError) as error:
            row["error"] = " ".join(str(error).split())
        row |= {"job_seconds": round(time.perf_counter() - start, 1), "seed": SEED, "commit": commit()}
        print({k: row.get(k) for k in ("job", "perplexity", "kl", "seconds", "job_seconds", "error")}, flush=True)
        samples = [*read_samples(path), row | {"recipe": to_dict(made)}]
        metrics = summary(bench.original(), samples)
        write_result(path, NAME, seeds=[SEED], metrics=metrics, samples=samples)


def claimed(share: Path, job: Job) -> bool:
    """Whether this process is the first to take a job."""
    share.mkdir(parents=True, exist_ok=True)
    try:
        (share / job.name.replace("/", "-")).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def summary(original: Any, samples: list[dict[str, Any]]) -> dict[str, Any]:
    """What the documents show."""
    return {"original": original, "rows": {s["job"]: brief(s) for s in samples}}


def brief(sample: dict[str, Any]) -> dict[str, Any]:
    """What the documents show of a row."""
    if "error" in sample:
        return {"error": sample["error"]}
    (perplexity,) = sample["perplexity"].values()
    shown = {key: sample[key] for key in ("kl", "top1", "seconds", "bits_per_weight", "note")}
    return {"perplexity": perplexity, **shown, "alone": sample["alone"]}


def merge(parts: list[Path], path: Path) -> None:
    """One file of several that were measured on devices of one kind; the order is that of `JOBS`.

    Raises:
        SystemExit: their devices, versions or originals differ.
    """
    results = [json.loads(part.read_text()) for part in parts]
    first = results[0]
    for part, result in zip(parts, results, strict=True):
        if any(result[key] != first[key] for key in ("device", "versions")):
            raise SystemExit(f"{part} was measured on another device or with other versions than {parts[0]}")
        if result["metrics"]["original"] != first["metrics"]["original"]:
            raise SystemExit(f"the original of {part} is not that of {parts[0]}")
    order = [job.name for job in JOBS]
    found = {s["job"]: s for result in results for s in result["samples"]}
    samples = sorted(found.values(), key=lambda s: order.index(s["job"]))
    joined = {**first, "metrics": summary(first["metrics"]["original"], samples), "samples": samples}
    path.write_text(json.dumps(joined, indent=1) + "\n")


def main() -> None:
    start = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", help="folder with wikitext-2-raw")
    parser.add_argument("--out", default=str(RESULTS))
    parser.add_argument("--only", nargs="*", help="METHOD, SCHEME or METHOD/SCHEME")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds for all")
    parser.add_argument("--share", type=Path, help="folder in which processes, one a GPU, say which jobs they took")
    parser.add_argument("--beside", action="store_true", help="another process is on the same GPU: no times")
    parser.add_argument("--merge", nargs="+", metavar="FOLDER", help="measure nothing; join the rows of these folders")
    parser.add_argument("--tiny", action="store_true", help="a dry run of two blocks that measures nothing")
    args = parser.parse_args()
    if args.merge:
        merge([Path(folder) / f"{NAME}.json" for folder in args.merge], Path(args.out) / f"{NAME}.json")
        return
    if not args.data:
        parser.error("--data is needed")
    asked = set(args.only or ())
    jobs = [job for job in JOBS if not asked or asked & {job.method, job.scheme, job.name}]
    if not jobs:
        raise SystemExit(f"no job of {', '.join(sorted(asked))}; methods are {', '.join(sorted(RECIPES))}")
    text = Path(args.data) / "wikitext-2-raw"
    settings = Settings(
        model=args.model,
        calibration=str(text / "wiki.valid.raw"),
        perplexity=(str(text / "wiki.test.raw"),),
        windows=2 if args.tiny else None,
        window=64 if args.tiny else 2048,
        evaluation_batch=1 if args.tiny else 8,
        seed=SEED,
    )
    print(environment(), len(jobs), "jobs", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "rows").mkdir()
        bench = Bench(settings, Path(folder), load=Original(args.model, blocks=2 if args.tiny else None))
        measure(
            jobs,
            bench,
            Path(args.out) / f"{NAME}.json",
            prepare=tiny if args.tiny else lambda made: made,
            left=lambda: args.budget - (time.perf_counter() - start),
            share=args.share,
            alone=not args.beside,
        )


if __name__ == "__main__":
    main()
