"""One job of `flatquant evaluate`: texts, divergence and tasks, kept in the folder if asked."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flatquant import evaluate as evaluation
from flatquant.data import calibration_tokens, evaluation_windows
from flatquant.models import ALIASES, identity, resolve
from flatquant.progress import Progress
from flatquant.runtime.artifact import facing, keep_evaluation, merged, read_evaluation
from flatquant.runtime.opening import open_model


class Evaluation:
    """Measurements of one model: the models they need, loaded once, and what was found so far.

    Attributes:
        model: a quantised folder, or whatever `load_model` takes.
        original: what the model is compared with; None for nothing.
        save: keep results in the folder, where the report and the card find them.
        result: what was found, as JSON.
        unplaced: whether the folder's card had no place for results.
    """

    def __init__(
        self,
        model: str,
        original: str | None,
        *,
        device: torch.device,
        dtype: torch.dtype | None,
        batch_size: int | None,
        save: bool,
        progress: Progress,
        quiet: bool,
    ) -> None:
        self.model, self.original, self.device, self.dtype = model, original, device, dtype
        self.batch_size, self.save, self.progress, self.quiet = batch_size, save, progress, quiet
        self.result: dict[str, Any] = {}
        self.unplaced = False  # the card has no place for results
        self.texts: dict[str, Any] = {}
        self.opened: dict[str, Any] = {}

    def open(self, name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """A model, read once."""
        if name not in self.opened:
            self.opened[name] = open_model(name, self.device, self.dtype)
        return self.opened[name]

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What tells the original from others, where results are kept."""

        if not self.save or self.original is None:
            return {}
        found = resolve(self.original)
        named = self.original if self.original in ALIASES or isinstance(found, str) else found.resolve().name
        return {"original": {"sha256": identity(self.original), "name": named}}

    def keep(self, result: dict[str, Any]) -> None:
        """Note a result, in the folder too if asked."""

        self.result = merged(self.result, result)
        if self.save and not keep_evaluation(Path(self.model), merged(_without_folders(result), self.facts)):
            self.unplaced = True

    def perplexity(self, source: str, seqlen: int, windows: int | None) -> None:
        """Of the model, and of the original where results are kept."""

        candidate, tokenizer = self.open(self.model)
        ids = self.texts[source] = evaluation_windows(source, tokenizer, seqlen=seqlen, windows=windows)

        def of(model: PreTrainedModel) -> dict[str, Any]:
            found = evaluation.perplexity(
                model,
                ids,
                batch_size=self.batch_size or 1,
                progress=lambda done, total: self.progress(f"perplexity of {source}", done, total),
            )
            return {"perplexity": {source: {"value": found.value, "windows": found.windows}}}

        self.keep(of(candidate))
        if self.save and self.original is not None:
            self.keep({"original": of(self.open(self.original)[0])})

    def divergence(self, windows: int | None, seqlen: int, seed: int) -> None:
        """From the original, on the first text."""

        assert self.original is not None
        candidate, _ = self.open(self.model)
        reference, tokenizer = self.open(self.original)
        if self.texts:
            held_out = next(iter(self.texts.values()))
        else:
            held_out = calibration_tokens(
                "self",
                tokenizer,
                samples=windows or 4,
                seqlen=min(seqlen, 512),
                seed=seed,
                model=reference,
                progress=lambda done, total: self.progress("text", done, total),
            )
        far = evaluation.divergence(
            candidate,
            reference,
            held_out,
            batch_size=self.batch_size or 1,
            progress=lambda done, total: self.progress("divergence", done, total),
        )
        self.keep({"divergence": {"kl": far.kl, "top1": far.top1}})

    def tasks(self, names: str, limit: int | None) -> None:
        """Of the model, and of the original for the drop; those that the folder has already are not run again."""

        wanted = evaluation.TASKS if names == "all" else tuple(name.strip() for name in names.split(","))
        kept = read_evaluation(Path(self.model)) if self.save else {}
        kept = facing(kept, self.facts.get("original", {}).get("sha256"))
        for name, found, wrap in (
            (self.model, kept, lambda r: r),
            (self.original, kept.get("original") or {}, lambda r: {"original": r}),
        ):
            if name is None:
                continue
            earlier = found.get("tasks") or {}
            missing = [t for t in wanted if (earlier.get(t) or {}).get("limit", -1) != limit]
            for task in wanted:
                if task not in missing:
                    self.result = _merged_task(self.result, wrap, task, earlier[task])
            if missing:
                scored, tokenizer = self.open(name)
                evaluation.zero_shot(
                    scored,
                    tokenizer,
                    missing,
                    limit=limit,
                    batch_size=self.batch_size,
                    keep=lambda task, score, wrap=wrap: self.keep(wrap({"tasks": {task: score}})),
                    quiet=self.quiet,
                )


def _merged_task(result: dict[str, Any], wrap: Any, task: str, score: Any) -> dict[str, Any]:
    return merged(result, wrap({"tasks": {task: score}}))


def _without_folders(result: dict[str, Any]) -> dict[str, Any]:
    """Texts by their names: where a file lay says nothing elsewhere."""
    return {
        key: {Path(text).name: found for text, found in value.items()}
        if key == "perplexity"
        else _without_folders(value)
        if key == "original"
        else value
        for key, value in result.items()
    }
