"""The typer application, and options that several commands have."""

from __future__ import annotations

from typing import Annotated

import typer

from flatquant import __version__

app = typer.Typer(
    help="Quantise language models to 4-bit weights, activations and KV cache.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; a GPU if there is one.")]
Devices = Annotated[
    int | None, typer.Option(min=1, help="GPUs of this host to divide the work among, a process for each.")
]
Dtype = Annotated[str | None, typer.Option(help="float16, bfloat16 or float32; chosen by device and model.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no summary.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else.")]


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
