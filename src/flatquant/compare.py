"""Methods side by side: the same model, text and schemes, one row for every method and scheme.

A comparison is a folder. Finished rows lie in `rows/`, one file each, and are not computed again; a row that was
interrupted goes on from its own state. `compare.json`, `compare.md` and `compare.png` are written anew after every
row, so that an interrupted comparison shows what it has. A combination that a method refuses is a row that says why.

Every row is measured on the folder that was written and read back, not on what was in memory.

Several ranks (`flatquant.distributed`) divide the rows: each is computed by one rank, as on one device, in the folder
that all of them see. The first writes the outputs.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flatquant import __version__, api, distributed, evaluate, seams, store
from flatquant.calibrate.memory import forget_peak, peak_bytes, release
from flatquant.data import evaluation_windows
from flatquant.errors import FlatQuantError, SpecError
from flatquant.models import load_model
from flatquant.progress import Progress
from flatquant.recipes import RECIPES, recipe
from flatquant.report import comparison
from flatquant.runtime import artifact
from flatquant.spec import Recipe, Scheme
from flatquant.wiring.arch import Geometry, blocks_at, submodule
from flatquant.wiring.archs import arch_of
from flatquant.wiring.cost import online_flops

_SETTINGS = "settings.json"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all rows share.

    Attributes:
        model: a name that `models.load_model` takes.
        calibration: of the methods that read text, as for `api.quantize`; None is each recipe's own.
        perplexity: texts to measure on; windows of `window` tokens, at most `windows` of each (None: all).
        divergence_windows: KL divergence from the original is measured on so many windows of each text. The original's
            logits are kept in memory, two bytes for each token of them and each of the vocabulary.
        evaluation_batch: windows at a time.
        tasks: zero-shot tasks, `task_limit` questions of each (None: all).
        verdict: also have each run measure itself on text that it kept back.
        samples, seqlen, epochs, batch_size: instead of the recipes', where they have such a setting.
    """

    model: str
    calibration: str | None = None
    preset: str = "reference"
    perplexity: tuple[str, ...] = ("wikitext2",)
    windows: int | None = None
    window: int = 2048
    divergence_windows: int = 8
    evaluation_batch: int = 1
    tasks: tuple[str, ...] = ()
    task_limit: int | None = None
    verdict: bool = False
    samples: int | None = None
    seqlen: int | None = None
    epochs: int | None = None
    batch_size: int | None = None
    device: str | None = None
    dtype: torch.dtype | None = None
    seed: int = 0

    def identity(self) -> dict[str, Any]:
        """What decides the numbers, JSON-ready."""
        device = torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        lists = {"perplexity": list(self.perplexity), "tasks": list(self.tasks)}
        fields = {**vars(self), **lists, "device": device.type, "dtype": str(self.dtype)}
        return fields | {"flatquant": __version__, "torch": torch.__version__}

    def recipe(self, method: str, scheme: str) -> Recipe:
        """The method's recipe with these settings.

        Raises:
            SpecError: the method does not take the scheme.
        """
        return recipe(method, scheme, self.preset).tuned(
            samples=self.samples, seqlen=self.seqlen, epochs=self.epochs, batch_size=self.batch_size
        )


def run(
    settings: Settings,
    methods: Sequence[str],
    schemes: Sequence[str],
    output: Path,
    *,
    plot: bool = True,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compare.

    Args:
        methods, schemes: every pair becomes a row.
        output: folder of the comparison; made if absent, gone on with if it has the same settings, by any number of
            ranks.
        plot: also draw `compare.png`.
        progress: called with (stage, done, total).

    Returns:
        The content of `compare.json`, on every rank.

    Raises:
        FlatQuantError: an unknown method or a scheme that is none, another comparison in the folder, no matplotlib;
            anything wrong with the model or the texts. What concerns one row alone is said in that row.
    """
    say = progress or (lambda *_: None)
    unknown = [method for method in methods if method not in RECIPES]
    if unknown:
        raise SpecError(f"unknown method {', '.join(unknown)}; known: {', '.join(sorted(RECIPES))}")
    names = {str(Scheme.parse(scheme)): scheme for scheme in schemes}
    if not methods or not names:
        raise SpecError("nothing to compare; name at least one method and one scheme")
    if plot:
        comparison.figure()
    with _claimed(output, settings.identity()):
        return _rows(Bench(settings, output, say), methods, names, output, plot)


def _rows(bench: Bench, methods: Sequence[str], names: Mapping[str, str], output: Path, plot: bool) -> dict[str, Any]:
    """Every row, and the outputs after each. `names` are schemes as they are written, and as given."""
    jobs = [(method, scheme, name) for name, scheme in names.items() for method in dict.fromkeys(methods)]
    files = [bench.file("original"), *(bench.file(method, name) for method, _, name in jobs)]
    rows: dict[int, dict[str, Any]] = {}  # by place in `files`

    def result(found: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
        original, *others = (found[i] for i in sorted(found))
        return {"settings": bench.settings.identity(), "original": original, "rows": others}

    for turn in distributed.turns(len(files)):
        bench.say("compare", turn, len(files))
        with distributed.alone():
            rows[turn] = bench.row(*jobs[turn - 1]) if turn else bench.original()
        if distributed.leads():
            found = {i: json.loads(file.read_text()) for i, file in enumerate(files) if file.is_file()} | rows
            if 0 in found and len(found) < len(files):
                write_outputs(result(found), output, plot=plot)
    whole = result(dict(distributed.gathered(list(rows.items()))))
    if distributed.leads():
        write_outputs(whole, output, plot=plot)
    bench.say("compare", len(files), len(files))
    return whole


@contextmanager
def _claimed(output: Path, identity: dict[str, Any]) -> Iterator[None]:
    """Make the folder of a comparison, or find that it is of this one; no other comparison writes there meanwhile.

    The first of several ranks does, and the others wait for it.
    """
    with ExitStack() as stack:
        try:
            if distributed.leads():
                stack.enter_context(store.held(output))
                _claim(output, identity)
        except BlockingIOError as error:
            raise FlatQuantError(
                f"another comparison is writing {output} ({error.strerror}); wait for it, or choose another output"
            ) from error
        except (OSError, ValueError) as error:
            raise FlatQuantError(f"cannot use {output}: {error}") from error
        distributed.broadcast(({}, None))
        if not (output / _SETTINGS).is_file():
            raise FlatQuantError(f"there is no {output} on this host; choose an output folder that all ranks see")
        yield


def _claim(output: Path, identity: dict[str, Any]) -> None:
    file = output / _SETTINGS
    if file.is_file():
        found = json.loads(file.read_text())
        differing = sorted(k for k in identity if found.get(k) != json.loads(json.dumps(identity[k])))
        if not differing:
            return
        own = (file, output / store.LOCK_FILE)
        if any(path.is_file() and path not in own for path in output.rglob("*")):
            raise FlatQuantError(
                f"the comparison in {output} differs in {', '.join(differing)}; "
                "repeat it with its own settings, or choose another output folder"
            )
    else:
        artifact.check_output(output)
    (output / "rows").mkdir(parents=True, exist_ok=True)
    store.write(file, (json.dumps(identity, indent=1) + "\n").encode())


class Bench:
    """The original and the texts, read when the first row needs them; measures rows."""

    def __init__(
        self,
        settings: Settings,
        output: Path,
        say: Progress = lambda *_: None,
        *,
        load: Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase]] | None = None,
    ) -> None:
        """`output` is where rows and models are put; `load` gives the original anew each time, instead of its file."""
        self.settings, self.output, self.say = settings, output, say
        self._load = load or partial(load_model, settings.model)
        self.device = torch.device(settings.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.dtype = torch.float32 if self.device.type == "cpu" else None

    @cached_property
    def texts(self) -> dict[str, Tensor]:
        """Windows to measure on, by source."""
        _, tokenizer = self._load_original()
        return {
            source: evaluation_windows(source, tokenizer, seqlen=self.settings.window, windows=self.settings.windows)
            for source in self.settings.perplexity
        }

    @cached_property
    def held_out(self) -> dict[str, Tensor]:
        """The windows of each text that divergence is measured on."""
        return {source: ids[: self.settings.divergence_windows] for source, ids in self.texts.items()}

    @cached_property
    def logits(self) -> dict[str, list[Tensor]]:
        """What the original says about `held_out`."""
        model, batch = self._load_original()[0], self.settings.evaluation_batch
        return {s: evaluate.reference_logits(model, ids, batch_size=batch) for s, ids in self.held_out.items()}

    def _load_original(self) -> tuple[Any, Any]:
        model, tokenizer = self._load()
        model.to(self.device)  # pyright: ignore[reportArgumentType]
        return model if self.dtype is None else model.to(self.dtype), tokenizer  # pyright: ignore[reportArgumentType]

    def file(self, method: str, *scheme: str) -> Path:
        """Where a finished row is kept; `original` is a method without a scheme."""
        return self.output / "rows" / f"{'-'.join((method, *scheme)).replace(',', '+')}.json"

    def original(self) -> dict[str, Any]:
        """The row of the unquantised model."""
        return self._kept(self.file("original"), self._measure_original)

    def row(self, method: str, scheme: str, name: str) -> dict[str, Any]:
        """One row, from its file if it is finished."""
        key = {"method": method, "scheme": name}
        try:
            # A method that does not take the scheme says so before anything is read.
            return self._kept(self.file(method, name), lambda: key | self.measure(self.settings.recipe(method, scheme)))
        except FlatQuantError as error:
            return key | {"error": " ".join(str(error).split())}
        except torch.OutOfMemoryError:
            return key | {"error": "the device is out of memory"}

    def _kept(self, file: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        if file.is_file():
            return json.loads(file.read_text())
        row = make()
        store.write(file, (json.dumps(row, indent=1) + "\n").encode())
        return row

    def _measure_original(self) -> dict[str, Any]:
        model, tokenizer = self._load_original()
        arch = arch_of(model.config, model)
        blocks = submodule(model, arch.blocks).children()
        own = [block for block in blocks if not any(map(seams.borrows, block.modules()))]
        cached = [Geometry.of(model.config).at(block, arch.of(block)).cached for block in own]
        return {
            "perplexity": self._perplexity(model, "original"),
            **self._tasks(model, tokenizer),
            "bits_per_weight": 16.0,
            "bytes_per_token": 2 * (sum(p.numel() for p in model.parameters()) - _looked_up(model).numel()),
            "kv_bytes_per_token": 2 * sum(cached),
        }

    def measure(self, parts: Recipe) -> dict[str, Any]:
        """What a recipe makes of the model: quality, cost, size. What it made is not kept.

        Raises:
            FlatQuantError: the recipe does not fit the model, or anything else that `api.quantize` raises.
        """
        self.texts  # noqa: B018 - one that is missing or too short is an error before minutes are spent
        settings, label = self.settings, f"{parts.name} {parts.scheme}"
        folder = self.output / "models" / f"{parts.name}-{str(parts.scheme).replace(',', '+')}"
        forget_peak(self.device)
        model, tokenizer = self._load()
        made = api.quantize(
            model,
            parts,
            settings.calibration if parts.needs_data else None,
            tokenizer=tokenizer,
            output=folder,
            device=self.device,
            dtype=settings.dtype,
            seed=settings.seed,
            resume=True,
            progress=lambda stage, done, total: self.say(f"{label}: {stage}", done, total),
            verdict=settings.verdict,  # every row is measured on test text too
        )
        peak = peak_bytes(self.device)
        found = artifact.inspect(folder)
        looked_up = found.embedding["bytes"] if found.embedding else _looked_up(made.model).nbytes
        timing = made.report["timing"]
        row = {
            "calibration": (made.report["data"] or {}).get("source"),
            **({} if made.verdict is None else {"verdict": made.verdict}),
            "seconds": timing["total"],
            "stages": timing["seconds"],
            "peak_bytes": peak,
            "estimated_bytes": timing["estimate"]["device"],
            "bits_per_weight": found.bits_per_quantised_weight,
            "online_flops_per_token": _flops(made),
            "bytes_per_token": sum(found.bytes_by_kind.values()) - looked_up,
            "kv_bytes_per_token": found.kv_bytes_per_token,
            "content_hash": found.content_hash,
        }
        del model, made
        release(self.device)
        model = artifact.load(folder, device=self.device, dtype=self.dtype)
        quality = {**self._divergence(model, label), **self._tasks(model, tokenizer)}
        row = {"perplexity": self._perplexity(model, label), **quality, **row}
        del model
        release(self.device)
        shutil.rmtree(folder, ignore_errors=True)
        return row

    def _perplexity(self, model: Any, label: str) -> dict[str, float]:
        return {
            Path(source).name: evaluate.perplexity(
                model,
                ids,
                batch_size=self.settings.evaluation_batch,
                progress=lambda done, total, s=source: self.say(f"{label}: perplexity of {s}", done, total),
            ).value
            for source, ids in self.texts.items()
        }

    def _divergence(self, model: Any, label: str) -> dict[str, Any]:
        """Of each text; `kl` and `top1` are those of the first."""
        found: dict[str, dict[str, float]] = {}
        for source, ids in self.held_out.items():
            far = evaluate.divergence_from_logits(
                model,
                self.logits[source],
                ids,
                batch_size=self.settings.evaluation_batch,
                progress=lambda done, total, s=source: self.say(f"{label}: divergence on {s}", done, total),
            )
            found[Path(source).name] = {"kl": far.kl, "top1": far.top1}
        return {**next(iter(found.values())), "divergence": found}

    def _tasks(self, model: Any, tokenizer: Any) -> dict[str, Any]:
        if not self.settings.tasks:
            return {}
        return {"tasks": evaluate.zero_shot(model, tokenizer, self.settings.tasks, limit=self.settings.task_limit)}


def _flops(made: api.Quantized) -> int:
    blocks = blocks_at(made.model, made.plan.blocks_path)
    return online_flops(made.plan, Geometry.of(made.model.config), blocks)


def _looked_up(model: Any) -> Tensor:
    """The input embedding, of which a token reads one row; empty if it is the output embedding too."""
    embedding, head = model.get_input_embeddings().weight, getattr(model.get_output_embeddings(), "weight", None)
    return embedding[:0] if head is embedding else embedding


def write_outputs(result: dict[str, Any], output: Path, *, plot: bool) -> None:
    """`compare.json`, `compare.md` and, if asked for, `compare.png`."""
    store.write(output / "compare.json", (json.dumps(result, indent=1) + "\n").encode())
    store.write(output / "compare.md", comparison.markdown(result).encode())
    if plot:
        comparison.draw(result, output / "compare.png")
