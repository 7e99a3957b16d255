"""`flatquant import` and `export`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flatquant.cli.app import Quiet, app
from flatquant.cli.terminal import errors, say
from flatquant.errors import FlatQuantError, SpecError

if TYPE_CHECKING:
    from flatquant.runtime.folder import Folder


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
    with errors():
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
        say(f"{output}: {recipe.scheme}")


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
    with errors():
        from flatquant import interchange
        from flatquant.models import load_tokenizer
        from flatquant.runtime import artifact
        from flatquant.runtime.folder import Folder

        if form not in ("dense", "compressed-tensors"):
            raise SpecError(f"unknown format {form!r}; known: dense, compressed-tensors")
        if weights_only and form != "dense":
            raise SpecError("--weights-only is for --format dense")
        model, opened = artifact.load(folder), Folder.open(Path(folder))
        plan = opened.plan
        tokenizer = load_tokenizer(Path(folder)) if (Path(folder) / "tokenizer_config.json").is_file() else None
        notes: list[str] = []
        instead = ""
        if form == "dense":
            interchange.export_dense(model, plan, output, tokenizer=tokenizer, weights_only=weights_only)
        else:
            notes = interchange.export_compressed(model, plan, output, tokenizer=tokenizer)
            instead = _instead(opened) if notes else ""
    if not quiet:
        say(f"{output}: {form}")
        for note in notes:
            say(f"note: {note}{instead}")


def _instead(folder: Folder) -> str:
    """What to do with a folder where vLLM takes no export of it: vLLM may serve the folder itself."""
    from flatquant.engines.parts import Parts
    from flatquant.engines.vllm.support import check_config

    try:
        check_config(folder)
        Parts(folder)
    except FlatQuantError:
        return ""
    return f"; `flatquant serve {shlex.quote(str(folder.path))}` serves the folder itself"
