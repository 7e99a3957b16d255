"""What calibration costs: time by stage, memory against its estimate, growth with size, and the same bits every time.

    python -m benchmarks.calibration --model smollm2-135m --data DATA --out benchmarks/results
    python -m benchmarks.calibration --model smollm2-135m --data DATA --out /tmp/results --tiny    # a dry run on a CPU

All parts run one after another in one process. Results are written as they come, and added to what the file already
holds; a part that fails is named, and the others go on. Models of other shapes than SmolLM2's have random weights with
planted outliers and a small vocabulary; they are run for few epochs, and what the whole preset would take is
extrapolated linearly from the last epoch (`extrapolated`, never in `measured`).
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import gc
import hashlib
import json
import math
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.common import commit, read_samples, write_result
from flatquant import api
from flatquant.calibrate.memory import Estimate, Limits, estimate
from flatquant.calibrate.optimise import EAGER_STEPS, Optimiser
from flatquant.calibrate.pipeline import calibrate
from flatquant.calibrate.state import RunState, fingerprint
from flatquant.data import calibration_tokens
from flatquant.models import load_model, load_tokenizer, resolve
from flatquant.recipes import flatquant
from flatquant.spec import DataSpec, FitSpec, Recipe, SolverSpec
from flatquant.wiring.arch import Geometry
from flatquant.wiring.archs import arch_of
from flatquant.wiring.plan import make_plan

NAME = "calibration-h100"
VENDOR_FLOPS = {"H100": 989e12, "H200": 989e12}  # dense half-precision products, from the data sheets
REFERENCE = flatquant("w4a4kv4")
EPOCHS = REFERENCE.fit.epochs if REFERENCE.fit else 0
# hidden, intermediate, heads, heads of keys and values, blocks of the whole model
LLAMA_8B = (4096, 14336, 32, 8, 32)
LLAMA_70B = (8192, 28672, 64, 8, 80)
TINY = (64, 160, 4, 2, 4)
VOCABULARY = 8192


class Killed(Exception):
    """Raised to stop a run that will be resumed."""


# ------------------------------------------------------------------------------------------------ instruments


class Busy:
    """Share of time in which a GPU runs a kernel, as its driver samples it; None where there is no `nvidia-smi`."""

    def __init__(self, index: int = 0) -> None:
        self.index = index

    def __enter__(self) -> Busy:
        self.values: list[float] = []
        self.process: subprocess.Popen[str] | None = None
        if torch.cuda.is_available() and shutil.which("nvidia-smi"):
            query = [
                "nvidia-smi",
                "--query-gpu=utilization.gpu",
                "--format=csv,noheader,nounits",
                "-lms",
                "200",
                "-i",
                str(self.index),
            ]
            self.process = subprocess.Popen(query, stdout=subprocess.PIPE, text=True)
            threading.Thread(target=self._read, daemon=True).start()
        return self

    def _read(self) -> None:
        assert self.process is not None
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with contextlib.suppress(ValueError):  # "[N/A]"
                self.values.append(float(line))

    def __exit__(self, *_: object) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait()

    @property
    def share(self) -> float | None:
        """Mean of the samples so far."""
        return statistics.mean(self.values) / 100 if self.values else None


def host_bytes(field: str) -> int | None:
    """Of this process: VmRSS, now, or VmHWM, at most since `forget_host_peak`."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1]) * 1024
    return None


def forget_host_peak() -> bool:
    """Make VmHWM start anew; whether the kernel let us."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def product_rate(device: torch.device, n: int, seconds: float = 0.5) -> float:
    """Operations a second of half-precision products of n x n matrices: what can be had of the vendor's figure."""
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    a = torch.randn(n, n, device=device, dtype=dtype)
    done, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        for _ in range(5):
            torch.mm(a, a)
        if device.type == "cuda":
            torch.cuda.synchronize()
        done += 5
    return done * 2 * n**3 / (time.perf_counter() - start)


def fit_operations(model: Any, recipe: Recipe) -> dict[str, float]:
    """Multiplications and additions of the reference fit's products, from shapes: of a token and of a step, per block.

    Linears and attention once forward and twice backward (weights are functions of what is fitted); the Kronecker
    products likewise, of activations a token and of weights a step. Causal attention counts half of its square.
    """
    c = model.config
    arch = arch_of(c, model)
    plan = make_plan(recipe, arch, Geometry.of(c), model.model.layers).blocks[0]
    token = step = 0.0
    for site in plan.sites.values():
        n1, n2 = site.shape
        rows = sum(model.model.layers[0].get_submodule(path).out_features for path in site.readers)
        token += 3 * 2 * n1 * n2 * (rows + n1 + n2)
        step += 3 * 2 * rows * n1 * n2 * (n1 + n2)
    width = c.num_attention_heads * (getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads)
    token += 3 * 2 * 2 * (recipe.data.seqlen / 2) * width
    return {"token": token, "step": step}


# ------------------------------------------------------------------------------------------------ models and runs


def random_llama(
    shape: tuple[int, ...],
    blocks: int,
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
    vocabulary: int | None = None,
    key_bias: float = 0,
) -> Any:
    """A model of these shapes in host memory: normal weights, norms with a few large channels, as in real models.

    With a `key_bias`, linears of attention have biases; those of keys are this large in every eighth channel, all
    others are 0.
    """
    hidden, intermediate, heads, kv_heads, _ = shape
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden // heads,
        num_hidden_layers=blocks,
        vocab_size=vocabulary or min(VOCABULARY, 128 * hidden),
        attention_bias=key_bias != 0,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        dtype=dtype,
    )
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    model = model.to(dtype=dtype)
    generator = torch.Generator(device).manual_seed(seed)
    for path, module in model.named_modules():
        for name, p in module.named_parameters(recurse=False):
            value = torch.randn(p.shape, generator=generator, device=device, dtype=torch.float32)
            if name == "bias":
                value.zero_()
                if path.endswith("k_proj"):
                    value[::8] = key_bias
            elif p.ndim == 1:
                value = 1 + 0.2 * value
                value[:: max(1, hidden // 4)] *= 20  # planted outliers
            else:
                value *= p.shape[1] ** -0.5
                if path.endswith("up_proj"):
                    value[:: max(1, intermediate // 4)] *= 10
            setattr(module, name, nn.Parameter(value.to(dtype).cpu(), requires_grad=False))
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config=config)
    return model.eval()


def random_tokens(model: Any, data: DataSpec) -> torch.Tensor:
    """Token ids without meaning."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, model.config.vocab_size, (data.samples, data.seqlen), generator=generator)


def plain_layout(model: Any, recipe: Recipe, device: torch.device, dtype: torch.dtype, **options: Any) -> Estimate:
    """The layout of a run without limits."""
    plan = make_plan(recipe, arch_of(model.config, model), Geometry.of(model.config), model.model.layers)
    options = {"limits": Limits(device=1 << 60, host=1 << 60), **options}
    shape = (recipe.data.samples, recipe.data.seqlen)
    return estimate(model, plan, recipe, shape=shape, device=device, dtype=dtype, **options)


class StepProfile:
    """Kernels and launches of a few recorded steps of a fit: the last of the first blocks that are fitted."""

    STEPS = 6

    def __init__(self, device: torch.device, side_by_side: int) -> None:
        self.device, self.calls = device, self.STEPS * side_by_side
        self.start = 0.0
        self.found: dict[str, Any] = {}

    def __enter__(self) -> StepProfile:
        self.real, self.seen = Optimiser.step, 0
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        profiler = torch.profiler.profile(activities=activities)
        skipped = 2 * (EAGER_STEPS + 1) * self.calls // self.STEPS  # eager steps, the recording, and some replays

        def step(optimiser: Optimiser, *batch: torch.Tensor) -> torch.Tensor:
            if self.seen == skipped:
                self._wait()
                profiler.start()
                self.start = time.perf_counter()
            loss = self.real(optimiser, *batch)
            self.seen += 1
            if self.seen == skipped + self.calls:
                self._wait()
                seconds = time.perf_counter() - self.start
                profiler.stop()
                with tempfile.NamedTemporaryFile(suffix=".json") as file:
                    profiler.export_chrome_trace(file.name)
                    self.found = self._read(json.loads(Path(file.name).read_text())["traceEvents"], seconds)
            return loss

        Optimiser.step = step
        return self

    def __exit__(self, *_: object) -> None:
        Optimiser.step = self.real

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _read(self, events: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
        kernels = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
        launches = [e["dur"] for e in events if e.get("cat") == "cuda_runtime" and e["name"] == "cudaGraphLaunch"]
        busy, end = 0.0, 0.0
        for e in sorted(kernels, key=lambda e: e["ts"]):
            busy += max(0.0, e["ts"] + e["dur"] - max(end, e["ts"]))
            end = max(end, e["ts"] + e["dur"])
        by_name: dict[str, list[float]] = {}
        for e in kernels:
            by_name.setdefault(e["name"][:110], []).append(e["dur"])
        largest = sorted(by_name.items(), key=lambda kv: -sum(kv[1]))[:40]
        return {
            "milliseconds": seconds * 1e3 / self.calls,  # of a step of a block, the profiler's own time included
            "kernels": len(kernels) / self.calls,
            "kernel_milliseconds": sum(e["dur"] for e in kernels) / 1e3 / self.calls,
            "busy_milliseconds": busy / 1e3 / self.calls,
            "short_kernels": sum(e["dur"] < 4 for e in kernels) / self.calls,  # microseconds
            "graph_launches": len(launches) / self.calls,
            "graph_launch_milliseconds": sum(launches) / 1e3 / self.calls,
            "largest": [[name, len(d) / self.calls, sum(d) / 1e3 / self.calls] for name, d in largest],
        }


class Epochs:
    """Seconds of every epoch of a fit: the fit waits for the device after each."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.start = time.perf_counter()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage == "fit":
            self.ends.append(time.perf_counter())

    def last(self, epochs: int) -> list[float]:
        """The last epoch of every group of blocks that are fitted side by side."""
        return [b - a for i, (a, b) in enumerate(zip(self.ends, self.ends[1:], strict=False)) if (i + 2) % epochs == 0]


@contextlib.contextmanager
def clean(device: torch.device) -> Iterator[None]:
    """Start a measurement with nothing of the one before."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    yield
    gc.collect()


def measured_run(
    model: Any, recipe: Recipe, tokens: torch.Tensor, device: torch.device, dtype: torch.dtype, **options: Any
) -> dict[str, Any]:
    """Calibrate `model` in place; seconds, memory and the estimate of it."""
    epochs = Epochs()
    if "layout" not in options:
        options["layout"] = plain_layout(model, recipe, device, dtype)
    before, reset = host_bytes("VmRSS"), forget_host_peak()
    with clean(device), Busy() as busy:
        start = time.perf_counter()
        _, report = calibrate(model, recipe, tokens, device=device, dtype=dtype, progress=epochs, **options)
        seconds = time.perf_counter() - start
    layout = options["layout"]
    per_run = recipe.fit.epochs if recipe.fit else 0
    return {
        "seconds": seconds,
        "stages": report.seconds,
        "last_epoch_seconds": epochs.last(per_run),
        "gpu_busy": busy.share,
        "peak_device_bytes": report.peak_memory,
        "reserved_device_bytes": torch.cuda.max_memory_reserved() if device.type == "cuda" else None,
        "host_bytes_before": before,
        "peak_host_bytes": host_bytes("VmHWM") if reset else None,
        "estimate": dataclasses.asdict(layout),
        "estimate_over_measured": layout.device / report.peak_memory if report.peak_memory else None,
        "losses": [[b["losses"][0], b["losses"][-1]] for b in report.blocks if b["losses"]],
    }


# ------------------------------------------------------------------------------------------------ parts


class Bench:
    """One device and the settings that all parts share."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.tiny = args, args.tiny
        self.device = torch.device(args.device)
        self.gpu = self.device.type == "cuda"
        self.rate = product_rate(self.device, 256 if self.tiny else 8192)

    def settings(self, model: Any, recipe: Recipe, blocks: int) -> dict[str, Any]:
        """What a sample says of its run."""
        c = model.config
        return {
            "hidden": c.hidden_size,
            "intermediate": c.intermediate_size,
            "blocks": blocks,
            "samples": recipe.data.samples,
            "seqlen": recipe.data.seqlen,
            "batch": recipe.fit.batch_size if recipe.fit else None,
            "epochs": recipe.fit.epochs if recipe.fit else 0,
            "solver": recipe.solver.kind,
        }

    def limit(self, model: Any, recipe: Recipe, blocks: int, epochs: int) -> dict[str, float]:
        """Seconds of the fit's arithmetic at the rate of large products, and at the vendor's."""
        assert recipe.fit is not None
        per = fit_operations(model, recipe)
        steps = epochs * (recipe.data.samples // recipe.fit.batch_size)
        tokens = steps * recipe.fit.batch_size * recipe.data.seqlen
        total = blocks * (tokens * per["token"] + steps * per["step"])
        name = torch.cuda.get_device_name() if self.gpu else ""
        vendor = next((v for key, v in VENDOR_FLOPS.items() if key in name), None)
        out = {"operations": total, "product_rate": self.rate, "seconds_at_product_rate": total / self.rate}
        return out | ({} if vendor is None else {"vendor_rate": vendor, "seconds_at_vendor_rate": total / vendor})

    def smollm2(self) -> Iterator[dict[str, Any]]:
        """(a) The reference preset on a real model."""
        dtype = torch.float16 if self.gpu else torch.float32
        model, tokenizer = load_model(self.args.model, dtype=dtype)
        recipe = REFERENCE
        if self.tiny:
            del model.model.layers[2:]
            model.config.num_hidden_layers = 2
            recipe = dataclasses.replace(
                recipe, data=DataSpec(samples=4, seqlen=32), fit=FitSpec(epochs=2, batch_size=2)
            )
        text = Path(self.args.data) / "wikitext-2-raw" / "wiki.valid.raw"
        tokens = calibration_tokens(text, tokenizer, samples=recipe.data.samples, seqlen=recipe.data.seqlen, seed=0)
        blocks = len(model.model.layers)
        settings = self.settings(model, recipe, blocks)
        assert recipe.fit is not None
        limit = self.limit(model, recipe, blocks, recipe.fit.epochs)
        run = measured_run(model, recipe, tokens, self.device, dtype)
        fit = run["stages"]["fit"]
        yield {**settings, **run, "limit": limit, "fit_over_limit": fit / limit["seconds_at_product_rate"]}

    def steps(self) -> Iterator[dict[str, Any]]:
        """(a) Where the time of a step goes, with as many blocks side by side as a GPU is given, and with one."""
        dtype = torch.float16 if self.gpu else torch.float32
        blocks, epochs = (1, 8) if self.tiny else (6, 2)
        data = DataSpec(samples=4, seqlen=32) if self.tiny else DataSpec(samples=64)
        fit = FitSpec(epochs=epochs, batch_size=2 if self.tiny else 4)
        recipe = dataclasses.replace(REFERENCE, data=data, fit=fit)
        for side_by_side in sorted({1, blocks}):
            model, _ = load_model(self.args.model, dtype=dtype)
            del model.model.layers[blocks:]
            model.config.num_hidden_layers = blocks
            layout = plain_layout(model, recipe, self.device, dtype, side_by_side=side_by_side)
            with clean(self.device), StepProfile(self.device, side_by_side) as profile:
                tokens = random_tokens(model, data)
                calibrate(model, recipe, tokens, device=self.device, dtype=dtype, layout=layout)
            yield {**self.settings(model, recipe, blocks), "side_by_side": side_by_side, **profile.found}

    def large(
        self,
        shape: tuple[int, ...],
        blocks: int,
        batch: int,
        epochs: int,
        windows: int | None = None,
        limit: int | None = None,
    ) -> Iterator[dict[str, Any]]:
        """(b) Other shapes: some blocks, some epochs, and what the whole would take; within a limit if given."""
        dtype = torch.bfloat16 if self.gpu else torch.float32
        whole = shape[-1]
        data = DataSpec(samples=8, seqlen=16) if self.tiny else REFERENCE.data
        model = random_llama(TINY if self.tiny else shape, blocks, dtype, self.device)
        assert REFERENCE.fit is not None
        fit = dataclasses.replace(REFERENCE.fit, epochs=epochs, batch_size=batch)
        recipe = dataclasses.replace(REFERENCE, data=data, fit=fit)
        if limit is not None and self.tiny:
            limit = plain_layout(model, recipe, self.device, dtype).host - 1
        limits = Limits(device=limit or 1 << 60, host=None if limit and not self.gpu else 1 << 60)
        layout = plain_layout(model, recipe, self.device, dtype, windows=windows, limits=limits)
        settings = self.settings(model, recipe, blocks) | {"max_memory": limit}
        arithmetic = self.limit(model, recipe, blocks, epochs)
        options = {"layout": layout, "limits": Limits(device=limit)}
        run = measured_run(model, recipe, random_tokens(model, data), self.device, dtype, **options)
        last = statistics.mean(run["last_epoch_seconds"])  # of one block: these are not fitted side by side
        others = sum(s for stage, s in run["stages"].items() if stage not in ("fit", "capture")) / blocks
        first = run["stages"]["fit"] / blocks - epochs * last  # what a block's fit takes to begin
        extrapolated = {
            "epochs": EPOCHS,
            "blocks": whole,
            "block_seconds": first + EPOCHS * last + others,
            "model_seconds": run["stages"]["capture"] + whole * (first + EPOCHS * last + others),
        }
        yield {
            **settings,
            **run,
            "limit": arithmetic,
            "fit_over_limit": last * blocks * epochs / arithmetic["seconds_at_product_rate"],
            "extrapolated": extrapolated,
        }

    def streamed(self) -> Iterator[dict[str, Any]]:
        """(b) Host memory of a model that is read block by block, against the same model loaded whole."""
        shape, blocks = (TINY, 3) if self.tiny else (LLAMA_8B, 4)
        dtype = torch.bfloat16
        data = DataSpec(samples=4, seqlen=16) if self.tiny else DataSpec(samples=16, seqlen=2048)
        recipe = dataclasses.replace(REFERENCE, data=data, fit=FitSpec(epochs=1, batch_size=4))
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "model"
            model = random_llama(shape, blocks, dtype, self.device)
            block_bytes = sum(p.nbytes for p in model.model.layers[0].parameters())
            all_bytes = sum(p.nbytes for p in model.parameters())
            tokens = random_tokens(model, data)
            model.save_pretrained(source)
            load_tokenizer(Path(resolve(self.args.model))).save_pretrained(source)
            del model
            hashes = {}
            for stream in (True, False):
                gc.collect()
                before, reset = host_bytes("VmRSS"), forget_host_peak()
                start = time.perf_counter()
                output = Path(folder) / f"out-{stream}"
                result = api.quantize(source, recipe, tokens, output=output, device=self.device, stream=stream)
                hashes[stream] = {p.name: _digest(p) for p in sorted(output.glob("*.safetensors"))}
                yield {
                    "hidden": shape[0],
                    "blocks": blocks,
                    "streamed": stream,
                    "seconds": time.perf_counter() - start,
                    "block_bytes": block_bytes,
                    "model_bytes": all_bytes,
                    "host_bytes_before": before,
                    "peak_host_bytes": host_bytes("VmHWM") if reset else None,
                    "estimate": result.report["timing"]["estimate"],
                    "same_files_as_streamed": hashes[stream] == hashes[True],
                }
                del result

    def growth(self) -> Iterator[dict[str, Any]]:
        """(c) Seconds of a step against tokens, hidden size and number of blocks."""
        dtype = torch.bfloat16 if self.gpu else torch.float32
        base = {"hidden": 32, "seqlen": 16, "blocks": 1} if self.tiny else {"hidden": 2048, "seqlen": 1024, "blocks": 1}
        scales = {
            "seqlen": (16, 32) if self.tiny else (256, 512, 1024, 2048, 4096),
            "hidden": (32, 64) if self.tiny else (512, 1024, 2048, 4096),
            "blocks": (1, 2) if self.tiny else (1, 2, 4),
        }
        batch, steps, epochs = 4, 2 if self.tiny else 8, 3
        for axis, values in scales.items():
            for value in values:
                at = base | {axis: value}
                shape = (at["hidden"], 7 * at["hidden"] // 2, at["hidden"] // 16, at["hidden"] // 16, at["blocks"])
                if not self.tiny:
                    shape = (at["hidden"], 7 * at["hidden"] // 2, at["hidden"] // 128, max(1, at["hidden"] // 512), 1)
                model = random_llama(shape, at["blocks"], dtype, self.device)
                data = DataSpec(samples=batch * steps, seqlen=at["seqlen"])
                recipe = dataclasses.replace(REFERENCE, data=data, fit=FitSpec(epochs=epochs, batch_size=batch))
                layout = plain_layout(model, recipe, self.device, dtype, side_by_side=1)
                per = fit_operations(model, recipe)
                run = measured_run(model, recipe, random_tokens(model, data), self.device, dtype, layout=layout)
                operations = batch * at["seqlen"] * per["token"] + per["step"]
                yield {
                    "axis": axis,
                    **at,
                    "tokens": batch * at["seqlen"],
                    "steps": steps,
                    "epoch_seconds": sum(run["last_epoch_seconds"]),  # all blocks, one after another
                    "operations": at["blocks"] * steps * operations,
                    "peak_device_bytes": run["peak_device_bytes"],
                    "estimate_over_measured": run["estimate_over_measured"],
                }

    def determinism(self) -> Iterator[dict[str, Any]]:
        """(d) One seed, one result, wherever things lie."""
        dtype = torch.float16 if self.gpu else torch.float32
        shape, blocks = (TINY, 2) if self.tiny else ((576, 1536, 9, 3, 30), 6)
        data = DataSpec(samples=8, seqlen=16) if self.tiny else DataSpec(samples=16, seqlen=512)
        recipe = dataclasses.replace(
            REFERENCE, data=data, fit=FitSpec(epochs=2, batch_size=4), solver=SolverSpec(kind="gptq")
        )
        original = random_llama(shape, blocks, dtype, self.device)
        plain = plain_layout(original, recipe, self.device, dtype)
        layouts: dict[str, Estimate] = {
            "plain": plain,
            "again": plain,
            "one block at a time": dataclasses.replace(plain, side_by_side=1),
            "host": dataclasses.replace(plain, place="host", side_by_side=1),
            "disk": dataclasses.replace(plain, place="disk", side_by_side=1),
            "resumed": plain,
            "two parts": dataclasses.replace(plain, windows=2),
            "two parts again, on disk, resumed": dataclasses.replace(plain, windows=2, place="disk", side_by_side=1),
        }
        for name, layout in layouts.items():
            with tempfile.TemporaryDirectory() as folder:
                options: dict[str, Any] = {"layout": layout, "device": self.device, "dtype": dtype}
                tokens = random_tokens(original, data)
                if "resumed" in name:

                    def kill(stage: str, done: int, total: int) -> None:
                        if stage == "solve" and done == 1:
                            raise Killed

                    with contextlib.suppress(Killed):
                        state = RunState(Path(folder) / "state", {}, resume=False)
                        calibrate(copy.deepcopy(original), recipe, tokens, state=state, progress=kill, **options)
                state = RunState(Path(folder) / "state", {}, resume=True)
                start = time.perf_counter()
                model = copy.deepcopy(original)
                _, report = calibrate(model, recipe, tokens, state=state, **options)
                yield {
                    "layout": name,
                    "place": layout.place,
                    "windows": layout.windows,
                    "side_by_side": layout.side_by_side,
                    "sha256": fingerprint(model),
                    "losses": [b["losses"] for b in report.blocks],
                    "seconds": time.perf_counter() - start,
                }


def _digest(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


PARTS: dict[str, Callable[[Bench], Iterator[dict[str, Any]]]] = {
    "determinism": Bench.determinism,
    "llama-3-8b": lambda b: b.large(LLAMA_8B, 4, 4, 2, limit=24 << 30),
    "llama-3-8b-in-10-gib": lambda b: b.large(LLAMA_8B, 1, 4, 2, limit=10 << 30),
    "llama-3-70b": lambda b: b.large(LLAMA_70B, 1, 4, 2, limit=60 << 30),
    "llama-3-70b-batch-1": lambda b: b.large(LLAMA_70B, 1, 1, 2, limit=40 << 30),
    "llama-3-70b-batch-4-in-parts": lambda b: b.large(LLAMA_70B, 1, 4, 2, windows=1),
    "smollm2": Bench.smollm2,
    "steps": Bench.steps,
    "growth": Bench.growth,
    "streamed": Bench.streamed,
}


# ------------------------------------------------------------------------------------------------ what it comes to


def slope(x: list[float], y: list[float]) -> float | None:
    """Exponent of y = a x^b: least squares of the logarithms."""
    if len(set(x)) < 2 or min(y) <= 0:
        return None
    return statistics.linear_regression([math.log(v) for v in x], [math.log(v) for v in y]).slope


def metrics(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """What documents show, from samples alone."""
    found: dict[str, Any] = {"failed": [s["part"] for s in samples if "error" in s]}
    samples = [s for s in samples if "error" not in s]
    for s in samples:
        if s["part"] == "smollm2" or s["part"].startswith("llama"):
            keys = ("seconds", "stages", "gpu_busy", "peak_device_bytes", "peak_host_bytes", "estimate_over_measured")
            keys = (*keys, "fit_over_limit", "extrapolated")
            found[s["part"]] = {key: s[key] for key in keys if key in s}
    grown = [s for s in samples if s["part"] == "growth"]
    # The model: a step is products, whose number grows with tokens and blocks to the power of 1 and with the hidden
    # size to the power of 2, and passes over activations, to the power of 1 in all three; a small step is launches.
    found["growth"] = {}
    for axis in dict.fromkeys(s["axis"] for s in grown):
        rows = [s for s in grown if s["axis"] == axis]
        x = [float(r[axis]) for r in rows]
        largest = sorted(rows, key=lambda r: r[axis])[-2:]
        found["growth"][axis] = {
            "exponent": slope(x, [r["epoch_seconds"] for r in rows]),
            "exponent_of_the_largest_two": slope(
                [float(r[axis]) for r in largest], [r["epoch_seconds"] for r in largest]
            ),
            "exponent_of_operations": slope(x, [r["operations"] for r in rows]),
        }
    same = {s["layout"]: s["sha256"] for s in samples if s["part"] == "determinism"}
    parts = {name: digest for name, digest in same.items() if "two parts" in name}
    rest = {name: digest for name, digest in same.items() if name not in parts}
    found["determinism"] = {
        "same_bits": {name: digest == rest.get("plain") for name, digest in rest.items()},
        "same_bits_in_two_parts": len(set(parts.values())) == 1 if parts else None,
    }
    losses = {s["layout"]: s["losses"] for s in samples if s["part"] == "determinism"}
    if "two parts" in losses and "plain" in losses:
        pairs = [(a[-1], b[-1]) for a, b in zip(losses["plain"], losses["two parts"], strict=True) if a]
        found["determinism"]["last_loss_in_two_parts"] = max((abs(b / a - 1) for a, b in pairs), default=None)
    found["streamed"] = [
        {k: s[k] for k in ("streamed", "host_bytes_before", "peak_host_bytes", "same_files_as_streamed")}
        for s in samples
        if s["part"] == "streamed"
    ]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", default="benchmarks/results")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--name", default=NAME, help="of the results file")
    parser.add_argument("--tiny", action="store_true", help="a dry run that measures nothing")
    args = parser.parse_args()
    bench, path = Bench(args), Path(args.out) / f"{args.name}.json"
    begin, failed = time.perf_counter(), []
    for part in args.only:
        start = time.perf_counter()
        try:
            for sample in PARTS[part](bench):
                _keep(path, {"part": part, "commit": commit(), **sample})
        except Exception as error:  # noqa: BLE001 - the other parts are worth their time
            traceback.print_exc()
            failed.append(part)
            first = (str(error).splitlines() or [""])[0][:200]
            _keep(path, {"part": part, "commit": commit(), "error": f"{type(error).__name__}: {first}"})
        gc.collect()
        if bench.gpu:
            torch.cuda.empty_cache()
        print(f"{part}: {time.perf_counter() - start:.1f} s, {time.perf_counter() - begin:.1f} s in all", flush=True)
    if failed:
        print("failed:", ", ".join(failed), flush=True)
    return len(failed)


def _keep(path: Path, sample: dict[str, Any]) -> None:
    samples = [*read_samples(path), sample]
    write_result(path, path.stem, seeds=[0], metrics=metrics(samples), samples=samples)
    brief = {k: v for k, v in sample.items() if k not in ("losses", "estimate", "commit")}
    print(brief, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
