"""`flatquant inspect` and `report`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flatquant.cli.app import Device, Json, Quiet, app
from flatquant.cli.display import Display
from flatquant.cli.quantize import rounded_end_rows, unquantised_rows
from flatquant.cli.terminal import device_of, errors, failure, print_json, print_table, say
from flatquant.errors import FlatQuantError
from flatquant.grade import readable
from flatquant.mixture import calibrated_on

if TYPE_CHECKING:
    import torch

    from flatquant.runtime.artifact import Inspection


@app.command()
def inspect(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="A quantised folder.")],
    as_json: Json = False,
) -> None:
    """Scheme, sizes, bits per weight and integrity of a quantised folder."""
    with errors():
        from flatquant.runtime import artifact
        from flatquant.spec import to_dict

        found = artifact.inspect(folder)
        try:
            rows = _inspected_rows(found)
        except (AttributeError, KeyError, TypeError, ValueError) as error:  # JSON of any form
            raise FlatQuantError(f"flatquant_report.json in {folder} is damaged ({error}); copy it again") from error
    if as_json:
        print_json(to_dict(found))
    else:
        print_table(folder, rows)
    if found.damaged:
        raise failure(f"{folder}: damaged or missing: {', '.join(found.damaged)}; copy the folder again", 1)


def _inspected_rows(found: Inspection) -> dict[str, str]:
    bits = found.bits_per_quantised_weight
    untied = bool(found.report and (found.report.get("sizes") or {}).get("untied"))
    kept = unquantised_rows(found.unquantised_bytes, found.left_in_16_bit, untied=untied)
    judged = (found.report or {}).get("verdict")
    return {
        "architecture": f"{found.architecture}, {found.blocks} blocks, {found.parameters:,} parameters",
        "recipe, scheme": f"{found.recipe}, {found.scheme}",
        **({"verdict": "\n".join(readable(judged))} if judged else {}),
        **({"calibration": text} if (text := calibrated_on((found.report or {}).get("data"))) else {}),
        "quantised parameters": f"{found.quantised_parameters:,}",
        **{f"bytes, {kind}": f"{size:,}" for kind, size in found.bytes_by_kind.items()},
        **rounded_end_rows(found.output_layer, found.embedding),
        **{name: value for name, value in kept.items() if value},
        "bits per quantised weight": f"{bits:.3f}, scales and transforms counted" if bits else "-",
        "bits per parameter": f"{found.bits_per_parameter:.3f} ({found.compression:.2f} x smaller than 16 bit)",
        "KV bytes per token": f"{found.kv_bytes_per_token:,} (in 16 bit {found.kv_bytes_per_token_16bit:,})",
        "format version": str(found.format_version),
        "content hash": found.content_hash,
        "integrity": "damaged: " + ", ".join(found.damaged) if found.damaged else "whole",
    }


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
    with errors(), Display(silent=quiet) as display:
        from flatquant import report as drawing
        from flatquant.runtime import artifact
        from flatquant.runtime.folder import COLLECTION_FILE, EVALUATION_FILE, Folder, read_json
        from flatquant.spec import to_dict

        opened = Folder.open(Path(folder))
        if collect is not None:
            found = _collect(folder, collect, text, tokens, device_of(device), opened, display)
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
        say(f"{target}: {len(drawn)} figures")


def _collect(
    folder: str, model: str, text: str, tokens: int, device: torch.device, opened: Any, display: Display
) -> dict[str, Any]:
    from flatquant.data import calibration_tokens
    from flatquant.evaluate.collect import collect
    from flatquant.runtime.opening import open_model

    original, _ = open_model(model, device, None)
    quantised, tokenizer = open_model(folder, device, None)
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
