"""`quantize`: arguments are checked, and the model is opened, whole or to be streamed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flatquant import distributed
from flatquant.api.checks import blocks_of, check_model, check_tokens, fit_dtype, room_for_copy, stage
from flatquant.api.place import Place
from flatquant.api.result import Quantized
from flatquant.api.run import Run
from flatquant.calibrate.memory import (
    Estimate,
    Limits,
    estimate,
    free_host_bytes,
    needs_all_blocks,
    parse_bytes,
    return_freed_memory,
)
from flatquant.calibrate.samples import Samples
from flatquant.calibrate.state import recorded
from flatquant.calibrate.work import work
from flatquant.errors import CalibrationError, DataError, ModelError, QualityWarning, SpecError, StreamingWarning
from flatquant.evaluate.prose import PROSE
from flatquant.grade import TOKENS, is_bad, sentences
from flatquant.mixture import Mixture
from flatquant.models import (
    ALIASES,
    Checkpoint,
    check_ids,
    find_device,
    load_model,
    loaded_bytes,
    open_model,
    resolve,
    warn_of_positions,
)
from flatquant.progress import Progress
from flatquant.runtime import artifact
from flatquant.runtime.experts import open_experts
from flatquant.spec import LARGEST_SEED, DataSpec, Recipe
from flatquant.wiring.arch import Geometry
from flatquant.wiring.archs import arch_of
from flatquant.wiring.head import with_ends
from flatquant.wiring.plan import make_plan


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
    place = None if output is None else Place.of(Path(output))
    if place is not None and distributed.leads():
        place.check(resume)
    if not 0 <= seed <= LARGEST_SEED:
        raise SpecError(f"seed {seed}: give a whole number from 0 to {LARGEST_SEED}")
    name, checkpoint = None, None
    mixture, windows = None, None  # of text that is to be read, or as they were given
    if isinstance(calibration, str | Path) or calibration is None:
        mixture = mixture_of(recipe, calibration)
    else:
        windows = calibration if isinstance(calibration, Tensor) else Samples.of(calibration)
    judged = held_out if held_out is None or isinstance(held_out, Tensor) else Samples.of(held_out, "held-out")
    if distributed.size() > 1 and (isinstance(windows, Samples) or isinstance(judged, Samples)):
        raise CalibrationError(f"{distributed.size()} ranks share tokens alone: calibrate samples with images by one")
    say = progress or (lambda *_: None)
    limits = Limits(device=_bytes(max_memory), host=_bytes(max_host_memory))
    if not isinstance(model, PreTrainedModel):
        name = str(model) if model in ALIASES or isinstance(resolve(model), str) else None
        with stage("load", say):
            model, own, checkpoint = _open(model, recipe, mixture, place, limits, stream)
        tokenizer = tokenizer or own
    elif stream:
        raise ModelError("a model that is in memory cannot be streamed; give its folder")
    device = find_device(device)
    dtype = dtype or fit_dtype(model, recipe, device)
    check_model(model, recipe)
    if tokenizer is not None:  # one of another model
        check_ids(torch.tensor(tokenizer(PROSE)["input_ids"], dtype=torch.int64), model, "a tokenizer")
    if windows is not None:
        check_tokens("calibration", windows, model)
        samples, seqlen = windows.shape
        recipe = replace(recipe, data=DataSpec(samples=samples, seqlen=seqlen, text=TOKENS))
    if mixture is not None:
        recipe = replace(recipe, data=replace(recipe.data, text=str(mixture)))
    if judged is not None:
        check_tokens("held-out", judged, model)
        if judged.shape[1] < 2:
            raise DataError("held-out tokens: a window of one token predicts nothing; give two or more a window")
    if recipe.needs_data:
        warn_of_positions(model, recipe.data.seqlen, "calibration windows")
    model.eval().requires_grad_(False)
    plan = make_plan(recipe, arch_of(model.config, model), Geometry.of(model.config), blocks_of(model))
    plan = with_ends(plan, recipe, model)
    shape = (recipe.data.samples, recipe.data.seqlen) if recipe.needs_data else None
    written = 0 if mixture is None else mixture.written(recipe.data.samples)
    half = device.type == "cpu" and model.dtype in (torch.float16, torch.bfloat16)
    writes = verdict and tokenizer is not None and checkpoint is None  # as `Run._writing` has it
    layout = None
    if distributed.leads():
        earlier = recorded(place.state) if place is not None and resume else {}
        layout = estimate(
            model,
            plan,
            recipe,
            shape=shape,
            device=device,
            dtype=dtype,
            limits=limits,
            streamed=checkpoint is not None,
            windows=earlier.get("windows"),
            memory=earlier.get("memory"),
            written=written,
            copied=writes and half and room_for_copy(model, limits),
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
    run = Run(
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


def mixture_of(recipe: Recipe, calibration: str | Path | None) -> Mixture | None:
    """The texts to read, if any."""
    if not recipe.needs_data:
        return None
    return Mixture.parse(recipe.data.text if calibration is None else calibration)


def _open(
    name: str | Path,
    recipe: Recipe,
    mixture: Mixture | None,
    place: Place | None,
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
                except ModelError as error:
                    warnings.warn(f"larger than the memory, and loaded whole: {error}", StreamingWarning, stacklevel=4)
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


def _bytes(size: int | str | None) -> int | None:
    return parse_bytes(size) if isinstance(size, str) else size
