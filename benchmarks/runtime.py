"""The fused runtime on a GPU: parity with the model it serves, then kernels, products and whole models against bf16.

    python -m benchmarks.runtime --model smollm2-135m --data DATA --out benchmarks/results

Parity comes first, on the real SmolLM2: perplexity of WikiText-2's test text from the packed folder, served by kernels,
against the same integers in memory, computed by the references. Then what `flatquant bench` measures, of the shapes of
Llama-2-7B and Llama-3-8B, and where the time of a few of their blocks goes, kernel by kernel. Results are written after
every part.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

import flatquant
from benchmarks.common import spawned, write_result
from flatquant import bench
from flatquant.data import calibration_tokens, evaluation_windows
from flatquant.evaluate.perplexity import perplexity
from flatquant.models import load_model
from flatquant.recipes import flatquant as recipe_of
from flatquant.runtime import fused
from flatquant.spec import DataSpec

NAME = "runtime-h100"
_CUTS = 4  # ways to cut the text into windows
_BATCHES = (1, 4, 16, 64)
_CHECKS = "checks"
_PROFILED: dict[str, Any] = {"blocks": 4, "prompt": 2048, "batches": (1, 16, 64)}


def parity(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Perplexity of one quantised model, by references and by kernels, and how fast it writes.

    Two ways to sum round some activations to other integers, and every such step is chance for what follows. How far
    chance goes is seen between the references in float32 and in the model's dtype, and from window to window; the text
    is cut into windows at several places, so that the mean difference is known better than from one.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model, tokenizer = load_model(args.model, dtype=dtype)
    texts = Path(args.data) / "wikitext-2-raw"
    samples, seqlen, windows, steps = (4, 64, 3, 1) if args.tiny else (128, 2048, None, 100)
    recipe = recipe_of("w4a4kv4", preset="best")
    assert recipe.end_to_end is not None
    end = dataclasses.replace(recipe.end_to_end, steps=steps)
    recipe = dataclasses.replace(recipe, end_to_end=end, data=DataSpec(samples=samples, seqlen=seqlen))
    tokens = calibration_tokens(texts / "wiki.valid.raw", tokenizer, samples=samples, seqlen=seqlen, seed=0)
    test = evaluation_windows(texts / "wiki.test.raw", tokenizer, seqlen=seqlen, windows=windows)
    with tempfile.TemporaryDirectory() as folder:
        flatquant.quantize(
            model, recipe, tokens, output=f"{folder}/out", device=device, tokenizer=tokenizer, verdict=False
        )
        served = flatquant.load(f"{folder}/out", device=device, dtype=dtype)
        plain = {d: flatquant.load(f"{folder}/out", device=device, dtype=d) for d in (torch.float32, dtype)}
    for loaded in plain.values():
        fused.attach(loaded, ())
    if device.type != "cuda":
        fused.attach(served, ("cpu",))
    assert fused.runtime(served) is not None
    sides = {f"reference_{str(d)[6:]}": m for d, m in plain.items()} | {"kernels": served}
    text = test.flatten()
    starts = [i * seqlen // _CUTS for i in range(_CUTS)]
    cuts = [text[s : s + (len(text) - s) // seqlen * seqlen].view(-1, seqlen) for s in starts]
    measured = {side: [perplexity(m, cut, batch_size=8) for cut in cuts] for side, m in sides.items()}
    found: dict[str, Any] = {side: perplexities[0].value for side, perplexities in measured.items()}
    nll = {side: [x for p in perplexities for x in p.nll] for side, perplexities in measured.items()}
    first = next(iter(nll))
    for side in list(nll)[1:]:
        more = [a - b for a, b in zip(nll[side], nll[first], strict=True)]
        found[f"{side}_minus_{first}"] = {
            "nats": statistics.mean(more),
            "standard_error": statistics.stdev(more) / len(more) ** 0.5,
            "windows": len(more),
        }
    print(found, flush=True)
    del plain, sides
    rates = {}
    ids = test[:1, :32].to(device)
    for _ in range(2):  # the first call compiles and records
        start = time.perf_counter()
        out = served.generate(ids, max_new_tokens=args.new_tokens, min_new_tokens=args.new_tokens, do_sample=False)
        rates["generate_tokens_per_second"] = (out.shape[1] - ids.shape[1]) / (time.perf_counter() - start)
    return {**found, "end_to_end_steps": steps, **rates}


def profile(shape: str, device: torch.device, *, blocks: int, prompt: int, batches: Sequence[int]) -> dict[str, Any]:
    """Microseconds of every kernel in a prompt and in a step of decoding, and of the whole as a graph."""
    calls = _calls(shape, "kronecker", device, blocks, prompt, batches)
    return {"blocks": blocks, "prompt": prompt, **{what: _profiled(call, device) for what, call in calls}}


def _calls(
    shape: str, transform: str, device: torch.device, blocks: int, prompt: int, batches: Sequence[int]
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """A prompt, and a step of decoding after it for every batch, by name."""
    config = bench.config_of(shape, blocks)
    runtime = bench.runtime_of(bench.packed_model(config, device, transform, scheme=bench.shape_of(shape).scheme))
    ids = torch.randint(0, config.vocab_size, (1, prompt), device=device)
    yield "prefill", partial(bench.prefill, runtime, ids, runtime.new_cache(1, prompt))
    for batch in batches:
        yield f"decode {batch}", bench.decoding(runtime, batch, prompt)


@torch.no_grad()
def _compile(shape: str, transform: str, what: str) -> None:
    """Run in a process of its own: what is compiled stays in Triton's cache."""
    device = torch.device("cuda")
    if what == _CHECKS:
        scheme = bench.shape_of(shape).scheme
        model = bench.packed_model(bench.config_of(shape, 1), device, transform, scheme=scheme)
        bench.kernels_error(bench.runtime_of(model))
    else:
        dict(_calls(shape, transform, device, 1, 2048, _BATCHES))[what]()
    torch.cuda.synchronize()


def compile_all(shapes: Sequence[str], workers: int) -> None:
    """Fill Triton's cache: one after another, kernels take longer to compile than all there is to measure."""
    parts = (_CHECKS, "prefill", *(f"decode {batch}" for batch in _BATCHES))
    jobs = [(shape, transform, part) for part in parts for shape in shapes for transform in bench.TRANSFORMS]
    for problem in spawned(_compile, jobs, workers):
        if problem is not None:
            raise problem


@torch.no_grad()
def _profiled(call: Callable[[], Any], device: torch.device, repeats: int = 5) -> dict[str, Any]:
    whole = bench.measure([call], device)
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CUDA if device.type == "cuda" else activity.CPU]) as profiler:
        for _ in range(repeats):
            call()
    kernels = []
    for event in profiler.key_averages():
        total = event.device_time_total if device.type == "cuda" else event.self_cpu_time_total
        if total > 0:
            kernels.append({"kernel": event.key, "calls": event.count / repeats, "us": total / repeats})
    kernels.sort(key=lambda k: -k["us"])
    return {"graph_ms": whole.median, "kernels": kernels[:20]}


def tiny_shapes(args: argparse.Namespace) -> list[str]:
    """Those of a dry run: the ones named, or one."""
    return [shape for shape in args.shapes if bench.shape_of(shape).tiny] or ["tiny"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", default="benchmarks/results")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--parts", nargs="*", default=["parity", "sites", "products", "models", "profile"])
    parser.add_argument("--shapes", nargs="*", default=["llama-2-7b", "llama-3-8b"])
    parser.add_argument("--workers", type=int, default=min(14, os.cpu_count() or 1), help="that compile")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--name", default=NAME, help="of the results file")
    parser.add_argument("--tiny", action="store_true", help="a dry run that measures nothing")
    args = parser.parse_args()
    device = torch.device(args.device)
    rows: list[dict[str, Any]] = []
    metrics: dict[str, Any] = {"memory": {}}
    for part in args.parts:
        start = time.perf_counter()
        if part == "parity":
            metrics["parity"] = parity(args, device)
            print(metrics["parity"], flush=True)
        elif part == "profile":
            sizes = {"blocks": 2, "prompt": 16, "batches": (1,)} if args.tiny else _PROFILED
            for shape in tiny_shapes(args) if args.tiny else args.shapes:
                found = metrics.setdefault("profile", {})[shape] = profile(shape, device, **sizes)
                for what, one in ((k, v) for k, v in found.items() if isinstance(v, dict)):
                    print(shape, what, f"{one['graph_ms']:.4f} ms")
                    for kernel in one["kernels"][:12]:
                        print(f"{kernel['us']:10.1f} us {kernel['calls']:6.1f} x  {kernel['kernel'][:90]}", flush=True)
        else:
            if part == "models" and device.type == "cuda":
                compile_all(args.shapes, args.workers)
                print("compiled", round(time.perf_counter() - start, 1), "s", flush=True)
            shapes = [] if part == "sites" else tiny_shapes(args) if args.tiny else args.shapes
            for which in [[shape] for shape in shapes] or [[]]:
                made, memory = bench.run(device, (part,), which, tiny=args.tiny)
                for row in made:
                    print(row, row.ratio, flush=True)
                rows += [row.json() for row in made]
                metrics["memory"] |= memory
                write_result(Path(args.out) / f"{args.name}.json", args.name, seeds=[0], metrics=metrics, samples=rows)
        print(part, round(time.perf_counter() - start, 1), "s", flush=True)
        write_result(Path(args.out) / f"{args.name}.json", args.name, seeds=[0], metrics=metrics, samples=rows)


if __name__ == "__main__":
    main()
