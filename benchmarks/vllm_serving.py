"""Tokens a second of vLLM: quantised folders against bfloat16 in the same release and run; and parity on the device.

    python -m benchmarks.vllm_serving --shapes llama-3-8b --work DIR                    # random weights
    python -m benchmarks.vllm_serving --original MODEL --folders FOLDER ... --work DIR  # real ones, made by `quantize`
    python -m benchmarks.vllm_serving --tiny --work DIR                                 # a dry run, on any machine

Every engine is a process of its own. All of a run start side by side, and are measured in turn: the others then wait.
Before, kernels are compiled in several processes: vLLM would compile them one after another.

A row is one number of sequences: all begin at once, each with a prompt of random tokens, and write greedily up to a
fixed length. `first` are the seconds until all have one new token, `whole` until they have all. Prefix caching is off.

Parity (`--parts parity`, real models only) is that of `vllm_parity` in bfloat16, with vLLM in eager mode: for weights
alone, log-probabilities against `flatquant.load` by its modules; with rounded activations, KL to the original.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

# Where Triton keeps what it has compiled: the inductor would move it for what is compiled after it has begun.
os.environ.setdefault("TRITON_CACHE_DIR", str(Path.home() / ".triton" / "cache"))

import torch
from transformers import AutoModelForCausalLM

from benchmarks.common import RESULTS, device_name, spawned, write_result
from flatquant import bench, recipes
from flatquant.engines.parts import Parts
from flatquant.models import load_model
from flatquant.runtime import artifact
from flatquant.runtime.folder import Folder
from flatquant.runtime.kernels import Unsupported
from flatquant.spec import Scheme, to_dict
from flatquant.wiring.arch import Geometry
from flatquant.wiring.archs import arch_of
from flatquant.wiring.plan import make_plan

BASE = "bfloat16"
TARGETS = {1: 1.5, 64: 1.3}  # times bfloat16, in tokens that are written a second
# For processes, where nothing else is said. vLLM has two runners of models, and takes the first for quantised ones
# alone: both sides get it. Tokens are the likeliest ones, which no sampler of FlashInfer chooses.
DEFAULTS = {
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}
STEP = 8192  # tokens that vLLM computes at once, at most
PATIENCE = 400  # seconds that an engine may take to start, or a row to be measured
_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}  # of a dry run: vLLM's least on a CPU


@dataclass(frozen=True, kw_only=True)
class Job:
    """One engine: what it serves, and how it is loaded by how much."""

    model: str  # what is compared with each other
    side: str  # bfloat16, or the folder's name or scheme
    path: str
    home: str  # its log, its rows and its signals
    sequences: list[int]
    prompt: int
    new: int
    repeats: int
    eager: bool

    @property
    def stem(self) -> Path:
        return Path(self.home) / re.sub(r"[^\w.-]", "-", f"{self.model}-{self.side}")

    def file(self, what: str) -> Path:
        return self.stem.with_name(f"{self.stem.name}.{what}")


Engine = tuple[Job, subprocess.Popen]

# --------------------------------------------------------------------------------------------- models


def random_config(shape: str, folder: Path, tiny: bool) -> None:
    """A folder that vLLM fills with random numbers (`load_format="dummy"`)."""
    config = _config(shape, tiny)
    config.architectures, config.dtype = [f"{type(config).__name__.removesuffix('Config')}ForCausalLM"], torch.bfloat16
    config.save_pretrained(folder)


def _config(shape: str, tiny: bool) -> Any:
    config = bench.config_of(shape)
    config.update(_HEADS if tiny else {})
    return config


@torch.no_grad()
def random_folder(shape: str, scheme: str, folder: str, tiny: bool) -> None:
    """A quantised folder of random integers."""
    config = _config(shape, tiny)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = bench.packed_model(config, device, scheme=scheme)
    with torch.device("meta"):
        plain: Any = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.bfloat16)
    recipe = recipes.flatquant(replace(Scheme.parse(scheme), key_offset="none"))
    plan = make_plan(recipe, arch_of(config), Geometry.of(config), plain.model.layers)
    artifact.save(model, plan, Path(folder), recipe=to_dict(recipe), report={})


def plain_folder(model: str, folder: Path) -> None:
    """An original in bfloat16, as vLLM reads it."""
    original, _ = load_model(model, dtype=torch.bfloat16)
    original.save_pretrained(folder)


@torch.no_grad()
def compile_site(folder: str, name: str, tokens: int) -> None:
    """Run a site's kernels once: what is compiled stays in Triton's cache."""
    device, parts = torch.device("cuda"), Parts(Folder.open(Path(folder)))
    site = parts.plan.blocks[0].sites[name]
    paths = [f"{parts.plan.blocks_path}.0.{reader}" for reader in site.readers]
    with contextlib.suppress(Unsupported):
        linear = parts.kernels([parts.linear(path, device, torch.bfloat16) for path in paths], name)
        linear(torch.randn(tokens, site.shape[0] * site.shape[1], dtype=torch.bfloat16, device=device))
    torch.cuda.synchronize()


def compile_all(folders: Iterable[str], tokens: list[int], workers: int) -> None:
    """The kernels of such folders at such numbers of tokens. The longest compile first."""
    jobs = []
    for folder in folders:
        sites = Folder.open(Path(folder)).plan.blocks[0].sites
        jobs += [(folder, name, t) for t in tokens for name, site in sites.items() if len(site.groups) == 1]
    jobs.sort(key=lambda job: job[1] != "mlp_mid")
    for problem in filter(None, spawned(compile_site, jobs, workers)):
        print("not compiled:", repr(problem)[:300], flush=True)


# --------------------------------------------------------------------------------------------- one engine


def serve(job: Job) -> None:
    """Start an engine, wait for the signal, and measure."""
    start = time.perf_counter()
    from vllm import LLM, SamplingParams, __version__

    llm = LLM(**options(job))
    job.file("ready").write_text(f"{time.perf_counter() - start:.1f}")
    while not job.file("go").exists():
        time.sleep(0.1)
    vocabulary = json.loads((Path(job.path) / "config.json").read_text())["vocab_size"]
    drawn = torch.Generator().manual_seed(0)

    def seconds(sequences: int, new: int) -> float:
        """Until so many sequences have `new` tokens each."""
        ids = torch.randint(0, vocabulary, (sequences, job.prompt), generator=drawn).tolist()
        sampling = SamplingParams(max_tokens=new, temperature=0, ignore_eos=True, detokenize=False)
        begin = time.perf_counter()
        done = llm.generate([{"prompt_token_ids": row} for row in ids], sampling, use_tqdm=False)
        taken = time.perf_counter() - begin
        assert all(len(one.outputs[0].token_ids) == new for one in done)
        return taken

    for sequences in job.sequences:
        seconds(sequences, min(job.new, 4))  # what runs for the first time
        times = [(seconds(sequences, 1), seconds(sequences, job.new)) for _ in range(job.repeats)]
        row = {
            "model": job.model,
            "side": job.side,
            "sequences": sequences,
            "prompt": job.prompt,
            "new": job.new,
            "eager": job.eager,
            "vllm": __version__,
            "runner": 1 + (os.environ["VLLM_USE_V2_MODEL_RUNNER"] == "1"),
            "first_seconds": [first for first, _ in times],
            "whole_seconds": [whole for _, whole in times],
        }
        with job.file("rows").open("a") as file:
            file.write(json.dumps(row) + "\n")


def options(job: Job) -> dict[str, Any]:
    """How vLLM is started."""
    config = json.loads((Path(job.path) / "config.json").read_text())
    most = max(job.sequences)
    found: dict[str, Any] = {
        "model": job.path,
        "dtype": "bfloat16",
        "max_model_len": job.prompt + job.new,
        "max_num_seqs": most,
        "max_num_batched_tokens": STEP if torch.cuda.is_available() else 512,
        "enable_prefix_caching": False,
        "skip_tokenizer_init": True,
        "enforce_eager": job.eager,
    }
    if not any(Path(job.path).glob("*.safetensors")):
        found["load_format"] = "dummy"
    if torch.cuda.is_available():
        heads = config.get("num_key_value_heads") or config["num_attention_heads"]
        size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        place = 2 * 2 * config["num_hidden_layers"] * heads * size  # bytes of a token's keys and values
        # Other engines share the GPU: vLLM is told how much it has, instead of measuring what is left.
        found["kv_cache_memory_bytes"] = (most + 8) * (job.prompt + job.new + 16) * place
        found["gpu_memory_utilization"] = 0.1
        if not job.eager:
            found["compilation_config"] = {"cudagraph_capture_sizes": sorted(job.sequences)}
    return found


# --------------------------------------------------------------------------------------------- parity


def parity(original: str, folders: list[str], windows: int, length: int, out: str) -> None:
    """Samples of `vllm_parity` for given folders, one a line of a file."""
    from benchmarks import vllm_parity as measure
    from flatquant.data import evaluation_windows

    model, tokenizer = load_model(original, dtype=torch.float32)
    model = model.to(measure.DEVICE)
    tokens = evaluation_windows("wikitext2", tokenizer, seqlen=length, windows=windows)
    logits = [measure.logits_of(model, window) for window in tokens]
    del model
    for folder in folders:
        row = measure.Row(Path(folder).name, "bfloat16", ("auto",))
        for sample in measure.measured(logits, Path(folder), row, tokens, lambda line: print(line, flush=True)):
            with Path(out).open("a") as file:
                file.write(json.dumps(sample | {"model": Path(original).name, "side": row.scheme}) + "\n")


# --------------------------------------------------------------------------------------------- all of them


def started(arguments: list[str], log: Path) -> subprocess.Popen:
    """A process of this module; what it prints goes into a file."""
    environment = DEFAULTS | os.environ
    with log.open("w") as out:
        command = [sys.executable, "-m", "benchmarks.vllm_serving", *arguments]
        return subprocess.Popen(command, stdout=out, stderr=out, env=environment)


def waited(process: subprocess.Popen, done: Callable[[], bool]) -> bool:
    """Whether something is done before a process ends, or takes too long."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        ended = process.poll() is not None
        if done():
            return True
        if ended:
            return False
        time.sleep(0.1)
    return False


def rows_of(file: Path) -> list[dict[str, Any]]:
    """Whole lines of a file that is being written."""
    text = file.read_text() if file.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def rows(engines: list[Engine]) -> Iterator[dict[str, Any]]:
    """The rows of engines that start side by side, as they come. One that fails is named, and the others go on."""
    try:
        for job, process in engines:
            ready = waited(process, job.file("ready").exists)
            print(
                job.model, job.side, f"started in {job.file('ready').read_text()} s" if ready else "FAILED", flush=True
            )
            if not ready:
                print(job.file("log").read_text()[-3000:], flush=True)
        for job, process in engines:
            job.file("go").touch()
            for index in range(len(job.sequences) if job.file("ready").exists() else 0):
                if not waited(process, lambda job=job, index=index: len(rows_of(job.file("rows"))) > index):
                    print(job.model, job.side, "FAILED", _end(job), flush=True)
                    break
                yield rows_of(job.file("rows"))[index]
            process.terminate()
            process.wait(60)
    finally:
        for _, process in engines:
            process.kill()


def _end(job: Job) -> str:
    return job.file("log").read_text()[-3000:]


def metrics(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Tokens a second of every row, by medians, and how many times those of bfloat16 they are."""
    found: dict[str, Any] = {}
    for sample in samples:
        first, whole = (statistics.median(sample[f"{what}_seconds"]) for what in ("first", "whole"))
        n, new = sample["sequences"], sample["new"]
        found.setdefault(sample["model"], {}).setdefault(sample["side"], {})[str(n)] = {
            "prefill": n * sample["prompt"] / first,
            "output": n * new / whole,
            "decode": n * (new - 1) / (whole - first),
        }
    for sides in found.values():
        base = sides.get(BASE, {})
        for side in sides.values():
            for n, rates in side.items():
                if side is not base and n in base:
                    rates["times"] = {what: rates[what] / base[n][what] for what in base[n]}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", default=[], help="of models with random weights; see flatquant.bench")
    parser.add_argument("--schemes", nargs="+", default=["w4a4"], help="of these")
    parser.add_argument("--original", help="a real model in 16 bits: a folder, a GGUF file or a name")
    parser.add_argument("--folders", nargs="*", default=[], help="quantised folders of it")
    parser.add_argument("--parts", nargs="+", default=["speed"], choices=["speed", "parity"])
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--windows", type=int, default=2, help="of parity")
    parser.add_argument("--eager", action="store_true", help="without torch.compile and CUDA graphs")
    parser.add_argument("--workers", type=int, default=min(14, os.cpu_count() or 1), help="that compile kernels")
    parser.add_argument("--work", type=Path, required=True, help="a folder for models and logs; best in memory")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--name", help="of the results file")
    parser.add_argument("--tiny", action="store_true", help="a dry run that measures nothing")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        job = json.loads(args.job)
        parity(**job) if "original" in job else serve(Job(**job))
        return
    if args.tiny:
        args.shapes, args.sequences, args.prompt, args.new, args.repeats = ["tiny"], [1, 3], 16, 8, 1
    cuda = torch.cuda.is_available()
    name = args.name or "vllm-serving-" + (re.sub(r"\W+", "-", device_name().split()[-1]).lower() if cuda else "cpu")
    path, begin = args.out / f"{name}.json", time.perf_counter()
    samples: list[dict[str, Any]] = []
    compared: list[dict[str, Any]] = []
    args.work.mkdir(parents=True, exist_ok=True)

    def say(line: str) -> None:
        print(f"[{time.perf_counter() - begin:.0f} s] {line}", flush=True)

    def keep() -> None:
        measured: dict[str, Any] = {"speed": metrics(samples)}
        if compared:
            from benchmarks.vllm_parity import metrics_of

            measured["parity"] = {f"{sample['model']} {sample['side']}": metrics_of(sample) for sample in compared}
        write_result(path, name, seeds=[0], samples=samples + compared, metrics=measured, targets=TARGETS)

    if "speed" in args.parts:
        for row in rows(engines(args, say)):
            samples.append(row)
            keep()
            say(json.dumps(metrics(samples)[row["model"]][row["side"]][str(row["sequences"])] | {"row": row}))
    if "parity" in args.parts:
        out, log = args.work / "parity.rows", args.work / "parity.log"
        job = {"original": args.original, "folders": args.folders, "windows": args.windows, "length": 128}
        process = started(["--work", str(args.work), "--job", json.dumps(job | {"out": str(out)})], log)
        if not waited(process, lambda: len(rows_of(out)) == len(args.folders)):
            print("parity FAILED", log.read_text()[-3000:], flush=True)
        process.kill()
        compared += rows_of(out)
        keep()
        for sample in compared:
            say(f"{sample['side']}: {json.dumps(json.loads(path.read_text())['metrics']['parity'], indent=1)}")
    say(f"all: {path}")


def engines(args: argparse.Namespace, say: Callable[[str], None]) -> list[Engine]:
    """All engines of a run, as they start; and before that their folders and kernels."""
    cuda, work = torch.cuda.is_available(), args.work
    given = {key: getattr(args, key) for key in ("sequences", "prompt", "new", "repeats", "eager")}
    given |= {"home": str(work)}
    running: list[Engine] = []

    def start(model: str, side: str, path: Path) -> None:
        job = Job(model=model, side=side, path=str(path), **given)
        for what in ("ready", "go", "rows"):
            job.file(what).unlink(missing_ok=True)
        running.append((job, started(["--work", str(work), "--job", json.dumps(asdict(job))], job.file("log"))))
        say(f"{model} {side} starts")

    quantised: list[tuple[str, str, Path]] = []
    fresh: list[tuple] = []
    for shape in args.shapes:
        random_config(shape, work / f"{shape}-{BASE}", args.tiny)
        start(shape, BASE, work / f"{shape}-{BASE}")
        for scheme in args.schemes:
            quantised.append((shape, scheme, work / f"{shape}-{scheme}"))
            if not quantised[-1][2].exists():
                fresh.append((shape, scheme, str(quantised[-1][2]), args.tiny))
    if args.original:
        model = Path(args.original).name
        plain_folder(args.original, work / f"{model}-{BASE}")
        start(model, BASE, work / f"{model}-{BASE}")
        quantised += [(model, Path(folder).name, Path(folder)) for folder in args.folders]
    for problem in filter(None, spawned(random_folder, fresh, 2) if fresh else []):
        raise problem
    say("folders are written")
    if cuda:
        steps = {min(n * args.prompt, STEP) for n in args.sequences}
        compile_all([str(path) for _, _, path in quantised], sorted({*args.sequences, *steps}), args.workers)
        say("kernels are compiled")
    for job in quantised:
        start(*job)
    return running


if __name__ == "__main__":
    main()
