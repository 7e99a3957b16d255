"""One job of `flatquant evaluate`: texts, divergence and tasks, kept in the folder if asked.

Several ranks (`flatquant.distributed`) divide the windows of texts. The first runs tasks, and keeps results.
"""

from __future__ import annotations

from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flatquant import distributed
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
        if self.save and distributed.leads():
            kept = merged(_without_folders(result), self.facts)
            self.unplaced |= not keep_evaluation(Path(self.model), kept)

    def perplexity(self, source: str, seqlen: int, windows: int | None) -> None:
        """Of the model, and of the original where results are kept."""

        candidate, tokenizer = self.open(self.model)
        ids = self.texts[source] = evaluation_windows(source, tokenizer, seqlen=seqlen, windows=windows)

        def of(model: PreTrainedModel) -> dict[str, Any]:
            ours, nll = self._ours(ids), ()
            if len(ours):
                nll = evaluation.perplexity(
                    model,
                    ours,
                    batch_size=self.batch_size or 1,
                    progress=lambda done, total: self.progress(f"perplexity of {source}", done, total),
                ).nll
            found = evaluation.Perplexity.of(distributed.gathered(nll), ids.shape[1])
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
            held_out = self._written(reference, tokenizer, windows or 4, min(seqlen, 512), seed)
        ours, sums = self._ours(held_out), []
        if len(ours):
            far = evaluation.divergence(
                candidate,
                reference,
                ours,
                batch_size=self.batch_size or 1,
                progress=lambda done, total: self.progress("divergence", done, total),
            )
            sums = [(far.kl, far.top1, far.tokens)]
        sums = distributed.gathered(sums)
        tokens = sum(count for *_, count in sums)
        kl, top1 = (sum(found[i] * (found[2] / tokens) for found in sums) for i in range(2))
        self.keep({"divergence": {"kl": kl, "top1": top1}})

    def _ours(self, windows: Tensor) -> Tensor:
        """The windows that this rank measures, in whole batches."""
        batches = windows.split(self.batch_size or 1)
        return torch.cat([windows[:0], *(batches[i] for i in distributed.share(len(batches)))])

    def _written(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, samples: int, seqlen: int, seed: int
    ) -> Tensor:
        """Text that a model writes: on the first rank, since not every device writes the same."""
        found = None
        if distributed.leads():
            told = partial(self.progress, "text")
            drawn = {"samples": samples, "seqlen": seqlen, "seed": seed}
            found = {"tokens": calibration_tokens("self", tokenizer, **drawn, model=model, progress=told)}, None
        return distributed.broadcast(found)[0]["tokens"]

    def tasks(self, names: str, limit: int | None) -> None:
        """Of the model, and of the original for the drop; those that the folder has already are not run again."""
        if not distributed.leads():
            return
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
