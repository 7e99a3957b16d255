"""The verdict on a quantised model: its words, their bounds, and how it reads. Pure data; `evaluate.verdict` measures.

The word goes by the mean KL divergence from the original, in nats per token. exp(KL) is about the factor by which
perplexity grows: the bounds are some 5 %, 40 % and e times. docs/verdict.md has what they were held against.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# The largest KL of each word, nats per token. Anything above, or not finite, is destroyed.
BOUNDS = {"excellent": 0.05, "good": 0.35, "degraded": 1.0}
DESTROYED = "destroyed"
WORDS = (*BOUNDS, DESTROYED)

# What a model is measured on where a run reads no text.
BUILT_IN, RANDOM = "built-in prose", "random tokens"
TOKENS = "tokens"  # and where token ids were given instead of a text


def word(kl: float | None) -> str:
    """The verdict for a divergence; None stands for one that is not finite."""
    return next((name for name, bound in BOUNDS.items() if kl is not None and kl <= bound), DESTROYED)


def word_of(report: Mapping[str, Any]) -> str | None:
    """The verdict in a report, which may hold anything; None if it has none."""
    found = report.get("verdict")
    name = found.get("word") if isinstance(found, Mapping) else None
    return name if name in WORDS else None


def is_bad(name: str) -> bool:
    """Whether a verdict asks what is to blame."""
    return name in ("degraded", DESTROYED)


def sentences(found: Mapping[str, Any]) -> list[str]:
    """A verdict for people, a line each: the word and its numbers, what is to blame, what to try.

    Args:
        found: the entry `verdict` of a report.
    """
    return [headline(found), *headed(found), *blamed(found), *tried(found)]


def readable(found: Any) -> list[str]:
    """`sentences` of what a file holds, which may be anything; nothing where it is no verdict."""
    try:
        return sentences(found)
    except (AttributeError, KeyError, TypeError, ValueError):
        return []


def headline(found: Mapping[str, Any]) -> str:
    """The word, and what was measured on how much text."""
    perplexity = found["perplexity"]
    return (
        f"{found['word']}: KL divergence from the original {number(found['kl'])} nats per token, the same likeliest "
        f"token {found['top1']:.1%} of the time, perplexity {number(perplexity['original'])} -> "
        f"{number(perplexity['quantised'])} ({measured_on(found)})"
    )


def headed(found: Mapping[str, Any]) -> list[str]:
    """What rounding the output layer makes alone, and how far embedded tokens are off, where these are rounded."""
    lines = [f"rounding the output layer alone makes KL {number(found['head'])}"] if "head" in found else []
    off = found.get("embedding")
    return lines if off is None else [*lines, f"the embedding's rows are off by {off:.1%} of their size"]


def measured_on(found: Mapping[str, Any]) -> str:
    """How much of which text."""
    source = "those given" if found["source"] == TOKENS else found["source"]
    where = f"{found['windows']} windows of {found['seqlen']} tokens of {source}"
    if found["source"] in (BUILT_IN, RANDOM):
        return where
    return where + (", kept back from calibration" if found["kept_back"] else ", which it was calibrated on")


def blamed(found: Mapping[str, Any]) -> list[str]:
    """What was found on the parts of a model; nothing for a model that is good."""
    lines = []
    for entry in found.get("blame") or ():
        if entry["block"] is not None:
            continue
        kind = entry["kind"]
        if "alone" in entry:
            lines.append(f"with weights rounded and all else in 16 bits, KL {number(entry['alone'])} remains")
        else:
            text = f"with {kind} in 16 bits, KL {number(entry['kl'])} remains"
            one = ", ".join(f"{_place(e)} ({number(e['kl'])})" for e in _of(found, kind) if "kl" in e)
            lines.append(text + (f"; with those of one block only: block {one}" if one else ""))
        worst = sorted((e for e in _of(found, kind) if "error" in e), key=lambda e: -_size(e))
        changed = ", ".join(f"{_place(e)} by {_percent(e['error'])}" for e in worst)
        if changed:
            lines.append(f"rounding {kind} alone changes the output of block {changed}")
    return lines


def tried(found: Mapping[str, Any]) -> list[str]:
    """The scheme that is proposed, as a ready option."""
    proposal = found.get("proposal")
    if not proposal:
        return []
    if proposal["kl"] is None:
        return [f"try --scheme {proposal['scheme']}"]
    before, kl = number(proposal["before"]), number(proposal["kl"])
    return [f"try --scheme {proposal['scheme']}: with these parts at 8 bits, KL {before} -> {kl} on a part of the text"]


def number(value: float | None) -> str:
    """Three digits; what is not finite is stored as null."""
    if value is None:
        return "not finite"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _of(found: Mapping[str, Any], kind: str) -> list[Mapping[str, Any]]:
    return [entry for entry in found["blame"] if entry["kind"] == kind and entry["block"] is not None]


def _place(entry: Mapping[str, Any]) -> str:
    return f"{entry['block']} at {entry['site']}" if entry.get("site") else str(entry["block"])


def _size(entry: Mapping[str, Any]) -> float:
    return float("inf") if entry["error"] is None else entry["error"]


def _percent(value: float | None) -> str:
    return "what is not finite" if value is None else f"{value:.0%}" if value >= 0.1 else f"{value:.1%}"
