"""`flatquant serve`, by the official client: one rank and two."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from openai import OpenAI, OpenAIError

from flatquant.runtime.artifact import load
from tests.engines.vllm.conftest import NEW, PROMPTS, expected

pytestmark = pytest.mark.vllm

COMMAND = str(Path(sys.executable).with_name("flatquant"))
MESSAGES = [{"role": "user", "content": "What is the time?"}]


@contextmanager
def server(folder: Path, *options: str, **environment: str) -> Iterator[OpenAI]:
    """A client of a server that runs."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"} | environment
    limits = ["--max-model-len", "256", "--max-num-seqs", "4", "--enforce-eager", "--return-tokens-as-token-ids"]
    arguments = [COMMAND, "serve", str(folder), "--port", str(port), "--dtype", "float32", *limits, *options]
    with (folder.parent / f"{port}.log").open("w") as log:
        process = subprocess.Popen(arguments, env=env, stdout=log, stderr=log)
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=120, max_retries=0)
        try:
            for _ in range(240):
                try:
                    client.models.list()
                    break
                except OpenAIError:
                    assert process.poll() is None, Path(log.name).read_text()[-3000:]
                    time.sleep(1)
            yield client
        finally:
            process.terminate()
            process.wait(60)


def check_logprobs(client: OpenAI, folder: Path) -> None:
    """Prompts and answers have the log-probabilities of `load`."""
    model = load(folder)
    for prompt in PROMPTS:
        done = client.completions.create(
            model="model", prompt=prompt, max_tokens=NEW, temperature=0, echo=True, logprobs=0
        )
        (choice,) = done.choices
        tokens = [int(token.removeprefix("token_id:")) for token in choice.logprobs.tokens]
        assert tokens[: len(prompt)] == prompt
        assert choice.logprobs.token_logprobs[1:] == pytest.approx(expected(model, tokens), abs=1e-4)


def test_the_api(quantised) -> None:
    folder = quantised("qwen2")
    with server(folder, "--chat-template", "{% for m in messages %}{{ m.content }}{% endfor %}") as client:
        assert [model.id for model in client.models.list()] == ["model"]
        check_logprobs(client, folder)
        asked = {"model": "model", "messages": MESSAGES, "max_tokens": NEW, "temperature": 0}
        whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2).choices[0]
        assert len(whole.logprobs.content) == NEW
        assert all(len(place.top_logprobs) == 2 for place in whole.logprobs.content)
        parts = [part.choices[0].delta.content or "" for part in client.chat.completions.create(**asked, stream=True)]
        assert "".join(parts) == whole.message.content


def test_two_ranks(quantised) -> None:
    folder = quantised("qwen2")
    with server(folder, "--tensor-parallel-size", "2", VLLM_CPU_OMP_THREADS_BIND="0|1") as client:
        check_logprobs(client, folder)


def test_a_bad_folder_is_one_line(tmp_path: Path) -> None:
    done = subprocess.run([COMMAND, "serve", str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr == f"error: {tmp_path} has no config.json: it is not a quantised model\n"
