"""Write the tables of README.md and docs from benchmarks/results/*.json, between their markers.

One comes from the code itself: which methods go with which families.

    python -m benchmarks.tables            rewrites the documents
    python -m benchmarks.tables --check    says which would change, exit code 1 if any

A table stands between `<!-- table: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import itertools
import json
import re
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = (
    "README.md",
    "docs/experiments.md",
    "docs/benchmarks.md",
    "docs/runtime.md",
    "docs/families.md",
    "docs/schemes.md",
    "docs/scale.md",
    "docs/vllm.md",
)
# The original implementation in the same setting; see docs/experiments.md, "Fidelity to the paper".
ORIGINAL_PERPLEXITY, ORIGINAL_SECONDS = 29.32, 842
LABELS = {
    "w4a4kv4": "FlatQuant W4A4KV4",
    "w4a16": "FlatQuant W4A16",
    "w3a16": "FlatQuant W3A16",
    "kv4": "FlatQuant KV4 only",
    "w4a4kv4-plain": "no transform W4A4KV4",
    "w4a16-plain": "no transform W4A16",
    "w3a16-plain": "no transform W3A16",
}

FORMS = {"wikitext2": ".2f", "c4": ".2f", "kl-wikitext2": ".3f", "kl-c4": ".3f"}


def read(name: str) -> dict[str, Any]:
    """One results file."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def reference() -> list[str]:
    """Perplexity of SmolLM2-135M under the reference preset."""
    result = read("smollm2-reference")
    lines = ["| SmolLM2-135M | weights | WikiText-2 | C4 | seeds |", "|---|---|---|---|---|"]
    metrics = result["metrics"]
    original = metrics["original"]
    lines.append(f"| fp16 | - | {original['wikitext2']:.2f} | {original['c4']:.2f} | - |")
    for row in sorted(metrics["mean"], key=lambda r: (list(LABELS).index(r["configuration"]), r["solver"] != "rtn")):
        label = LABELS[row["configuration"]]
        lines.append(
            f"| {label} | {row['solver'].upper()} | {row['wikitext2']:.2f} | {row['c4']:.2f} | {row['seeds']} |"
        )
    lines.append(f"| original implementation, W4A4KV4 | RTN | {ORIGINAL_PERPLEXITY} | - | 1 |")
    # Some runs shared the device; their times mean nothing.
    timed = [s for s in result["samples"] if s["configuration"] == "w4a4kv4" and s.get("alone", True)]
    timed = [s for s in timed if not s["fit_reused"]]
    if timed:
        seconds = statistics.mean(s["calibration_seconds"] for s in timed)
        memory = max(s["peak_memory_bytes"] for s in timed) / 2**30
        lines += [
            "",
            f"Calibration alone on one {result['device']}: {seconds:.0f} s, {memory:.1f} GiB peak",
            f"(original implementation on the same kind of GPU: {ORIGINAL_SECONDS} s).",
        ]
    return lines


def quick() -> list[str]:
    """Variants of the quick preset."""
    result = read("quick-preset")
    lines = ["| variant | trained tokens | first and last KL | perplexity, 20 windows |", "|---|---|---|---|"]
    for s in sorted(result["samples"], key=lambda s: s["perplexity"]):
        first, last = s["divergence"] or (None, None)
        kl = f"{first:.3f}, {last:.3f}" if s["divergence"] else "-"
        lines.append(f"| {s['variant']} | {s['trained_tokens']:,} | {kl} | {s['perplexity']:.2f} |")
    return lines


def best() -> list[str]:
    """Variants of the best preset."""
    result = read("best-preset")
    original, rows = result["metrics"]["original"], result["metrics"]["mean"]
    lines = ["| variant | WikiText-2 | C4 | KL, WikiText-2 | KL, C4 | seconds | seeds |", "|---" * 7 + "|"]
    lines.append(f"| original, fp16 | {original['wikitext2']:.2f} | {original['c4']:.2f} | - | - | - | - |")
    for name, row in sorted(rows.items(), key=lambda item: item[1]["wikitext2"]):
        texts = " | ".join(f"{row[key]:{form}}" for key, form in FORMS.items())
        lines.append(f"| {name} | {texts} | {row['seconds']:.0f} | {len(row['seeds'])} |")
    return lines


def best_again() -> list[str]:
    """The best preset as it is now."""
    result = read("best-preset-h200")
    original, rows = result["metrics"]["original"], result["metrics"]["mean"]
    lines = ["| | WikiText-2 | C4 | KL, WikiText-2 | KL, C4 | seeds |", "|---" * 6 + "|"]
    lines.append(f"| original, fp16 | {original['wikitext2']:.2f} | {original['c4']:.2f} | - | - | - |")
    for name, row in rows.items():
        texts = " | ".join(f"{row[key]:{form}}" for key, form in FORMS.items())
        lines.append(f"| {name} | {texts} | {len(row['seeds'])} |")
    return lines


def calibration_text() -> list[str]:
    """What windows an end-to-end fit sees."""
    rows = read("calibration-text-smollm2-135m")["metrics"]["rows"]
    lines = ["| windows | KL, WikiText-2 | KL, C4 | KL, code | last losses | held out |", "|---" * 6 + "|"]
    for name, row in rows.items():
        texts = " | ".join(f"{value:.3f}" for value in row["kl"].values())
        lines.append(f"| {name} | {texts} | {row['last']:.3f} | {row['held_out'][1]:.3f} |")
    return lines


def ablation() -> list[str]:
    """One change at a time, on a CPU."""
    result = read("ablation-small")
    lines = ["| variant | KL, WikiText-2 | each seed | KL, C4 | each seed |", "|---" * 5 + "|"]
    rows = result["metrics"]["rows"]
    for name, row in sorted(rows.items(), key=lambda item: item[1]["wikitext2"]["mean"]):
        cells = [
            f"{row[text]['mean']:.3f} | {', '.join(f'{v:.3f}' for v in row[text]['each'])}"
            for text in ("wikitext2", "c4")
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def calibration() -> list[str]:
    """What a calibration costs, and what the whole preset would."""
    samples = {s["part"]: s for s in read("calibration-h100")["samples"] if "error" not in s}
    head = ("", "blocks, epochs", "seconds", "times its arithmetic", "GPU busy", "peak GiB", "estimate")
    head += ("reserved", "limit", "whole preset")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for part, s in samples.items():
        if "peak_device_bytes" not in s or s["part"] == "growth":
            continue
        sizes = (s["peak_device_bytes"], s["estimate"]["device"], s["reserved_device_bytes"], s.get("max_memory"))
        peak = " | ".join("-" if size is None else f"{size / 2**30:.1f}" for size in sizes)
        whole = s["extrapolated"]["model_seconds"] / 60 if "extrapolated" in s else None
        lines.append(
            f"| {part} | {s['blocks']}, {s['epochs']} | {s['seconds']:.0f} | {s['fit_over_limit']:.1f} | "
            f"{s['gpu_busy']:.0%} | {peak} | {'-' if whole is None else f'{whole:.0f} min'} |"
        )
    return lines


def growth() -> list[str]:
    """How the time of a step grows."""
    lines = ["| axis | exponent of time | of the largest two | of operations |", "|---|---|---|---|"]
    for axis, row in read("calibration-h100")["metrics"]["growth"].items():
        lines.append(f"| {axis} | {' | '.join(f'{value:.2f}' for value in row.values())} |")
    return lines


def clip_start() -> list[str]:
    """Where learned clips start."""
    result = read("clip-start")
    lines = ["| weights | activations, keys, values | KL | top-1 | perplexity |", "|---|---|---|---|---|"]
    for s in result["samples"]:
        lines.append(f"| {s['weights']} | {s['others']} | {s['kl']:.3f} | {s['top1']:.1%} | {s['perplexity']:.1f} |")
    return lines


def block_transforms() -> list[str]:
    """Transforms for formats in blocks: KL divergence and perplexity, fixed matrices beside trained ones."""
    samples = read("block-transforms")["samples"]
    head = [f"{made}{how}" for made in ("fixed Hadamard, RTN", "`quick`, trained") for how in ("", ", scales searched")]
    lines = [f"| format | transform | {' | '.join(head)} |", "|---" * 6 + "|"]
    for scheme, transform in dict.fromkeys((s["scheme"], s["transform"]) for s in samples):
        cells = []
        for variant in itertools.product((False, True), ("none", "search")):
            key = (scheme, transform, *variant)
            found = [s for s in samples if (s["scheme"], s["transform"], s["learned"], s["clip"]) == key]
            cells.append(f"{found[0]['kl']:.3f}, {found[0]['perplexity']:.1f}" if found else "-")
        lines.append(f"| `{scheme}` | {transform} | {' | '.join(cells)} |")
    return lines


def demo() -> list[str]:
    """The demo on a CPU."""
    result = read("demo-cpu")
    lines = ["| | KL to the original | top-1 agreement | WikiText-2 perplexity | seconds |", "|---|---|---|---|---|"]
    for name, row in result["metrics"]["rows"].items():
        perplexity = f"{row['perplexity']:.1f}" if row.get("perplexity") is not None else "-"
        seconds = f"{row['seconds']:.0f}" if row["seconds"] is not None else "-"
        lines.append(f"| {name} | {row['kl']:.3f} | {row['top1']:.1%} | {perplexity} | {seconds} |")
    total = result["metrics"]["seconds"]
    lines += ["", f"In all {total / 60:.1f} minutes on {result['device']}."]
    return lines


def over_seeds(name: str, what: str, value: str, form: str) -> list[str]:
    """One row for every variant of a results file whose samples are numbers by variant."""
    result = read(name)
    lines = [f"| {what} | {value}, mean | least and largest over seeds |", "|---|---|---|"]
    for variant, mean in result["metrics"].items():
        values = [s[variant] for s in result["samples"]]
        lines.append(f"| {variant} | {mean:{form}} | {min(values):{form}}, {max(values):{form}} |")
    return lines


def compared() -> list[str]:
    """Every method at every scheme, the best first; empty until there are results."""
    try:
        metrics = read("compare-smollm2")["metrics"]
    except FileNotFoundError:
        return ["Not measured yet."]
    lines = [
        "| scheme | method | perplexity | KL | top-1 | bits per weight | seconds | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    (original,) = metrics["original"]["perplexity"].values()
    lines.append(f"| - | original | {original:.2f} | - | - | 16 | - | |")
    rows = [(*job.split("/"), row) for job, row in metrics["rows"].items() if "error" not in row]
    schemes = ("w4a4kv4", "w4a16", "w3a16", "w2a16")
    for scheme in schemes:
        at = [(method, row) for method, where, row in rows if where == scheme]
        for method, row in sorted(at, key=lambda pair: pair[1]["kl"]):
            quality = f"{row['perplexity']:.2f} | {row['kl']:.3f} | {row['top1']:.1%}"
            seconds = f"{row['seconds']:.0f}" if row["alone"] else "-"
            cost = f"{row['bits_per_weight']:.2f} | {seconds}"
            lines.append(f"| {scheme} | {method} | {quality} | {cost} | {row['note']} |")
    return lines


def low_bits() -> list[str]:
    """Weights at few bits, and activations at four, without a fit."""
    result = read("low-bits")
    lines = ["| three blocks | KL | top-1 |", "|---|---|---|"]
    for s in sorted(result["samples"], key=lambda s: (s["variant"][:2], s["kl"])):
        lines.append(f"| {s['variant']} | {s['kl']:.3f} | {s['top1']:.1%} |")
    return lines


def zeroshot() -> list[str]:
    """Zero-shot accuracy of every variant, with standard errors, and the drop of the mean against the original."""
    scores = read("zeroshot-smollm2")["scores"]
    tasks = list(scores["original"])
    lines = [f"| W4A4KV4 | {' | '.join(tasks)} | mean | drop |", "|---" * (len(tasks) + 3) + "|"]
    whole = statistics.mean(s["value"] for s in scores["original"].values())
    for variant, found in scores.items():
        each = " | ".join(f"{100 * found[t]['value']:.1f} ± {100 * found[t]['stderr']:.1f}" for t in tasks)
        mean = statistics.mean(found[t]["value"] for t in tasks)
        drop = "-" if variant == "original" else f"{100 * (whole - mean):.1f}"
        lines.append(f"| {variant} | {each} | {100 * mean:.1f} | {drop} |")
    return lines


def first_site() -> list[str]:
    """The first fused kernel of a site against moving its bytes."""
    rows = [s for s in read("first-site-kernel")["samples"] if s["tokens"] in (1, 8192)]
    lines = ["| n | 1 token, us | 8192 tokens, us | moving the bytes, us | times |", "|---|---|---|---|---|"]
    for one, many in zip(rows[::2], rows[1::2], strict=True):
        what = one["what"].removeprefix("transform and quantise ")
        times = [1e3 * one["ms"], 1e3 * many["ms"], 1e3 * many["baseline_ms"]]
        cells = f"{times[0]:.1f} | {times[1]:.0f} | {times[2]:.0f}"
        lines.append(f"| {what} | {cells} | {times[1] / times[2]:.1f} |")
    return lines


def second_site() -> list[str]:
    """The second one, by its fastest settings."""
    samples = read("second-site-kernel")["samples"]
    lines = ["| n | tokens | us | moving the bytes, us | times |", "|---|---|---|---|---|"]
    for what, tokens in dict.fromkeys((s["what"], s["tokens"]) for s in samples):
        rows = [s for s in samples if (s["what"], s["tokens"]) == (what, tokens)]
        times = [s["ms"] for s in rows if "ms" in s]
        n, base = what.split()[1].rstrip(","), rows[0]["baselines"]["bytes"]
        cells = f"{1e3 * min(times):.1f} | {1e3 * base:.1f} | {min(times) / base:.1f}" if times else "wrong | - | -"
        lines.append(f"| {n} | {tokens} | {cells} |")
    return lines


def _runtime_rows(start: str) -> list[dict[str, Any]]:
    return [s for s in read("runtime-h100")["samples"] if s["what"].startswith(start)]


def third_site() -> list[str]:
    """The third one, as it is launched."""
    lines = ["| n | 1 token, us | 8192 tokens, us | moving the bytes, us | times |", "|---|---|---|---|---|"]
    rows = _runtime_rows("transform and quantise")
    for what in dict.fromkeys(s["what"] for s in rows):
        one, many = (next(s for s in rows if (s["what"], s["tokens"]) == (what, tokens)) for tokens in (1, 8192))
        ms, base = many["ms"], many["baseline_ms"]
        cells = f"{1e3 * one['ms']:.1f} | {1e3 * ms:.0f} | {1e3 * base:.0f} | {ms / base:.2f}"
        lines.append(f"| {what.removeprefix('transform and quantise ')} | {cells} |")
    return lines


def few_tokens() -> list[str]:
    """Products with packed weights: how many times faster than bfloat16."""
    rows = _runtime_rows("product")
    counts = sorted({s["tokens"] for s in rows})
    tokens = " | ".join(f"{t} token{'s' if t > 1 else ''}" for t in counts)
    lines = [f"| weights | {tokens} |", "|---" * (len(counts) + 1) + "|"]
    for what in dict.fromkeys(s["what"] for s in rows):
        cells = " | ".join(
            f"{next(s['ratio'] for s in rows if (s['what'], s['tokens']) == (what, t)):.1f}" for t in counts
        )
        lines.append(f"| {what.removeprefix('product ')} | {cells} |")
    return lines


def attention() -> list[str]:
    """One token's attention over the packed cache: before, after, and moving its bytes."""
    lines = ["| heads of | sequences | before, us | after, us | moving the bytes, us | times |", "|---" * 6 + "|"]
    before, after = (
        [s for s in read(name)["samples"] if s["what"].startswith("attention") and "ms" in s]
        for name in ("tune-runtime-h100", "tune-attention-h100")
    )
    for old in (s for s in before if s["today"]):
        same = [s for s in after if (s["what"], s["tokens"]) == (old["what"], old["tokens"])]
        launched = {"parts": old["settings"]["parts"], "block": 64, "warps": 2, "stages": 3}
        new = next(s for s in same if s["settings"] == launched)
        times = [1e3 * t for t in (old["ms"], new["ms"], new["baselines"]["bytes"])]
        cells = " | ".join(f"{t:.1f}" for t in times)
        lines.append(f"| {SHAPES[old['what'].split()[1]]} | {old['tokens']} | {cells} | {times[1] / times[2]:.1f} |")
    return lines


def whole_models(shapes: dict[str, str], *files: str) -> list[str]:
    """Prefill and decoding of whole models: milliseconds, and how many times faster than bfloat16."""
    lines = ["| | sequences | bfloat16, ms | packed, ms | times faster |", "|---" * 5 + "|"]
    rows = [row for file in files for row in read(file)["samples"] if row["what"].endswith("kronecker")]
    for shape, label in shapes.items():
        for row in (row for row in rows if row["what"].startswith(f"{shape} ")):
            part = "prefill" if "prefill" in row["what"] else "decode"
            sequences = 1 if part == "prefill" else row["tokens"]
            times = f"{row['baseline_ms']:.2f} | {row['ms']:.2f} | {row['ratio']:.2f}"
            lines.append(f"| {label}, {part} | {sequences} | {times} |")
    return lines


def output_layer() -> list[str]:
    """An output layer in 8 bits: microseconds of few tokens, of bfloat16, and of moving its bytes."""
    lines = ["| output layer | tokens | 8 bits, us | bfloat16, us | its bytes, us |", "|---|---|---|---|---|"]
    for s in read("tune-head-h200")["samples"]:
        if s["today"]:
            times = (s["ms"], s["baselines"]["bf16"], s["baselines"]["bytes"])
            lines.append(f"| {s['what'][5:]} | {s['tokens']} | {' | '.join(f'{1e3 * t:.0f}' for t in times)} |")
    return lines


def fit_step() -> list[str]:
    """A step of a block-wise fit by its kernels, with one block at a time and with several."""
    lines = [
        "| blocks at a time | a step of a block, ms | some kernel runs, ms | all kernels, ms | kernels | under 4 us "
        "| launching records, ms |",
        "|---" * 7 + "|",
    ]
    for s in read("calibration-steps-h200")["samples"]:
        times = [f"{s[name]:.2f}" for name in ("milliseconds", "busy_milliseconds", "kernel_milliseconds")]
        counts = [f"{s[name]:.0f}" for name in ("kernels", "short_kernels")]
        launch = f"{s['graph_launch_milliseconds']:.2f}"
        lines.append(f"| {s['side_by_side']} | {' | '.join((*times, *counts, launch))} |")
    return lines


def vllm_serving() -> list[str]:
    """Tokens a second of vLLM, with folders of ours and in bfloat16."""
    lines = [
        "| sequences | prompts, bfloat16 | w4a4 | output, bfloat16 | w4a4 | times faster |",
        "|---" * 6 + "|",
    ]
    for sides in read("vllm-serving-h200")["metrics"]["speed"].values():
        for sequences, plain in sides["bfloat16"].items():
            ours = sides["w4a4"][sequences]
            rates = (plain["prefill"], ours["prefill"], plain["output"], ours["output"])
            times = f"{ours['times']['output']:.2f}"
            lines.append(f"| {sequences} | {' | '.join(f'{rate:.0f}' for rate in rates)} | {times} |")
    return lines


def transforms_cost() -> list[str]:
    """How many times faster than bfloat16, by transform."""
    kinds = {"kronecker": "FlatQuant's", "hadamard": "Hadamard", "none": "none"}
    lines = [f"| | {' | '.join(kinds.values())} | FlatQuant's, if sites only moved their bytes |", "|---" * 5 + "|"]
    for shape, label in SHAPES.items():
        for tokens, part in ((2048, "prefill"), (1, "decode")):
            found = {
                kind: next(r for r in _runtime_rows(f"{shape} {part}, {kind}") if r["tokens"] == tokens)
                for kind in kinds
            }
            bound = f"{_without_transforms(shape, found['kronecker']):.2f}" if part == "prefill" else "-"
            cells = " | ".join(f"{row['ratio']:.2f}" for row in found.values())
            lines.append(f"| {label}, {part} | {cells} | {bound} |")
    return lines


def _without_transforms(shape: str, row: dict[str, Any]) -> float:
    """Times faster than bfloat16 if a prompt's site kernels took as long as moving their bytes."""
    profile = read("runtime-h100")["metrics"]["profile"][shape]
    blocks = profile["blocks"]
    sites = sum(k["us"] for k in profile["prefill"]["kernels"] if k["kernel"] == "_kernel") / blocks
    bytes_ = {int(s["what"].split()[3]): s["baseline_ms"] for s in _runtime_rows("transform") if s["tokens"] == 2048}
    hidden, inner = 4096, {"llama-2-7b": 11008, "llama-3-8b": 14336}[shape]
    # What was moved there is two bytes and a half a channel; a float8 integer is a byte, and a gate two more.
    moved = 1e3 * (3 * bytes_[hidden] * 3 / 2.5 + bytes_[inner] * 5 / 2.5)
    return row["baseline_ms"] / (row["ms"] - 32 * (sites - moved) / 1e3)


def memory(shapes: dict[str, str], *files: str) -> list[str]:
    """Bytes of weights and cache."""
    lines = ["| | weights, GiB | of bfloat16 | cache of 2,048 tokens, GiB | of bfloat16 |", "|---" * 5 + "|"]
    measured = {shape: m for file in files for shape, m in read(file)["metrics"]["memory"].items()}
    for shape, label in shapes.items():
        m = measured[shape]
        weights = f"{m['weights'] / 2**30:.2f} | {m['weights'] / m['bf16_weights']:.2f}"
        cache = f"{m['cache'] / 2**30:.2f} | {m['cache'] / m['bf16_cache']:.2f}"
        lines.append(f"| {label} | {weights} | {cache} |")
    return lines


def weight_sizes() -> list[str]:
    """Bytes of weights as shares of bfloat16's, by what is rounded."""
    lines = ["| | blocks | and the output layer | and the embedding |", "|---|---|---|---|"]
    found = {s["shape"]: s for s in read("sizes")["samples"]}
    for shape, label in {"llama-3-8b": "Llama-3-8B", "qwen3-8b": "Qwen3-8B"}.items():
        parts = [found[shape + ends] for ends in ("", "-head8", "-ends8")]
        cells = [f"{m['weights'] / 2**30:.2f} GiB, {m['weights'] / m['bf16_weights']:.3f}" for m in parts]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return lines


def ends(name: str) -> list[str]:
    """What rounding the output layer and the embedding costs and saves, with all else in 16 bit."""
    samples = read(f"ends-{name}")["samples"]
    whole = next((s["bytes"] for s in samples if s["scheme"] == "w16"), None)
    lines = ["| | KL | of the layer alone | embedded tokens are off by | folder, of 16 bit |", "|---|---|---|---|---|"]
    for s in samples:
        if s["scheme"] != "w16":
            head = "-" if s["head"] is None else f"{s['head']:.4f}"
            off = "-" if s["embedding"] is None else f"{s['embedding']:.1%}"
            label = s["scheme"].removeprefix("w16,")
            share = "-" if whole is None else f"{s['bytes'] / whole:.2f}"
            lines.append(f"| `{label}` | {s['kl']:.4f} | {head} | {off} | {share} |")
    return lines


def bounded_memory() -> list[str]:
    """`best` by how its weights are held: KL divergence on every text, and the share of its gain that is lost."""
    metrics = read("bounded-memory-smollm2-135m")["metrics"]
    texts = list(metrics["rows"]["rtn/w4a4kv4"]["kl"])
    head = [
        "weights",
        *(f"KL, {TEXTS[t]}" for t in texts),
        "WikiText-2",
        "C4",
        "gain over `reference` lost",
        "peak, GB",
    ]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    rows = {"`reference`": metrics["rows"]["reference/w4a4kv4"]}
    rows |= {f"`best`, {name}": row for name, row in metrics["memories"]["w4a4kv4"].items()}
    for name, row in rows.items():
        lost = ", ".join(f"{share:.0%}" for share in row["lost"]["reference"].values()) if "lost" in row else "-"
        cells = [f"{row['kl'][t]:.3f}" for t in texts] + [f"{row['perplexity'][t]:.2f}" for t in NAMED]
        lines.append(f"| {name} | {' | '.join(cells)} | {lost} | {row['peak_bytes'] / 1e9:.1f} |")
    return lines


def latent() -> list[str]:
    """Two blocks of DeepSeek-V3's shape: milliseconds of each before and after, and bytes of its cache."""
    (run,) = read("latent-h200")["samples"]
    lines = ["| | a prompt, ms: dense, experts | a token, ms: dense, experts | cache, MB |", "|---" * 4 + "|"]
    names = {
        "original": "bfloat16",
        "packed": "packed, experts in one product",
        "one_after_another": "packed, one by one",
    }
    for key, name in names.items():
        cells = [", ".join(f"{ms:.1f}" for ms in run[key][what]) for what in ("prompt_ms", "token_ms")]
        lines.append(f"| {name} | {' | '.join(cells)} | {run[key]['cache_bytes'] / 1e6:.2f} |")
    return lines


def latent_fit() -> list[str]:
    """What the fit of the block with experts took, by the plan's rates and measured."""
    from benchmarks.latent import Rates
    from flatquant.recipes import RECIPES

    (run,), found = read("latent-h200")["samples"], read("plan-671b")["metrics"]
    dense, experts = found["blocks"]
    fit = RECIPES["flatquant"]("w4a4kv4").fit
    assert fit is not None
    tokens, steps = run["samples"] * run["seqlen"], run["samples"] // fit.batch_size
    epoch = Rates(**found["rates"]).epoch(tokens, steps, experts["passed"], run["weights"] - dense["weights"])
    planned = run["epochs"] * epoch
    peak, told = run["peak_device_bytes"] / 1e9, run["estimate"]["device"] / 1e9
    return [
        f"The fit of the block with {run['experts']} experts took {run['fits'][-1]:.1f} s; the plan's rates, "
        f"of an H100, give {planned:.1f} s. Its peak was {peak:.0f} GB, where the estimate said {told:.0f} GB."
    ]


def devices(model: str) -> list[str]:
    """Seconds of a run's divided stages, of all of it, and its peak, on one GPU and on several."""
    lines = [
        "| run | GPUs | block-wise fits, s | end-to-end fit, s | a step, ms | all of the run, s | peak, GB | told, GB "
        "| KL | same bytes |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    found = read(f"devices-{model}")
    samples = sorted(found["samples"], key=lambda s: (s["rung"], s["devices"]))
    for s in samples:
        stages, row = s["timing"]["seconds"], found["metrics"][f"{s['rung']}, seed {s['seed']}"]
        step = row.get("step_seconds", {}).get(str(s["devices"]))
        several = len(row["hashes"]) > 1
        lines.append(
            f"| `{s['rung']}` | {s['devices']} | {stages['fit']:.1f} "
            f"| {f'{v:.1f}' if (v := stages.get('end to end')) else '-'} | {f'{1e3 * step:.0f}' if step else '-'} "
            f"| {s['timing']['total']:.1f} | {s['timing']['peak_device_bytes'] / 1e9:.1f} "
            f"| {s['timing']['estimate']['device'] / 1e9:.1f} | {s['verdict']['kl']:.3f} "
            f"| {('yes' if row['same_bits'] else 'no') if several else '-'} |"
        )
    return lines


def plan() -> list[str]:
    """Hours of DeepSeek-V3's blocks on one GPU, and of all on several."""
    found = read("plan-671b")["metrics"]
    lines = [
        "| blocks | weights of each | of which a token passes | an epoch | a fit | all of them |",
        "|---" * 6 + "|",
    ]
    for row in found["blocks"]:
        one = row["fit_seconds"] + row["full_precision_seconds"] + row["other_seconds"]
        lines.append(
            f"| {row['blocks']} | {row['weights'] / 1e9:.2f} billion | {row['passed'] / 1e9:.2f} billion | "
            f"{row['epoch_seconds']:.0f} s | {row['fit_seconds'] / 60:.1f} min | {row['blocks'] * one / 3600:.1f} h |"
        )
    return lines


def plan_hours() -> list[str]:
    """The same on several GPUs, and the rates' check."""
    found = read("plan-671b")["metrics"]
    several = ", ".join(f"{hours:.1f} h on {n}" for n, hours in found["hours"].items())
    check = found["check"]
    return [
        f"All blocks: {several}. The same rates give {check['planned']:.2f} s for an epoch of Llama-3-8B's shape, "
        f"which took {check['measured']:.2f} s."
    ]


def plan_memory() -> list[str]:
    """Device memory of a run by method and by the number of experts; host memory, files and traffic."""
    found = read("plan-671b")["metrics"]
    lines = ["| run | experts in a block | on the GPU | in host memory |", "|---" * 4 + "|"]
    for name, m in found["memory"].items():
        lines.append(f"| `{name}` | 256 | {m['device'] / 1e9:.0f} GB | {m['host'] / 1e9:.0f} GB |")
    for experts, m in found["memory_by_experts"].items():
        if experts != "256":
            lines.append(f"| `flatquant` | {experts} | {m['device'] / 1e9:.0f} GB | {m['host'] / 1e9:.0f} GB |")
    return lines


def plan_bytes() -> list[str]:
    """What is read and written once."""
    found = read("plan-671b")["metrics"]
    size, cache = found["bytes"], found["cache_bytes"]
    rows = {
        "read from a checkpoint in float8": f"{size['read'] / 1e9:.0f} GB",
        "to the GPU in bfloat16, on each rank": f"{size['to_device'] / 1e9:.0f} GB",
        "state: a byte a weight; sent to all other ranks": f"{size['state'] / 1e9:.0f} GB",
        "packed folder": f"{size['written'] / 1e9:.0f} GB",
        "cache of a token, 4 bits": f"{cache['packed'] / 1e3:.1f} kB",
        "cache of a token, bfloat16": f"{cache['bfloat16'] / 1e3:.1f} kB",
    }
    return ["| what | size |", "|---|---|", *(f"| {name} | {text} |" for name, text in rows.items())]


SHAPES = {"llama-2-7b": "Llama-2-7B", "llama-3-8b": "Llama-3-8B"}
NEWER = {
    "qwen3-8b": "Qwen3-8B",
    "qwen3-8b-head8": "Qwen3-8B, output layer in 8 bits",
    "llama-3-8b-head8": "Llama-3-8B, output layer in 8 bits",
    "gemma-3-1b": "Gemma 3 1B",
}
ENDS = {
    "llama-3-8b-ends8": "Llama-3-8B, both ends in 8 bits",
    "qwen3-8b-ends8": "Qwen3-8B, both ends in 8 bits",
}
_PARTS = {  # of a block, by what their kernels' names begin with
    "products": ("nvjet", "_vector", "_few"),
    "weights to float8": ("_expand",),
    "sites": ("_kernel",),
    "attention": ("cudnn", "_attend"),
    "into the cache": ("_append",),
    "sums": ("void at::native::vectorized_elementwise_kernel<8, at::native::CUDAFunctor_add",),
}


def where() -> list[str]:
    """Where the time of a block goes."""
    return [line for shape in SHAPES for line in (*_where(shape), "")][:-1]


def _where(shape: str) -> list[str]:
    profile = read("runtime-h100")["metrics"]["profile"][shape]
    blocks, columns = profile["blocks"], {k: v for k, v in profile.items() if isinstance(v, dict)}
    lines = [f"| {SHAPES[shape]}, us a block | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for part, names in _PARTS.items():
        times = [
            sum(k["us"] for k in one["kernels"] if k["calls"] >= blocks and k["kernel"].startswith(names)) / blocks
            for one in columns.values()
        ]
        lines.append(f"| {part} | {' | '.join(f'{t:.0f}' if t else '-' for t in times)} |")
    return lines


def quick_bound() -> list[str]:
    """A step of the quick preset against its products."""
    result = read("quick-bound")
    m = result["metrics"]
    lines = [f"| a step on {result['device']}, {m['threads']} threads | seconds | of the step |", "|---|---|---|"]
    for what, operations in m["operations"].items():
        seconds = operations / m["product_rate"]
        lines.append(f"| products: {what} | {seconds:.2f} | {seconds / m['step_seconds']:.0%} |")
    rest = m["step_seconds"] - m["products_seconds"]
    lines.append(f"| all else | {rest:.2f} | {rest / m['step_seconds']:.0%} |")
    return lines


def clips() -> list[str]:
    """Rotations with and without fixed clips of activations: as the methods are, and with nothing trained."""
    lines = ["| rotations at W4A4KV4 | KL, mean over seeds | each |", "|---|---|---|"]
    for name, what in (("rotation-clips", ""), ("rotation-clips-untrained", ", plain rounding")):
        rows = read(name)["metrics"]["rows"]
        for variant in dict.fromkeys(row["variant"] for row in rows):
            each = [row["kl"] for row in rows if row["variant"] == variant]
            figures = ", ".join(f"{v:.3f}" for v in each) if len(each) > 1 else "one seed"
            lines.append(f"| {variant}{what} | {statistics.mean(each):.3f} | {figures} |")
    return lines


def families() -> list[str]:
    """Which methods go with which families: found by planning, not by measuring."""
    from flatquant.families import table

    return _named(table())


def engines() -> list[str]:
    """Which engine serves which method: found by taking small packed models apart, not by measuring."""
    from benchmarks.engines import engines_table

    return _named(engines_table())


def _named(rows: list[dict[str, str]]) -> list[str]:
    """A table of rows whose first column is a name."""
    name, *others = rows[0]
    lines = ["| " + " | ".join((name, *others)) + " |", "|---" * (1 + len(others)) + "|"]
    return lines + [f"| `{row[name]}` | " + " | ".join(row[other] for other in others) + " |" for row in rows]


LADDER = ("smollm2-135m", "qwen2.5-coder-1.5b")
TEXTS = {"wikitext2": "WikiText-2", "c4": "C4", "code.txt": "code"}
NAMED = ("wikitext2", "c4")


def ladder(prefix: str, seconds: bool) -> list[str]:
    """Perplexity and KL divergence of both real models on every text; `seconds`: what a run took, and its peak."""
    files = {model: read(f"{prefix}-{model}")["metrics"] for model in LADDER}
    texts = [
        text
        for text in TEXTS
        if all(text in metrics["rows"][next(iter(metrics["rows"]))]["kl"] for metrics in files.values())
    ]
    # A file that a row was measured on need not be the next row's: its perplexities are given as ratios.
    named = [f"{TEXTS[t]}, times 16 bits" if t not in NAMED else TEXTS[t] for t in texts]
    head = ["model, recipe", *named, *(f"KL, {TEXTS[t]}" for t in texts), "verdict"]
    head += ["seconds", "peak, GB"] if seconds else []
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for model, metrics in files.items():
        original = [f"{metrics['original']['perplexity'][t]:.2f}" if t in NAMED else "1.00" for t in texts]
        blank = len(head) - 1 - len(texts)
        lines.append(f"| {model}, 16 bits | {' | '.join(original)} |{' - |' * blank}")
        for name, row in metrics["rows"].items():
            sizes = [row["perplexity"][t] / (1.0 if t in NAMED else row["original"][t]) for t in texts]
            cells = [f"{size:.2f}" for size in sizes] + [f"{row['kl'][t]:.3f}" for t in texts]
            cells.append(", ".join(dict.fromkeys(row["verdicts"])))
            cells += [f"{row['seconds']:.0f}", f"{row['peak_bytes'] / 1e9:.1f}"] if seconds else []
            lines.append(f"| {model}, {name.rpartition('/')[0]} | {' | '.join(cells)} |")
    return lines


def fp4() -> list[str]:
    """Formats in blocks, by rung: perplexity, KL divergence, and how much of plain rounding's divergence is gone."""
    named = [text if t in NAMED else f"{text}, times 16 bits" for t, text in TEXTS.items()]
    head = ["model, scheme", "rung", *named, *(f"KL, {text}" for text in TEXTS.values())]
    head += ["less KL than rtn", "seconds", "peak, GB"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for model in LADDER:
        rows: dict[str, Any] = {}
        for file in sorted(RESULTS.glob(f"fp4*-{model}.json")):  # processes that shared no disk wrote one each
            found = read(file.stem)["metrics"]["rows"]
            for name, row in found.items():  # compared with what was measured on the same texts
                rows[name] = row | {"plain": found.get(f"rtn/{name.rpartition('/')[2]}", row)}
        for name, row in sorted(rows.items(), key=lambda item: item[0].rpartition("/")[2]):
            rung, _, scheme = name.rpartition("/")
            where = f"| {model}, `{scheme.removesuffix('kv16')}` | `{rung}` |"
            if "error" in row:
                lines.append(f"{where} {row['error']} |{' |' * (len(head) - 3)}")
                continue
            plain, texts = row["plain"]["kl"], [text for text in TEXTS if text in row["kl"]]
            less = statistics.mean(1 - row["kl"][text] / plain[text] for text in texts)
            sizes = {t: row["perplexity"][t] / (1.0 if t in NAMED else row["original"][t]) for t in texts}
            cells = [f"{sizes[t]:.2f}" if t in texts else "-" for t in TEXTS]
            cells += [f"{row['kl'][t]:.3f}" if t in texts else "-" for t in TEXTS]
            peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.1f}"
            cells += [f"{less:.0%}", f"{row['seconds']:.0f}", peak]
            lines.append(f"{where} {' | '.join(cells)} |")
    return lines


def key_offset() -> list[str]:
    """Milliseconds with and without an offset of keys, by each way to give it back."""
    lines = ["| angles | what | sequences | without, ms | with, ms | ratio | in 16 pairs |", "|---" * 7 + "|"]
    files = {
        "of every place": "key-offset-places-h200",
        "of a block's first place, pairs gathered": "key-offset-gathered-h200",
        "of a block's first place": "key-offset-h200",
    }
    for label, name in files.items():
        result = read(name)
        for row in result["rows"]:
            ratios = row.get("ratios") or {"with": row["ratio"]}
            few = f"{ratios['with 16 pairs']:.2f}" if "with 16 pairs" in ratios else "-"
            times = f"{row['without']:.2f} | {row['with']:.2f} | {ratios['with']:.2f} | {few}"
            what = f"{row['what']}, {result['layers']} layers"
            lines.append(f"| {label} | {what} | {row['batch']} | {times} |")
    return lines


def weight_only() -> list[str]:
    """Weights alone in groups, ours and peers' on the same text."""
    lines = ["| model | weights | row | WikiText-2 | C4 | KL, WikiText-2 | KL, C4 | seconds |", "|---" * 8 + "|"]
    for name in ("smollm2-135m", "qwen2.5-coder-1.5b"):
        rows = {(s["scheme"], s["row"]): s for s in read(f"weight-only-{name}")["samples"]}
        order = ["-", *sorted({scheme for scheme, _ in rows if scheme != "-"}, reverse=True)]
        for (scheme, row), s in sorted(rows.items(), key=lambda r: (order.index(r[0][0]), r[1]["wikitext2"]["kl"])):
            texts = s["wikitext2"], s["c4"]
            values = [f"{t['perplexity']:.2f}" for t in texts] + [f"{t['kl']:.3f}" for t in texts]
            if row == "original":
                values[2:] = ["-", "-"]
            seconds = f"{s['seconds']:.0f}" if "seconds" in s else "-"
            lines.append(f"| {name} | {scheme.removesuffix('a16')} | {row} | {' | '.join(values)} | {seconds} |")
    return lines


TABLES: dict[str, Callable[[], list[str]]] = {
    "weight_only": weight_only,
    "reference": reference,
    "quick": quick,
    "best": best,
    "best_again": best_again,
    "calibration_text": calibration_text,
    "ablation": ablation,
    "calibration": calibration,
    "growth": growth,
    "clip_start": clip_start,
    "block_transforms": block_transforms,
    "demo": demo,
    "compared": compared,
    "low_bits": low_bits,
    "zeroshot": zeroshot,
    "clips": clips,
    "quick_bound": quick_bound,
    "first_site": first_site,
    "second_site": second_site,
    "third_site": third_site,
    "few_tokens": few_tokens,
    "attention": attention,
    "whole_models": partial(whole_models, SHAPES, "runtime-h100"),
    "newer_models": partial(whole_models, NEWER, "runtime-qwen3-h200", "runtime-heads-h200"),
    "ends_models": partial(whole_models, ENDS, "runtime-ends-h200"),
    "ends_again": partial(whole_models, ENDS, "runtime-ends-again-h200"),
    "ends_memory": partial(memory, ENDS, "runtime-ends-h200"),
    "output_layer": output_layer,
    "fit_step": fit_step,
    "vllm_serving": vllm_serving,
    "transforms_cost": transforms_cost,
    "memory": partial(memory, SHAPES, "runtime-h100"),
    "weight_sizes": weight_sizes,
    "ends": partial(ends, "smollm2-135m"),
    "ends_qwen": partial(ends, "qwen2.5-coder-1.5b"),
    "newer_memory": partial(memory, NEWER, "runtime-qwen3-h200", "runtime-heads-h200"),
    "bounded_memory": bounded_memory,
    "latent": latent,
    "latent_fit": latent_fit,
    "devices": partial(devices, "smollm2-135m"),
    "plan": plan,
    "plan_hours": plan_hours,
    "plan_memory": plan_memory,
    "plan_bytes": plan_bytes,
    "where": where,
    "families": families,
    "engines": engines,
    "kv4": partial(ladder, "ladder-kv4", False),
    "ladder": partial(ladder, "ladder", True),
    "fp4": fp4,
    "key_offset": key_offset,
    "branch_dit": partial(over_seeds, "branch-dit", "W4A4 of one block", "relative squared error", ".4f"),
    "levels_digits": partial(over_seeds, "levels-digits", "weights and activations", "accuracy", ".2%"),
}
_MARKED = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def rendered(text: str) -> str:
    """A document with its tables made anew."""
    return _MARKED.sub(lambda m: m[1] + "\n".join(TABLES[m[2]]()) + "\n" + m[3], text)


def main() -> int:
    changed = [name for name in DOCUMENTS if rendered((ROOT / name).read_text()) != (ROOT / name).read_text()]
    if "--check" in sys.argv:
        print("\n".join(f"{name} differs from the results" for name in changed))
        return bool(changed)
    for name in changed:
        (ROOT / name).write_text(rendered((ROOT / name).read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
