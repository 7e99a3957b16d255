"""A peer's side of `benchmarks.weight_only`, run by the Python of an environment that has the peer.

    PYTHON benchmarks/weight_only_peer.py auto-round MODEL TOKENS OUT --bits 4 --group 64

TOKENS is a file of int64 token ids (samples, seqlen), as torch saves it. OUT gets the model's weights after rounding,
as numbers under their own names, and a JSON file with the versions, the settings and the seconds.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGES = ("auto-round", "llmcompressor", "compressed-tensors", "torch", "transformers")


def auto_round(model: Any, tokenizer: Any, tokens: Tensor, args: argparse.Namespace) -> tuple[nn.Module, dict]:
    """Rounding by signed gradients, with the package's own defaults but for the number of steps."""
    from auto_round import AutoRound  # pyright: ignore[reportMissingImports]

    settings = {"bits": args.bits, "group_size": args.group, "sym": True, "iters": args.steps, "seed": args.seed}
    settings |= {"nsamples": len(tokens), "seqlen": tokens.shape[1], "batch_size": 8}
    rounding = AutoRound(
        model, tokenizer, dataset=list(tokens.split(1)), device_map=args.device, enable_torch_compile=False, **settings
    )
    return rounding.quantize()[0], settings


def llm_compressor(model: Any, tokenizer: Any, tokens: Tensor, args: argparse.Namespace) -> tuple[nn.Module, dict]:
    """GPTQ with the package's own defaults."""
    from datasets import Dataset  # pyright: ignore[reportMissingImports]
    from llmcompressor import oneshot  # pyright: ignore[reportMissingImports]
    from llmcompressor.modifiers.quantization import GPTQModifier  # pyright: ignore[reportMissingImports]

    weights = {"num_bits": args.bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": args.group}
    recipe = GPTQModifier(ignore=["lm_head"], config_groups={"group_0": {"targets": ["Linear"], "weights": weights}})
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in tokens.tolist()]
    oneshot(
        model=model,
        dataset=Dataset.from_list(rows),
        recipe=recipe,
        max_seq_length=tokens.shape[1],
        num_calibration_samples=len(rows),
        shuffle_calibration_samples=False,
    )
    return model, {**weights, "actorder": str(recipe.actorder), "dampening_frac": recipe.dampening_frac}


PEERS: dict[str, Callable[..., tuple[nn.Module, dict]]] = {"auto-round": auto_round, "llm-compressor": llm_compressor}


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("model")
    parser.add_argument("tokens")
    parser.add_argument("out")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--blocks", type=int, help="only the first ones")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    model.model.layers = model.model.layers[: args.blocks]
    model.config.num_hidden_layers = len(model.model.layers)
    names = [name for name, _ in model.named_parameters()]
    start = time.perf_counter()
    rounded, settings = PEERS[args.peer](
        model, AutoTokenizer.from_pretrained(args.model), torch.load(args.tokens), args
    )
    seconds = time.perf_counter() - start
    state = rounded.state_dict()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    save_file({name: state[name].detach().float().cpu().contiguous() for name in names}, out / "weights.safetensors")
    (out / "peer.json").write_text(json.dumps({"versions": versions(), "settings": settings, "seconds": seconds}))


if __name__ == "__main__":
    main()
