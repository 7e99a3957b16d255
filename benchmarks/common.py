"""What every benchmark shares: the environment it ran in, and where results go."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from flatquant.spec import Transforms

RESULTS = Path(__file__).parent / "results"
MARK = "RESULT "
PACKAGES = ("torch", "triton", "transformers", "safetensors", "numpy")


def commit() -> str:
    """The commit under test: `FLATQUANT_COMMIT`, else what git says, with `+` for uncommitted changes."""
    if given := os.environ.get("FLATQUANT_COMMIT"):
        return given
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        dirty = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if dirty.strip() else "")


def device_name() -> str:
    """The accelerator, or the processor and its core count."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide a result."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def environment() -> dict[str, Any]:
    """Device, versions and commit, as every results file has them."""
    return {"device": device_name(), "versions": versions(), "commit": commit()}


def write_result(path: Path, name: str, **content: Any) -> None:
    """Write a results file, all at once: name, environment, and whatever the benchmark measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(f".{os.getpid()}")
    scratch.write_text(json.dumps({"name": name, **environment(), **content}, indent=1) + "\n")
    scratch.replace(path)


def read_samples(path: Path) -> list[dict[str, Any]]:
    """The samples of a results file, to add to; none if there is no such file.

    Raises:
        ValueError: the file comes from another device or other versions; give another folder.
    """
    if not path.exists():
        return []
    result, here = json.loads(path.read_text()), environment()
    if any(result[key] != here[key] for key in ("device", "versions")):
        raise ValueError(f"{path} was measured on another device or with other versions")
    return result["samples"]


def started(transforms: Mapping[str, Transforms], diagonal: str, others: str) -> dict[str, Transforms]:
    """A recipe's transforms with other starting points (`init`) of the diagonals, and of what is none."""
    return {
        site: tuple(dataclasses.replace(t, init=diagonal if t.kind == "diagonal" else others) for t in parts)
        for site, parts in transforms.items()
    }


def spawned(work: Callable[..., Any], jobs: list[tuple], workers: int) -> list[BaseException | None]:
    """Call `work` with each job's arguments, in processes of their own side by side; what went wrong in each."""
    # Forked processes could not use the GPU.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        return [future.exception() for future in [pool.submit(work, *job) for job in jobs]]


def run_jobs(
    module: str, jobs: list[list[str]], parallel: int, common: list[str], keep: Callable[[dict[str, Any]], None]
) -> None:
    """Run `python -m module COMMON JOB` for every job, at most `parallel` processes at a time.

    A job prints its result as a line `RESULT {json}`; `keep` receives each as it comes. A job that fails is named, and
    the others go on. Each gets its share of the cores: threads that outnumber them wait for each other.
    """
    waiting, running = list(jobs), []
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // parallel))}
    while waiting or running:
        while waiting and len(running) < parallel:
            command = [sys.executable, "-m", module, *common, *waiting.pop(0)]
            running.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=threads | os.environ))
        for process in [p for p in running if p.poll() is not None]:
            running.remove(process)
            assert process.stdout is not None
            lines = [line for line in process.stdout if line.startswith(MARK)]
            if process.returncode or not lines:
                print("failed:", process.args, flush=True)
                continue
            keep(json.loads(lines[-1].removeprefix(MARK)))
        time.sleep(0.5)


def print_result(result: dict[str, Any]) -> None:
    """What a job of `run_jobs` ends with."""
    print(MARK + json.dumps(result), flush=True)
