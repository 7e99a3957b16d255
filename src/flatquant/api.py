"""Quantise a model from Python, and load what was saved: `quantize`, `load`.

A run with an output folder keeps its state in a sibling, `<output>.partial`: the calibration text if the model wrote
it, and every finished block. The output folder appears by one rename at the very end, and the state goes after that,
so that a run may be killed at any point and started again with `resume=True`: it ends with the same bytes, the entry
`timing` of `flatquant_report.json` excepted, which tells of the last run only.

Of several ranks (`flatquant.distributed`), each calls `quantize` with the same arguments. The first reads the text,
keeps the state, measures the verdict and writes the folder; the others receive what calibrating their blocks needs.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import platform
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flatquant import __version__, distributed, store
from flatquant.calibrate.blockwise import held_out_windows
from flatquant.calibrate.end2end import FittedModel
from flatquant.calibrate.memory import (
    Estimate,
    Limits,
    estimate,
    free_host_bytes,
    needs_all_blocks,
    parse_bytes,
    peak_resident_bytes,
    return_freed_memory,
)
from flatquant.calibrate.pipeline import Report, calibrate, measured, solved_name
from flatquant.calibrate.preflight import preflight
from flatquant.calibrate.samples import UNSCORED, Samples, Windows, cut
from flatquant.calibrate.state import RUN_FILE, RunState, fingerprint, recorded, tensor_bytes
from flatquant.calibrate.witness import Witness
from flatquant.calibrate.work import work
from flatquant.data import WRITTEN, Part, joined, read_parts, written_part
from flatquant.errors import ArtifactError, CalibrationError, DataError, ModelError, QualityWarning, SpecError
from flatquant.evaluate.prose import PROSE
from flatquant.evaluate.verdict import PACKED_ERROR, blame, continuations, packed_agrees, verdict
from flatquant.families import plan_for
from flatquant.grade import BUILT_IN, RANDOM, TOKENS, is_bad, sentences
from flatquant.mixture import Mixture
from flatquant.models import (
    ALIASES,
    Checkpoint,
    check_ids,
    find_device,
    load_model,
    loaded_bytes,
    open_model,
    processor_files,
    resolve,
    warn_of_positions,
)
from flatquant.progress import Progress
from flatquant.runtime import artifact
from flatquant.runtime.experts import open_experts
from flatquant.runtime.folder import REPORT_FILE, Folder, read_json
from flatquant.runtime.hf import adopt
from flatquant.runtime.linear import Unpacked
from flatquant.spec import DataSpec, Plan, Recipe, to_dict
from flatquant.wiring.arch import Geometry, submodule
from flatquant.wiring.archs import arch_of
from flatquant.wiring.plan import make_plan

load = artifact.load

_TEXT = "calibration"  # the state's file of tokens the model wrote

# What the verdict is measured on: at least so many tokens where they are cheap, in a few windows that are not too long.
_JUDGED_TOKENS, _JUDGED_WINDOWS, _JUDGED_SEQLEN = 512, (2, 8), 2048
# What the report says of a block beside its losses, where there is such.
_OF_A_BLOCK = ("experts", "dtype", "held_out", "plain", "undone", "learned_rounding")
_TEXTLESS = (2, 128)  # windows and their tokens where a run reads no text


@dataclass(frozen=True)
class Quantized:
    """A quantised model, what sits where in it, and how it came about (the content of `flatquant_report.json`).

    A streamed run leaves the model on the disk: there `model` is read when it is first asked for.
    """

    plan: Plan
    report: dict[str, Any]
    make: Callable[[], PreTrainedModel]

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model, ready to generate."""
        return self.make()

    @property
    def verdict(self) -> dict[str, Any] | None:
        """How good it is: the report's entry `verdict` (docs/verdict.md); None if it was not asked for."""
        return self.report.get("verdict")


def quantize(
    model: PreTrainedModel | str | Path,
    recipe: Recipe,
    calibration: str | Path | Tensor | Sequence[Mapping[str, Any]] | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    output: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    resume: bool = False,
    progress: Progress | None = None,
    stream: bool | None = None,
    max_memory: int | str | None = None,
    max_host_memory: int | str | None = None,
    notice: Callable[[Estimate], None] | None = None,
    held_out: Tensor | Sequence[Mapping[str, Any]] | None = None,
    verdict: bool = True,
) -> Quantized:
    """Quantise a causal language model.

    Args:
        model: a model, which is quantised in place, or a name that `models.load_model` takes, tokenizer included.
        recipe: the method and its settings, from `flatquant.recipes`.
        calibration: `wikitext2`, `c4`, `self` (the model writes the text), a text file or folder, several of these with
            their shares of the windows (`wikitext2:1,c4:3,self:1,FILE`), or int64 token ids (samples, seqlen), whose
            shape then counts instead of the recipe's. Or a list of what the model's processor makes of texts with
            images, one at a time, all of one length and without padding. None is the recipe's own choice.
        tokenizer: for calibration text, and saved along.
        output: folder to write; absent or empty. None keeps the result in memory only.
        device: where blocks are fitted; a GPU if there is one. The model stays where it is.
        dtype: of the fit's matrix products; on a GPU that of models in float16 or bfloat16, else float32.
        seed: of the calibration text and of random transforms, from 0 to 2^32 - 1.
        resume: go on with an unfinished run of the same settings, if there is one.
        progress: called with (stage, done, total), and where a stage begins with what is done by then. "text" counts
            tokens, "fit" epochs of all blocks (in fractions), "end to end" steps, "solve" blocks, "load", "hash" and
            "save" themselves.
        stream: have one block of a local folder's model in memory at a time; the same result. By default where the
            weights are more than the host memory that is free (or allowed).
        max_memory: on the device, in bytes or as `20GiB`; by default what is free.
        max_host_memory: likewise, of the host.
        notice: called once, before any work but loading, with what the run will need by an estimate from shapes.
        held_out: int64 token ids (windows, seqlen), or samples as in `calibration`, that the verdict is measured on. By
            default windows of the calibration text that are kept back; of `calibration` that is given as token ids or
            samples the first windows themselves; where no text is read, a short text that comes with the package.
        verdict: measure how good the result is. A verdict that is not good is also a `QualityWarning`.

    Raises:
        FlatQuantError: anything that is wrong with the model, text, recipe, folder or disk. Nothing half-written stays
            besides the run's state, which `resume` goes on with.
    """
    place = None if output is None else _Place.of(Path(output))
    if place is not None and distributed.leads():
        place.check(resume)
    if not 0 <= seed < 2**32:
        raise SpecError(f"seed {seed}: give a whole number from 0 to {2**32 - 1}")
    name, checkpoint = None, None
    mixture, windows = None, None  # of text that is to be read, or as they were given
    if isinstance(calibration, str | Path) or calibration is None:
        mixture = _mixture(recipe, calibration)
    else:
        windows = calibration if isinstance(calibration, Tensor) else Samples.of(calibration)
    judged = held_out if held_out is None or isinstance(held_out, Tensor) else Samples.of(held_out, "held-out")
    if distributed.size() > 1 and (isinstance(windows, Samples) or isinstance(judged, Samples)):
        raise CalibrationError(f"{distributed.size()} ranks share tokens alone: calibrate samples with images by one")
    say = progress or (lambda *_: None)
    limits = Limits(device=_bytes(max_memory), host=_bytes(max_host_memory))
    if not isinstance(model, PreTrainedModel):
        name = str(model) if model in ALIASES or isinstance(resolve(model), str) else None
        with _stage("load", say):
            model, own, checkpoint = _open(model, recipe, mixture, place, limits, stream)
        tokenizer = tokenizer or own
    elif stream:
        raise ModelError("a model that is in memory cannot be streamed; give its folder")
    device = find_device(device)
    dtype = dtype or _fit_dtype(model, recipe, device)
    _check_model(model, recipe)
    if tokenizer is not None:  # one of another model
        check_ids(torch.tensor(tokenizer(PROSE)["input_ids"], dtype=torch.int64), model, "a tokenizer")
    if windows is not None:
        _check_tokens("calibration", windows, model)
        samples, seqlen = windows.shape
        recipe = replace(recipe, data=DataSpec(samples=samples, seqlen=seqlen, text=TOKENS))
    if mixture is not None:
        recipe = replace(recipe, data=replace(recipe.data, text=str(mixture)))
    if judged is not None:
        _check_tokens("held-out", judged, model)
        if judged.shape[1] < 2:
            raise DataError("held-out tokens: a window of one token predicts nothing; give two or more a window")
    if recipe.needs_data:
        warn_of_positions(model, recipe.data.seqlen, "calibration windows")
    model.eval().requires_grad_(False)
    plan = make_plan(recipe, arch_of(model.config, model), Geometry.of(model.config), _blocks(model))
    shape = (recipe.data.samples, recipe.data.seqlen) if recipe.needs_data else None
    written = 0 if mixture is None else mixture.written(recipe.data.samples)
    half = device.type == "cpu" and model.dtype in (torch.float16, torch.bfloat16)
    writes = verdict and tokenizer is not None and checkpoint is None  # as `_Run._writing` has it
    layout = None
    if distributed.leads():
        layout = estimate(
            model,
            plan,
            recipe,
            shape=shape,
            device=device,
            dtype=dtype,
            limits=limits,
            streamed=checkpoint is not None,
            windows=recorded(place.state).get("windows") if place is not None and resume else None,
            written=written,
            copied=writes and half and _room_for_copy(model, limits),
        )
        costs = work(
            model,
            plan,
            recipe,
            shape,
            written=written,
            saves=place is not None,
            recompute=layout.recompute,
            ranks=distributed.size(),
        )
        layout = replace(layout, work=costs)
    layout = Estimate(**distributed.broadcast(None if layout is None else ({}, asdict(layout)))[1])
    run = _Run(
        model,
        name,
        recipe,
        mixture if windows is None else windows,
        tokenizer,
        place,
        device,
        dtype,
        seed,
        resume,
        say,
        checkpoint,
        limits,
        layout,
        notice,
        judged,
        verdict,
    )
    result = run()
    if distributed.leads() and result.verdict is not None and is_bad(result.verdict["word"]):
        warnings.warn("; ".join(sentences(result.verdict)), QualityWarning, stacklevel=2)
    return result


def _mixture(recipe: Recipe, calibration: str | Path | None) -> Mixture | None:
    """The texts to read, if any."""
    if not recipe.needs_data:
        return None
    return Mixture.parse(recipe.data.text if calibration is None else calibration)


def _open(
    name: str | Path,
    recipe: Recipe,
    mixture: Mixture | None,
    place: _Place | None,
    limits: Limits,
    stream: bool | None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Checkpoint | None]:
    """A model with all its tensors, or with those outside its blocks and the place where the others are read."""
    why = needs_all_blocks(recipe)
    if not why and mixture is not None and mixture.writes:
        why = "the model writes its own calibration text"
    if not why and place is None:
        why = "no output folder is given, where solved blocks could go"
    if stream is None and not why:
        limit, folder = limits.host or free_host_bytes(), resolve(name)
        if isinstance(folder, Path) and limit is not None:
            stream = loaded_bytes(folder) > limit
            if stream:
                try:
                    return _streamed(name)
                except ModelError:
                    stream = False
    if not stream:
        return *load_model(name), None
    if why:
        raise CalibrationError(f"{why}, so that the model cannot be streamed; load it whole (--no-stream)")
    return _streamed(name)


@torch.no_grad()
def _streamed(name: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Checkpoint]:
    return_freed_memory()
    model, tokenizer, checkpoint = open_model(name, lay_out=open_experts)
    checkpoint.fill(model, "", besides=arch_of(model.config, model).blocks + ".")
    model.tie_weights()
    artifact.rebuild_buffers(model, torch.device("cpu"))
    return model, tokenizer, checkpoint


class _Run:
    """One call of `quantize`; holds what its steps share."""

    def __init__(
        self,
        model: PreTrainedModel,
        name: str | None,
        recipe: Recipe,
        calibration: Mixture | Windows | None,
        tokenizer: PreTrainedTokenizerBase | None,
        place: _Place | None,
        device: torch.device,
        dtype: torch.dtype,
        seed: int,
        resume: bool,
        progress: Progress,
        checkpoint: Checkpoint | None,
        limits: Limits,
        layout: Estimate,
        notice: Callable[[Estimate], None] | None,
        held_out: Windows | None,
        verdict: bool,
    ) -> None:
        self.model, self.recipe, self.calibration, self.tokenizer = model, recipe, calibration, tokenizer
        self.name = name  # a hub id or an alias; never a path, since the report travels
        self.place, self.device, self.dtype, self.seed = place, device, dtype, seed
        self.resume, self.progress = resume, progress
        self.checkpoint, self.limits, self.layout, self.notice = checkpoint, limits, layout, notice
        self.title = self._title()
        self.held_out, self.judged = held_out, verdict
        self.seconds: dict[str, float] = {}  # of the verdict's stages
        self.parts: list[Part | None] = []  # of the calibration text; None is what the model has yet to write
        self.kept: Tensor | None = None  # windows of it that are not trained on
        self.start = time.perf_counter()

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
            adopt(self.model, plan, str(self.recipe.scheme), to_dict(self.recipe), report, None)
        return Quantized(plan, report, lambda: self.model)

    def _quantized(self) -> Quantized:
        if self.notice is not None:
            self.notice(self.layout)
        data, tokens = self._text()
        text_seconds = time.perf_counter() - self.start
        with _stage("hash", self.progress):
            original = {
                "sha256": fingerprint(self.model, self._read),
                "bytes": stored_bytes(self.model),
                "tied": artifact.is_tied(self.model),
            }
        identity = self._identity(data, original["sha256"])
        with _stage("preflight", self.progress):
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
            data["sha256"] = _sha256(tokens)
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
            judged = self._verdict(witness, windows, plan, bring, before)
        report = self._report(identity, plan, data, original, calibration, text_seconds)
        if judged is not None:
            report["verdict"] = judged
        adopt(self.model, plan, str(self.recipe.scheme), to_dict(self.recipe), report, None)
        if self.place is not None:
            with _stage("save", self.progress):
                artifact.save(
                    self.model,
                    plan,
                    self.place.output,
                    recipe=to_dict(self.recipe),
                    report=report,
                    tokenizer=self.tokenizer,
                    beside=processor_files(self.model),
                    elsewhere=None if state is None else partial(_solved_tensor, state, plan),
                    completed=partial(self._completed, report, plan, witness, bring),
                )
            _check_packed(report, self.place.output)
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
        _check_finite(name, tensor, arch_of(self.model.config, self.model).blocks)
        return tensor

    def _text(self) -> tuple[dict[str, Any] | None, Windows | None]:
        """What the text is, and its tokens; None where the model has yet to write some of them."""
        if not self.recipe.needs_data:
            return None, None
        source, spec = self.calibration, self.recipe.data
        data: dict[str, Any] = {"source": spec.text, "samples": spec.samples, "seqlen": spec.seqlen}
        if isinstance(source, Tensor):
            tokens = source.cpu()
            return {**data, "sha256": _sha256(tokens)}, tokens
        if isinstance(source, Samples):
            return {**data, "sha256": _sha256(*source.tensors())}, source
        assert source is not None
        if self.tokenizer is None:
            raise DataError(
                "calibration text needs the model's tokenizer; pass tokenizer=, or token ids instead of text"
            )
        with nullcontext() if source.writes else _stage("text", self.progress):
            self.parts = read_parts(source, self.tokenizer, **self._drawing())
        for part in filter(None, self.parts):
            for windows in (part.tokens, part.kept):
                if windows is not None:
                    check_ids(windows, self.model, "calibration windows")
        shares = zip(source.sources, source.divided(spec.samples), self.parts, strict=True)
        data["sources"] = [
            {"source": text.name, "windows": windows, "cut": part.cut, "sha256": _sha256(part.tokens)}
            if part is not None
            else {"source": text.name, "windows": windows, "cut": WRITTEN}
            for text, windows, part in shares
        ]
        if source.writes:
            return data, None
        tokens, self.kept = joined([part for part in self.parts if part is not None])
        return {**data, "sha256": _sha256(tokens)}, tokens

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
        if state is not None and state.has(_TEXT):
            tensors, digest = state.load(_TEXT)
            if _sha256(tensors["tokens"]) != digest:
                raise CalibrationError(f"the calibration text in {state.folder} is damaged; delete that folder")
            return Part(tensors["tokens"], tensors.get("kept"), WRITTEN)
        assert self.tokenizer is not None
        assert isinstance(self.calibration, Mixture)
        drawing = self._drawing()
        self.progress("text", 0, self.calibration.written(drawing["samples"]) * drawing["seqlen"])
        with _copied_to(self.device, self.model):
            own = written_part(
                self.calibration, self.model, self.tokenizer, **drawing, progress=partial(self.progress, "text")
            )
        if state is not None:
            kept = {} if own.kept is None else {"kept": own.kept}
            state.save(_TEXT, {"tokens": own.tokens, **kept}, _sha256(own.tokens))
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

    def _judged_windows(self, tokens: Windows | None, data: Mapping[str, Any] | None) -> _Judged:
        """What the verdict is measured on."""
        if self.held_out is not None:
            return _Judged(cut(self.held_out, len(self.held_out), _JUDGED_SEQLEN), TOKENS, True)
        if data is None or tokens is None:
            return self._textless()
        if self.kept is not None:
            return _Judged(self.kept[self._windows_of_fits() :, :_JUDGED_SEQLEN], data["source"], True)
        return _Judged(cut(tokens, self._windows_of_verdict(), _JUDGED_SEQLEN), data["source"], False)

    def _textless(self) -> _Judged:
        """A text that comes with the package; without a tokenizer, tokens at random."""
        windows, seqlen = _TEXTLESS
        vocabulary = _vocabulary(self.model)
        if self.tokenizer is not None:
            ids = torch.tensor(self.tokenizer(PROSE, add_special_tokens=False)["input_ids"], dtype=torch.int64)
            seqlen = min(seqlen, len(ids) // windows)
            if seqlen > 1:
                return _Judged(ids[: windows * seqlen].view(windows, seqlen), BUILT_IN, True)
        generator = torch.Generator().manual_seed(self.seed)
        return _Judged(torch.randint(vocabulary, _TEXTLESS, generator=generator), RANDOM, True)

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
            with _copied_to(self.device, model):
                yield model
        elif home.type == "cpu" and model.dtype in (torch.float16, torch.bfloat16):
            yield copy.deepcopy(model).float() if _room_for_copy(model, self.limits) else None
        else:
            yield model

    @contextmanager
    def _brought(self, state: RunState | None, index: int) -> Iterator[nn.Module]:
        """A block of the quantised model on the device."""
        block = _blocks(self.model)[index]
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
        self, witness: Witness, windows: _Judged, plan: Plan, bring: Any, before: list[dict[str, str]]
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
            loaded = artifact.load(folder)
            report["verdict"]["packed"] = packed_agrees(loaded, self.model, plan, witness, bring)
        return report

    def _identity(self, data: Mapping[str, Any] | None, model_hash: str) -> dict[str, Any]:
        """Everything that decides the result."""
        versions = {"flatquant": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
        config = {k: v for k, v in self.model.config.to_diff_dict().items() if not k.endswith("name_or_path")}
        return {
            "recipe": to_dict(self.recipe),
            "data": None if data is None else dict(data),
            "model": model_hash,
            "config": hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest(),
            "seed": self.seed,
            "dtype": _name(self.dtype),
            "windows": self.layout.windows,
            "device": self.device.type,
            "versions": versions,
        }

    def _report(
        self,
        identity: Mapping[str, Any],
        plan: Plan,
        data: Mapping[str, Any] | None,
        original: Mapping[str, Any],
        calibration: Report,
        text_seconds: float,
    ) -> dict[str, Any]:
        blocks = [
            {"block": b["block"], "before": _first(b["losses"]), "after": _last(b["losses"]), "losses": b["losses"]}
            | {key: b[key] for key in _OF_A_BLOCK if key in b}
            for b in calibration.blocks
        ]
        whole = calibration.end_to_end
        seconds = {"calibration text": text_seconds, **calibration.seconds, **self.seconds}
        return {
            "recipe": to_dict(self.recipe),
            "data": data,
            "model": {
                "name": self.name,
                "title": self.title,
                "architecture": type(self.model).__name__,
                "dtype": _name(self.model.dtype),
                "sha256": original["sha256"],
            },
            "seed": self.seed,
            "dtype": _name(self.dtype),
            "device": _device_name(self.device),
            "versions": {**identity["versions"], "python": platform.python_version()},
            "blocks": blocks,
            "end_to_end": None if whole is None or not (whole.losses or whole.held_out) else _whole_fit(whole),
            "sizes": {
                "original_bytes": original["bytes"],
                "quantised_bytes": stored_bytes(self.model),
                "unquantised_bytes": artifact.unquantised(self.model, plan),
                "untied": original["tied"] and not artifact.is_tied(self.model),
            },
            "run": _run_hash(identity),
            "timing": {
                "seconds": {stage: round(value, 3) for stage, value in seconds.items()},
                "blocks": [b.get("seconds") for b in calibration.blocks],
                # Rounding errors, whose last bits depend on the machine.
                "preflight": None if self.preflight is None else asdict(self.preflight),
                "total": round(time.perf_counter() - self.start, 3),
                "peak_device_bytes": calibration.peak_memory,
                "peak_host_bytes": peak_resident_bytes(),
                "estimate": asdict(self.layout),
            },
        }


@dataclass(frozen=True)
class _Judged:
    """The windows that the verdict is measured on, where they come from, and that they were not trained on."""

    tokens: Windows  # int64, (N, T), or samples
    source: str
    kept_back: bool


@dataclass(frozen=True)
class _Place:
    """The output folder and the run state beside it."""

    output: Path
    state: Path

    @classmethod
    def of(cls, output: Path) -> _Place:
        return cls(output, state_folder(output))

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other runs away from the output folder and the state.

        Raises:
            CalibrationError: another run is at work there, or the state's folder cannot be made.
        """
        with ExitStack() as stack:
            try:
                stack.enter_context(store.held(self.state))
            except BlockingIOError as error:
                raise CalibrationError(
                    f"another run is writing {self.output} ({error.strerror}); wait for it, or choose another output"
                ) from error
            except OSError as error:
                raise CalibrationError(f"cannot make {self.state}: {error.strerror or error}") from error
            yield

    def check(self, resume: bool) -> None:
        """Before any work: another run is writing there, or one is there that `resume` was not asked to go on with."""
        if self.state.is_dir():
            with self.held():
                pass
        if resume:
            return
        artifact.check_output(self.output)
        if (self.state / RUN_FILE).exists():
            raise CalibrationError(
                f"an unfinished run is in {self.state}; go on with --resume, or delete that folder to start over"
            )

    def finished(self, identity: Mapping[str, Any]) -> Quantized | None:
        """What this very run has saved, if it was killed between saving and tidying up."""
        if not (self.output / REPORT_FILE).is_file():
            return None
        report = read_json(self.output / REPORT_FILE)
        if not isinstance(report, dict) or report.get("run") != _run_hash(identity):
            return None
        return Quantized(Folder.open(self.output).plan, report, partial(artifact.load, self.output))

    def tidy(self) -> None:
        """Remove the state, and what killed runs of this output folder were writing."""
        shutil.rmtree(self.state, ignore_errors=True)
        output = self.output.resolve()
        leftover = re.compile(re.escape(output.name) + r"\.tmp-(\d+)-[0-9a-f]+")
        for path in output.parent.iterdir():
            if (match := leftover.fullmatch(path.name)) and not _alive(int(match[1])):
                shutil.rmtree(path, ignore_errors=True)


def _alive(process: int) -> bool:
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


# ------------------------------------------------------------------------------------------------- checks


def _check_model(model: PreTrainedModel, recipe: Recipe) -> None:
    """What can be said before any text is read: the family, the recipe's fit to the model, NaN in the weights."""
    arch = arch_of(model.config, model)
    blocks = _blocks(model)
    open_experts(blocks)
    plan_for(recipe, arch, Geometry.of(model.config), blocks)
    for name, parameter in model.named_parameters():
        if not parameter.is_meta:
            _check_finite(name, parameter, arch.blocks)


def _blocks(model: PreTrainedModel) -> nn.ModuleList:
    blocks = submodule(model, arch_of(model.config, model).blocks)
    assert isinstance(blocks, nn.ModuleList)
    return blocks


def _check_finite(name: str, tensor: Tensor, blocks: str) -> None:
    if not bool(torch.isfinite(tensor).all()):
        match = re.fullmatch(re.escape(blocks) + r"\.(\d+)\.(.+)", name)
        where = f"block {match[1]}: {match[2]}" if match else name
        raise CalibrationError(
            f"{where} holds NaN or infinity; check the model file, fetch it again, or load it in float32"
        )


def _check_tokens(what: str, tokens: Windows, model: PreTrainedModel) -> None:
    if isinstance(tokens, Samples):
        config: Any = model.config
        ids = tokens.ids(getattr(config, "image_token_id", None))  # which may have no embedding
        check_ids(ids[ids != UNSCORED], model, f"{what} samples")
        return
    if tokens.ndim != 2 or tokens.dtype != torch.int64 or tokens.numel() == 0:
        raise DataError(f"{what} tokens must be (samples, seqlen) int64, not {tuple(tokens.shape)} {tokens.dtype}")
    check_ids(tokens, model, f"{what} windows")


def _vocabulary(model: PreTrainedModel) -> int:
    return model.get_input_embeddings().weight.shape[0]  # type: ignore[union-attr]


def _fit_dtype(model: PreTrainedModel, recipe: Recipe, device: torch.device) -> torch.dtype:
    """Half precision only on a GPU, and only for models that are stored in it.

    Gradients that are squared into Hessians are not left to float16: small ones would vanish there.
    """
    half = model.dtype in (torch.float16, torch.bfloat16)
    if device.type != "cuda" or not half:
        return torch.float32
    squared = recipe.solver.hessian == "output_adaptive" and recipe.scheme.weights is not None
    return torch.float32 if squared and model.dtype == torch.float16 else model.dtype


def _check_packed(report: Mapping[str, Any], output: Path) -> None:
    judged = report.get("verdict") or {}
    packed, own = judged.get("packed"), judged.get("kl")
    if packed is None or packed["equal"] or own is None:  # two models that are not finite cannot be compared
        return
    if packed["error"] is None or packed["error"] > PACKED_ERROR:
        raise ArtifactError(
            f"{output} was written, but read back it is not the model in memory: KL divergence {packed['kl']} on "
            f"{packed['tokens']} tokens; do not use it, and report this"
        )


# ------------------------------------------------------------------------------------------------- small things


@contextmanager
def _stage(name: str, progress: Progress) -> Iterator[None]:
    """Tell the beginning and the end of a stage that counts nothing."""
    progress(name, 0, 1)
    yield
    progress(name, 1, 1)


def state_folder(output: Path) -> Path:
    """Where a run with this output folder keeps its state."""
    named = output if output.name not in ("", "..") else output.resolve()
    return named.with_name(f"{named.name}.partial")


def check_output(output: Path, *, resume: bool) -> None:
    """Whether a run may write a folder, before any work.

    Raises:
        ArtifactError: something is in the way.
        CalibrationError: another run is at work there, or an unfinished one is there and `resume` is not set.
    """
    _Place.of(output).check(resume)


def discard(output: Path) -> None:
    """Remove what an unfinished run with this output folder has left.

    Raises:
        CalibrationError: it is still at work.
    """
    place = _Place.of(output)
    with place.held():
        place.tidy()


def _room_for_copy(model: PreTrainedModel, limits: Limits) -> bool:
    """Whether a float32 copy of a model in 16 bits takes less than half of the host memory that there is."""
    free = limits.host or free_host_bytes()
    return free is None or 2 * stored_bytes(model) < free // 2


@contextmanager
def _copied_to(device: torch.device, model: PreTrainedModel) -> Iterator[None]:
    """Have a model compute on another device for a while. Its own tensors stay where they are: none is copied back."""
    data = [(p, p.data) for p in model.parameters()]
    modules = [(module, dict(module._parameters), dict(module._buffers)) for module in model.modules()]
    try:
        model.to(device)  # pyright: ignore[reportArgumentType]
        yield
    finally:
        for module, parameters, buffers in modules:
            module._parameters.update(parameters)
            module._buffers.update(buffers)
        for p, own in data:
            p.data = own


def stored_bytes(model: nn.Module) -> int:
    """Bytes of a model's tensors as they are stored: integers packed, shared tensors once."""
    unpacked = {f"{name}.{m.loose}": m for name, m in model.named_modules() if isinstance(m, Unpacked)}
    sizes: dict[int | str, int] = {}
    for name, tensor in model.state_dict().items():
        sizes[name if tensor.is_meta else tensor.data_ptr()] = (
            unpacked[name].packed_bytes if name in unpacked else tensor.nbytes
        )
    return sum(sizes.values())


def _solved_tensor(state: RunState, plan: Plan, name: str) -> Tensor:
    """A tensor of a block that is kept solved, by its name in the model."""
    index, _, key = name.removeprefix(plan.blocks_path + ".").partition(".")
    return state.tensor(solved_name(int(index)), key)


def _bytes(size: int | str | None) -> int | None:
    return parse_bytes(size) if isinstance(size, str) else size


def _sha256(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def _run_hash(identity: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _whole_fit(fitted: FittedModel) -> dict[str, Any]:
    """What a report says of an end-to-end fit."""
    losses = fitted.losses
    found: dict[str, Any] = {"before": _first(losses), "after": _last(losses), "losses": losses}
    return found if fitted.held_out is None else found | measured(fitted)


def _first(values: list[float]) -> float | None:
    return values[0] if values else None


def _last(values: list[float]) -> float | None:
    return values[-1] if values else None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()
