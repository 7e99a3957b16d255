"""The main job on a small scale: a 135M model to 4 bits on a laptop CPU, and what that cost.

Original, plain rounding (RTN) and FlatQuant side by side, each read back from the disk, on text that the original
wrote and neither method saw. No data set is needed; where `FLATQUANT_DATA` names one, perplexity is shown too.
"""

from __future__ import annotations

import copy
import gc
import os
import shutil
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flatquant import api, evaluate
from flatquant.data import evaluation_windows
from flatquant.errors import ArtifactError, QualityWarning
from flatquant.models import load_model
from flatquant.progress import Progress
from flatquant.recipes import recipe
from flatquant.runtime import artifact
from flatquant.runtime.folder import CONFIG_FILE, METHOD, read_json
from flatquant.runtime.generate import generate_text
from flatquant.spec import DataSpec
from flatquant.writing import write

MODEL = "smollm2-135m"
SCHEME = "w4a4kv4"
PROMPT = "The most important thing about the ocean is"


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is looked at: windows of held-out text, and of WikiText-2 where it is there."""

    windows: int = 4
    seqlen: int = 512
    wikitext_windows: int = 2
    wikitext_seqlen: int = 2048
    new_tokens: int = 40


SIZE = Size()


def run(output: Path, *, overwrite: bool = False, progress: Progress | None = None) -> dict[str, Any]:
    """Quantise, save, reload, compare, generate.

    Args:
        output: folder of the FlatQuant model.
        overwrite: replace a quantised folder that is there, and what an interrupted demo left.
        progress: called with (stage, done, total).

    Returns:
        JSON-ready: `rows` by method (`kl`, `top1`, `perplexity`, `bytes`, `seconds`), `verdict`, `prompt`, `text`,
        `seconds`.

    Raises:
        FlatQuantError: as `api.quantize`; ArtifactError if something is in the way.
    """
    start, say = time.perf_counter(), progress or (lambda *_: None)
    if overwrite:
        api.discard(output)
    _make_room(output, overwrite)
    say("load", 0, 1)
    original, tokenizer = load_model(MODEL)
    say("load", 1, 1)
    flat = recipe("flatquant", SCHEME, "quick")
    calibration, held_out = _write_texts(original, tokenizer, flat.data, say)
    test = _Test(original, tokenizer, held_out, say)
    rows: dict[str, dict[str, Any]] = {
        "original": {"kl": 0.0, "top1": 1.0, **test.original, "bytes": api.stored_bytes(original), "seconds": None}
    }
    with tempfile.TemporaryDirectory(prefix="flatquant-demo-") as folder:
        rounded = Path(folder) / "rtn"
        for name, parts, place in (("RTN", recipe("rtn", SCHEME), rounded), ("FlatQuant", flat, output)):
            before = time.perf_counter()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", QualityWarning)  # the caller has the verdict
                result = api.quantize(
                    load_model(MODEL)[0],
                    parts,
                    calibration if parts.needs_data else None,
                    tokenizer=tokenizer,
                    output=place,
                    progress=_prefixed(name, say),
                    held_out=held_out[:1],  # all of it is measured below
                    verdict=name == "FlatQuant",
                )
            seconds = time.perf_counter() - before
            stored, judged = result.report["sizes"]["quantised_bytes"], result.verdict
            del result
            gc.collect()
            reloaded = artifact.load(place, device=test.device, dtype=test.dtype)
            rows[name] = {**test(reloaded, name), "bytes": stored, "seconds": seconds}
        say("generate", 0, 1)
        written = generate_text(reloaded, tokenizer, PROMPT, max_new_tokens=SIZE.new_tokens)
        say("generate", 1, 1)
    return {
        "model": MODEL,
        "scheme": SCHEME,
        "output": str(output),
        "rows": rows,
        "verdict": judged,
        "prompt": PROMPT,
        "text": written.text,
        "seconds": time.perf_counter() - start,
    }


def _write_texts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: DataSpec, say: Progress
) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows to calibrate on and windows to test on, of different texts: prose, as what is generated at the end.

    The model writes all of them at once: on a CPU, a row more costs little beside reading the weights for each token.
    """
    windows = -(-SIZE.windows * SIZE.seqlen // data.seqlen)
    tokens = write(
        model,
        tokenizer,
        samples=data.samples + windows,
        seqlen=data.seqlen,
        seed=0,
        topics=False,
        progress=lambda done, total: say("text", done, total),
    )
    held_out = tokens[data.samples :].flatten()[: SIZE.windows * SIZE.seqlen]
    return tokens[: data.samples], held_out.view(SIZE.windows, SIZE.seqlen)


class _Test:
    """Held-out text and what the original says about it."""

    def __init__(
        self, original: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, windows: torch.Tensor, say: Progress
    ) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = torch.float32 if self.device.type == "cpu" else None
        self.windows, self.say = windows, say
        # A copy of its own, in the dtype that all three are compared in.
        reference = copy.deepcopy(original).to(self.device, self.dtype)  # type: ignore[call-overload]
        self.logits = evaluate.reference_logits(
            reference, windows, progress=lambda done, total: say("original: divergence", done, total)
        )
        self.text: torch.Tensor | None = None
        if os.environ.get("FLATQUANT_DATA"):
            self.text = evaluation_windows(
                "wikitext2", tokenizer, seqlen=SIZE.wikitext_seqlen, windows=SIZE.wikitext_windows
            )
        self.original = {"perplexity": self._perplexity(reference, "original")}

    def __call__(self, model: PreTrainedModel, name: str) -> dict[str, float | None]:
        far = evaluate.divergence_from_logits(
            model,
            self.logits,
            self.windows,
            progress=lambda done, total: self.say(f"{name}: divergence", done, total),
        )
        return {"kl": far.kl, "top1": far.top1, "perplexity": self._perplexity(model, name)}

    def _perplexity(self, model: PreTrainedModel, name: str) -> float | None:
        if self.text is None:
            return None
        return evaluate.perplexity(
            model, self.text, progress=lambda done, total: self.say(f"{name}: perplexity", done, total)
        ).value


def _prefixed(name: str, say: Progress) -> Progress:
    return lambda stage, done, total: say(f"{name}: {stage}", done, total)


def _make_room(output: Path, overwrite: bool) -> None:
    if not output.is_dir() or not any(output.iterdir()):
        artifact.check_output(output)
        return
    config = read_json(output / CONFIG_FILE) if (output / CONFIG_FILE).is_file() else None
    quantisation = config.get("quantization_config") if isinstance(config, dict) else None
    if not isinstance(quantisation, dict) or quantisation.get("quant_method") != METHOD:
        raise ArtifactError(f"{output} is not empty and no quantised model; choose another --output")
    if not overwrite:
        raise ArtifactError(f"{output} already holds a quantised model; replace it with --overwrite")
    shutil.rmtree(output)
