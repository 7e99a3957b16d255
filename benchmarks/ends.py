"""What rounding the output layer and the embedding costs and saves, with all else in 16 bit, on any model.

    python -m benchmarks.ends smollm2-135m ./Qwen2.5-Coder-1.5B-Instruct

A row is a run of `rtn` by a scheme that rounds nothing else: its verdict (KL divergence from the original on the
built-in text, what the layer makes alone, how far embedded tokens are off), and the bytes of the folder's tensors. Each
model has a results file of its own, `ends-NAME.json`.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

import flatquant
from benchmarks.common import RESULTS, write_result
from flatquant.models import load_model
from flatquant.recipes import rtn
from flatquant.runtime.artifact import inspect

SCHEMES = (
    "w16",
    "w16,lm_head=w8",
    "w16,embed_tokens=w8",
    "w16,lm_head=w8,embed_tokens=w8",
    "w16,lm_head=w6,embed_tokens=w6",
    "w16,lm_head=w4g64,embed_tokens=w4g64",
)


def measured(model: str, scheme: str, device: str) -> dict[str, Any]:
    """The verdict of one scheme, and its bytes."""
    dtype = torch.float32 if device == "cpu" else None  # products in 16 bits are slow on a processor
    loaded, tokenizer = load_model(model, dtype=dtype)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "out"
        result = flatquant.quantize(loaded, rtn(scheme), tokenizer=tokenizer, output=output, device=device)
        found = inspect(output, verify=False)
    judged = result.verdict
    assert judged is not None
    kept = {key: judged.get(key) for key in ("word", "kl", "top1", "perplexity", "head", "embedding", "windows")}
    return {
        "scheme": scheme,
        "dtype": str(loaded.dtype),
        **kept,
        "bytes": sum(found.bytes_by_kind.values()),
        "embeddings": found.embedding,
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="hub id, local folder, GGUF file, or smollm2-135m")
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    for model in given.models:
        name, samples = f"ends-{Path(model).stem.lower()}", []
        for scheme in given.schemes:
            samples.append(measured(model, scheme, given.device))
            print(samples[-1], flush=True)
            metrics = {s["scheme"]: {"kl": s["kl"], "bytes": s["bytes"]} for s in samples}
            write_result(given.out / f"{name}.json", name, seeds=[0], metrics=metrics, samples=samples)


if __name__ == "__main__":
    main()
