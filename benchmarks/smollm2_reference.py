"""SmolLM2-135M under FlatQuant's reference preset: perplexity and calibration time of every scheme, several seeds.

    python benchmarks/smollm2_reference.py --model smollm2-135m --data DATA --out benchmarks/results

One process runs one job (a configuration and a seed); several run side by side on one GPU. `--alone` times one job on
an otherwise idle device first: calibration times come from there. The text for calibration is wiki.valid.raw, for
perplexity wiki.test.raw and the C4 sample, windows of 2,048 tokens.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.common import print_result, run_jobs, write_result
from flatquant.calibrate.pipeline import calibrate
from flatquant.calibrate.state import RunState
from flatquant.data import calibration_tokens, evaluation_windows
from flatquant.evaluate.perplexity import perplexity
from flatquant.models import load_model
from flatquant.recipes import flatquant, gptq, rtn
from flatquant.spec import DataSpec, Recipe, SolverSpec, to_dict

# name -> (recipe, more solvers to run on the same fit)
CONFIGURATIONS: dict[str, Recipe] = {
    "w4a4kv4": flatquant("w4a4kv4"),
    "w4a16": flatquant("w4a16"),
    "w3a16": flatquant("w3a16"),
    "kv4": flatquant("kv4"),
    "w4a4kv4-plain-rtn": rtn("w4a4kv4"),
    "w4a16-plain-gptq": gptq("w4a16"),
    "w3a16-plain-gptq": gptq("w3a16"),
}
SEVERAL_SEEDS = ("w4a4kv4",)  # the headline; one tells enough of the others
MODULE = "benchmarks.smollm2_reference"
SOLVERS = ("rtn", "gptq")
GPTQ_TOO = ("w4a4kv4", "w4a16", "w3a16")


def job(args: argparse.Namespace) -> None:
    """One configuration, one seed: calibrate, evaluate, print a JSON line."""
    device = torch.device(args.device)
    recipe = CONFIGURATIONS[args.job]
    if args.variant:
        recipe = VARIANTS[args.variant](recipe)
    if args.tiny:
        fit = recipe.fit and dataclasses.replace(recipe.fit, epochs=1)
        recipe = dataclasses.replace(recipe, data=DataSpec(samples=4, seqlen=64), fit=fit)
    dtype = getattr(torch, args.dtype)
    model, tokenizer = load_model(args.model, dtype=torch.float16 if device.type == "cuda" else torch.float32)
    data = Path(args.data)
    tokens = calibration_tokens(
        data / "wikitext-2-raw" / "wiki.valid.raw",
        tokenizer,
        samples=recipe.data.samples,
        seqlen=recipe.data.seqlen,
        seed=args.seed,
    )
    original = copy.deepcopy(model)
    out: dict = {"configuration": args.job, "variant": args.variant, "seed": args.seed, "dtype": args.dtype}
    out["alone"] = args.alone  # whether the device had nothing else to do: only then do times mean anything
    out["recipe"] = to_dict(recipe)
    with tempfile.TemporaryDirectory() as folder:
        solvers = ["rtn", "gptq"] if args.job in GPTQ_TOO else [recipe.solver.kind]
        for solver in solvers:
            # a second solver takes the first one's fit
            kept = Path(folder) / solver
            kept.mkdir()
            for file in Path(folder, "rtn").glob("fitted-*") if solver != "rtn" else ():
                shutil.copy(file, kept)
            current = copy.deepcopy(original)
            start = time.perf_counter()
            _, report = calibrate(
                current,
                dataclasses.replace(recipe, solver=SolverSpec(kind=solver)),
                tokens,
                device=device,
                dtype=dtype,
                seed=args.seed,
                state=RunState(kept, {"solver": solver}, resume=False),
                graph=not args.eager,
            )
            seconds = time.perf_counter() - start
            current.to(device)
            out[solver] = {
                "calibration_seconds": seconds,
                "stages": report.seconds,
                "peak_memory_bytes": report.peak_memory,
                "first_losses": [b["losses"][0] if b["losses"] else None for b in report.blocks],
                "last_losses": [b["losses"][-1] if b["losses"] else None for b in report.blocks],
                "perplexity": evaluate(current, tokenizer, data, args.tiny),
            }
    print_result(out)


def evaluate(model, tokenizer, data: Path, tiny: bool) -> dict[str, float]:
    """Perplexity on WikiText-2 test and on the C4 sample."""
    seqlen, windows = (64, 2) if tiny else (2048, None)
    texts = {"wikitext2": data / "wikitext-2-raw" / "wiki.test.raw", "c4": data / "c4" / "c4-en-sample.jsonl"}
    return {
        name: perplexity(model, evaluation_windows(text, tokenizer, seqlen=seqlen, windows=windows), batch_size=8).value
        for name, text in texts.items()
    }


def _start(scale: str):
    def change(recipe: Recipe) -> Recipe:
        transforms = {
            site: tuple(dataclasses.replace(t, init=scale) if t.kind == "diagonal" else t for t in parts)
            for site, parts in recipe.transforms.items()
        }
        return dataclasses.replace(recipe, transforms=transforms)

    return change


def _parameters(recipe: Recipe) -> Recipe:
    transforms = {
        site: tuple(dataclasses.replace(t, parameters="svd") if t.kind != "diagonal" else t for t in parts)
        for site, parts in recipe.transforms.items()
    }
    return dataclasses.replace(recipe, transforms=transforms)


VARIANTS = {"second-moment": _start("second_moment"), "svd": _parameters}


def summary(results: list[dict]) -> list[dict]:
    """Mean over seeds per configuration, variant and solver."""
    groups: dict[tuple, list[dict]] = {}
    for r in results:
        for solver in SOLVERS:
            if solver in r:
                groups.setdefault((r["configuration"], r["variant"], solver), []).append(r[solver])
    rows = []
    for (configuration, variant, solver), runs in sorted(groups.items(), key=str):
        row = {"configuration": configuration, "variant": variant, "solver": solver, "seeds": len(runs)}
        for text in runs[0]["perplexity"]:
            row[text] = statistics.mean(run["perplexity"][text] for run in runs)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", default="benchmarks/results")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float16" if torch.cuda.is_available() else "float32")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--parallel", type=int, default=2, help="jobs side by side; each fills most of a GPU")
    parser.add_argument("--only", nargs="*", help="configurations to run")
    parser.add_argument("--variants", nargs="*", default=[""], help="variants of w4a4kv4 to run")
    parser.add_argument("--alone", action="store_true", help="first time w4a4kv4 alone")
    parser.add_argument("--eager", action="store_true", help="no CUDA graph")
    parser.add_argument("--tiny", action="store_true", help="a dry run that measures nothing")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--variant", default="", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        job(args)
        return
    common = ["--model", args.model, "--data", args.data, "--device", args.device, "--dtype", args.dtype]
    common += ["--tiny"] * args.tiny + ["--eager"] * args.eager
    model, tokenizer = load_model(args.model, dtype=torch.float16 if args.device == "cuda" else torch.float32)
    original = evaluate(model.to(args.device), tokenizer, Path(args.data), args.tiny)
    print("original", original, flush=True)
    del model
    results: list[dict] = []
    name = "smollm2-reference"

    def keep(result: dict) -> None:
        results.append(result)
        brief = {s: {k: round(v, 3) for k, v in result[s]["perplexity"].items()} for s in SOLVERS if s in result}
        print(result["configuration"], result["variant"], result["seed"], brief, flush=True)
        write_result(
            Path(args.out) / f"{name}.json",
            name,
            seeds=sorted({r["seed"] for r in results}),
            metrics={"original": original, "mean": summary(results)},
            samples=results,
        )

    names = args.only if args.only is not None else list(CONFIGURATIONS)
    if args.alone:
        run_jobs(MODULE, [["--job", "w4a4kv4", "--alone"]], 1, common, keep)
        r = results[0]["rtn"]
        print("alone", r["calibration_seconds"], r["stages"], r["peak_memory_bytes"], flush=True)
    wanted = [(n, v, s) for s in range(args.seeds) for v in args.variants for n in names if not v or n == "w4a4kv4"]
    wanted = [w for w in wanted if w[2] == 0 or w[0] in SEVERAL_SEEDS]
    wanted.sort(key=lambda w: w[0] != "w4a4kv4")  # the headline first, should time run out
    jobs = [["--job", n, "--variant", v, "--seed", str(s)] for n, v, s in wanted]
    run_jobs(MODULE, jobs[1:] if args.alone else jobs, args.parallel, common, keep)
    print(json.dumps(summary(results), indent=1))


if __name__ == "__main__":
    main()
