"""The page: what a newcomer should see first, then figures, each with a sentence that says how to read it.

Sources are JSON files of a quantised folder: what `quantize` noted (`flatquant_report.json`), what `evaluate --save`
measured (`flatquant_evaluation.json`), what `report --collect` saw inside (`flatquant_collection.json`), and what
`inspect` counted. Whatever is missing is left out, and the page says which command brings it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from flatquant import store
from flatquant.errors import FlatQuantError
from flatquant.grade import BOUNDS, DESTROYED, blamed, measured_on, tried
from flatquant.grade import number as told
from flatquant.mixture import calibrated_on
from flatquant.report import plots
from flatquant.report.plots import number

FILE = "flatquant_report.html"
_BASES = {"none": "original", "scaling": "scaling", "hadamard": "Hadamard", "quantised": "this model"}
_CSS = """
:root{color-scheme:light dark;--back:#fff;--card:#f6f7f9;--text:#1b1f24;--soft:#5a6472;--line:#dde1e6;--mark:#00936b}
@media(prefers-color-scheme:dark){:root{--back:#14171b;--card:#1d2127;--text:#e6e8eb;--soft:#9aa4b2;--line:#31363d}}
*{box-sizing:border-box}body{margin:0;background:var(--back);color:var(--text);font:16px/1.55 system-ui,sans-serif}
main{max-width:1180px;margin:0 auto;padding:24px 16px 64px}h1{font-size:1.7rem;margin:.2em 0}
h2{font-size:1.2rem;margin:2em 0 .4em}p{margin:.4em 0}.soft{color:var(--soft);font-size:.92rem}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin:18px 0}
.card{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:12px 14px}
.card b{display:block;font-size:1.35rem}
.figures{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,460px),1fr));gap:18px}
figure{margin:0;background:var(--card);border:1px solid var(--line);border-radius:10px;padding:10px}
figure svg{width:100%;height:auto;display:block}figcaption{color:var(--soft);font-size:.88rem;padding:4px 6px}
figcaption b{color:var(--text)}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:.94rem}
th,td{border-bottom:1px solid var(--line);padding:5px 8px;text-align:right;font-variant-numeric:tabular-nums}
th:first-child,td:first-child,.facts td{text-align:left}details{margin:.6em 0}summary{cursor:pointer}
pre{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:10px;overflow-x:auto;font-size:.82rem}
code{font-size:.9em;overflow-wrap:anywhere}
.verdict{display:grid;grid-template-columns:minmax(0,1fr) minmax(0,1fr);gap:4px 28px;align-items:center}
.verdict svg{width:100%}.word{font-size:2.2rem;font-weight:700;line-height:1.2}ul{padding-left:1.2em}
.texts{display:grid;grid-template-columns:1fr 1fr;gap:10px}
.texts .prompt{grid-column:1/-1;font-weight:600;margin-top:8px}
.texts div:not(.prompt){background:var(--card);border:1px solid var(--line);border-radius:10px;padding:8px 12px}
.texts small{display:block;color:var(--soft)}
@media(max-width:640px){.verdict,.texts{grid-template-columns:1fr}}
"""


def write(path: Path, content: str | bytes) -> None:
    """Write a file of the report.

    Raises:
        FlatQuantError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        store.write(path, content.encode("utf-8") if isinstance(content, str) else content)
    except OSError as error:
        raise FlatQuantError(f"cannot write {path}: {error.strerror or error}") from error


def page(
    name: str,
    inspection: Mapping[str, Any],
    report: Mapping[str, Any],
    evaluation: Mapping[str, Any] | None,
    collection: Mapping[str, Any] | None,
) -> str:
    """The whole page.

    Args:
        name: of the folder, for commands that the page proposes.
        inspection: `flatquant inspect --json`.
        report: `flatquant_report.json`; may be empty.
        evaluation: `flatquant_evaluation.json`.
        collection: `flatquant_collection.json`.
    """
    original = str(_at(report, "model", "name") or "ORIGINAL")
    model = _at(report, "model", "name") or _at(report, "model", "title") or inspection.get("architecture") or "model"
    title = f"{model}, {inspection.get('scheme', '')}"
    drawn = figures(report, collection)
    body = [
        f"<h1>{escape(title)}</h1>",
        _verdict(_at(report, "verdict") or {}),
        f"<p class=soft>{escape(_bits(report))}Quantised by the recipe "
        f"{escape(str(inspection.get('recipe', '')))}; every number below comes from files in its folder.</p>",
        _cards(inspection, evaluation, collection),
        _quality(name, original, evaluation, measured=bool(_at(report, "verdict"))),
        *(_section(section, text, drawn) for section, text in _SECTIONS.items()),
        *(f"<p>{escape(line)}</p>" for line in _undone(report)),
    ]
    if not collection:
        body.append(
            f"<p>To see how flat weights and activations are, and where errors arise: "
            f"<code>flatquant report {escape(name)} --collect {escape(original)}</code></p>"
        )
    body += [_bytes(inspection), _reproduce(inspection, report)]
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width, initial-scale=1"><link rel=icon href="data:,">'
        f"<title>{escape(title)}</title><style>{_CSS}{plots.STYLE}</style></head>"
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )


# --------------------------------------------------------------------------------------------- figures

_SECTIONS = {
    "flatness": (
        "How flat it is",
        "A grid of 16 levels must cover the largest channel, so the others share what is left. Each curve shows the "
        "sizes of all channels, largest first, over their mean: the nearer to a flat line at 1, the better 4 bits fit. "
        "Sites are what linear layers read: attn_in (queries, keys, values), attn_out (attention's output), mlp_in "
        "(gate and up), mlp_mid (down).",
    ),
    "error": (
        "Where errors arise",
        "Blocks are the model's layers, in the order data meets them.",
    ),
    "fit": (
        "How the fit went",
        "What was trained, and how far. A site's transform is made of two small matrices, left and right; keys have "
        "one of their own.",
    ),
}


def figures(report: Mapping[str, Any], collection: Mapping[str, Any] | None) -> dict[str, tuple[str, str, str]]:
    """Every figure that the sources allow: name -> (section, SVG, caption)."""
    found: dict[str, tuple[str, str, str]] = {}
    for name, figure in {**_collected(collection or {}), **_noted(report)}.items():
        if figure[1]:
            found[name] = figure
    return found


def _collected(collection: Mapping[str, Any]) -> dict[str, tuple[str, str, str]]:
    out: dict[str, tuple[str, str, str]] = {}
    flatness = _list(collection, "flatness")
    for kind in ("activations", "weights"):
        if flatness:
            worst = max(flatness, key=lambda f: f[kind]["none"]["peak"])
            curves = {label: worst[kind][base]["curve"] for base, label in _BASES.items()}
            where = f"{worst['site']}, block {worst['block']}"
            out[f"flatness-{kind}"] = (
                "flatness",
                plots.lines(
                    curves,
                    f"Channel sizes of {kind} at {where}",
                    "channels, largest first (%)",
                    "size over mean",
                    log=True,
                    span=(0, 100),
                ),
                "Where the original is least flat. Scaling moves size between "
                "activations and weights; a Hadamard rotation spreads it blindly; the model's transforms were learned.",
            )
            peaks = {
                label: _by_block(flatness, lambda f, base=base, kind=kind: f[kind][base]["peak"])
                for base, label in _BASES.items()
            }
            out[f"peaks-{kind}"] = (
                "flatness",
                plots.lines(peaks, f"Largest channel of {kind} by block", "block", "largest over mean", log=True),
                "Over the mean channel; of a block's sites, the mean.",
            )
    out["surface"] = (
        "error",
        plots.heat(_list(collection, "surface"), "Relative error by block and token", "token", "block"),
        "Error of each block's output, relative to its size (1: as large as the output), token by token. The "
        "first token often differs: "
        "attention parks what it does not need there.",
    )
    alone = _list(collection, "alone")
    share = sum(alone) or 1.0
    out["alone"] = (
        "error",
        plots.bars([100 * v / share for v in alone], "Share of the divergence by block", "block", "share (%)"),
        f"KL divergence when only this block is quantised, as a share of all blocks'. Together they make "
        f"{number(float(collection.get('kl', 0.0)))} nats; the sum of each alone is {number(sum(alone))}.",
    )
    conditions: dict[str, list[float]] = {}
    for entry in _list(collection, "transforms"):
        conditions.setdefault(entry["where"], []).append(entry["condition"])
    out["conditions"] = (
        "fit",
        plots.lines(conditions, "Condition numbers of the transforms", "block", "condition number", log=True),
        "How much a transform stretches some directions more than others. Near 1 it is a rotation; in the thousands "
        "its inverse would amplify rounding.",
    )
    clips: dict[str, list[float]] = {}
    for entry in _list(collection, "clips"):
        clips.setdefault(entry["where"], []).append(sum(entry["keeps"]) / len(entry["keeps"]))
    out["clips"] = (
        "fit",
        plots.lines(clips, "Learned clips", "block", "share of the range kept", zero=False),
        "How much of their range the grids of activations, keys and values cover. Less than 1 gives up a few "
        "extremes for finer levels.",
    )
    return out


def _noted(report: Mapping[str, Any]) -> dict[str, tuple[str, str, str]]:
    blocks = [b for b in _list(report, "blocks") if b.get("before") and b.get("after")]
    curves = {"before": [b["before"] for b in blocks], "after": [b["after"] for b in blocks]}
    end = _at(report, "end_to_end", "losses") or []
    seconds = _at(report, "timing", "seconds") or {}
    routed = [b["experts"]["tokens"] for b in _list(report, "blocks") if b.get("experts")]
    return {
        "losses": (
            "fit",
            plots.lines(curves, "Loss of each block's fit", "block", "mean squared error", log=True) if blocks else "",
            "Error of each block's output in the first and the last epoch of its fit.",
        ),
        "end-to-end": (
            "fit",
            plots.lines({"KL divergence": end}, "End-to-end fit", "step", "nats per token") if end else "",
            "Divergence from the original on calibration text, step by step.",
        ),
        "experts": (
            "fit",
            plots.heat(routed, "Calibration tokens by expert", "expert", "block with experts") if routed else "",
            "How many tokens of the calibration text each expert saw. One that saw few is rounded as if it had also "
            "seen what the others did.",
        ),
        "time": (
            "fit",
            plots.shares({k: float(v) for k, v in seconds.items()}, "Time by stage", "s"),
            "Where the time of quantising went. Capture and full precision run the original, fold multiplies "
            "transforms into the weights, solve rounds them.",
        ),
    }


def _undone(report: Mapping[str, Any]) -> list[str]:
    """Sentences about fits that were not kept, or not made."""
    end, lines = _at(report, "end_to_end") or {}, []
    if end.get("undone") and end.get("losses"):
        lines.append("The end-to-end fit was undone: on windows held out of it, the model was better without.")
    elif end.get("undone") and end.get("plain") is not None:
        lines.append(
            f"Nothing was fitted end to end: plain rounding loses {number(float(end['plain']))} nats per token on "
            "windows held out."
        )
    blocks = [str(block["block"]) for block in _list(report, "blocks") if block.get("undone")]
    if blocks:
        lines.append(f"The fit of block {', '.join(blocks)} was undone: on windows held out of it, it was worse.")
    return lines


def _by_block(entries: Sequence[Mapping[str, Any]], value: Any) -> list[float]:
    found: dict[int, list[float]] = {}
    for entry in entries:
        found.setdefault(entry["block"], []).append(value(entry))
    return [sum(v) / len(v) for _, v in sorted(found.items())]


def _section(key: str, heading: tuple[str, str], drawn: Mapping[str, tuple[str, str, str]]) -> str:
    own = [
        f"<figure>{figure}<figcaption><b>{_title(figure)}.</b> {escape(caption)}</figcaption></figure>"
        for section, figure, caption in drawn.values()
        if section == key
    ]
    if not own:
        return ""
    title, text = heading
    return f"<h2>{title}</h2><p class=soft>{escape(text)}</p><div class=figures>{''.join(own)}</div>"


# --------------------------------------------------------------------------------------------- tables


def _cards(
    inspection: Mapping[str, Any], evaluation: Mapping[str, Any] | None, collection: Mapping[str, Any] | None
) -> str:
    cards = {}
    if (times := inspection.get("compression")) is not None:
        cards["smaller than 16 bit"] = f"{times:.2f} ×"
    if (bits := inspection.get("bits_per_quantised_weight")) is not None:
        cards["bits per quantised weight, with scales and transforms"] = f"{bits:.2f}"
    kv, kv16 = inspection.get("kv_bytes_per_token"), inspection.get("kv_bytes_per_token_16bit")
    if kv and kv16:
        cards["smaller KV cache"] = f"{kv16 / kv:.2f} ×"
    divergence = _at(evaluation or {}, "divergence", "kl")
    if divergence is None and collection:
        divergence = collection.get("kl")
    if divergence is not None:
        cards["KL divergence from the original, nats per token (0: the same)"] = number(float(divergence))
    if (same := _at(evaluation or {}, "divergence", "top1")) is not None:
        cards["of next tokens are the original's"] = f"{same:.1%}"
    return _card_row(cards)


def _card_row(cards: Mapping[str, str]) -> str:
    inner = "".join(f"<div class=card><b>{escape(v)}</b>{escape(k)}</div>" for k, v in cards.items())
    return f"<div class=cards>{inner}</div>"


def _verdict(found: Mapping[str, Any]) -> str:
    """The word on its scale, what it was measured on, what is to blame, and what both models write."""
    if not found:
        return ""
    kl, perplexity = found["kl"], found["perplexity"]
    bounds = found.get("bounds") or BOUNDS
    drawn = plots.scale(kl, bounds, DESTROYED, "KL divergence from the original, nats per token", "nats per token")
    cards = {
        "perplexity of the original → quantised": f"{told(perplexity['original'])} → {told(perplexity['quantised'])}",
        "KL divergence from the original, nats per token (0: the same)": told(kl),
        "of next tokens are the original's": f"{found['top1']:.1%}",
    }
    if "head" in found:
        cards["KL that rounding the output layer alone makes"] = told(found["head"])
    if "embedding" in found:
        cards["error of embedded tokens"] = f"{found['embedding']:.1%}"
    packed = found.get("packed")
    if packed:
        same = "to the last bit" if packed["equal"] else f"to a KL of {told(packed['kl'])}"
        cards[f"the folder, read back, gives what the model in memory gave ({packed['tokens']} tokens)"] = same
    lines = "".join(f"<li>{escape(line)}</li>" for line in (*blamed(found), *tried(found)))
    return (
        f"<div class=verdict><div><div class=word>{escape(found['word'])}</div>"
        f"<p class=soft>Measured on {escape(measured_on(found))}.</p></div>{drawn}</div>"
        f"{_card_row(cards)}{f'<h2>What is to blame, and what to try</h2><ul>{lines}</ul>' if lines else ''}"
        f"{_texts(found.get('texts') or [])}"
    )


def _texts(texts: Sequence[Mapping[str, Any]]) -> str:
    """What both models write after the same prompts, side by side."""
    rows = "".join(
        f"<div class=prompt>{escape(text['prompt'])} ...</div>"
        f"<div><small>original</small>{escape(text['original'])}</div>"
        f"<div><small>quantised</small>{escape(text['quantised'])}</div>"
        for text in texts
    )
    return f"<h2>What both write</h2><div class=texts>{rows}</div>" if rows else ""


def _quality(name: str, original: str, evaluation: Mapping[str, Any] | None, *, measured: bool) -> str:
    if not evaluation:
        command = f"flatquant evaluate {name} --perplexity wikitext2 --divergence-from {original} --save"
        what = "On a test text" if measured else "Not measured yet"
        return f"<h2>Quality</h2><p>{what}: <code>{escape(command)}</code></p>"
    rows = []
    for text, found in (evaluation.get("perplexity") or {}).items():
        before = _at(evaluation, "original", "perplexity", text, "value")
        rows.append((f"perplexity, {text}", before, found.get("value"), ".3f", ""))
    for task, found in (evaluation.get("tasks") or {}).items():
        before = _at(evaluation, "original", "tasks", task, "value")
        note = f" ± {found.get('stderr', 0):.1%}"
        rows.append((f"{task}, {found.get('metric', '')}", before, found.get("value"), ".1%", note))
    lines = [
        f"<tr><td>{escape(what)}</td><td>{'-' if before is None else format(before, form)}</td>"
        f"<td>{format(after, form)}{note}</td>"
        f"<td>{'-' if before is None else format(after - before, '+' + form)}</td></tr>"
        for what, before, after, form, note in rows
    ]
    if not lines:
        return ""
    head = "<tr><th></th><th>original</th><th>quantised</th><th>change</th></tr>"
    return f"<h2>Quality</h2><div class=scroll><table>{head}{''.join(lines)}</table></div>"


def _bytes(inspection: Mapping[str, Any]) -> str:
    kinds = inspection.get("bytes_by_kind") or {}
    names: dict[str, str] = {
        "packed": "packed integers",
        "grids": "scales",
        "transforms": "transforms",
        "dense": "not quantised, 16 bit",
    }
    parts = {names.get(str(kind), str(kind)): size / 1e6 for kind, size in kinds.items()}
    figure = plots.shares(parts, "Bytes by kind", "MB")
    return f"<h2>Bits and bytes</h2><div class=figures><figure>{figure}</figure></div>" if figure else ""


def _reproduce(inspection: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    facts = {
        "content hash": inspection.get("content_hash"),
        "model": _at(report, "model", "sha256"),
        "calibration": calibrated_on(report.get("data")) or None,
        "calibration tokens (sha256)": _at(report, "data", "sha256"),
        "seed": report.get("seed"),
        "device": report.get("device"),
        **{str(k): v for k, v in (report.get("versions") or {}).items()},
    }
    rows = "".join(
        f"<tr><td>{escape(k)}</td><td style='overflow-wrap:anywhere'>{escape(str(v))}</td></tr>"
        for k, v in facts.items()
        if v is not None
    )
    recipe = json.dumps(report.get("recipe"), indent=1) if report.get("recipe") else ""
    details = f"<details><summary>The recipe, in full</summary><pre>{escape(recipe)}</pre></details>" if recipe else ""
    return f"<h2>To reproduce it</h2><div class=scroll><table class=facts>{rows}</table></div>{details}"


# --------------------------------------------------------------------------------------------- small things


def _title(figure: str) -> str:
    """What a figure is called, as markup: the first title of its SVG."""
    return figure.partition("<title>")[2].partition("</title>")[0]


def _bits(report: Mapping[str, Any]) -> str:
    """A recipe's scheme in words, as a sentence; nothing without a recipe."""
    found: dict[int, list[str]] = {}
    for name in ("weights", "activations", "keys", "values"):
        bits = _at(report, "recipe", "scheme", name, "bits")
        found.setdefault(bits if isinstance(bits, int) else 16, []).append(name)
    if not _at(report, "recipe", "scheme"):
        return ""
    words = [f"{_and(names)} in {bits} bits" for bits, names in sorted(found.items())]
    return f"{_and(words).capitalize()}. "


def _and(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _at(data: Mapping[str, Any], *path: str) -> Any:
    """An entry deep inside, or None."""
    found: Any = data
    for key in path:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def _list(data: Mapping[str, Any], key: str) -> list[Any]:
    found = data.get(key)
    return found if isinstance(found, list) else []
