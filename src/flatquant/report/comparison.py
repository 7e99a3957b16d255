"""A comparison of methods as a table and as a picture, drawn from the content of its `compare.json`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from flatquant import store
from flatquant.report.raster import figure_class

_COLUMNS = (
    ("top-1", "top1", "{:.1%}"),
    ("seconds", "seconds", "{:,.0f}"),
    ("peak memory, MB", "peak_bytes", "{:,.0f}"),
    ("bits per weight", "bits_per_weight", "{:.2f}"),
    ("online FLOPs per token", "online_flops_per_token", "{:,.0f}"),
    ("bytes per token, MB", "bytes_per_token", "{:,.2f}"),
    ("KV bytes per token", "kv_bytes_per_token", "{:,.0f}"),
)
_MEGA = ("peak_bytes", "bytes_per_token")

# matplotlib's class; a FlatQuantError without it.
figure = partial(figure_class, "the plot needs matplotlib", "leave it out with --no-plot")


def cells(result: dict[str, Any]) -> list[list[str]]:
    """The rows as text under a header; a row that was refused shows why, and is shorter."""
    texts = list(result["original"].get("perplexity", {}))
    header = ["scheme", "method", "calibrated on", *(f"perplexity, {t}" for t in texts)]
    lines = [[*header, *(f"KL, {t}" for t in texts), *(title for title, _, _ in _COLUMNS)]]
    for row in [{"scheme": "-", "method": "original", **result["original"]}, *result["rows"]]:
        if "error" in row:
            lines.append([row["scheme"], row["method"], row["error"]])
            continue
        line = [row["scheme"], row["method"], row.get("calibration") or "-"]
        line += [f"{row['perplexity'][t]:.2f}" for t in texts]
        line += [f"{row['divergence'][t]['kl']:.4f}" if "divergence" in row else "-" for t in texts]
        for _, key, form in _COLUMNS:
            value = row.get(key)
            line.append("-" if value is None else form.format(value / 1e6 if key in _MEGA else value))
        lines.append(line)
    return lines


def markdown(result: dict[str, Any]) -> str:
    """`cells` as a Markdown table."""
    header, *rows = cells(result)
    lines = [header, ["---"] * len(header), *(row + [""] * (len(header) - len(row)) for row in rows)]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def draw(result: dict[str, Any], file: Path) -> None:
    """Quality against cost: KL divergence over the bytes that one token reads, a colour a method, a marker a scheme.

    Raises:
        FlatQuantError: matplotlib is not there.
    """
    drawn = figure()(figsize=(7, 4.5), layout="constrained")
    axes = drawn.add_subplot(xlabel="MB read per token", ylabel="KL divergence from the original, nats per token")
    rows = [row for row in result["rows"] if "error" not in row]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    schemes = list(dict.fromkeys(row["scheme"] for row in rows))
    for row in rows:
        axes.scatter(
            (row["bytes_per_token"] + row["kv_bytes_per_token"]) / 1e6,
            row["kl"],
            color=f"C{methods.index(row['method'])}",
            marker="os^Dv*XP"[schemes.index(row["scheme"]) % 8],
            label=f"{row['method']} {row['scheme']}",
        )
    if rows:
        axes.set_yscale("log")
        axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    with store.replacing(file) as temporary:
        drawn.savefig(temporary, dpi=150, format=file.suffix[1:])
