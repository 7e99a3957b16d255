"""`flatquant serve`, by the official client: one rank and two; and under load."""

import asyncio
import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from benchmarks.vllm_load import draw, load, serving, summary
from openai import OpenAI

from flatquant import recipes
from flatquant.runtime import artifact
from tests.engines.vllm.conftest import NEW, PROMPTS, VOCAB, expected

pytestmark = pytest.mark.vllm

MESSAGES = [{"role": "user", "content": "What is the time?"}]
TEMPLATE = ("--chat-template", "{% for m in messages %}{{ m.content }}{% endfor %}")
TWO_RANKS = ("--tensor-parallel-size", "2")


@contextmanager
def client_of(folder: Path, *options: str, **environment: str) -> Iterator[OpenAI]:
    """A client of a server that runs."""
    with serving(folder, *options, log=folder.parent / "log", **environment) as server:
        yield OpenAI(base_url=server.url, api_key="none", timeout=120, max_retries=0)


def check_logprobs(client: OpenAI, folder: Path) -> None:
    """Prompts and answers have the log-probabilities of `load`."""
    model = artifact.load(folder)
    for prompt in PROMPTS:
        done = client.completions.create(
            model="model", prompt=prompt, max_tokens=NEW, temperature=0, echo=True, logprobs=0
        )
        (choice,) = done.choices
        tokens = [int(token.removeprefix("token_id:")) for token in choice.logprobs.tokens]
        assert tokens[: len(prompt)] == prompt
        assert choice.logprobs.token_logprobs[1:] == pytest.approx(expected(model, tokens), abs=1e-4)


@pytest.mark.parametrize("options", [pytest.param((), marks=pytest.mark.slow, id="1"), pytest.param(TWO_RANKS, id="2")])
def test_the_api(quantised, options: tuple[str, ...]) -> None:
    """By one rank, and by two, which gather what attention writes, and transform parts of the other by themselves."""
    recipe = recipes.flatquant("w4a16kv4")
    apart = {"mlp_mid": recipe.for_ranks(2).transforms["mlp_mid"]}
    folder = quantised("qwen2", dataclasses.replace(recipe, transforms={**recipe.transforms, **apart}))
    bound = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"} if options else {}
    with client_of(folder, *TEMPLATE, *options, **bound) as client:
        assert [model.id for model in client.models.list()] == ["model"]
        check_logprobs(client, folder)
        asked = {"model": "model", "messages": MESSAGES, "max_tokens": NEW, "temperature": 0}
        whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2).choices[0]
        assert len(whole.logprobs.content) == NEW
        assert all(len(place.top_logprobs) == 2 for place in whole.logprobs.content)
        parts = [part.choices[0].delta.content or "" for part in client.chat.completions.create(**asked, stream=True)]
        assert "".join(parts) == whole.message.content


@pytest.mark.slow
def test_many_requests_at_once(quantised) -> None:
    """Every answer as alone; clients leave; nothing is held after. `benchmarks/vllm_load.py` does it for minutes."""
    folder = quantised("qwen2", recipes.flatquant("w4a16"))
    with serving(folder, log=folder.parent / "log") as server:
        requests = draw(200, VOCAB - 2, seed=0)
        found = summary(asyncio.run(load(server, requests, cancelled=0.2, minutes=0, seed=0)))
    assert (found["answered"], found["cancelled"], found["different"]) == (160, 40, 0)
    assert found["always_idle_after"]


@pytest.mark.slow
def test_a_bad_folder_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "flatquant", "serve", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr == f"error: {tmp_path} has no config.json: it is not a quantised model\n"
