"""DeepSeek-V3's shape: two blocks with random weights measured, and the whole model planned.

    python -m benchmarks.latent --part blocks --experts 32 80 --out benchmarks/results     # on a GPU of 141 GB
    python -m benchmarks.latent --part plan --out benchmarks/results                       # anywhere, some minutes
    python -m benchmarks.latent --part blocks --tiny --out /tmp/results                    # a dry run on a CPU

`blocks` quantises a block without experts and one with some of V3's 256, of which a token passes 8 as it does there:
seconds of a fit and of its epochs, memory against its estimate, bytes of the latent cache against bfloat16, and each
block's time before and after, with grouped products and with experts one after another. A block of all 256 holds 11.5
billion weights; what a fit keeps of them is in the estimate, and more than a GPU has.

`plan` computes what the reference preset would take for all 61 blocks. Its seconds come from fits that were measured on
Llama-3-70B's shape with two batch sizes: an epoch is tokens times the weights that a token passes, and steps times all
weights of a block. Its memory and files are those of the estimate that a run prints.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DeepseekV3Config, DynamicCache

import flatquant
from benchmarks.common import RESULTS, read_samples, write_result
from flatquant.calibrate.memory import Limits, estimate, linear_weights
from flatquant.ops import grouped_linear
from flatquant.recipes import RECIPES
from flatquant.runtime import linear
from flatquant.runtime.experts import open_experts
from flatquant.runtime.kvcache import QuantizedCache, token_bytes
from flatquant.seams import CACHE
from flatquant.spec import DataSpec, Recipe
from flatquant.wiring.arch import Geometry, blocks_at
from flatquant.wiring.archs import arch_of
from flatquant.wiring.plan import make_plan

NAME, PLAN = "latent-h200", "plan-671b"
V3: dict[str, Any] = {  # of deepseek-ai/DeepSeek-V3's config.json
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "first_k_dense_replace": 3,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "vocab_size": 129280,
}
TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 48,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "vocab_size": 128,
}
VOCABULARY = 8192  # of measured models
EXPERTS = (32, 64, 80, 96, 128, 256)  # whose memory is estimated
AGREES = 0.02  # how far logits may differ between two orders of sums, in bfloat16


def config_of(experts: int, *, tiny: bool) -> DeepseekV3Config:
    """Two blocks: without experts, and with so many."""
    sizes: dict[str, Any] = V3 | {"vocab_size": VOCABULARY} | (TINY if tiny else {})
    sizes |= {"num_hidden_layers": 2, "first_k_dense_replace": 1, "n_routed_experts": experts}
    return DeepseekV3Config(**sizes, max_position_embeddings=8192)


# ------------------------------------------------------------------------------------------------ measured


def blocks(experts: int, recipe: Recipe, device: torch.device, *, prompt: int, tiny: bool) -> dict[str, Any]:
    """Quantise, pack, load and time two blocks."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config_of(experts, tiny=tiny), dtype=dtype).eval()
    data = recipe.data
    ids = torch.randint(model.config.vocab_size, (data.samples, data.seqlen))
    few = ids[:1, :prompt].to(device)
    plain = DynamicCache(config=model.config)
    found: dict[str, Any] = {
        "experts": experts,
        "weights": sum(p.numel() for b in layers(model) for p in b.parameters()),
    }
    found["original"] = times(model, few, plain)
    model.to("cpu")
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        result = flatquant.quantize(model, recipe, ids, output=f"{folder}/out", device=device, verdict=False)
        found["seconds"] = time.perf_counter() - start
        timing = result.report["timing"]
        found |= {"stages": timing["seconds"], "fits": timing["blocks"]}
        found |= {name: timing[name] for name in ("peak_device_bytes", "peak_host_bytes", "estimate")}
        found["losses"] = [block["losses"] for block in result.report["blocks"]]
        found["sizes"] = {k: v for k, v in result.report["sizes"].items() if k.endswith("_bytes")}
        del model, result
        served = flatquant.load(f"{folder}/out", device=device)
    found["packed"] = times(served, few, QuantizedCache(served))
    together = logits_of(served, few)
    with one_after_another():
        found["one_after_another"] = times(served, few, QuantizedCache(served))
        alone = logits_of(served, few)
    found["difference"] = float((together - alone).norm() / alone.norm())
    found["agrees"] = found["difference"] <= AGREES
    return found | {"prompt": few.shape[1]}


def layers(model: Any) -> list[nn.Module]:
    return list(model.model.layers)


@torch.no_grad()
def logits_of(model: Any, ids: Tensor) -> Tensor:
    return model(ids).logits.float()


@torch.no_grad()
def times(model: Any, ids: Tensor, cache: Any, repeats: int = 6) -> dict[str, Any]:
    """Milliseconds of each block, for a prompt and for a token after it; bytes of the cache in between."""
    whole = [timed(model, lambda: model(ids, use_cache=False)) for _ in range(repeats)]
    model(ids, **{CACHE: cache})
    kept = cache.nbytes() if isinstance(cache, QuantizedCache) else sum(t.nbytes for t in _tensors(cache))
    step = [timed(model, lambda: model(ids[:, :1], **{CACHE: cache})) for _ in range(repeats)]
    return {"prompt_ms": medians(whole), "token_ms": medians(step), "cache_bytes": kept}


def _tensors(cache: Any) -> Iterator[Tensor]:
    for layer in cache.layers:
        yield from (layer.keys, layer.values)


def medians(runs: list[list[float]]) -> list[float]:
    """By block; the first run compiles."""
    return [statistics.median(ms) for ms in zip(*runs[1:], strict=True)]


def timed(model: Any, call: Callable[[], Any]) -> list[float]:
    """Milliseconds of every block in a call, one after another on the device."""
    moments: list[float] = []

    def note(*_: Any) -> None:
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        moments.append(time.perf_counter())

    handles = [h for b in layers(model) for h in (b.register_forward_pre_hook(note), b.register_forward_hook(note))]
    try:
        call()
    finally:
        for handle in handles:
            handle.remove()
    return [1000 * (after - before) for before, after in zip(moments[::2], moments[1::2], strict=True)]


@contextlib.contextmanager
def one_after_another() -> Iterator[None]:
    """Without grouped products."""
    before = grouped_linear.gains
    grouped_linear.gains = linear.gains = lambda device: False
    try:
        yield
    finally:
        grouped_linear.gains = linear.gains = before


# ------------------------------------------------------------------------------------------------ planned


@dataclasses.dataclass(frozen=True)
class Rates:
    """Seconds of one H100, by weight: of a fit for a token that passes it and for a step, of other stages."""

    token: float
    step: float
    forward: float
    rest: float  # folding and rounding

    @classmethod
    def of(cls, measured: dict[str, Any]) -> Rates:
        """From two runs of Llama-3-70B's shape, whose batches differ: their epochs have the same tokens."""
        many, one = (shape_of(measured, part) for part in ("llama-3-70b", "llama-3-70b-batch-1"))
        seconds = [statistics.mean(run["last_epoch_seconds"]) for run in (many, one)]
        steps = [run["samples"] // run["batch"] for run in (many, one)]
        weights, tokens = llama_weights(many), many["samples"] * many["seqlen"]
        step = (seconds[1] - seconds[0]) / (steps[1] - steps[0])
        stages = many["stages"]
        return cls(
            token=(seconds[0] - step * steps[0]) / (tokens * weights),
            step=step / weights,
            forward=stages["full precision"] / (tokens * weights),
            rest=(stages["fold"] + stages["solve"]) / weights,
        )

    def epoch(self, tokens: int, steps: int, passed: int, weights: int) -> float:
        """Seconds of one epoch of a block."""
        return tokens * passed * self.token + steps * weights * self.step


def shape_of(measured: dict[str, Any], part: str) -> dict[str, Any]:
    return next(s for s in measured["samples"] if s["part"] == part)


def llama_weights(run: dict[str, Any]) -> int:
    """Of a block of Llama-3's shape with 8 heads of keys of 128 channels."""
    h, i = run["hidden"], run["intermediate"]
    return h * (2 * h + 2 * 8 * 128) + 3 * h * i


def plan(measured: dict[str, Any], ranks: tuple[int, ...] = (1, 8)) -> dict[str, Any]:
    """What DeepSeek-V3 would take, from fits of another shape and from its own."""
    rates, (model, modules) = Rates.of(measured), empty(V3["n_routed_experts"], V3["num_hidden_layers"])
    recipe = RECIPES["flatquant"]("w4a4kv4")
    assert recipe.fit is not None
    tokens, steps = recipe.data.samples * recipe.data.seqlen, recipe.data.samples // recipe.fit.batch_size
    made = make_plan(recipe, arch_of(model.config), Geometry.of(model.config), modules)
    # Blocks of a kind, by their weights and those that a token passes.
    counted: dict[tuple[int, int], int] = {}
    for block, block_plan in zip(modules, made.blocks, strict=True):
        weights = linear_weights(block, block_plan)
        shares = [part(site) for site in block_plan.sites.values()]
        key = sum(weights), round(sum(w * share for w, share in zip(weights, shares, strict=True)))
        counted[key] = counted.get(key, 0) + 1
    rows = []
    for (weights, passed), count in counted.items():
        epoch = rates.epoch(tokens, steps, passed, weights)
        shared = tokens * passed * rates.forward
        rows.append(
            {
                "blocks": count,
                "weights": weights,
                "passed": passed,
                "epoch_seconds": epoch,
                "fit_seconds": recipe.fit.epochs * epoch,
                "full_precision_seconds": shared,
                "other_seconds": weights * rates.rest,
            }
        )
    hours = {
        str(n): sum(
            r["blocks"] * ((r["fit_seconds"] + r["other_seconds"]) / n + r["full_precision_seconds"]) for r in rows
        )
        / 3600
        for n in ranks
    }
    return {
        "rates": dataclasses.asdict(rates),
        "check": check(measured, rates),
        "exponents": {axis: found["exponent"] for axis, found in measured["metrics"]["growth"].items()},
        "blocks": rows,
        "hours": hours,
        "tokens": tokens,
        "epochs": recipe.fit.epochs,
        "memory": {name: memory(model, modules, RECIPES[name]("w4a4kv4")) for name in ("flatquant", "gptq", "rtn")},
        "memory_by_experts": {str(count): memory(*empty(count), recipe) for count in EXPERTS},
        "bytes": traffic(model, made, modules),
        "cache_bytes": cache_bytes(made),
    }


def empty(experts: int, blocks: int = 4) -> tuple[Any, nn.ModuleList]:
    """V3 without numbers, and its blocks: three without experts, the others with so many."""
    sizes: dict[str, Any] = V3 | {"n_routed_experts": experts, "num_hidden_layers": blocks}
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(DeepseekV3Config(**sizes), dtype=torch.bfloat16)
    modules = blocks_at(model, arch_of(model.config).blocks)
    open_experts(modules)
    return model, modules


def part(site: Any) -> float:
    """The share of a site's weights that one token passes: of experts, as many as it is sent to."""
    if not site.experts:
        return 1.0
    groups = [len(group) for group in site.groups]
    chosen = V3["num_experts_per_tok"]
    each = max(groups)  # linears of an expert; those that every token passes read the site as well
    shared = sum(groups) - site.experts * each if len(groups) > site.experts else 0
    return (chosen * each + shared) / (site.experts * each + shared)


def check(measured: dict[str, Any], rates: Rates) -> dict[str, float]:
    """Seconds of an epoch of Llama-3-8B's shape: by the rates, and measured."""
    run = shape_of(measured, "llama-3-8b")
    tokens, weights = run["samples"] * run["seqlen"], llama_weights(run)
    planned = rates.epoch(tokens, run["samples"] // run["batch"], weights, weights)
    return {"planned": planned, "measured": statistics.mean(run["last_epoch_seconds"])}


def memory(model: Any, modules: nn.ModuleList, recipe: Recipe) -> dict[str, int]:
    """What a streamed run of a recipe would need on a GPU, in host memory and on disk, in bytes."""
    made = make_plan(recipe, arch_of(model.config), Geometry.of(model.config), modules)
    shape = (recipe.data.samples, recipe.data.seqlen) if recipe.needs_data else None
    limits = Limits(device=1 << 60, host=1 << 60)
    device = torch.device("cuda")
    found = estimate(
        model, made, recipe, shape=shape, device=device, dtype=torch.bfloat16, limits=limits, streamed=True, windows=1
    )
    return {"device": found.device, "host": found.host, "disk": found.disk}


def traffic(model: Any, made: Any, modules: nn.ModuleList) -> dict[str, int]:
    """Bytes that are read and written once: a float8 checkpoint, the state with a byte a weight, the packed folder."""
    weights = sum(sum(linear_weights(b, p)) for b, p in zip(modules, made.blocks, strict=True))
    ends = 2 * sum(p.numel() for name, p in model.named_parameters() if ".layers." not in name)
    return {"read": weights + ends, "to_device": 2 * weights, "state": weights, "written": weights // 2 + ends}


def cache_bytes(made: Any) -> dict[str, int]:
    """Of a token, in all blocks: of `QuantizedCache`, and in bfloat16."""
    packed = sum(token_bytes(b.key_dim, b.keys) + token_bytes(b.value_dim, b.values) for b in made.blocks)
    return {"packed": packed, "bfloat16": sum(2 * (b.key_dim + b.value_dim) for b in made.blocks)}


# ------------------------------------------------------------------------------------------------ the script


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["blocks", "plan"], required=True)
    parser.add_argument("--experts", type=int, nargs="+", default=[32, 80])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--out", default=str(RESULTS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="a dry run that measures nothing")
    args = parser.parse_args()
    out = Path(args.out)
    if args.part == "plan":
        measured = json.loads((RESULTS / "calibration-h100.json").read_text())
        source = {"file": "calibration-h100", "device": measured["device"], "commit": measured["commit"]}
        write_result(out / f"{PLAN}.json", PLAN, seeds=[0], samples=[source], metrics=plan(measured))
        return
    recipe = RECIPES["flatquant"]("w4a4kv4")
    assert recipe.fit is not None
    samples, seqlen = (4, 16) if args.tiny else (args.samples, recipe.data.seqlen)
    fit = dataclasses.replace(recipe.fit, epochs=args.epochs, batch_size=2 if args.tiny else 4)
    recipe = dataclasses.replace(recipe, fit=fit, data=DataSpec(samples=samples, seqlen=seqlen))
    path = out / f"{NAME}.json"
    rows = [] if args.tiny else read_samples(path)
    for experts in [4, 8] if args.tiny else args.experts:
        row = blocks(experts, recipe, torch.device(args.device), prompt=12 if args.tiny else 2048, tiny=args.tiny)
        print(json.dumps({k: v for k, v in row.items() if k != "losses"}), flush=True)
        assert row["agrees"], f"grouped products differ by {row['difference']}"
        rows.append({"samples": samples, "seqlen": seqlen, "epochs": args.epochs, **row})
        write_result(path, NAME, seeds=[0], samples=rows, metrics=metrics(rows))


def metrics(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Bytes of a token in the cache, and how times grow with the number of experts."""
    last = rows[-1]
    tokens = last["prompt"] * len(last["fits"])
    return {
        "cache_bytes_of_a_token_and_block": {
            "packed": last["packed"]["cache_bytes"] / tokens,
            "original": last["original"]["cache_bytes"] / tokens,
        },
        "fit_seconds_by_experts": {row["experts"]: row["fits"][-1] for row in rows},
        "peak_device_bytes_by_experts": {row["experts"]: row["peak_device_bytes"] for row in rows},
    }


if __name__ == "__main__":
    main()
