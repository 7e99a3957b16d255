"""`flatquant quantize`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from flatquant.cli.app import Device, Devices, Json, Quiet, app
from flatquant.cli.display import Display
from flatquant.cli.options import recipe_of
from flatquant.cli.terminal import (
    Mistakes,
    check_devices,
    device_of,
    divided,
    dtype_of,
    errors,
    failure,
    megabytes,
    print_json,
    print_table,
    say,
)
from flatquant.errors import QualityWarning, SpecError
from flatquant.grade import DESTROYED, readable, tried
from flatquant.spec import LARGEST_SEED

if TYPE_CHECKING:
    from flatquant.spec import Plan, Recipe


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
    weight_memory: Annotated[
        str | None,
        typer.Option(
            help="How an end-to-end fit holds weights: full (16 bytes each), compact (5), transforms (does not train "
            "them), sharded (16, divided among --devices); auto takes the first of full, compact, sharded that fits."
        ),
    ] = None,
    key_offset: Annotated[
        str | None,
        typer.Option(help="A constant that cached keys leave out: auto (mean; without text, bias), none, bias, mean."),
    ] = None,
    ranks: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Of tensor parallelism that is to transform what it holds without a gather: left factors in blocks.",
        ),
    ] = None,
    device: Device = None,
    devices: Devices = None,
    dtype: Annotated[str | None, typer.Option(help="Of the fit's products: float16, bfloat16 or float32.")] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=LARGEST_SEED, help="Of the calibration text and of random transforms.")
    ] = 0,
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
    with errors(hint):
        from flatquant import api, distributed, models, recipes
        from flatquant.calibrate.memory import parse_bytes
        from flatquant.data import check_source
        from flatquant.spec import Scheme

        mistakes = Mistakes()
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
            "weight_memory": weight_memory,
            "ranks": ranks,
        }
        named = not mistakes.found
        made = partial(recipe_of, **rounding)
        recipe = mistakes(made, method, scheme, preset, calibration, *options) if named else None
        if recipe and losses and recipe.fit is recipe.end_to_end is None and not recipe.solver.learns:
            mistakes.found.append(SpecError(f"method {method} fits nothing: leave out --losses"))
        mistakes(models.check, model)
        if recipe.needs_data if recipe else calibration and not named:
            mistakes(check_source, (calibration or recipe.data.text) if recipe else calibration)
        if not distributed.launched():  # there, the first rank does
            mistakes(partial(api.check_output, resume=resume), output)
        where = mistakes(device_of, device)
        mistakes(check_devices, devices, where)
        mistakes(dtype_of, dtype)
        for memory in filter(None, (max_memory, max_host_memory)):
            mistakes(parse_bytes, memory)
        mistakes.tell()
        assert recipe is not None

        assert where is not None
        with divided(devices, where) as leads:
            display = Display(silent=quiet or as_json or not leads, epochs=recipe.fit.epochs if recipe.fit else 0)
            with display, warnings.catch_warnings():
                # Verdicts are told below, warnings of other ranks by the first.
                warnings.simplefilter("ignore", QualityWarning if leads else Warning)
                display("load", 0, 1)
                result = api.quantize(
                    model,
                    recipe,
                    calibration if recipe.needs_data else None,
                    output=output,
                    device=where,
                    dtype=dtype_of(dtype),
                    seed=seed,
                    resume=resume,
                    progress=display,
                    stream=stream,
                    max_memory=max_memory,
                    max_host_memory=max_host_memory,
                    notice=display.expect,
                )
    if not leads:
        return
    found = result.verdict
    if as_json:
        sizes, timing = result.report["sizes"], result.report["timing"]
        print_json(
            {"output": str(output), "scheme": str(recipe.scheme), "sizes": sizes, "timing": timing, "verdict": found}
        )
    elif not quiet:
        say(_quantised_line(output, recipe, result.report))
        print_table(None, _quantised_rows(result.report, result.plan))
    if losses and not as_json:
        Console(highlight=False).print(_losses(result.report))
    if not (quiet or as_json):
        for line in readable(found):
            say(line)
    if found is not None and found["word"] == DESTROYED and not accept:
        again = f"; {line}" if (line := " ".join(tried(found))) else ""
        raise failure(f"{output} was written, but the model in it is destroyed (--accept takes it){again}", 3)


def _quantised_line(output: Path, recipe: Recipe, report: dict[str, Any]) -> str:
    sizes, timing = report["sizes"], report["timing"]
    original, quantised = sizes["original_bytes"], sizes["quantised_bytes"]
    return (
        f"{output}: {recipe.name} {recipe.scheme}, {megabytes(original)} -> {megabytes(quantised)} "
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
        **rounded_end_rows(sizes["output_layer"], sizes.get("embedding")),
        **unquantised_rows(sizes["unquantised_bytes"], left_in_16_bit(plan), untied=sizes["untied"]),
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
            parts.append(f"{megabytes(peak)} {where} (estimate {megabytes(expected)})")
    return ", ".join(parts)


def rounded_end_rows(head: Mapping[str, Any] | None, embedding: Mapping[str, Any] | None) -> dict[str, str]:
    """A rounded output layer and embedding, and what the layer costs where it was the embeddings."""
    rows = {}
    if head:
        copied = ", a copy of the embeddings, which stay in 16 bit" if head["tied"] else ""
        rows["output layer"] = f"{head['grids']}, {megabytes(head['bytes'])}{copied}"
    if embedding:
        size = "the output layer's integers" if embedding["shared"] else megabytes(embedding["bytes"])
        rows["embedding"] = f"{embedding['grids']}, {size}"
    return rows


def unquantised_rows(sizes: Mapping[str, int], without: Sequence[str], *, untied: bool) -> dict[str, str]:
    """What stays as it was, and what it costs."""
    why = {"output layer": " (of its own since the embedding is rotated or rounded)"} if untied else {}
    kept = ", ".join(f"{kind} {megabytes(size)}{why.get(kind, '')}" for kind, size in sizes.items())
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
