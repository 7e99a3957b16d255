"""What each rung of accuracy costs and gives, on any model: rtn, quarot, spinquant, reference and best, by scheme.

    python -m benchmarks.ladder smollm2-135m
    python -m benchmarks.ladder ./Qwen2.5-Coder-1.5B-Instruct --texts code.jsonl --tasks all
    python -m benchmarks.ladder smollm2-135m --methods best best:end_to_end.steps=800:factors=hadamard
    python -m benchmarks.ladder smollm2-135m --prefix fp4 --schemes nvfp4 mxfp4kv4 w4g32a4 \
        --methods rtn rtn:blocks=own:clip=search best:blocks=own

A model is whatever `flatquant quantize` takes; each has a results file of its own, `PREFIX-NAME.json`. A row has
perplexity and KL divergence from the original on every text, the seconds and the peak memory of its run, the verdict,
and zero-shot scores if tasks are asked for. It is measured on the folder that was written, read back
(`flatquant.compare`), and is kept as soon as it is there: rows that a results file holds, by the same settings, are not
made again (`--again` does). A pair that a method refuses is a row that says why.

A rung may change its recipe: `:PATH=VALUE` for a field, `:factors=hadamard` for where Kronecker factors and matrices
start, `:blocks=16` for block-diagonal matrices in the place of Kronecker products, or, of a recipe without transforms,
for fixed Hadamard matrices; `blocks=own` has the size in which the scheme's weights share scales. `:clip=search` and
`:clip=none` say how formats find the scales of blocks. So one change at a time can be measured on any model.

Several processes may add to one results file, each with rows of its own. Ranks divide the rows among them:

    torchrun --nproc-per-node 8 -m benchmarks.ladder smollm2-135m

Every recipe is calibrated on its own text unless `--calibration` names one. Texts are WikiText-2's test text, documents
of C4 that calibration does not read, and files; with `--windows`, so many windows of each count for perplexity, and
with `--divergence-windows`, so many for KL divergence.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import RESULTS, commit, environment, read_samples, write_result
from benchmarks.compare_smollm2 import Original, tiny
from flatquant import distributed, formats, store
from flatquant.compare import Bench, Settings
from flatquant.errors import FlatQuantError, QualityWarning, SpecError
from flatquant.evaluate import TASKS
from flatquant.mixture import Mixture
from flatquant.models import find_device
from flatquant.recipes import RECIPES, recipe
from flatquant.spec import SITES, Recipe, Scheme, TransformSpec, from_dict, to_dict

# Rungs that are not a method by its reference preset.
PRESETS = {"reference": ("flatquant", "reference"), "best": ("flatquant", "best"), "quick": ("flatquant", "quick")}
RUNGS = ("rtn", "quarot", "spinquant", "reference", "best")
SCHEMES = ("w4a4kv4", "w4a16", "w16a16kv4")

Summary = Callable[[list[dict[str, Any]]], dict[str, Any]]


@dataclass(frozen=True)
class Job:
    """One row."""

    rung: str
    scheme: str
    seed: int

    @property
    def key(self) -> dict[str, Any]:
        """What a row is known by, besides its settings."""
        return {"rung": self.rung, "scheme": str(Scheme.parse(self.scheme)), "seed": self.seed}

    def recipe(self) -> Recipe:
        """A method by its reference preset, or one of `PRESETS`.

        Raises:
            SpecError: the method does not take the scheme.
        """
        name, *changes = self.rung.split(":")
        method, preset = PRESETS.get(name, (name, "reference"))
        return changed(recipe(method, self.scheme, preset), changes)


def changed(made: Recipe, changes: Sequence[str]) -> Recipe:
    """A recipe with other fields: `end_to_end.steps=800`, `scheme.key_offset=mean`, `factors=hadamard`, `blocks=16`.

    Raises:
        SpecError: no such field, or a value that it does not take.
    """
    data = to_dict(made)
    weights = made.scheme.weights
    for change in changes:
        path, _, text = change.partition("=")
        if path == "factors":
            for chain in data["transforms"].values():
                for transform in chain:
                    if transform["kind"] in ("kronecker", "matrix"):
                        transform["init"] = text
            continue
        if path == "blocks":
            own = weights and (weights.format.block if weights.format else weights.group_size)
            size = str(own) if text == "own" else text
            if not size.isdecimal():
                raise SpecError(f"{change!r}: name a size, or own where weights of {made.scheme} have scales by block")
            put_blocks(data, int(size))
            continue
        if path == "clip":
            for grid in (data["scheme"]["weights"], data["scheme"]["activations"]):
                if grid and grid["kind"] in formats.names():
                    grid["clip"] = text
            continue
        *outer, last = path.split(".")
        fields = data
        for name in outer:
            fields = fields.get(name) if isinstance(fields, dict) else None
        if not isinstance(fields, dict):
            raise SpecError(f"{change!r}: the recipe has no {'.'.join(outer)}")
        try:
            fields[last] = json.loads(text)
        except json.JSONDecodeError:
            fields[last] = text
    return from_dict(Recipe, data)


def put_blocks(recipe: dict[str, Any], size: int) -> None:
    """Matrices inside blocks for Kronecker products; where nothing is transformed, fixed Hadamard matrices."""
    if not recipe["transforms"]:
        fixed = TransformSpec(kind="blocks", parameters="fixed", init="hadamard", size=size)
        recipe["transforms"] = {site: [to_dict(fixed)] for site in SITES}
    for chain in recipe["transforms"].values():
        for transform in chain:
            if transform["kind"] == "kronecker":
                transform |= {"kind": "blocks", "size": size}


def measure(
    jobs: list[Job],
    base: Settings,
    load: Callable[[], Any],
    path: Path,
    *,
    again: bool = False,
    prepare: Callable[[Recipe], Recipe] = lambda made: made,
    summary: Summary | None = None,
) -> None:
    """Make the rows that `path` does not hold yet by these settings, or all of them `again`.

    Args:
        base: settings of all rows; the seed is each job's own.
        load: gives the original anew.
        prepare: changes every recipe.
        summary: of the rows; by default `summary`.
    """
    shared = measured_by(base)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "rows").mkdir()
        bench = Bench(base, Path(folder), load=load)
        for turn in distributed.turns(len(jobs)):
            job = jobs[turn]
            known = {**job.key, "settings": shared}

            def others(known: dict[str, Any] = known) -> list[dict[str, Any]]:
                return [s for s in read_samples(path) if any(s[name] != value for name, value in known.items())]

            if len(others()) < len(read_samples(path)) and not again:
                continue
            bench.settings = dataclasses.replace(base, seed=job.seed)
            with distributed.alone():
                row = {**known, **measured(bench, job, prepare), "original": bench.original(), "commit": commit()}
            shown = ("rung", "scheme", "seed", "perplexity", "divergence", "seconds", "error")
            print({name: row[name] for name in shown if name in row}, flush=True)
            with store.held(path.parent, wait=60.0):
                write(path, [*others(), row], summary)  # of the file as other processes have left it


def measured(bench: Bench, job: Job, prepare: Callable[[Recipe], Recipe]) -> dict[str, Any]:
    """A row's content, or why there is none."""
    start = time.perf_counter()
    try:
        made = prepare(job.recipe())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", QualityWarning)  # the row has the verdict
            row = bench.measure(made) | {"recipe": to_dict(made)}
    except (FlatQuantError, torch.OutOfMemoryError) as error:
        row = {"error": " ".join(str(error).split())}
        shutil.rmtree(bench.output / "models", ignore_errors=True)  # what there is of it; the next may have its name
    return row | {"row_seconds": round(time.perf_counter() - start, 1)}


def measured_by(settings: Settings) -> dict[str, Any]:
    """What must agree for rows to be compared; without folders."""
    kept = ("windows", "window", "divergence_windows", "task_limit", "samples", "seqlen")
    found = {name: getattr(settings, name) for name in kept}
    names = [Path(text).name for text in settings.perplexity]
    calibration = None if settings.calibration is None else str(Mixture.parse(settings.calibration))
    return found | {"texts": names, "tasks": list(settings.tasks), "calibration": calibration}


def write(path: Path, samples: list[dict[str, Any]], summarise: Summary | None = None) -> None:
    """The results file."""
    write_result(
        path,
        path.stem,
        seeds=sorted({s["seed"] for s in samples}),
        metrics=(summarise or summary)(samples),
        samples=samples,
    )


def summary(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds of the rows of the last settings, and the original by them."""
    settings = samples[-1]["settings"]
    same = [s for s in samples if s["settings"] == settings]
    rows: dict[str, Any] = {}
    for name in dict.fromkeys(f"{s['rung']}/{s['scheme']}" for s in same):
        runs = [s for s in same if f"{s['rung']}/{s['scheme']}" == name]
        rows[name] = brief(runs)
    return {"settings": settings, "original": samples[-1]["original"], "rows": rows}


def brief(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What the documents show of a row: means over its seeds."""
    whole = [run for run in runs if "error" not in run]
    if not whole:
        return {"error": runs[-1]["error"]}

    def mean(of: Callable[[dict[str, Any]], float]) -> float:
        return statistics.mean(of(run) for run in whole)

    texts, tasks = whole[0]["perplexity"], whole[0].get("tasks", {})
    peaks = [run["peak_bytes"] for run in whole if run["peak_bytes"] is not None]
    return {
        "seeds": [run["seed"] for run in whole],
        "calibration": whole[0]["calibration"],
        "perplexity": {text: mean(lambda run, t=text: run["perplexity"][t]) for text in texts},
        "original": {text: mean(lambda run, t=text: run["original"]["perplexity"][t]) for text in texts},
        "kl": {text: mean(lambda run, t=text: run["divergence"][t]["kl"]) for text in texts},
        "tasks": {task: mean(lambda run, t=task: run["tasks"][t]["value"]) for task in tasks},
        "verdicts": [run["verdict"]["word"] for run in whole],
        "seconds": mean(lambda run: run["seconds"]),
        "peak_bytes": max(peaks, default=None),
        "estimated_bytes": whole[0].get("estimated_bytes"),
        "bits_per_weight": whole[0]["bits_per_weight"],
    }


def add_options(parser: argparse.ArgumentParser, *, prefix: str, schemes: Sequence[str]) -> None:
    """What every benchmark of rows by rung and scheme takes; the defaults of two of them."""
    parser.add_argument("models", nargs="+", metavar="MODEL", help="hub id, local folder, GGUF file, or smollm2-135m")
    parser.add_argument("--schemes", nargs="+", default=list(schemes), metavar="SCHEME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--texts", nargs="*", default=[], metavar="FILE", help="to measure on, beside wikitext2 and c4")
    parser.add_argument("--only-texts", action="store_true", help="measure on the files alone")
    parser.add_argument("--calibration", help="instead of each recipe's own text")
    parser.add_argument("--windows", type=int, help="at most so many windows of each text; all of them by default")
    parser.add_argument("--divergence-windows", type=int, default=8)
    parser.add_argument("--seqlen", type=int, default=2048, help="tokens in a window that is measured on")
    parser.add_argument("--tasks", nargs="*", default=[], help="zero-shot tasks, or all")
    parser.add_argument("--limit", type=int, help="questions of each task; all of them by default")
    parser.add_argument("--batch", type=int, default=1, help="windows at a time")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--again", action="store_true", help="make rows that are there already")
    parser.add_argument("--out", default=str(RESULTS))
    parser.add_argument("--prefix", default=prefix, help="of results files")
    parser.add_argument("--tiny", action="store_true", help="a dry run of two blocks that measures nothing")


def run(
    parser: argparse.ArgumentParser, args: argparse.Namespace, rungs: Sequence[str], *, summary: Summary | None = None
) -> None:
    """Rows of these rungs, by what `add_options` has read."""
    jobs = [Job(rung, scheme, seed) for seed in args.seeds for scheme in args.schemes for rung in rungs]
    named = () if args.only_texts else ("wikitext2", "c4")
    settings = Settings(
        model="",  # loaded here
        calibration=args.calibration,
        perplexity=(*named, *args.texts),
        windows=2 if args.tiny else args.windows,
        window=64 if args.tiny else args.seqlen,
        divergence_windows=2 if args.tiny else args.divergence_windows,
        evaluation_batch=args.batch,
        tasks=tuple(TASKS if args.tasks == ["all"] else args.tasks),
        task_limit=args.limit,
        verdict=True,
        device=args.device,
    )
    if not settings.perplexity:
        parser.error("--only-texts needs --texts")
    print(len(jobs), "rows a model", flush=True)
    with distributed.joined(find_device(args.device)):
        for model in args.models:
            measure(
                jobs,
                settings,
                Original(model, blocks=2 if args.tiny else None),
                Path(args.out) / f"{args.prefix}-{Path(model).name.removesuffix('.gguf').lower()}.json",
                again=args.again,
                prepare=tiny if args.tiny else lambda made: made,
                summary=summary,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = ", ".join([*PRESETS, *sorted(RECIPES)])
    parser.add_argument(
        "--methods", nargs="+", default=list(RUNGS), metavar="RUNG", help=f"of {known}, with changes if any"
    )
    add_options(parser, prefix="ladder", schemes=SCHEMES)
    args = parser.parse_args()
    unknown = [rung for rung in args.methods if (name := rung.split(":")[0]) not in PRESETS and name not in RECIPES]
    if unknown:
        parser.error(f"unknown {', '.join(unknown)}; known: {known}")
    print(environment(), flush=True)
    run(parser, args, args.methods)


if __name__ == "__main__":
    main()
