"""`flatquant methods`, `bench` and `compare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from flatquant.cli.app import Device, Devices, Json, Quiet, app
from flatquant.cli.display import Display
from flatquant.cli.terminal import check_devices, device_of, divided, dtype_of, errors, print_json, say
from flatquant.errors import FlatQuantError, SpecError
from flatquant.spec import LARGEST_SEED

if TYPE_CHECKING:
    from flatquant.bench import Row


@app.command()
def methods(
    families: Annotated[
        bool, typer.Option("--families", help="Instead: which methods go with which families of models.")
    ] = False,
    as_json: Json = False,
) -> None:
    """What every method is made of, and what it costs while serving."""
    with errors():
        if families:
            from flatquant.families import table
        else:
            from flatquant.methods import table
        rows = table()
    if as_json:
        print_json(rows)
    elif families:
        _families_table(rows)
    else:
        _methods_table(rows)


def _families_table(rows: list[dict[str, str]]) -> None:
    """A line for each family: all methods, or what does not go."""
    shown = Table(title="methods by family", title_justify="left")
    shown.add_column("family", overflow="fold", max_width=34)
    shown.add_column("methods", overflow="fold")
    shown.add_column("engines", overflow="fold")
    for row in rows:
        limited: dict[str, list[str]] = {}
        for method, cell in row.items():
            if method not in ("family", "engines") and cell != "yes":
                limited.setdefault("not" if cell == "-" else f"{cell} alone", []).append(method)
        methods = "; ".join(f"{how}: {', '.join(found)}" for how, found in limited.items()) or "all"
        shown.add_row(row["family"], methods, row["engines"])
    Console(highlight=False).print(shown)
    say("all methods go but those that are named; --json has every pair")


def _methods_table(rows: list[dict[str, Any]]) -> None:
    shown = Table(title="methods", title_justify="left", show_lines=True)
    columns = [column for column in rows[0] if column not in ("scheme", "data")]
    for column in columns:
        shown.add_column(column, overflow="fold", no_wrap=column == "method")
    for row in rows:
        shown.add_row(*(row[column] for column in columns[:-1]), f"{row['online']:.2%}")
    Console(highlight=False).print(shown)
    say("online: operations added to those of the linears of a Llama-2-7B block; --json shows more")


@app.command()
def bench(
    what: Annotated[str, typer.Argument(help="Comma-separated: sites, products, models.")] = "sites,products,models",
    shapes: Annotated[
        str, typer.Option(help="Comma-separated: llama-2-7b, llama-3-8b, qwen3-8b, gemma-3-1b, tiny and others.")
    ] = "llama-2-7b,llama-3-8b",
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Time the runtime against bfloat16, with random weights of true shapes; a row that fails its check has no time."""
    with errors("interrupted"):
        from flatquant import bench as benchmark

        where = device_of(device)
        parts, names = (tuple(filter(None, text.split(","))) for text in (what, shapes))
        unknown = set(parts) - {"sites", "products", "models"}
        if unknown:
            raise SpecError(f"nothing called {', '.join(sorted(unknown))} to time; known: sites, products, models")
        for name in names:
            benchmark.config_of(name)
        tiny = all(benchmark.shape_of(name).tiny for name in names)
        if where.type != "cuda" and not tiny:
            raise SpecError("the runtime's kernels are for CUDA devices; --shapes tiny goes the same way on others")
        rows, memory = benchmark.run(where, parts, names, tiny=tiny)
        wrong = [row for row in rows if not row.correct]
        if as_json:
            print_json({"rows": [row.json() for row in rows], "memory": memory})
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
        say(f"{shape}: {', '.join(parts)}")


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
    devices: Devices = None,
    dtype: Annotated[str | None, typer.Option(help="Of fits' products: float16, bfloat16 or float32.")] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=LARGEST_SEED, help="Of the calibration text and of random transforms.")
    ] = 0,
    plot: Annotated[bool, typer.Option("--plot/--no-plot", help="Draw compare.png, with matplotlib.")] = True,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Quantise a model by several methods and schemes, one row for each: quality, time, memory, size, cost."""
    with errors("interrupted; go on by repeating the command"):
        from flatquant import compare as comparison
        from flatquant.report.comparison import cells

        where, kind = device_of(device), dtype_of(dtype)
        check_devices(devices, where)
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
            device=str(where),
            dtype=kind,
            seed=seed,
        )
        with divided(devices, where) as leads, Display(silent=quiet or as_json or not leads) as display:
            result = comparison.run(
                settings, _listed(methods), _listed_schemes(schemes), output, plot=plot, progress=display
            )
    if not leads:
        return
    if as_json:
        print_json(result)
    elif not quiet:
        header, *rows = cells(result)
        table = Table(title=model, title_justify="left")
        for title in header:
            table.add_column(title, overflow="fold")
        for row in rows:
            table.add_row(*row)
        Console(highlight=False).print(table)
        say(f"{output}: compare.json, compare.md" + (", compare.png" if plot else ""))


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
