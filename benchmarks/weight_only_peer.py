"""A peer's side of `benchmarks.weight_only`, run where the peer's packages are.

    PYTHONPATH=PACKAGES python benchmarks/weight_only_peer.py auto-round MODEL TOKENS OUT --bits 4 --group 64 \\
        --set iters=50

TOKENS is a file of int64 token ids (samples, seqlen), as torch saves it. OUT gets the model's weights after rounding,
as numbers under their own names, and a JSON file with the versions, the settings and the seconds.

Both peers import `datasets` to load texts by name. Tokens are given here, so where it is not installed an empty module
takes its place: using anything of it is an error.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGES = ("auto-round", "llmcompressor", "compressed-tensors", "torch", "transformers", "datasets")


class _Absent(ModuleType):
    """A package that is not installed, whose names can be imported."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__, self.__path__ = ModuleSpec(name, None, is_package=True), []

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)

        def refuse(*_: object, **__: object) -> None:
            raise RuntimeError(f"{self.__name__}.{name} was used, and {self.__name__} is not installed")

        return type(name, (), {"__new__": refuse})


def stand_in() -> None:
    """Let `datasets` be imported where it is not installed."""
    if find_spec("datasets") is None:
        for name in ("datasets", "datasets.formatting", "datasets.formatting.formatting"):
            sys.modules[name] = _Absent(name)


def auto_round(
    model: Any, tokenizer: Any, tokens: Tensor, args: argparse.Namespace, changes: dict[str, Any]
) -> tuple[nn.Module, dict]:
    """Rounding by signed gradients, with the package's own defaults but for what is set."""
    from auto_round import AutoRound  # pyright: ignore[reportMissingImports]

    settings = {"bits": args.bits, "group_size": args.group, "sym": True, "iters": 200, "seed": args.seed}
    settings |= {"nsamples": len(tokens), "seqlen": tokens.shape[1], "batch_size": 8, "enable_torch_compile": False}
    settings |= changes
    rounding = AutoRound(model, tokenizer, dataset=list(tokens.split(1)), device_map=args.device, **settings)
    return rounding.quantize()[0], settings


def llm_compressor(
    model: Any, tokenizer: Any, tokens: Tensor, args: argparse.Namespace, changes: dict[str, Any]
) -> tuple[nn.Module, dict]:
    """GPTQ with the package's own defaults but for the grid: `symmetric` is of the weights, all else of GPTQ."""
    from llmcompressor import oneshot  # pyright: ignore[reportMissingImports]
    from llmcompressor.modifiers.quantization import GPTQModifier  # pyright: ignore[reportMissingImports]

    weights = {"num_bits": args.bits, "type": "int", "strategy": "group", "group_size": args.group}
    weights["symmetric"] = changes.pop("symmetric", True)
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    recipe = GPTQModifier(ignore=["lm_head"], config_groups=groups, **changes)
    rows: Any = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in tokens]
    # It brings one block at a time to the accelerator, if there is one, by itself.
    oneshot(model=model, dataset=DataLoader(rows, batch_size=1), recipe=recipe, num_calibration_samples=len(rows))
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


def _setting(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("model")
    parser.add_argument("tokens")
    parser.add_argument("out")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--blocks", type=int, help="only the first ones")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="of the peer's own settings")
    args = parser.parse_args()
    stand_in()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    model.model.layers = model.model.layers[: args.blocks]
    model.config.num_hidden_layers = len(model.model.layers)
    names = [name for name, _ in model.named_parameters()]
    start = time.perf_counter()
    rounded, settings = PEERS[args.peer](
        model,
        AutoTokenizer.from_pretrained(args.model),
        torch.load(args.tokens),
        args,
        dict(_setting(text) for text in args.set),
    )
    seconds = time.perf_counter() - start
    state = rounded.state_dict()
    told = {"versions": versions(), "settings": settings, "dtype": str(state[names[0]].dtype), "seconds": seconds}
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    save_file({name: state[name].detach().float().cpu().contiguous() for name in names}, out / "weights.safetensors")
    (out / "peer.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main()
