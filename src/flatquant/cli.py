"""The command line: `flatquant quantize`, `methods`, `compare`, `evaluate`, `generate`, `inspect`, `report`, `import`,
`export`, `demo`.

Results go to stdout, progress and errors to stderr, so that `--json` can be piped. An error that the user can act on
is one line and exit code 1 (3: a model was written, and its verdict is destroyed); anything else is a defect and keeps
its traceback. What takes time to import is imported
inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from flatquant import __version__
from flatquant.errors import FitWarning, FlatQuantError, ModelError, PositionsWarning, QualityWarning, SpecError
from flatquant.grade import DESTROYED, readable, tried, word_of
from flatquant.mixture import calibrated_on
from flatquant.progress import Forecast, duration

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from flatquant.bench import Row
    from flatquant.calibrate.memory import Estimate
    from flatquant.runtime.artifact import Inspection
    from flatquant.spec import Plan, Recipe

app = typer.Typer(
    help="Quantise language models to 4-bit weights, activations and KV cache.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

T = TypeVar("T")

SEEDS = 2**32 - 1  # the largest that goes with everything that draws numbers
DEMO_OUTPUT = Path("outputs/smollm2-135m-w4a4kv4")

Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; a GPU if there is one.")]
Dtype = Annotated[str | None, typer.Option(help="float16, bfloat16 or float32; chosen by device and model.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no summary.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else.")]


# --------------------------------------------------------------------------------------------- manners


class Display:
    """Progress on stderr with the time left: bars on a terminal, elsewhere a line where a stage begins and ends.

    Call it with (stage, done, total). Between those lines no more than `every` seconds pass without another, whether or
    not the stage says anything. `epochs` turns the fit's epochs of all blocks into "block 3/30".
    """

    def __init__(
        self, *, silent: bool, epochs: int = 0, every: float = 10.0, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self.bars: Progress | None = None
        if not silent and self.console.is_terminal:
            self.bars = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f}%"),
                TimeElapsedColumn(),
                TextColumn("{task.fields[left]}", markup=False),
                console=self.console,
            )
        self.silent, self.epochs, self.every, self.clock = silent, epochs, every, clock
        self.forecast = Forecast()
        self.tasks: dict[str, Any] = {}
        self.last: tuple[str, float, int] | None = None
        self.begun: set[str] = set()
        self.ended: set[str] = set()
        self.start = self.spoken = clock()
        self.lock = threading.RLock()
        self.over = threading.Event()

    def __enter__(self) -> Display:
        if self.bars is not None:
            self.bars.start()
        elif not self.silent:
            threading.Thread(target=self._keep_speaking, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        if self.bars is not None:
            self.bars.stop()

    def __call__(self, stage: str, done: float, total: int) -> None:
        if self.silent:
            return
        with self.lock:
            self.forecast.update(stage, done, total, self.clock())
            self.last = stage, done, total
            if self.bars is not None:
                self._bar(self.bars, stage, done, total)
            elif self._worth_a_line(stage, done, total):
                self._speak()

    def expect(self, estimate: Estimate) -> None:
        """Say what a run will need, and from now on when it will be over."""
        self.note(estimate)
        self.forecast.work = dict(estimate.work)

    def note(self, what: object) -> None:
        """A line of its own."""
        if not self.silent:
            with self.lock:
                self.spoken = self.clock()
                self.console.print(f"[{self.spoken - self.start:7.1f} s] {what}", markup=False)

    def _worth_a_line(self, stage: str, done: float, total: int) -> bool:
        """Whether a stage begins or ends, or nothing was said for a while."""
        begins, ends = stage not in self.begun, done >= total and stage not in self.ended
        self.begun.add(stage)
        if ends:
            self.ended.add(stage)
        return begins or ends or self.clock() - self.spoken >= self.every

    def _keep_speaking(self) -> None:
        """Lines of a stage that says nothing itself."""
        while not self.over.wait(min(1.0, self.every / 4)):
            with self.lock:
                if self.last is not None and self.clock() - self.spoken >= self.every and not self.over.is_set():
                    self._speak()

    def _speak(self) -> None:
        assert self.last is not None
        stage, done, total = self.last
        parts = [self._describe(stage, done, total)]
        if done < total:
            parts.append(self._left(self._by_now(self.forecast.stage_left(stage))))
        if self.forecast.work:
            parts.append(f"whole run: {self._left(self._by_now(self.forecast.left()))}")
        self.note("; ".join(parts))

    def _left(self, seconds: float | None) -> str:
        return "estimating the time left" if seconds is None else f"{duration(seconds)} left"

    def _by_now(self, left: float | None) -> float | None:
        """Seconds left by now of those that the forecast knew at the last call."""
        return None if left is None else max(0.0, left - (self.clock() - self.forecast.now))

    def _bar(self, bars: Progress, stage: str, done: float, total: int) -> None:
        text, left = self._describe(stage, done, total), self._left(self._by_now(self.forecast.stage_left(stage)))
        if stage not in self.tasks:
            self.tasks[stage] = bars.add_task(text, total=total, left=left)
        bars.update(self.tasks[stage], description=text, completed=done, total=total, left=left if done < total else "")
        if self.forecast.work:
            passed, rest = self.clock() - self.start, self._by_now(self.forecast.left())
            whole = None if rest is None else passed + rest
            if _WHOLE not in self.tasks:
                self.tasks[_WHOLE] = bars.add_task(_WHOLE, total=whole, left="")
            bars.update(self.tasks[_WHOLE], total=whole, completed=passed, left=self._left(rest))

    def _describe(self, stage: str, done: float, total: int) -> str:
        kind, whole = stage.rpartition(": ")[2], int(done)
        if kind == "fit" and self.epochs:
            return f"{stage}, block {max(1, -int(-done // self.epochs))}/{total // self.epochs}, epoch {whole}/{total}"
        if total == 1:
            return f"{stage}, done" if whole else stage
        return f"{stage}, {_UNITS.get(kind, '')}{whole}/{total}"


_WHOLE = "whole run"
_UNITS = {
    "capture": "window ", "full precision": "block ", "fit": "epoch ", "fold": "block ", "solve": "block ",
    "text": "token ", "end to end": "step ",
}  # fmt: skip


@contextmanager
def _errors(interrupted: str = "interrupted") -> Iterator[None]:
    """One line on stderr for whatever the user can act on, and for what is only to be known."""
    try:
        with _warnings():
            yield
    except FlatQuantError as error:
        raise _failure(str(error), 1, getattr(error, "__notes__", ())) from error
    except ExceptionGroup as group:
        if group.split(FlatQuantError)[1] is not None:
            raise
        raise [_failure(str(error), 1, getattr(error, "__notes__", ())) for error in group.exceptions][-1] from group
    except KeyboardInterrupt as error:
        raise _failure(interrupted, 130) from error
    except Exception as error:
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(error, torch.OutOfMemoryError):
            message = (
                "the device is out of memory; try --max-memory with less than it has, a smaller --seqlen, or another"
            )
            raise _failure(message, 1) from error
        raise


@contextmanager
def _warnings() -> Iterator[None]:
    """Our own warnings as lines on stderr, each once."""
    told: set[str] = set()
    with warnings.catch_warnings():
        ours = (PositionsWarning, FitWarning)
        for kind in ours:
            warnings.simplefilter("always", kind)
        others = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *where: Any) -> None:
            if not issubclass(category, ours):
                others(message, category, *where)
            elif str(message) not in told:
                told.add(str(message))
                typer.echo(f"warning: {message}", err=True)

        warnings.showwarning = show
        yield


class _Mistakes:
    """Checks that are all made, so that a user hears of every mistake at once."""

    def __init__(self) -> None:
        self.found: list[FlatQuantError] = []

    def __call__(self, check: Callable[..., T], *args: Any) -> T | None:
        try:
            return check(*args)
        except FlatQuantError as error:
            self.found.append(error)
            return None

    def tell(self) -> None:
        """Raise what was found."""
        if len(self.found) == 1:
            raise self.found[0]
        if self.found:
            raise ExceptionGroup("several mistakes", self.found)


def _failure(message: str, code: int, notes: Iterable[str] = ()) -> typer.Exit:
    typer.echo(f"error: {' '.join(message.split())}", err=True)
    for note in notes:
        typer.echo(note, err=True)
    return typer.Exit(code)


def _print_json(data: Any) -> None:
    sys.stdout.write(json.dumps(data, indent=1, ensure_ascii=False) + "\n")


def _print(*parts: Any) -> None:
    Console(highlight=False, soft_wrap=True).print(*parts, markup=False)


def _table(title: str | None, rows: dict[str, str]) -> None:
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, value)
    Console(highlight=False).print(table)


def _size(size: float) -> str:
    return f"{size / 1e6:,.1f} MB"


def _write(file: str, data: Any) -> None:
    """JSON into a file; `-` is stdout."""
    if file == "-":
        _print_json(data)
        return
    try:
        Path(file).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise FlatQuantError(f"cannot write {file}: {error.strerror or error}") from error


def _dtype(name: str | None) -> torch.dtype | None:
    import torch

    known = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
    if name is not None and name not in known:
        raise SpecError(f"unknown dtype {name!r}; known: {', '.join(known)}")
    return None if name is None else known[name]


def _device(name: str | None) -> torch.device:
    import torch

    from flatquant.models import find_device

    device = find_device(name)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # for whatever asks for the current device's stream, in other libraries too
    return device


def _is_quantised(name: str) -> bool:
    """Whether a folder says that it is one of ours, whatever its state."""
    try:
        config = json.loads((Path(name) / "config.json").read_bytes())
        return config["quantization_config"]["quant_method"] == "flatquant"
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _open(
    name: str, device: torch.device, dtype: torch.dtype | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model to be run: a quantised folder, or whatever `load_model` takes. Float32 on a CPU: half is slower there."""
    import torch

    from flatquant.models import load_model, load_tokenizer
    from flatquant.runtime import artifact

    dtype = dtype or (torch.float32 if device.type == "cpu" else None)
    if _is_quantised(name):
        return artifact.load(name, device=device, dtype=dtype), load_tokenizer(Path(name))
    return load_model(name, device=device, dtype=dtype)


# --------------------------------------------------------------------------------------------- quantize


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="Hub id, local folder, GGUF file, or smollm2-135m.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; absent or empty.")],
    method: Annotated[str, typer.Option(help="One of those that `flatquant methods` lists.")] = "flatquant",
    scheme: Annotated[
        str, typer.Option(help="w4a4kv4, w3a16, w4g128a8kv4, k4v2, w4a4kv4,mlp_mid=w8a8, ...")
    ] = "w4a4kv4",
    preset: Annotated[
        str, typer.Option(help="reference: the paper's recipe; best: more accurate; quick: for a laptop CPU.")
    ] = "reference",
    calibration: Annotated[
        str | None,
        typer.Option(
            help="wikitext2, c4, self (the model writes it), a text file or folder, or several with their shares: "
            "wikitext2:1,c4:3,FILE; by default the preset's own."
        ),
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Calibration windows.")] = None,
    seqlen: Annotated[int | None, typer.Option(help="Tokens in a window.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Epochs of each block's fit; the quick preset has none.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Windows in a step of a fit.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate of fits; clips get ten times that.")] = None,
    solver: Annotated[str | None, typer.Option(help="How weights are rounded: rtn, gptq or codebook.")] = None,
    hessian: Annotated[
        str | None, typer.Option(help="What the solver preserves: input_gram (layers) or output_adaptive (the loss).")
    ] = None,
    act_order: Annotated[
        bool | None,
        typer.Option("--act-order/--no-act-order", help="Whether the solver rounds columns of large curvature first."),
    ] = None,
    update_scales: Annotated[
        bool | None,
        typer.Option(
            "--update-scales/--keep-scales", help="Whether gptq finds scales of a format's blocks as it reaches them."
        ),
    ] = None,
    damping: Annotated[float | None, typer.Option(help="Of the solver's Hessian, as a share of its mean.")] = None,
    gram_inputs: Annotated[
        str | None, typer.Option(help="What the solver's Hessian is of: quantised (blocks' inputs) or original.")
    ] = None,
    weight_clip: Annotated[
        str | None, typer.Option(help="Ranges of weights that no fit learns: none (all of it), or search.")
    ] = None,
    activation_clip: Annotated[
        str | None,
        typer.Option(help="Scales of activations in a format: none (as large as their block), or search for the best."),
    ] = None,
    rounding_steps: Annotated[
        int | None, typer.Option(help="Steps by which each block's rounding is then learned; 0 for none.")
    ] = None,
    key_offset: Annotated[
        str | None,
        typer.Option(help="A constant that cached keys leave out: auto (mean; without text, bias), none, bias, mean."),
    ] = None,
    device: Device = None,
    dtype: Annotated[str | None, typer.Option(help="Of the fit's products: float16, bfloat16 or float32.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=SEEDS, help="Of the calibration text and of random transforms.")] = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an unfinished run of the same settings.")
    ] = False,
    max_memory: Annotated[str | None, typer.Option(help="On the device, like 20GiB; by default what is free.")] = None,
    max_host_memory: Annotated[
        str | None, typer.Option(help="Of the host, like 20GiB; by default what is free.")
    ] = None,
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--no-stream",
            help="One block of a local folder's model in memory at a time; by default if it is larger than the memory.",
        ),
    ] = None,
    losses: Annotated[
        bool, typer.Option("--losses", help="At the end, a table of losses before and after, block by block.")
    ] = False,
    accept: Annotated[
        bool, typer.Option("--accept", help="Exit code 0 even if the verdict is destroyed; 3 otherwise.")
    ] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Quantise a model, save it as a folder, and say how good it is."""
    hint = f"interrupted; go on by repeating the command with --resume (the state is in {output}.partial)"
    with _errors(hint):
        from flatquant import api, models, recipes
        from flatquant.calibrate.memory import parse_bytes
        from flatquant.data import check_source
        from flatquant.spec import Scheme

        mistakes = _Mistakes()
        mistakes(Scheme.parse, scheme)
        mistakes(recipes.recipe, method, "w4a16", preset)  # method and preset, whatever the scheme
        options = (samples, seqlen, epochs, batch_size, lr, solver, hessian, key_offset)
        rounding = {
            "act_order": act_order,
            "update_scales": update_scales,
            "damping": damping,
            "gram_inputs": gram_inputs,
            "weight_clip": weight_clip,
            "activation_clip": activation_clip,
            "rounding_steps": rounding_steps,
        }
        named = not mistakes.found
        made = partial(_recipe, **rounding)
        recipe = mistakes(made, method, scheme, preset, calibration, *options) if named else None
        if recipe and losses and recipe.fit is recipe.end_to_end is None and not recipe.solver.learns:
            mistakes.found.append(SpecError(f"method {method} fits nothing: leave out --losses"))
        mistakes(models.check, model)
        if recipe.needs_data if recipe else calibration and not named:
            mistakes(check_source, (calibration or recipe.data.text) if recipe else calibration)
        mistakes(partial(api.check_output, resume=resume), output)
        mistakes(_device, device)
        mistakes(_dtype, dtype)
        for memory in filter(None, (max_memory, max_host_memory)):
            mistakes(parse_bytes, memory)
        mistakes.tell()
        assert recipe is not None

        display = Display(silent=quiet or as_json, epochs=recipe.fit.epochs if recipe.fit else 0)
        with display, warnings.catch_warnings():
            warnings.simplefilter("ignore", QualityWarning)  # told below
            display("load", 0, 1)
            result = api.quantize(
                model,
                recipe,
                calibration if recipe.needs_data else None,
                output=output,
                device=_device(device),
                dtype=_dtype(dtype),
                seed=seed,
                resume=resume,
                progress=display,
                stream=stream,
                max_memory=max_memory,
                max_host_memory=max_host_memory,
                notice=display.expect,
            )
    found = result.verdict
    if as_json:
        sizes, timing = result.report["sizes"], result.report["timing"]
        _print_json(
            {"output": str(output), "scheme": str(recipe.scheme), "sizes": sizes, "timing": timing, "verdict": found}
        )
    elif not quiet:
        _print(_quantised_line(output, recipe, result.report))
        _table(None, _quantised_rows(result.report, result.plan))
    if losses and not as_json:
        Console(highlight=False).print(_losses(result.report))
    if not (quiet or as_json):
        for line in readable(found):
            _print(line)
    if found is not None and found["word"] == DESTROYED and not accept:
        again = f"; {line}" if (line := " ".join(tried(found))) else ""
        raise _failure(f"{output} was written, but the model in it is destroyed (--accept takes it){again}", 3)


def _quantised_line(output: Path, recipe: Recipe, report: dict[str, Any]) -> str:
    sizes, timing = report["sizes"], report["timing"]
    original, quantised = sizes["original_bytes"], sizes["quantised_bytes"]
    return (
        f"{output}: {recipe.name} {recipe.scheme}, {_size(original)} -> {_size(quantised)} "
        f"({original / quantised:.2f} x), {timing['total']:.1f} s"
    )


def _quantised_rows(report: dict[str, Any], plan: Plan) -> dict[str, str]:
    """What a run says at its end, besides its line."""
    from flatquant.runtime.folder import left_in_16_bit

    sizes, timing = report["sizes"], report["timing"]
    seconds = {stage: value for stage, value in timing["seconds"].items() if value >= 0.05}
    rows = {
        "seconds": ", ".join(f"{stage} {value:.1f}" for stage, value in {**seconds, "total": timing["total"]}.items()),
        "memory": _memory(timing),
        **_unquantised_rows(sizes["unquantised_bytes"], left_in_16_bit(plan), untied=sizes["untied"]),
    }
    experts = [block["experts"] for block in report["blocks"] if "experts" in block]
    if rare := sum(len(e["rare"]) for e in experts):
        rows["experts"] = (
            f"{rare} of {sum(len(e['tokens']) for e in experts)} experts saw fewer calibration tokens than they have "
            "inputs: more --samples may help"
        )
    return {name: value for name, value in rows.items() if value}


def _memory(timing: dict[str, Any]) -> str:
    """Measured peaks beside the estimate."""
    estimate, parts = timing["estimate"], []
    for where, peak, expected in (
        ("on the device", timing["peak_device_bytes"], estimate["device"]),
        ("in memory", timing["peak_host_bytes"], estimate["host"]),
    ):
        if peak is not None:
            parts.append(f"{_size(peak)} {where} (estimate {_size(expected)})")
    return ", ".join(parts)


def _unquantised_rows(sizes: Mapping[str, int], without: Sequence[str], *, untied: bool) -> dict[str, str]:
    """What stays as it was, and what it costs."""
    why = {"output layer": " (of its own since the residual stream is rotated)"} if untied else {}
    kept = ", ".join(f"{kind} {_size(size)}{why.get(kind, '')}" for kind, size in sizes.items())
    return {"left unquantised": kept, "without a grid": ", ".join(without)}


def _losses(report: dict[str, Any]) -> Table:
    """Losses before and after, block by block, then of the end-to-end fit: in training, and on windows held out."""
    table = Table("", "before", "after", "after / before", "held out", title="losses", title_justify="left")
    rows = [(f"block {block['block']}", block) for block in report["blocks"]]
    rows += [("end to end", report["end_to_end"])] if report["end_to_end"] else []
    for name, found in rows:
        _losses_row(table, name, found)
        if "learned_rounding" in found:
            _losses_row(table, f"{name}, rounding", found["learned_rounding"])
    return table


def _losses_row(table: Table, name: str, found: dict[str, Any]) -> None:
    before, after = found["before"], found["after"]
    if before is not None and after is not None:
        ratio = f"{after / before:.3f}" if before else "-"
        table.add_row(name, f"{before:.4g}", f"{after:.4g}", ratio, _held_out(found))
    elif found.get("held_out") and None not in found["held_out"]:
        table.add_row(name, "-", "-", "-", f"{found['plain']:.4g} plainly rounded, nothing fitted")
    elif found.get("held_out"):  # no epoch ended with a loss that is finite
        table.add_row(name, "not finite", "not finite", "-", _held_out(found))


def _held_out(found: dict[str, Any]) -> str:
    """A fit's loss before and after it, on windows that it was not trained on."""
    before_and_after = " -> ".join("not finite" if x is None else f"{x:.4g}" for x in found.get("held_out") or ())
    return before_and_after + (", undone" if found.get("undone") else "")


def _recipe(
    method: str,
    scheme: str,
    preset: str,
    calibration: str | None,
    samples: int | None,
    seqlen: int | None,
    epochs: int | None,
    batch_size: int | None,
    lr: float | None,
    solver: str | None,
    hessian: str | None = None,
    key_offset: str | None = None,
    *,
    act_order: bool | None = None,
    update_scales: bool | None = None,
    damping: float | None = None,
    gram_inputs: str | None = None,
    weight_clip: str | None = None,
    activation_clip: str | None = None,
    rounding_steps: int | None = None,
) -> Recipe:
    """The method's recipe with what the options change; an option that would change nothing is an error."""
    from flatquant.recipes import recipe
    from flatquant.spec import Scheme, from_dict, to_dict

    base = recipe(method, scheme, preset)
    if key_offset is not None:
        if base.scheme.keys is None and not base.scheme.cache_overrides:
            raise SpecError(f"scheme {base.scheme} does not quantise keys: leave out --key-offset")
        base = replace(base, scheme=from_dict(Scheme, to_dict(base.scheme) | {"key_offset": key_offset}, "scheme"))
    steps = {"batch_size": batch_size, "lr": lr}
    steps = {name: value for name, value in steps.items() if value is not None}
    learns = base.solver.learned is not None if rounding_steps is None else rounding_steps > 0
    data = {name: value for name, value in (("samples", samples), ("seqlen", seqlen)) if value is not None}
    if steps and base.fit is None and base.end_to_end is None and not (learns and lr is None):
        raise SpecError(f"method {method} fits nothing: leave out {_options(steps)}")
    if epochs is not None and base.fit is None:
        raise SpecError(f"method {method} with preset {preset} has no block-wise fit: leave out --epochs")
    base = base.tuned(samples=samples, seqlen=seqlen, epochs=epochs, batch_size=batch_size, lr=lr)
    for tensors, clip in (("weights", weight_clip), ("activations", activation_clip)):
        if clip is not None:
            base = _with_clip(base, tensors, clip)
    if update_scales and act_order is None:
        act_order = False  # the recipes' default would refuse
    settings = {
        "act_order": act_order,
        "update_scales": update_scales,
        "damping": damping,
        "gram_inputs": gram_inputs,
    }
    changed = _with_solver(base, solver, hessian, {n: v for n, v in settings.items() if v is not None})
    if rounding_steps is not None:
        changed = _with_learned_rounding(changed, rounding_steps).tuned(batch_size=batch_size)
    if not changed.needs_data and (data or calibration is not None):
        given = data if calibration is None else {**data, "calibration": calibration}
        raise SpecError(f"method {method} at {changed.scheme} reads no calibration text: leave out {_options(given)}")
    return changed


def _with_solver(base: Recipe, solver: str | None, hessian: str | None, settings: dict[str, Any]) -> Recipe:
    """The recipe with another way to round, or with other settings of its own."""
    from flatquant.spec import SolverSpec, from_dict, to_dict

    kinds = {name: value for name, value in (("kind", solver), ("hessian", hessian)) if value is not None}
    if not kinds and not settings:
        return base
    own = to_dict(base.solver)
    if not base.transforms and any(own[name] != value for name, value in kinds.items()):
        given = _options({name: 0 for name, value in (("solver", solver), ("hessian", hessian)) if value})
        raise SpecError(f"method {base.name} rounds with {base.solver.kind}: leave out {given}, or change --method")
    kept = own if solver is None else {"learned": own["learned"]}
    fields = {"gram_inputs": "inputs", "update_scales": "updates_scales"}
    rounding = kept | kinds | {fields.get(name, name): v for name, v in settings.items()}
    scheme = base.scheme
    if solver == "codebook":
        rounding["codebook"] = {}  # its defaults, and no clip
        if scheme.weights is not None:
            scheme = replace(scheme, weights=replace(scheme.weights, clip="none"))
    made = from_dict(SolverSpec, rounding, "solver")
    if settings and not made.needs_hessian:
        raise SpecError(f"the solver {made.kind} uses no Hessian: leave out {_options(settings)}, or take gptq")
    return replace(base, solver=made, scheme=scheme)


def _with_clip(base: Recipe, tensors: str, clip: str) -> Recipe:
    """The recipe with other ranges of weights, or of activations in a format."""
    from flatquant.spec import QuantSpec, from_dict, to_dict

    spec, option = getattr(base.scheme, tensors), f"{tensors.removesuffix('s')}-clip"
    if spec is None or spec.clip == "learned" or (tensors == "activations" and not spec.format):
        raise SpecError(f"method {base.name} at {base.scheme} leaves no ranges to choose: leave out --{option}")
    if clip not in ("none", "search"):
        raise SpecError(f"unknown {option.replace('-', ' ')} {clip!r}; known: none, search")
    made = from_dict(QuantSpec, to_dict(spec) | {"clip": clip}, tensors)
    return replace(base, scheme=replace(base.scheme, **{tensors: made}))


def _with_learned_rounding(base: Recipe, steps: int) -> Recipe:
    """The recipe with so many steps of learned rounding."""
    from flatquant.spec import RoundingSpec

    if base.scheme.weights is None:
        raise SpecError(f"scheme {base.scheme} does not quantise weights: leave out --rounding-steps")
    learned = base.solver.learned or RoundingSpec()
    return replace(base, solver=replace(base.solver, learned=replace(learned, steps=steps)))


def _options(names: dict[str, Any]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)


# --------------------------------------------------------------------------------------------- methods, compare


@app.command()
def methods(
    families: Annotated[
        bool, typer.Option("--families", help="Instead: which methods go with which families of models.")
    ] = False,
    as_json: Json = False,
) -> None:
    """What every method is made of, and what it costs while serving."""
    with _errors():
        if families:
            from flatquant.families import table
        else:
            from flatquant.methods import table
        rows = table()
    if as_json:
        _print_json(rows)
    elif families:
        _families_table(rows)
    else:
        _methods_table(rows)


def _families_table(rows: list[dict[str, str]]) -> None:
    """A line for each family: all methods, or what does not go."""
    shown = Table(title="methods by family", title_justify="left")
    shown.add_column("family", overflow="fold", max_width=34)
    shown.add_column("methods", overflow="fold")
    for row in rows:
        limited: dict[str, list[str]] = {}
        for method, cell in row.items():
            if method != "family" and cell != "yes":
                limited.setdefault("not" if cell == "-" else f"{cell} alone", []).append(method)
        shown.add_row(row["family"], "; ".join(f"{how}: {', '.join(found)}" for how, found in limited.items()) or "all")
    Console(highlight=False).print(shown)
    _print("all methods go but those that are named; --json has every pair")


def _methods_table(rows: list[dict[str, Any]]) -> None:
    shown = Table(title="methods", title_justify="left", show_lines=True)
    columns = [column for column in rows[0] if column not in ("scheme", "data")]
    for column in columns:
        shown.add_column(column, overflow="fold", no_wrap=column == "method")
    for row in rows:
        shown.add_row(*(row[column] for column in columns[:-1]), f"{row['online']:.2%}")
    Console(highlight=False).print(shown)
    _print("online: operations added to those of the linears of a Llama-2-7B block; --json shows more")


@app.command()
def bench(
    what: Annotated[str, typer.Argument(help="Comma-separated: sites, products, models.")] = "sites,products,models",
    shapes: Annotated[
        str, typer.Option(help="Comma-separated: llama-2-7b, llama-3-8b, tiny.")
    ] = "llama-2-7b,llama-3-8b",
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Time the runtime against bfloat16, with random weights of true shapes; a row that fails its check has no time."""
    with _errors("interrupted"):
        from flatquant import bench as benchmark

        where = _device(device)
        parts, names = (tuple(filter(None, text.split(","))) for text in (what, shapes))
        unknown = set(parts) - {"sites", "products", "models"}
        if unknown:
            raise SpecError(f"nothing called {', '.join(sorted(unknown))} to time; known: sites, products, models")
        tiny = names == ("tiny",)
        if where.type != "cuda" and not tiny:
            raise SpecError("the runtime's kernels are for CUDA devices; --shapes tiny goes the same way on others")
        rows, memory = benchmark.run(where, parts, names, tiny=tiny)
        wrong = [row for row in rows if not row.correct]
        if as_json:
            _print_json({"rows": [row.json() for row in rows], "memory": memory})
        else:
            _bench_table(rows, memory)
        if wrong:
            raise FlatQuantError(f"{len(wrong)} of {len(rows)} rows failed their check; their times were not taken")


def _bench_table(rows: list[Row], memory: dict[str, dict[str, int]]) -> None:
    table = Table("what", "tokens", "ms", "10 % - 90 %", "against", "ms", "times faster")
    for row in rows:
        times = (f"{row.ms:.4f}", f"{row.low:.4f} - {row.high:.4f}") if row.correct else ("wrong", f"{row.error:.3g}")
        ratio = ("", "") if row.ratio is None else (f"{row.baseline_ms:.4f}", f"{row.ratio:.2f}")
        table.add_row(row.what, str(row.tokens), *times, row.baseline, *ratio)
    Console(highlight=False).print(table)
    for shape, sizes in memory.items():
        parts = (f"{part} {sizes[part] / sizes[f'bf16_{part}']:.2f} of bfloat16's" for part in ("weights", "cache"))
        _print(f"{shape}: {', '.join(parts)}")


@app.command()
def compare(
    model: Annotated[str, typer.Argument(help="Hub id, local folder, GGUF file, or smollm2-135m.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the comparison, new or to go on with.")],
    methods: Annotated[str, typer.Option(help="Comma-separated; those that `flatquant methods` lists.")],
    schemes: Annotated[str, typer.Option(help="Comma-separated: w4a4kv4,w4a16,w3a16.")] = "w4a4kv4",
    calibration: Annotated[
        str | None, typer.Option(help="As for quantize; by default each recipe's own, mostly wikitext2.")
    ] = None,
    preset: Annotated[str, typer.Option(help="reference: the papers' recipes; quick: for a laptop CPU.")] = "reference",
    perplexity: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="wikitext2 (default), c4, or a text; repeatable.")
    ] = None,
    windows: Annotated[int | None, typer.Option(help="At most so many windows of each text.")] = None,
    window: Annotated[int, typer.Option(help="Tokens in a window.")] = 2048,
    divergence_windows: Annotated[int, typer.Option(min=1, help="Of each text, that divergence is measured on.")] = 8,
    samples: Annotated[int | None, typer.Option(help="Calibration windows.")] = None,
    seqlen: Annotated[int | None, typer.Option(help="Tokens in a calibration window.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Epochs of block-wise fits.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Windows in a step of a fit.")] = None,
    device: Device = None,
    dtype: Annotated[str | None, typer.Option(help="Of fits' products: float16, bfloat16 or float32.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=SEEDS, help="Of the calibration text and of random transforms.")] = 0,
    plot: Annotated[bool, typer.Option("--plot/--no-plot", help="Draw compare.png, with matplotlib.")] = True,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Quantise a model by several methods and schemes, one row for each: quality, time, memory, size, cost."""
    with _errors("interrupted; go on by repeating the command"):
        from flatquant import compare as comparison

        where, kind = _device(device), _dtype(dtype)
        settings = comparison.Settings(
            model=model,
            calibration=calibration,
            preset=preset,
            perplexity=tuple(perplexity or ("wikitext2",)),
            windows=windows,
            window=window,
            divergence_windows=divergence_windows,
            samples=samples,
            seqlen=seqlen,
            epochs=epochs,
            batch_size=batch_size,
            device=None if where is None else str(where),
            dtype=kind,
            seed=seed,
        )
        with Display(silent=quiet or as_json) as display:
            result = comparison.run(
                settings, _listed(methods), _listed_schemes(schemes), output, plot=plot, progress=display
            )
    if as_json:
        _print_json(result)
    elif not quiet:
        header, *rows = comparison.cells(result)
        table = Table(title=model, title_justify="left")
        for title in header:
            table.add_column(title, overflow="fold")
        for row in rows:
            table.add_row(*row)
        Console(highlight=False).print(table)
        _print(f"{output}: compare.json, compare.md" + (", compare.png" if plot else ""))


def _listed(text: str) -> list[str]:
    return [part for part in (p.strip() for p in text.split(",")) if part]


def _listed_schemes(text: str) -> list[str]:
    """Schemes between commas; an override (`mlp_mid=w8`, `0.k8`) belongs to the scheme before it."""
    found: list[str] = []
    for part in _listed(text):
        if found and ("=" in part or "." in part):
            found[-1] += f",{part}"
        else:
            found.append(part)
    return found


# --------------------------------------------------------------------------------------------- evaluate


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL_OR_DIR", help="A quantised folder, or any model.")],
    perplexity: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="wikitext2, c4, or a text file or folder; repeatable.")
    ] = None,
    windows: Annotated[int | None, typer.Option(help="At most so many windows of each text.")] = None,
    seqlen: Annotated[int, typer.Option(help="Tokens in a window.")] = 2048,
    tasks: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="Zero-shot tasks: all, or piqa,arc_easy,... (needs lm-eval)."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=2, help="Questions of each task.")] = None,
    divergence_from: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="KL divergence from this model, on the first text, else on text it writes; its scores on --tasks too.",
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Windows or questions at a time; 1 window, and as many questions as fit."),
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    seed: Annotated[int, typer.Option(min=0, max=SEEDS, help="Of text that --divergence-from's model writes.")] = 1,
    json_file: Annotated[str | None, typer.Option("--json", metavar="FILE", help="Write JSON; - is stdout.")] = None,
    save: Annotated[
        bool,
        typer.Option("--save", help="Keep results in DIR, for report and model card; kept tasks are not run again."),
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Perplexity on texts, zero-shot tasks, and divergence from the original model."""
    with _errors():
        if not perplexity and not tasks and divergence_from is None:
            raise FlatQuantError("nothing to evaluate; give --perplexity TEXT, --tasks all or --divergence-from MODEL")
        if json_file not in (None, "-") and not Path(json_file).parent.is_dir():
            raise FlatQuantError(f"cannot write {json_file}: no such folder")
        if save and not _is_quantised(model):
            raise FlatQuantError(f"--save keeps results in a quantised folder, and {model} is none")
        where, kind = _device(device), _dtype(dtype)
        with Display(silent=quiet or json_file == "-") as display:
            job = _Evaluation(model, divergence_from, where, kind, batch_size, display, save)
            for source in perplexity or ():
                job.perplexity(source, seqlen, windows)
            if divergence_from is not None and (perplexity or not tasks):
                job.divergence(windows, seqlen, seed)
            if tasks:
                job.tasks(tasks, limit)
            if job.unplaced:
                display.note(f"{model}/README.md is its owner's, and has no marks around results: it is left as it is")
        if json_file is not None:
            _write(json_file, job.result)
    if json_file != "-" and not (quiet and json_file):
        _table(model, _evaluation_rows(job.result))


class _Evaluation:
    """One call of `evaluate`: its models, loaded when needed, and what was found so far."""

    def __init__(
        self,
        model: str,
        original: str | None,
        device: torch.device,
        dtype: torch.dtype | None,
        batch_size: int | None,
        display: Display,
        save: bool,
    ) -> None:
        self.model, self.original, self.device, self.dtype = model, original, device, dtype
        self.batch_size, self.display, self.save = batch_size, display, save
        self.result: dict[str, Any] = {}
        self.unplaced = False  # the card has no place for results
        self.texts: dict[str, Any] = {}
        self.opened: dict[str, Any] = {}

    def open(self, name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """A model, read once."""
        if name not in self.opened:
            self.opened[name] = _open(name, self.device, self.dtype)
        return self.opened[name]

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What tells the original from others, where results are kept."""
        from flatquant.models import ALIASES, identity, resolve

        if not self.save or self.original is None:
            return {}
        found = resolve(self.original)
        named = self.original if self.original in ALIASES or isinstance(found, str) else found.resolve().name
        return {"original": {"sha256": identity(self.original), "name": named}}

    def keep(self, result: dict[str, Any]) -> None:
        """Note a result, in the folder too if asked."""
        from flatquant.runtime.artifact import keep_evaluation, merged

        self.result = merged(self.result, result)
        if self.save and not keep_evaluation(Path(self.model), merged(_without_folders(result), self.facts)):
            self.unplaced = True

    def perplexity(self, source: str, seqlen: int, windows: int | None) -> None:
        """Of the model, and of the original where results are kept."""
        from flatquant import evaluate as evaluation
        from flatquant.data import evaluation_windows

        candidate, tokenizer = self.open(self.model)
        ids = self.texts[source] = evaluation_windows(source, tokenizer, seqlen=seqlen, windows=windows)

        def of(model: PreTrainedModel) -> dict[str, Any]:
            found = evaluation.perplexity(
                model,
                ids,
                batch_size=self.batch_size or 1,
                progress=lambda done, total: self.display(f"perplexity of {source}", done, total),
            )
            return {"perplexity": {source: {"value": found.value, "windows": found.windows}}}

        self.keep(of(candidate))
        if self.save and self.original is not None:
            self.keep({"original": of(self.open(self.original)[0])})

    def divergence(self, windows: int | None, seqlen: int, seed: int) -> None:
        """From the original, on the first text."""
        from flatquant import evaluate as evaluation
        from flatquant.data import calibration_tokens

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
                progress=lambda done, total: self.display("text", done, total),
            )
        far = evaluation.divergence(
            candidate,
            reference,
            held_out,
            batch_size=self.batch_size or 1,
            progress=lambda done, total: self.display("divergence", done, total),
        )
        self.keep({"divergence": {"kl": far.kl, "top1": far.top1}})

    def tasks(self, names: str, limit: int | None) -> None:
        """Of the model, and of the original for the drop; those that the folder has already are not run again."""
        from flatquant import evaluate as evaluation
        from flatquant.runtime.artifact import facing, read_evaluation

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
                    quiet=self.display.silent,
                )


def _merged_task(result: dict[str, Any], wrap: Any, task: str, score: Any) -> dict[str, Any]:
    from flatquant.runtime.artifact import merged

    return merged(result, wrap({"tasks": {task: score}}))


def _evaluation_rows(result: dict[str, Any]) -> dict[str, str]:
    rows = {
        f"perplexity, {source}": f"{found['value']:.4f} ({found['windows']} windows)"
        for source, found in result.get("perplexity", {}).items()
    }
    if "divergence" in result:
        rows |= {
            "KL divergence": f"{result['divergence']['kl']:.5f} nats per token",
            "top-1 agreement": f"{result['divergence']['top1']:.2%}",
        }
    before = result.get("original", {}).get("tasks", {})
    for task, found in result.get("tasks", {}).items():
        drop = f", {found['value'] - before[task]['value']:+.2%} against the original" if task in before else ""
        rows[f"{task}, {found['metric']}"] = f"{found['value']:.2%} ± {found['stderr']:.2%}{drop}"
    return rows


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


# --------------------------------------------------------------------------------------------- generate


@app.command()
def generate(
    model: Annotated[str, typer.Argument(metavar="DIR", help="A quantised folder (or any model).")],
    prompt: Annotated[str, typer.Option(help="What the text begins with.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write at most.")] = 64,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, max=SEEDS, help="Of the sampling.")] = 0,
    chat: Annotated[bool, typer.Option(help="Put the prompt into the tokenizer's chat template.")] = False,
    device: Device = None,
    dtype: Dtype = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Write text with a quantised model and its quantised KV cache."""
    with _errors():
        from flatquant.runtime.generate import generate_text

        loaded, tokenizer = _open(model, _device(device), _dtype(dtype))
        found = generate_text(
            loaded,
            tokenizer,
            prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            chat=chat,
            stream=not as_json,
        )
    if as_json:
        _print_json({"prompt": prompt, **vars(found)})
    elif not quiet:
        kept = "" if found.cache_bytes is None else f", {found.cache_bytes / 1e3:.1f} kB of keys and values"
        typer.echo(f"[{found.tokens} tokens, {found.tokens / found.seconds:.1f} per second{kept}]", err=True)


# --------------------------------------------------------------------------------------------- serve


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    folder: Annotated[str, typer.Argument(metavar="DIR", help="A quantised folder.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    dtype: Annotated[str, typer.Option(help="Of activations and cache: auto, float16, bfloat16 or float32.")] = "auto",
    tensor_parallel_size: Annotated[int, typer.Option(min=1, help="GPUs that share every layer.")] = 1,
    accept: Annotated[bool, typer.Option("--accept", help="Serve it even if its verdict is destroyed.")] = False,
) -> None:
    """Serve a quantised model over the OpenAI API, by vLLM. Options that are not listed here are vLLM's own."""
    with _errors():
        from flatquant.engines.vllm import support

        support.check_version(support.installed())
        support.check_plugins()
        found = support.open_folder(folder)
        support.check_cut(found, tensor_parallel_size)
        if not accept and word_of(found.read_report()) == DESTROYED:
            raise ModelError(f"{folder} has the verdict {DESTROYED}; quantise it with more bits, or give --accept")
        server = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
        options = {
            "--model": folder,
            "--served-model-name": found.path.resolve().name,
            "--host": host,
            "--port": str(port),
            "--dtype": dtype,
            "--tensor-parallel-size": str(tensor_parallel_size),
        }
        given = {option.partition("=")[0] for option in context.args}
        named = [part for name, value in options.items() if name not in given for part in (name, value)]
        os.execv(sys.executable, [*server, *named, *context.args])


# --------------------------------------------------------------------------------------------- inspect


@app.command()
def inspect(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="A quantised folder.")],
    as_json: Json = False,
) -> None:
    """Scheme, sizes, bits per weight and integrity of a quantised folder."""
    with _errors():
        from flatquant.runtime import artifact
        from flatquant.spec import to_dict

        found = artifact.inspect(folder)
        try:
            rows = _inspected_rows(found)
        except (AttributeError, KeyError, TypeError, ValueError) as error:  # JSON of any form
            raise FlatQuantError(f"flatquant_report.json in {folder} is damaged ({error}); copy it again") from error
    if as_json:
        _print_json(to_dict(found))
    else:
        _table(folder, rows)
    if found.damaged:
        raise _failure(f"{folder}: damaged or missing: {', '.join(found.damaged)}; copy the folder again", 1)


def _inspected_rows(found: Inspection) -> dict[str, str]:
    bits = found.bits_per_quantised_weight
    untied = bool(found.report and (found.report.get("sizes") or {}).get("untied"))
    kept = _unquantised_rows(found.unquantised_bytes, found.left_in_16_bit, untied=untied)
    judged = (found.report or {}).get("verdict")
    return {
        "architecture": f"{found.architecture}, {found.blocks} blocks, {found.parameters:,} parameters",
        "recipe, scheme": f"{found.recipe}, {found.scheme}",
        **({"verdict": "\n".join(readable(judged))} if judged else {}),
        **({"calibration": text} if (text := calibrated_on((found.report or {}).get("data"))) else {}),
        "quantised parameters": f"{found.quantised_parameters:,}",
        **{f"bytes, {kind}": f"{size:,}" for kind, size in found.bytes_by_kind.items()},
        **{name: value for name, value in kept.items() if value},
        "bits per quantised weight": f"{bits:.3f}, scales and transforms counted" if bits else "-",
        "bits per parameter": f"{found.bits_per_parameter:.3f} ({found.compression:.2f} x smaller than 16 bit)",
        "KV bytes per token": f"{found.kv_bytes_per_token:,} (in 16 bit {found.kv_bytes_per_token_16bit:,})",
        "format version": str(found.format_version),
        "content hash": found.content_hash,
        "integrity": "damaged: " + ", ".join(found.damaged) if found.damaged else "whole",
    }


# --------------------------------------------------------------------------------------------- report


@app.command()
def report(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="A quantised folder.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="HTML file to write; flatquant_report.html in DIR.")
    ] = None,
    figures: Annotated[
        Path | None, typer.Option(help="Folder for the figures as files of their own, SVG and PNG.")
    ] = None,
    png: Annotated[bool, typer.Option("--png/--no-png", help="Of --figures: PNG too, with matplotlib.")] = True,
    collect: Annotated[
        str | None, typer.Option(metavar="MODEL", help="First look inside both models: the original, as for quantize.")
    ] = None,
    text: Annotated[str, typer.Option(help="Of --collect: wikitext2, c4, self, or a text file.")] = "self",
    tokens: Annotated[int, typer.Option(min=8, help="Of --collect: tokens to run.")] = 512,
    device: Device = None,
    quiet: Quiet = False,
) -> None:
    """One HTML file about a quantised model: quality, flatness, errors, sizes, and how to make it again."""
    with _errors(), Display(silent=quiet) as display:
        from flatquant import report as drawing
        from flatquant.runtime import artifact
        from flatquant.runtime.folder import COLLECTION_FILE, EVALUATION_FILE, Folder, read_json
        from flatquant.spec import to_dict

        opened = Folder.open(Path(folder))
        if collect is not None:
            found = _collect(folder, collect, text, tokens, _device(device), opened, display)
            drawing.write(opened.path / COLLECTION_FILE, json.dumps(found, indent=1) + "\n")
        extra = [opened.path / name for name in (EVALUATION_FILE, COLLECTION_FILE)]
        evaluation, collection = (read_json(file) if file.is_file() else None for file in extra)
        noted = opened.read_report()
        try:
            page = drawing.page(folder, to_dict(artifact.inspect(folder)), noted, evaluation, collection)
            drawn = drawing.figures(noted, collection)
        except (AttributeError, KeyError, TypeError, ValueError) as error:  # JSON of any form
            raise FlatQuantError(f"the JSON files in {folder} are damaged ({error}); make them again") from error
        target = output or opened.path / drawing.FILE
        drawing.write(target, page)
        for name, (_, figure, _) in drawn.items() if figures is not None else ():
            drawing.write(figures / f"{name}.svg", drawing.standalone(figure))  # type: ignore[operator]
            if png:
                drawing.write(figures / f"{name}.png", drawing.png(figure))  # type: ignore[operator]
    if not quiet:
        _print(f"{target}: {len(drawn)} figures")


def _collect(
    folder: str, model: str, text: str, tokens: int, device: torch.device, opened: Any, display: Display
) -> dict[str, Any]:
    from flatquant.data import calibration_tokens
    from flatquant.evaluate.collect import collect

    original, _ = _open(model, device, None)
    quantised, tokenizer = _open(folder, device, None)
    windows = calibration_tokens(
        text,
        tokenizer,
        samples=max(1, tokens // 256),
        seqlen=min(tokens, 256),
        seed=2,
        model=original,
        progress=lambda done, total: display("text", done, total),
    )
    return collect(
        quantised, original, opened.plan, windows, progress=lambda done, total: display("collect", done, total)
    )


# --------------------------------------------------------------------------------------------- import, export


@app.command(name="import")
def import_(
    model: Annotated[
        str, typer.Argument(help="With --matrices, the unquantised model; else an FP4 folder of compressed-tensors.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; absent or empty.")],
    matrices: Annotated[
        Path | None, typer.Option(help="flat_matrices.pth of the original FlatQuant project, or its folder.")
    ] = None,
    scheme: Annotated[
        str | None, typer.Option(help="What the matrices were made for; the file does not say. w4a4kv4 by default.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Take over what other tools have found: the original project's matrices, or FP4 models of compressed-tensors."""
    with _errors():
        from flatquant.interchange import import_compressed, import_matrices
        from flatquant.models import load_model, load_tokenizer
        from flatquant.runtime import artifact
        from flatquant.spec import to_dict

        artifact.check_output(output)
        if matrices is None and scheme is not None:
            raise SpecError("an FP4 folder says what its scheme is: leave out --scheme, or name --matrices")
        if matrices is None:
            loaded, plan, recipe, noted = import_compressed(Path(model))
            tokenizer = load_tokenizer(Path(model))
        else:
            loaded, tokenizer = load_model(model)
            plan, recipe, noted = import_matrices(loaded, matrices, scheme or "w4a4kv4")
        artifact.save(loaded, plan, output, recipe=to_dict(recipe), report=noted, tokenizer=tokenizer)
    if not quiet:
        _print(f"{output}: {recipe.scheme}")


@app.command()
def export(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="A quantised folder.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; absent or empty.")],
    form: Annotated[str, typer.Option("--format", help="dense or compressed-tensors.")] = "dense",
    weights_only: Annotated[
        bool, typer.Option("--weights-only", help="Of dense: leave out the grids of activations, keys and values.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Write a quantised model for other tools."""
    with _errors():
        from flatquant import interchange
        from flatquant.models import load_tokenizer
        from flatquant.runtime import artifact
        from flatquant.runtime.folder import Folder

        if form not in ("dense", "compressed-tensors"):
            raise SpecError(f"unknown format {form!r}; known: dense, compressed-tensors")
        if weights_only and form != "dense":
            raise SpecError("--weights-only is for --format dense")
        model, plan = artifact.load(folder), Folder.open(Path(folder)).plan
        tokenizer = load_tokenizer(Path(folder)) if (Path(folder) / "tokenizer_config.json").is_file() else None
        if form == "dense":
            interchange.export_dense(model, plan, output, tokenizer=tokenizer, weights_only=weights_only)
        else:
            interchange.export_compressed(model, plan, output, tokenizer=tokenizer)
    if not quiet:
        _print(f"{output}: {form}")


# --------------------------------------------------------------------------------------------- demo


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the quantised model.")] = DEMO_OUTPUT,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a quantised model that is there.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Quantise SmolLM2-135M to W4A4KV4 on this machine; compare original, RTN and FlatQuant."""
    with _errors("interrupted; start over with --overwrite"), Display(silent=quiet or as_json) as display:
        from flatquant import demo as job

        result = job.run(output, overwrite=overwrite, progress=display)
    if as_json:
        _print_json(result)
        return
    rows = result["rows"]
    table = Table(title=f"{result['model']}, {result['scheme']}", title_justify="left")
    table.add_column("")
    for name in rows:
        table.add_column(name, justify="right")
    table.add_row("KL divergence, nats per token", *(f"{row['kl']:.4f}" for row in rows.values()))
    table.add_row("top-1 agreement", *(f"{row['top1']:.1%}" for row in rows.values()))
    if rows["original"]["perplexity"] is not None:
        table.add_row("perplexity, WikiText-2 (start)", *(f"{row['perplexity']:.2f}" for row in rows.values()))
    table.add_row("size", *(_size(row["bytes"]) for row in rows.values()))
    took = ("-" if row["seconds"] is None else f"{row['seconds']:.0f} s" for row in rows.values())
    table.add_row("time to quantise and save", *took)
    Console(highlight=False).print(table)
    for line in readable(result["verdict"]):
        _print(line)
    _print(f"{result['prompt']}{result['text']}")
    _print(f"saved in {result['output']}; {result['seconds']:.0f} s in all")


# --------------------------------------------------------------------------------------------- entry


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"flatquant {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    pass


def main() -> None:
    """The console entry."""
    app(prog_name="flatquant")


if __name__ == "__main__":
    main()
