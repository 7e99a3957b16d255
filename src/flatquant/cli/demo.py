"""`flatquant demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from flatquant.cli.app import Json, Quiet, app
from flatquant.cli.display import Display
from flatquant.cli.terminal import errors, megabytes, print_json, say
from flatquant.grade import readable

DEMO_OUTPUT = Path("outputs/smollm2-135m-w4a4kv4")


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the quantised model.")] = DEMO_OUTPUT,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a quantised model that is there.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Quantise SmolLM2-135M to W4A4KV4 on this machine; compare original, RTN and FlatQuant."""
    with errors("interrupted; start over with --overwrite"), Display(silent=quiet or as_json) as display:
        from flatquant import demo as job

        result = job.run(output, overwrite=overwrite, progress=display)
    if as_json:
        print_json(result)
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
    table.add_row("size", *(megabytes(row["bytes"]) for row in rows.values()))
    took = ("-" if row["seconds"] is None else f"{row['seconds']:.0f} s" for row in rows.values())
    table.add_row("time to quantise and save", *took)
    Console(highlight=False).print(table)
    for line in readable(result["verdict"]):
        say(line)
    say(f"{result['prompt']}{result['text']}")
    say(f"saved in {result['output']}; {result['seconds']:.0f} s in all")
