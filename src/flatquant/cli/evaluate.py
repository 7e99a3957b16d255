"""`flatquant evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from flatquant.cli.app import Device, Devices, Dtype, Quiet, app
from flatquant.cli.display import Display
from flatquant.cli.terminal import check_devices, device_of, divided, dtype_of, errors, print_table, write_json
from flatquant.errors import FlatQuantError
from flatquant.spec import LARGEST_SEED


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
    devices: Devices = None,
    dtype: Dtype = None,
    seed: Annotated[
        int, typer.Option(min=0, max=LARGEST_SEED, help="Of text that --divergence-from's model writes.")
    ] = 1,
    json_file: Annotated[str | None, typer.Option("--json", metavar="FILE", help="Write JSON; - is stdout.")] = None,
    save: Annotated[
        bool,
        typer.Option("--save", help="Keep results in DIR, for report and model card; kept tasks are not run again."),
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Perplexity on texts, zero-shot tasks, and divergence from the original model."""
    with errors():
        if not perplexity and not tasks and divergence_from is None:
            raise FlatQuantError("nothing to evaluate; give --perplexity TEXT, --tasks all or --divergence-from MODEL")
        if json_file not in (None, "-") and not Path(json_file).parent.is_dir():
            raise FlatQuantError(f"cannot write {json_file}: no such folder")
        from flatquant.evaluate.job import Evaluation
        from flatquant.runtime.opening import is_quantised

        if save and not is_quantised(model):
            raise FlatQuantError(f"--save keeps results in a quantised folder, and {model} is none")
        where, kind = device_of(device), dtype_of(dtype)
        check_devices(devices, where)
        with divided(devices, where) as leads, Display(silent=quiet or json_file == "-" or not leads) as display:
            job = Evaluation(
                model,
                divergence_from,
                device=where,
                dtype=kind,
                batch_size=batch_size,
                save=save,
                progress=display,
                quiet=display.silent,
            )
            for source in perplexity or ():
                job.perplexity(source, seqlen, windows)
            if divergence_from is not None and (perplexity or not tasks):
                job.divergence(windows, seqlen, seed)
            if tasks:
                job.tasks(tasks, limit)
            if job.unplaced:
                display.note(f"{model}/README.md is its owner's, and has no marks around results: it is left as it is")
        if json_file is not None and leads:
            write_json(json_file, job.result)
    if leads and json_file != "-" and not (quiet and json_file):
        print_table(model, _evaluation_rows(job.result))


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
