"""One run of `quantize`, from the text to the folder."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flatquant import distributed
from flatquant.api.checks import (
    blocks_of,
    check_finite,
    check_packed,
    copied_to,
    room_for_copy,
    sha256,
    solved_tensor,
    stage,
    stored_bytes,
)
from flatquant.api.place import Place
from flatquant.api.report import identity_of, report_of
from flatquant.api.result import Judged, Quantized
from flatquant.calibrate.blockwise import held_out_windows
from flatquant.calibrate.memory import (
    Estimate,
    Limits,
    free_host_bytes,
    freed_memory_returned,
)
from flatquant.calibrate.pipeline import Report, calibrate, solved_name
from flatquant.calibrate.preflight import preflight
from flatquant.calibrate.samples import Samples, Windows, cut
from flatquant.calibrate.state import RunState, fingerprint
from flatquant.calibrate.witness import Witness
from flatquant.data import WRITTEN, Part, joined, read_parts, written_part
from flatquant.errors import CalibrationError, DataError
from flatquant.evaluate.prose import PROSE
from flatquant.evaluate.verdict import blame, continuations, packed_agrees, verdict
from flatquant.grade import BUILT_IN, RANDOM, TOKENS, is_bad
from flatquant.mixture import Mixture
from flatquant.models import (
    Checkpoint,
    check_ids,
    processor_files,
    vocabulary_size,
)
from flatquant.progress import Progress
from flatquant.runtime import artifact
from flatquant.runtime.folder import Folder
from flatquant.spec import Plan, Recipe, to_dict
from flatquant.wiring.archs import arch_of

TEXT = "calibration"  # the state's file of tokens the model wrote
# What the verdict is measured on: at least so many tokens where they are cheap, in a few windows that are not too long.
_JUDGED_TOKENS, _JUDGED_WINDOWS, _JUDGED_SEQLEN = 512, (2, 8), 2048
_TEXTLESS = (2, 128)  # windows and their tokens where a run reads no text


@dataclass(eq=False)
class Run:
    """One call of `quantize`; holds what its steps share."""

    model: PreTrainedModel
    name: str | None  # a hub id or an alias; never a path, since the report travels
    recipe: Recipe
    calibration: Mixture | Windows | None
    tokenizer: PreTrainedTokenizerBase | None
    place: Place | None
    device: torch.device
    dtype: torch.dtype
    seed: int
    resume: bool
    progress: Progress
    checkpoint: Checkpoint | None
    limits: Limits
    layout: Estimate
    notice: Callable[[Estimate], None] | None
    held_out: Windows | None
    judged: bool
    seconds: dict[str, float] = field(default_factory=dict)  # of the verdict's stages
    # Of the calibration text; None is what the model has yet to write.
    parts: list[Part | None] = field(default_factory=list)
    kept: Tensor | None = None  # windows of it that are not trained on
    start: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self.title = self._title()

    def __call__(self) -> Quantized:
        if not distributed.leads():
            return self._assisted()
        with nullcontext() if self.place is None else self.place.held():
            return self._quantized()

    def _assisted(self) -> Quantized:
        """What a rank other than the first does."""
        tensors, report = distributed.broadcast(None)
        if report is not None:  # an earlier run has saved all
            assert self.place is not None
            return Quantized(Folder.open(self.place.output).plan, report, partial(artifact.load, self.place.output))
        windows = tensors.get("windows")
        witness = None if windows is None else Witness(windows)
        plan, _ = self._calibrated(tensors.get("tokens"), witness, tensors.get("held_out"), None)
        report = distributed.broadcast(None)[1]
        return self._result(plan, report)

    def _calibrated(
        self, tokens: Windows | None, witness: Witness | None, held_out: Tensor | None, state: RunState | None
    ) -> tuple[Plan, Report]:
        return calibrate(
            self.model,
            self.recipe,
            tokens,
            device=self.device,
            dtype=self.dtype,
            seed=self.seed,
            state=state,
            progress=self.progress,
            limits=self.limits,
            layout=self.layout,
            checkpoint=self.checkpoint,
            witness=witness,
            held_out=held_out,
        )

    def _result(self, plan: Plan, report: dict[str, Any]) -> Quantized:
        """The model, where it is."""
        if self.checkpoint is not None and self.place is not None:
            return Quantized(plan, report, partial(artifact.load, self.place.output))
        if not distributed.leads():
            self._adopt(plan, report)
        return Quantized(plan, report, lambda: self.model)

    def _adopt(self, plan: Plan, report: dict[str, Any]) -> None:
        scheme, recipe = str(self.recipe.scheme), to_dict(self.recipe)
        artifact.adopt(self.model, artifact.Origin(plan=plan, scheme=scheme, recipe=recipe, report=report))

    def _quantized(self) -> Quantized:
        if self.notice is not None:
            self.notice(self.layout)
        data, tokens = self._text()
        text_seconds = time.perf_counter() - self.start
        with stage("hash", self.progress):
            original = {
                "sha256": fingerprint(self.model, self._read),
                "bytes": stored_bytes(self.model),
                "tied": artifact.is_tied(self.model),
            }
        identity = identity_of(self, data, original["sha256"])
        with stage("preflight", self.progress):
            self.preflight = preflight(self.model, self.recipe, device=self.device, checkpoint=self.checkpoint)
        state = None
        if self.place is not None:
            if (finished := self.place.finished(identity)) is not None:
                self.place.tidy()
                distributed.broadcast(({}, finished.report))
                return finished
            artifact.check_output(self.place.output)
            state = RunState(self.place.state, identity, resume=self.resume)
        if data is not None and tokens is None:
            before = time.perf_counter()
            tokens = self._own_text(state)
            data["sha256"] = sha256(tokens)
            text_seconds += time.perf_counter() - before
        windows = self._judged_windows(tokens, data) if self.judged else None
        witness = None if windows is None else Witness(windows.tokens)
        before = self._continuations() if witness is not None else []
        held_out = self._held_out_of_fits()
        shared = {"tokens": tokens, "held_out": held_out, "windows": None if windows is None else windows.tokens}
        distributed.broadcast(({name: t for name, t in shared.items() if t is not None}, None))
        plan, calibration = self._calibrated(tokens, witness, held_out, state)
        bring = partial(self._brought, state)
        judged = None
        if witness is not None and windows is not None:
            with self._judging():
                judged = self._verdict(witness, windows, plan, bring, before)
        report = report_of(self, identity, plan, data, original, calibration, text_seconds)
        if judged is not None:
            report["verdict"] = judged
        self._adopt(plan, report)
        if self.place is not None:
            with stage("save", self.progress):
                artifact.save(
                    self.model,
                    plan,
                    self.place.output,
                    recipe=to_dict(self.recipe),
                    report=report,
                    tokenizer=self.tokenizer,
                    beside=processor_files(self.model),
                    elsewhere=None if state is None else partial(solved_tensor, state, plan),
                    completed=partial(self._completed, report, plan, witness, bring),
                )
            check_packed(report, self.place.output)
            self.place.tidy()
        distributed.broadcast(({}, report))
        return self._result(plan, report)

    def _title(self) -> str:
        """What people call the model: its name, or that of its folder, or else its class."""
        known = self.name or str(getattr(self.model.config, "_name_or_path", None) or "")
        known = Path(known).name if Path(known).exists() else known
        return known or type(self.model).__name__

    def _read(self, name: str) -> Tensor:
        """A tensor of the model that is not in memory."""
        assert self.checkpoint is not None
        tensor = self.checkpoint.read(name)
        check_finite(name, tensor, arch_of(self.model.config, self.model).blocks)
        return tensor

    def _text(self) -> tuple[dict[str, Any] | None, Windows | None]:
        """What the text is, and its tokens; None where the model has yet to write some of them."""
        if not self.recipe.needs_data:
            return None, None
        source, spec = self.calibration, self.recipe.data
        data: dict[str, Any] = {"source": spec.text, "samples": spec.samples, "seqlen": spec.seqlen}
        if isinstance(source, Tensor):
            tokens = source.cpu()
            return {**data, "sha256": sha256(tokens)}, tokens
        if isinstance(source, Samples):
            return {**data, "sha256": sha256(*source.tensors())}, source
        assert source is not None
        if self.tokenizer is None:
            raise DataError(
                "calibration text needs the model's tokenizer; pass tokenizer=, or token ids instead of text"
            )
        with nullcontext() if source.writes else stage("text", self.progress):
            self.parts = read_parts(source, self.tokenizer, **self._drawing())
        for part in filter(None, self.parts):
            for windows in (part.tokens, part.kept):
                if windows is not None:
                    check_ids(windows, self.model, "calibration windows")
        shares = zip(source.sources, source.divided(spec.samples), self.parts, strict=True)
        data["sources"] = [
            {"source": text.name, "windows": windows, "cut": part.cut, "sha256": sha256(part.tokens)}
            if part is not None
            else {"source": text.name, "windows": windows, "cut": WRITTEN}
            for text, windows, part in shares
        ]
        if source.writes:
            return data, None
        tokens, self.kept = joined([part for part in self.parts if part is not None])
        return {**data, "sha256": sha256(tokens)}, tokens

    def _drawing(self) -> dict[str, int]:
        """How windows of text are drawn."""
        spec = self.recipe.data
        return {"samples": spec.samples, "seqlen": spec.seqlen, "seed": self.seed, "kept": self._windows_to_keep()}

    def _own_text(self, state: RunState | None) -> Tensor:
        """The text with what the model writes of it."""
        own = self._written(state)
        tokens, self.kept = joined([part or own for part in self.parts])
        return tokens

    def _written(self, state: RunState | None) -> Part:
        """What the model writes; kept, since writing takes long and not every device writes the same."""
        if state is not None and state.has(TEXT):
            tensors, digest = state.load(TEXT)
            if sha256(tensors["tokens"]) != digest:
                raise CalibrationError(f"the calibration text in {state.folder} is damaged; delete that folder")
            return Part(tensors["tokens"], tensors.get("kept"), WRITTEN)
        assert self.tokenizer is not None
        assert isinstance(self.calibration, Mixture)
        drawing = self._drawing()
        self.progress("text", 0, self.calibration.written(drawing["samples"]) * drawing["seqlen"])
        with copied_to(self.device, self.model):
            own = written_part(
                self.calibration, self.model, self.tokenizer, **drawing, progress=partial(self.progress, "text")
            )
        if state is not None:
            kept = {} if own.kept is None else {"kept": own.kept}
            state.save(TEXT, {"tokens": own.tokens, **kept}, sha256(own.tokens))
        return own

    # ----------------------------------------------------------------------------------------- verdict

    def _windows_to_keep(self) -> int:
        """How many windows of the calibration text are kept back: for fits, then for the verdict.

        As many without a verdict: so it changes no bit of the model.
        """
        return self._windows_of_fits() + self._windows_of_verdict()

    def _windows_of_fits(self) -> int:
        data = self.recipe.data
        return held_out_windows(data.samples, data.seqlen) if self.recipe.fits else 0

    def _windows_of_verdict(self) -> int:
        fewest, most = _JUDGED_WINDOWS
        count = min(most, max(fewest, -(-_JUDGED_TOKENS // self.recipe.data.seqlen)))
        return self.calibration.evenly(count, most) if isinstance(self.calibration, Mixture) else count

    def _held_out_of_fits(self) -> Tensor | None:
        """What tells whether a fit has helped; None where nothing was kept back."""
        count = self._windows_of_fits()
        return self.kept[:count] if self.kept is not None and count else None

    def _judged_windows(self, tokens: Windows | None, data: Mapping[str, Any] | None) -> Judged:
        """What the verdict is measured on."""
        if self.held_out is not None:
            return Judged(cut(self.held_out, len(self.held_out), _JUDGED_SEQLEN), TOKENS, True)
        if data is None or tokens is None:
            return self._textless()
        if self.kept is not None:
            return Judged(self.kept[self._windows_of_fits() :, :_JUDGED_SEQLEN], data["source"], True)
        return Judged(cut(tokens, self._windows_of_verdict(), _JUDGED_SEQLEN), data["source"], False)

    def _textless(self) -> Judged:
        """A text that comes with the package; without a tokenizer, tokens at random."""
        windows, seqlen = _TEXTLESS
        vocabulary = vocabulary_size(self.model)
        if self.tokenizer is not None:
            ids = torch.tensor(self.tokenizer(PROSE, add_special_tokens=False)["input_ids"], dtype=torch.int64)
            seqlen = min(seqlen, len(ids) // windows)
            if seqlen > 1:
                return Judged(ids[: windows * seqlen].view(windows, seqlen), BUILT_IN, True)
        generator = torch.Generator().manual_seed(self.seed)
        return Judged(torch.randint(vocabulary, _TEXTLESS, generator=generator), RANDOM, True)

    def _continuations(self) -> list[dict[str, str]]:
        """What the model writes after a few prompts; nothing where it is not in memory, or has no room to write."""
        if self.tokenizer is None or self.checkpoint is not None:
            return []
        done = int("texts" in self.seconds)  # of two: the original's, and the quantised model's
        self.progress("texts", done, 2)
        with self._timed("texts"), self._writing() as model:
            written = [] if model is None else continuations(model, self.tokenizer)
        self.progress("texts", done + 1, 2)
        return written

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start

    @contextmanager
    def _writing(self) -> Iterator[PreTrainedModel | None]:
        """The model where it writes fastest: on the device; on a CPU, without half-precision units, as float32."""
        home, model = next(self.model.parameters()).device, self.model
        if self.device.type == "cuda" and home.type == "cpu":
            if stored_bytes(model) > torch.cuda.mem_get_info(self.device)[0] // 2:
                yield None
                return
            with copied_to(self.device, model):
                yield model
        elif home.type == "cpu" and model.dtype in (torch.float16, torch.bfloat16):
            yield copy.deepcopy(model).float() if room_for_copy(model, self.limits) else None
        else:
            yield model

    @contextmanager
    def _brought(self, state: RunState | None, index: int) -> Iterator[nn.Module]:
        """A block of the quantised model on the device."""
        block = blocks_of(self.model)[index]
        if self.checkpoint is not None:
            assert state is not None
            block = copy.deepcopy(block)  # on the meta device
            block.load_state_dict(state.load(solved_name(index))[0], assign=True)
            yield block.to(self.device)
        elif next(self.model.parameters()).device != self.device:
            yield copy.deepcopy(block).to(self.device)
        else:
            yield block

    def _verdict(
        self, witness: Witness, windows: Judged, plan: Plan, bring: Any, before: list[dict[str, str]]
    ) -> dict[str, Any]:
        """The report's entry, but for `packed`."""
        found = {**verdict(witness), "source": windows.source, "kept_back": windows.kept_back, "packed": None}
        found |= {"blame": [], "proposal": None}
        if is_bad(found["word"]):
            told, scheme = partial(self.progress, "blame"), self.recipe.scheme
            with self._timed("blame"):
                found["blame"], found["proposal"] = blame(witness, self.model, plan, scheme, bring, progress=told)
        after = self._continuations() if before else []
        found["texts"] = [
            {"prompt": b["prompt"], "original": b["text"], "quantised": a["text"]}
            for b, a in zip(before, after, strict=False)
        ]
        return found

    def _completed(
        self, report: dict[str, Any], plan: Plan, witness: Witness | None, bring: Any, folder: Path
    ) -> dict[str, Any]:
        """The report, with the folder compared with the model in memory."""
        free = free_host_bytes()
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        if witness is not None and (free is None or 2 * size < free):
            with self._judging():
                loaded = artifact.load(folder)
                report["verdict"]["packed"] = packed_agrees(loaded, self.model, plan, witness, bring)
        return report

    def _judging(self) -> AbstractContextManager[None]:
        """No growth of the heap, by weights that are dequantised in every call. A streamed run has that throughout."""
        return freed_memory_returned() if self.checkpoint is None else nullcontext()
