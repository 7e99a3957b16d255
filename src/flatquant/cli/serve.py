"""`flatquant generate` and `serve`."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from flatquant.cli.app import Device, Dtype, Json, Quiet, app
from flatquant.cli.terminal import device_of, dtype_of, errors, print_json
from flatquant.errors import ModelError
from flatquant.grade import DESTROYED, word_of
from flatquant.spec import LARGEST_SEED


@app.command()
def generate(
    model: Annotated[str, typer.Argument(metavar="DIR", help="A quantised folder (or any model).")],
    prompt: Annotated[str, typer.Option(help="What the text begins with.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write at most.")] = 64,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Of the sampling.")] = 0,
    chat: Annotated[bool, typer.Option(help="Put the prompt into the tokenizer's chat template.")] = False,
    device: Device = None,
    dtype: Dtype = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Write text with a quantised model and its quantised KV cache."""
    with errors():
        from flatquant.runtime.generate import generate_text
        from flatquant.runtime.opening import open_model

        loaded, tokenizer = open_model(model, device_of(device), dtype_of(dtype))
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
        print_json({"prompt": prompt, **vars(found)})
    elif not quiet:
        kept = "" if found.cache_bytes is None else f", {found.cache_bytes / 1e3:.1f} kB of keys and values"
        typer.echo(f"[{found.tokens} tokens, {found.tokens / found.seconds:.1f} per second{kept}]", err=True)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    folder: Annotated[str, typer.Argument(metavar="DIR", help="A quantised folder.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    dtype: Annotated[str, typer.Option(help="Of activations and cache: auto, float16, bfloat16 or float32.")] = "auto",
    tensor_parallel_size: Annotated[int, typer.Option(min=1, help="GPUs that share every layer.")] = 1,
    kv_cache_dtype: Annotated[
        str, typer.Option(help="Of stored keys and values: auto (as activations), or int4_per_token_head.")
    ] = "auto",
    accept: Annotated[bool, typer.Option("--accept", help="Serve it even if its verdict is destroyed.")] = False,
) -> None:
    """Serve a quantised model over the OpenAI API, by vLLM. Options that are not listed here are vLLM's own."""
    with errors():
        from flatquant.engines.vllm import support

        version = support.check_version(support.installed())
        support.check_plugins()
        found = support.open_folder(folder)
        support.check_older(found, version, kv_cache_dtype)
        support.check_cut(found, tensor_parallel_size)
        if kv_cache_dtype == support.PACKED:
            support.check_packed(found)
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
            "--kv-cache-dtype": kv_cache_dtype,
        }
        given = {option.partition("=")[0] for option in context.args}
        named = [part for name, value in options.items() if name not in given for part in (name, value)]
        os.execv(sys.executable, [*server, *named, *context.args])
