"""Draw the README's picture from benchmarks/results/compare-smollm2.json: quality and cost of every method in W4A4KV4.

    python -m benchmarks.picture            writes docs/methods.svg
    python -m benchmarks.picture --check    says whether it would change, exit code 1 if so

It has a background of its own, light or dark as the reader's system is, since a page may be the other.
"""

from __future__ import annotations

import argparse
import math
from html import escape
from pathlib import Path
from typing import Any

from benchmarks.tables import ROOT, read
from flatquant.report.plots import COLOURS, number, svg

FILE = ROOT / "docs" / "methods.svg"
SCHEME = "w4a4kv4"
NAMES = {
    "rtn": "RTN", "gptq": "GPTQ", "smoothquant": "SmoothQuant", "omniquant": "OmniQuant", "affinequant": "AffineQuant",
    "quarot": "QuaRot", "spinquant": "SpinQuant", "flatquant": "FlatQuant", "flattenquant": "FlattenQuant",
    "svdquant": "SVDQuant", "vptq": "VPTQ", "oac": "OAC", "direct": "direct",
}  # fmt: skip
STYLE = (
    "svg{color:#1b1f24;--back:#ffffff}text{font:14px system-ui,sans-serif;fill:currentColor}"
    ".title{font-weight:600;font-size:16px}.small{font-size:12.5px;fill-opacity:.75}.ours{font-weight:600}"
    ".grid{stroke:currentColor;stroke-opacity:.15}.back{fill:var(--back)}"
    "@media(prefers-color-scheme:dark){svg{color:#e6e8eb;--back:#0d1117}}"
)
WIDTH, LEFT, RIGHT, TOP, ROW = 820, 128, 226, 86, 27


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{escape(text)}</text>'


def picture(result: dict[str, Any]) -> str:
    """One bar per method, the best first, on a logarithmic scale that begins at the original's perplexity."""
    original = result["metrics"]["original"]
    (least,) = original["perplexity"].values()
    rows = [s for s in result["samples"] if s["scheme"] == SCHEME and "error" not in s]
    found = sorted((next(iter(s["perplexity"].values())), s) for s in rows if s["perplexity"])
    # In 16 bit a token reads two bytes of every weight, and multiplies and adds once with it.
    operations = original["bytes_per_token"]
    ends = math.log10(least), math.ceil(math.log10(found[-1][0]))

    def at(value: float) -> float:
        return LEFT + (math.log10(value) - ends[0]) / (ends[1] - ends[0]) * (WIDTH - LEFT - RIGHT)

    height = TOP + ROW * len(found) + 40
    body = [f"<style>{STYLE}</style>", f'<rect class="back" width="{WIDTH}" height="{height}" rx="8"/>']
    body.append(_text(16, 28, "SmolLM2-135M, weights, activations and KV cache in 4 bits", "title"))
    under = f"Perplexity on WikiText-2, lower is better, logarithmic; the original in 16 bits has {least:.1f}."
    body.append(_text(16, 49, under, "small"))
    body.append(_text(16, 67, "Beside it: how many more operations a token costs than in the original.", "small"))
    base = TOP + ROW * len(found)
    for value in [least, *(10.0**e for e in range(math.ceil(ends[0]), ends[1] + 1))]:
        body.append(f'<line class="grid" x1="{at(value):.1f}" x2="{at(value):.1f}" y1="{TOP - 4}" y2="{base}"/>')
        label = f"{value:.1f}" if value == least else f"{value:,.0f}"
        body.append(_text(at(value), base + 18, label, "small", "middle"))
    for index, (value, sample) in enumerate(found):
        y, ours = TOP + ROW * index, sample["method"] == "flatquant"
        kind = "ours" if ours else ""
        colour = COLOURS[3] if ours else COLOURS[0]
        more = sample["online_flops_per_token"] / operations
        body.append(_text(LEFT - 10, y + 15, NAMES[sample["method"]], kind, "end"))
        width = at(value) - LEFT
        body.append(f'<rect x="{LEFT}" y="{y + 2}" width="{width:.1f}" height="{ROW - 9}" style="fill:{colour}"/>')
        shown = f"{value:.1f}" if value < 1000 else number(value)
        body.append(_text(at(value) + 8, y + 16, f"{shown} · +{more:.1%}" if more else f"{shown} · +0%", kind))
    return svg("".join(body), f"Perplexity of {len(found)} methods in W4A4KV4", WIDTH, height) + "\n"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    drawn = picture(read("compare-smollm2"))
    if FILE.exists() and FILE.read_text(encoding="utf-8") == drawn:
        return
    if check:
        raise SystemExit(f"{FILE.relative_to(ROOT)} is not that of the results; run python -m benchmarks.picture")
    Path(FILE).write_text(drawn, encoding="utf-8")


if __name__ == "__main__":
    main()
