"""Memory that a run is told to need beside what it takes, each run in a process of its own.

    python -m benchmarks.memory                    random models and SmolLM2-135M on a CPU: memory-cpu.json
    python -m benchmarks.memory --device cuda      SmolLM2-135M by three presets on a GPU: memory-cuda.json

The estimate is `Estimate.host`, and `Estimate.device` on a GPU. Measured are the peak of the process (`VmHWM`, the
libraries included), and the peak of tensors on the GPU, with what torch had reserved for them beside it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import MARK, RESULTS, print_result, write_result

SMOLLM2 = "smollm2-135m"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run. A model is SmolLM2's alias, or a random Llama of a shape: hidden, intermediate, blocks, vocabulary."""

    shape: tuple[int, int, int, int] | None = None
    method: str = "flatquant"
    preset: str = "reference"
    scheme: str = "w4a4kv4"
    samples: int | None = None
    seqlen: int | None = None
    epochs: int | None = None
    steps: int | None = None  # of an end-to-end fit: two show the peak
    text: str = "tokens"  # random ones, or `self`
    stream: bool = False


SMALL, WIDE, WORDY = (256, 704, 4, 1024), (1024, 2816, 2, 4096), (256, 704, 4, 16384)
CPU = (
    Case(shape=WIDE, method="rtn"),
    Case(shape=WIDE, method="rtn", stream=True),
    Case(shape=SMALL, method="gptq", samples=4, seqlen=128),
    Case(shape=WORDY, method="quarot", samples=4, seqlen=64),
    Case(shape=SMALL, samples=8, seqlen=256, epochs=1),
    Case(shape=SMALL, samples=8, seqlen=256, epochs=1, stream=True),
    Case(shape=WORDY, preset="quick", samples=8, seqlen=256, steps=2, text="self"),
    Case(shape=SMALL, preset="best", samples=8, seqlen=128, epochs=1, steps=2),
)
WHOLE = (Case(preset="quick", samples=10, seqlen=256, steps=2, text="self"),)
CUDA = (
    Case(preset="quick", text="self"),
    Case(preset="reference", epochs=2),
    Case(preset="best", epochs=1, steps=8),
)


def make_model(shape: tuple[int, int, int, int], folder: Path) -> None:
    """Save a random Llama in bfloat16 and a tokenizer of single characters."""
    import torch
    from tests.tiny_models import tiny_llama, tiny_tokenizer

    hidden, intermediate, layers, vocab = shape
    heads = hidden // 64
    model = tiny_llama(
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        intermediate=intermediate,
        layers=layers,
        vocab=vocab,
        dtype=torch.bfloat16,
    )
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def run_case(case: Case, model: str, device: str) -> dict[str, Any]:
    """Quantise in this process; the estimate and the peaks, in bytes."""
    import torch

    import flatquant
    from flatquant.calibrate.memory import peak_resident_bytes
    from flatquant.recipes import recipe

    parts = recipe(case.method, case.scheme, case.preset)
    if parts.needs_data:
        parts = parts.tuned(samples=case.samples, seqlen=case.seqlen)
    if parts.fit is not None and case.epochs is not None:
        parts = parts.tuned(epochs=case.epochs)
    if parts.end_to_end is not None and case.steps is not None:
        parts = dataclasses.replace(parts, end_to_end=dataclasses.replace(parts.end_to_end, steps=case.steps))
    told: list[Any] = []
    peaks = {"allocated": 0, "reserved": 0}

    def look(*_: object) -> None:
        if device == "cuda":  # calibration resets torch's own peaks
            peaks["allocated"] = max(peaks["allocated"], torch.cuda.max_memory_allocated())
            peaks["reserved"] = max(peaks["reserved"], torch.cuda.max_memory_reserved())

    calibration: Any = None
    if parts.needs_data:
        generator = torch.Generator().manual_seed(0)
        shape = (parts.data.samples, parts.data.seqlen)
        vocab = case.shape[3] if case.shape else 49152
        calibration = "self" if case.text == "self" else torch.randint(0, vocab, shape, generator=generator)
    with tempfile.TemporaryDirectory() as folder:
        result = flatquant.quantize(
            model,
            parts,
            calibration,
            output=Path(folder) / "out",
            device=device,
            stream=case.stream or None,
            progress=look,
            notice=told.append,
        )
    look()
    (estimate,) = told
    found = {
        **dataclasses.asdict(case),
        "device": device,
        "estimate": {key: getattr(estimate, key) for key in ("host", "device", "place", "windows", "side_by_side")},
        "peak_host_bytes": peak_resident_bytes(),
        "seconds": result.report["timing"]["total"],
    }
    if device == "cuda":
        found |= {"peak_device_bytes": peaks["allocated"], "reserved_device_bytes": peaks["reserved"]}
        found["device_estimate_over_measured"] = estimate.device / peaks["allocated"]
    return found | {"host_estimate_over_measured": estimate.host / found["peak_host_bytes"]}


def measured(case: Case, device: str = "cpu") -> dict[str, Any]:
    """One case in a process of its own.

    Raises:
        RuntimeError: the run failed; what it said.
    """
    with tempfile.TemporaryDirectory() as folder:
        model = SMOLLM2
        if case.shape is not None:
            make_model(case.shape, Path(folder))
            model = folder
        job = json.dumps(dataclasses.asdict(case))
        command = [sys.executable, "-m", "benchmarks.memory", "--device", device, "--case", job, "--model", model]
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or not lines:
        raise RuntimeError(done.stderr)
    return json.loads(lines[-1].removeprefix(MARK))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--case", help="of one run, in this process")
    parser.add_argument("--model", default=SMOLLM2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    if given.case is not None:
        print_result(run_case(Case(**json.loads(given.case)), given.model, given.device))
        return
    samples = []
    for case in CUDA if given.device == "cuda" else CPU + WHOLE:
        samples.append(measured(case, given.device))
        print(json.dumps(samples[-1]), flush=True)
        ratios = [value for sample in samples for key, value in sample.items() if key.endswith("over_measured")]
        metrics = {"least_over_measured": min(ratios), "most_over_measured": max(ratios)}
        name = f"memory-{given.device}"
        write_result(given.out / f"{name}.json", name, seeds=[0], metrics=metrics, samples=samples)


if __name__ == "__main__":
    main()
