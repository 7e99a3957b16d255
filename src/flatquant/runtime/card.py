"""The model card of a quantised folder: what was done to the model, how good it is, and how to load it.

What we write stands between marks (`<!-- flatquant: quality -->` to `<!-- flatquant: end of quality -->`), and only
that is ever written again: the rest of the card is its owner's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from flatquant.grade import readable
from flatquant.mixture import calibrated_on
from flatquant.models import WRAPPERS, auto_class

_USE = """```python
import flatquant  # registers the format; without it transformers refuses to load this model
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{place}")
tokenizer = AutoTokenizer.from_pretrained("{place}")
```"""


def _use(model_type: str, place: str) -> str:
    """How to load a model; a wrapper takes images or sounds."""
    use = _USE.format(place=place)
    if model_type not in WRAPPERS:
        return use
    use = use.replace("AutoTokenizer", "AutoProcessor").replace("tokenizer =", "processor =")
    return use.replace("AutoModelForCausalLM", auto_class(model_type).__name__)


_SECTIONS = ("model", "quality")


def updated(card: str, new: str) -> str | None:
    """A card with our sections as they are in `new`; None if it has no place for any."""
    found = None
    for name in _SECTIONS:
        section = _section(name).search(new)
        place = _section(name).search(card)
        if section and place:
            found = card = card[: place.start()] + section[0] + card[place.end() :]
    return found


def _section(name: str) -> re.Pattern[str]:
    begin, end = (re.escape(mark) for mark in _marks(name))
    return re.compile(f"{begin}.*?{end}", re.DOTALL)


def _marks(name: str) -> tuple[str, str]:
    return f"<!-- flatquant: {name} -->", f"<!-- flatquant: end of {name} -->"


def _marked(name: str, lines: list[str]) -> list[str]:
    begin, end = _marks(name)
    return [begin, *lines, end, ""]


def model_card(config: Mapping[str, Any], report: Mapping[str, Any], evaluation: Mapping[str, Any] | None) -> str:
    """Markdown with the hub's header.

    Args:
        config: `config.json`.
        report: `flatquant_report.json`; what it lacks is left out.
        evaluation: `flatquant_evaluation.json`, if there is one.
    """
    quantisation = config["quantization_config"]
    recipe, scheme = quantisation["recipe"], quantisation["scheme"]
    base = _dict(report, "model").get("name")
    called = base or _dict(report, "model").get("title")
    header = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    header += [f"base_model: {base}"] if isinstance(base, str) and base.count("/") == 1 else []
    header += ["tags:", "- flatquant", "- 4-bit", f"- {scheme.split(',')[0]}", "---", ""]
    title = f"{called or config.get('architectures', ['A language model'])[0]}, {scheme}"
    rows = {
        "scheme": f"`{scheme}`: bits of weights (w), activations (a), keys and values (kv)",
        "recipe": f"{recipe.get('name')}, weights rounded by {_dict(recipe, 'solver').get('kind')}",
        **_transforms(recipe),
        **_data(report),
        **_versions(report),
        "content hash": f"`{quantisation['content_hash']}`",
    }
    table = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
    body = [
        *header,
        *_marked(
            "model",
            [
                f"# {title}",
                "",
                "Quantised with flatquant. Load it with transformers:",
                "",
                _use(str(config.get("model_type")), "this-repository-or-folder"),
                "",
                *table,
                "",
                *_verdict(report),
            ],
        ),
        *_marked("quality", _quality(evaluation)),
    ]
    return "\n".join(body)


def _dict(data: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = data.get(key)
    return found if isinstance(found, Mapping) else {}


def _transforms(recipe: Mapping[str, Any]) -> dict[str, str]:
    sites = [
        f"{site}: {' then '.join(str(part.get('kind')) for part in parts)}"
        for site, parts in _dict(recipe, "transforms").items()
        if isinstance(parts, list | tuple) and parts and all(isinstance(part, Mapping) for part in parts)
    ]
    return {"transforms": "; ".join(sites)} if sites else {}


def _data(report: Mapping[str, Any]) -> dict[str, str]:
    text = calibrated_on(report.get("data"))
    return {"calibration": text} if text else {}


def _versions(report: Mapping[str, Any]) -> dict[str, str]:
    versions = _dict(report, "versions")
    return {"made with": ", ".join(f"{name} {version}" for name, version in versions.items())} if versions else {}


def _verdict(report: Mapping[str, Any]) -> list[str]:
    """What the run found on windows that it kept back."""
    lines = readable(report.get("verdict"))
    return ["## Verdict", "", *(f"- {line}" for line in lines), ""] if lines else []


def _quality(evaluation: Mapping[str, Any] | None) -> list[str]:
    """A table of what `flatquant evaluate --save` measured."""
    if not evaluation:
        return []
    rows = [
        f"| perplexity, {text} | {found['value']:.3f} ({found['windows']} windows) |"
        for text, found in _dict(evaluation, "perplexity").items()
    ]
    divergence = _dict(evaluation, "divergence")
    if divergence:
        rows.append(f"| KL divergence from the original | {divergence['kl']:.4f} nats per token |")
        rows.append(f"| top-1 agreement with the original | {divergence['top1']:.2%} |")
    rows += [
        f"| {task}, {found['metric']} | {found['value']:.2%} ± {found['stderr']:.2%} |"
        for task, found in _dict(evaluation, "tasks").items()
    ]
    return ["## Quality", "", "| | |", "|---|---|", *rows, ""] if rows else []
