"""vLLM against `flatquant.load` on the same tokens: log-probabilities, rounded keys, and KL to the original.

    FLATQUANT_DATA=DATA python -m benchmarks.vllm_parity --folders FOLDER       # in the environment of `make test-vllm`

A model is quantised at each scheme (without a fit: this measures serving, not quality) and served by vLLM in this
process. Four comparisons tell what a difference comes from:

- `served`: vLLM against `load`.
- `order`: `load` against itself with the prompt in 16 parts. The function and the precision are the same; sums are in
  another order, as products of few rows take them. No engine can be expected to be nearer.
- `unrounded`: `served` with the grids of keys and values taken away on both sides.
- `same_inputs`: on the queries, keys and values that vLLM gives a block, whether both give attention the same bits.

Schemes with 4-bit keys and values are served a second time with vLLM's cache in 4 bits (`packed`), which has a backend
of ours: there, only logits are compared.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

# Before vLLM is imported: the engine runs in this process, so that its model can be looked at.
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}

import torch
import vllm
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

from benchmarks.common import RESULTS, read_samples, write_result
from flatquant import api, recipes
from flatquant.data import calibration_tokens, evaluation_windows
from flatquant.engines.vllm.support import PACKED
from flatquant.models import load_model
from flatquant.runtime import artifact, fused
from flatquant.runtime.keyvalue import FrozenKeyValue
from flatquant.seams import CACHE, attached


class Row(NamedTuple):
    """What is measured: a scheme in a precision, with each of these caches of vLLM's."""

    scheme: str
    dtype: str
    caches: tuple[str, ...] = ("auto", PACKED)


ROWS = (
    Row("kv4", "float32"),
    Row("kv4", "bfloat16"),
    Row("w4a16kv4", "float32"),
    Row("w4a4kv4", "float32"),
    Row("w4a16", "float32", ("auto",)),
)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PARTS = 16  # of two or four, sums are the same to the last bit
WITHIN = (1e-4, 1e-3, 1e-2, 1e-1)  # differences of log-probabilities that are counted
SEED = 0


def recipe_of(scheme: str) -> Any:
    """The quick preset where its fit begins: balanced scales, Hadamard factors, means of keys, clips."""
    made = recipes.flatquant(scheme, preset="quick")
    return dataclasses.replace(made, end_to_end=None, data=dataclasses.replace(made.data, samples=8, seqlen=128))


def folder_of(model: str, scheme: str, folders: Path) -> Path:
    """The quantised folder, made where there is none."""
    folder = folders / f"{model}-{scheme}"
    if not folder.exists():
        original, tokenizer = load_model(model)
        recipe = recipe_of(scheme)
        data = recipe.data
        tokens = calibration_tokens("wikitext2", tokenizer, samples=data.samples, seqlen=data.seqlen, seed=SEED)
        api.quantize(original, recipe, tokens, tokenizer=tokenizer, output=folder, verdict=False)
    return folder


# --------------------------------------------------------------------------------------------- the two sides


class Keys(list):
    """Keys as attention gets them, (tokens, heads * d), block after block, in the order of calls."""

    def watch(self, kv: FrozenKeyValue) -> None:
        key = kv.key

        def kept(*args: Any) -> Tensor:
            out = key(*args)
            self.append(out[0].transpose(0, 1).flatten(1).float().cpu())
            return out

        kv.key = kept  # pyright: ignore[reportAttributeAccessIssue]

    def take(self, blocks: int, parts: int) -> list[Tensor]:
        """By block, the parts of a prompt joined; and begin anew."""
        assert len(self) == blocks * parts, (len(self), blocks, parts)
        found = [torch.cat(self[block::blocks]) for block in range(blocks)]
        self.clear()
        return found


@torch.no_grad()
def logits_of(model: PreTrainedModel, tokens: Tensor, parts: int = 1) -> Tensor:
    """Of one window, given in one part or in several.  # (T,) -> float32, (T - 1, V)"""
    cache: Any = DynamicCache()
    found = [model(part[None], **{CACHE: cache}).logits[0].float() for part in tokens.to(model.device).chunk(parts)]
    return torch.cat(found)[:-1].cpu()


def ours(folder: Path, dtype: torch.dtype, windows: Tensor, parts: int, unrounded: bool = False) -> Iterator[Any]:
    """Logits and keys of each window by `load`."""
    model = _loaded(folder, dtype)
    keys = Keys()
    blocks: Any = model.model.layers
    kvs = [kv for block in blocks if isinstance(kv := attached(block.self_attn), FrozenKeyValue)]
    for kv in kvs:
        if unrounded:
            kv.keys = kv.values = None
        keys.watch(kv)
    for tokens in windows:
        logits = logits_of(model, tokens, parts)
        yield logits, keys.take(len(kvs), parts) if kvs else []


def _loaded(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Computed by its modules, not by fused kernels."""
    model = artifact.load(folder, dtype=dtype, device=DEVICE)
    fused.attach(model, ())
    return model


@contextmanager
def engine(folder: Path, **options: Any) -> Iterator[LLM]:
    """vLLM's engine of a folder, in this process."""
    limits = {"gpu_memory_utilization": 0.3} if DEVICE.type == "cuda" else {}  # `load` takes memory too
    llm = LLM(model=str(folder), **{"enforce_eager": True, **limits, **options})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()


def theirs(
    folder: Path, dtype: str, windows: Tensor, cache: str, unrounded: bool = False, same: list | None = None
) -> list[Any]:
    """Logits of each window by vLLM, and keys but for those in 4 bits.

    Args:
        cache: vLLM's `kv_cache_dtype`.
        same: gets, for every block and window, whether `load` makes the same bits of the block's inputs.
    """
    keys, seen, inputs = Keys(), [], []

    def watch(model: nn.Module) -> int:
        bases = [m for name, m in model.named_modules() if name.endswith("self_attn.attn.flatquant")]
        bases = [] if cache == PACKED else bases
        for basis in bases:
            if unrounded:
                basis.kv.keys = basis.kv.values = None
            keys.watch(basis.kv)
            if same is not None:
                basis.register_forward_hook(lambda module, given, out: inputs.append((given, out)))
        model.logits_processor.register_forward_hook(lambda module, given, out: seen.append(out.float().cpu()))
        return len(bases)

    found = []
    sampling = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False, ignore_eos=True)
    length = 2 * windows.shape[1]
    options = {"max_model_len": length, "max_num_batched_tokens": length, "max_num_seqs": 1, "kv_cache_dtype": cache}
    with engine(folder, dtype=dtype, enable_prefix_caching=False, **options) as llm:
        (blocks,) = llm.apply_model(watch)
        for tokens in windows:
            seen.clear(), keys.clear(), inputs.clear()
            llm.generate([{"prompt_token_ids": tokens.tolist()}], sampling, use_tqdm=False)
            logits = torch.cat([x for x in seen if len(x) > 1])
            assert len(logits) == len(tokens) - 1, [x.shape for x in seen]
            made = keys.take(blocks, 1) if blocks else []
            if same is not None and blocks:
                same += compare_inputs(folder, dtype, inputs)
            found.append((logits, made))
    return found


@torch.no_grad()
def compare_inputs(folder: Path, dtype: str, inputs: list[Any]) -> list[dict[str, bool]]:
    """Of what vLLM gave each block: are the bits of queries, keys and values those of `load`'s modules?"""
    model: Any = _loaded(folder, getattr(torch, dtype))
    found = []
    for block, ((q, k, v, layer), out) in zip(model.model.layers, inputs, strict=True):
        kv: Any = attached(block.self_attn)
        angles = None
        if kv.key_offset is not None:
            from flatquant.rotary import Angles

            angles = Angles(*model.model.rotary_emb(k[None], torch.arange(len(k), device=k.device)[None]))
        sides = [
            kv.query(q.view(len(q), layer.num_heads, -1).transpose(0, 1)[None]),
            kv.key(k.view(len(k), layer.num_kv_heads, -1).transpose(0, 1)[None], angles),
            kv.value(v.view(len(v), layer.num_kv_heads, -1).transpose(0, 1)[None]),
        ]
        want = [side[0].transpose(0, 1).reshape(given.shape) for side, given in zip(sides, out, strict=True)]
        equal = [torch.equal(a, b) for a, b in zip(want, out, strict=True)]
        found.append(dict(zip(("query", "key", "value"), equal, strict=True)))
    return found


# --------------------------------------------------------------------------------------------- numbers


def chosen(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probabilities of the text's own tokens.  # (T - 1, V), (T,) -> (T - 1,)"""
    return logits.log_softmax(-1).gather(-1, tokens[1:, None])[:, 0]


def divergence(original: Tensor, logits: Tensor) -> Tensor:
    """KL of each token's distribution to the original's.  # (T - 1,)"""
    p, q = original.log_softmax(-1), logits.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def rounded(values: Tensor) -> list[float]:
    """For a file: five digits."""
    return [float(f"{x:.5g}") for x in values.tolist()]


def moved(a: list[Tensor], b: list[Tensor]) -> list[float]:
    """By block, the share of keys that lie on another step of their grid: farther apart than 1 % of the row's range."""
    found = []
    for x, y in zip(a, b, strict=True):
        span = (x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True)).clamp(min=1e-9)
        found.append(((x - y).abs() > span / 100).float().mean().item())
    return found


def difference(a: Any, b: Any, windows: Tensor) -> dict[str, Any]:
    """Of two sides' (logits, keys) of all windows; of keys, if both have some."""
    pairs = list(zip(a, b, windows, strict=True))
    apart = torch.cat([(chosen(x[0], t) - chosen(y[0], t)).abs() for x, y, t in pairs])
    keys = [moved(x[1], y[1]) if x[1] else [] for x, y, _ in pairs]
    by_block = [sum(block) / len(keys) for block in zip(*keys, strict=True)]
    return {"logprob_differences": rounded(apart), "keys_moved_by_block": [float(f"{x:.4g}") for x in by_block]}


def summary(made: dict[str, Any]) -> dict[str, Any]:
    """What documents show of a comparison."""
    apart = torch.tensor(made["logprob_differences"])
    blocks = made["keys_moved_by_block"]
    return {
        "median": apart.median().item(),
        "largest": apart.max().item(),
        "within": {str(bound): (apart < bound).float().mean().item() for bound in WITHIN},
        **({"keys_moved_first": blocks[0], "keys_moved_last": blocks[-1]} if blocks else {}),
    }


def mean_of(values: list[float]) -> dict[str, float]:
    x = torch.tensor(values, dtype=torch.float64)
    return {"mean": x.mean().item(), "standard_error": (x.std() / len(x) ** 0.5).item()}


def measured(original: list[Tensor], folder: Path, row: Row, windows: Tensor, say: Callable) -> list[dict[str, Any]]:
    """One scheme in one precision; with each cache that it has."""
    real = getattr(torch, row.dtype)
    loaded, apart = (list(ours(folder, real, windows, parts)) for parts in (1, PARTS))
    order = difference(apart, loaded, windows)
    samples = []
    for cache in row.caches:
        same: list[dict[str, bool]] = []
        served = theirs(folder, row.dtype, windows, cache, same=same)
        say(f"{row}: served with the cache {cache}")
        sample: dict[str, Any] = {"scheme": row.scheme, "dtype": row.dtype, "cache": cache, "seed": SEED}
        sample["served"], sample["order"] = difference(served, loaded, windows), order
        reference = [logits for logits, _ in loaded]
        sides = (("load", original, loaded), ("vllm", original, served), ("vllm to load", reference, served))
        sample["kl"] = {
            name: rounded(torch.cat([divergence(o, logits) for o, (logits, _) in zip(whence, side, strict=True)]))
            for name, whence, side in sides
        }
        if same:
            sample["same_inputs"] = {name: sum(s[name] for s in same) / len(same) for name in same[0]}
        if row == ROWS[0] and cache == "auto":
            unrounded = theirs(folder, row.dtype, windows, cache, unrounded=True)
            sample["unrounded"] = difference(unrounded, list(ours(folder, real, windows, 1, unrounded=True)), windows)
        samples.append(sample)
    return samples


def metrics_of(sample: dict[str, Any]) -> dict[str, Any]:
    """What documents show of a sample."""
    found: dict[str, Any] = {k: summary(sample[k]) for k in ("served", "order", "unrounded") if k in sample}
    kl = sample["kl"]
    between = [a - b for a, b in zip(kl["vllm"], kl["load"], strict=True)]
    found["kl"] = {name: mean_of(values) for name, values in {**kl, "vllm - load": between}.items()}
    return found | {k: sample[k] for k in ("same_inputs",) if k in sample}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--schemes", nargs="+", default=list(dict.fromkeys(row.scheme for row in ROWS)))
    parser.add_argument("--folders", required=True, help="where quantised folders are, or are put")
    parser.add_argument("--windows", type=int, default=3)
    parser.add_argument("--length", type=int, default=128, help="tokens in a window")
    parser.add_argument("--out", default=str(RESULTS), help="where the results file is, or is put; it is added to")
    args = parser.parse_args()

    def say(line: str) -> None:
        print(line, flush=True)

    model, tokenizer = load_model(args.model, dtype=torch.float32)
    windows = evaluation_windows("wikitext2", tokenizer, seqlen=args.length, windows=args.windows)
    original = [logits_of(model, tokens) for tokens in windows]
    del model
    name = f"vllm-parity-{args.model}"
    path = Path(args.out) / f"{name}.json"
    samples = read_samples(path)
    done = {(sample["scheme"], sample["dtype"]) for sample in samples}
    settings = {"windows": args.windows, "length": args.length, "text": "wikitext2", "vllm": vllm.__version__}
    for row in ROWS:
        if row.scheme not in args.schemes or (row.scheme, row.dtype) in done:
            continue
        folder = folder_of(args.model, row.scheme, Path(args.folders))
        say(f"{row.scheme}: quantised")
        samples += measured(original, folder, row, windows, say)
        metrics = {title(sample): metrics_of(sample) for sample in samples}
        write_result(path, name, seeds=[SEED], samples=samples, metrics=metrics | settings)
        say(f"{row}: {metrics[title(samples[-1])]}")


def title(sample: dict[str, Any]) -> str:
    """Of a row in documents."""
    return f"{sample['scheme']} {sample['dtype']}" + (" packed" if sample["cache"] == PACKED else "")


if __name__ == "__main__":
    main()
