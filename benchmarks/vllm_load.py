"""A vLLM server under load: many requests at once, clients that leave, and the server's memory over minutes.

    python -m benchmarks.vllm_load DIR --log FILE --minutes 10      # in the environment of `make test-vllm`

Every request is first answered alone. Then rounds of all of them at once follow, in each of which some clients leave
while their answer is written; what the others get must be what they got alone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openai import AsyncOpenAI, OpenAI, OpenAIError

from benchmarks.common import RESULTS, write_result

LIMITS = ("--dtype", "float32", "--max-model-len", "256", "--enforce-eager", "--return-tokens-as-token-ids")
IDLE = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")


@dataclass(frozen=True)
class Server:
    """A server that runs: where, and its process."""

    url: str
    process: subprocess.Popen

    def megabytes(self) -> float:
        """Resident memory of the process and of all below it."""
        return sum(map(_resident, _tree(self.process.pid))) / 1e6

    def idle(self) -> bool:
        """Whether it has no request, and no place of its cache is held."""
        with urllib.request.urlopen(self.url.removesuffix("/v1") + "/metrics") as answer:
            text = answer.read().decode()
        values = [re.findall(rf"^{name}\{{.*\}} (\S+)$", text, re.MULTILINE) for name in IDLE]
        assert all(values), f"the server's metrics lack some of {IDLE}"
        return not any(float(value) for found in values for value in found)


@contextmanager
def serving(folder: Path, *options: str, log: Path, **environment: str) -> Iterator[Server]:
    """`flatquant serve`, until it answers.

    Raises:
        RuntimeError: it ended before it answered, or did not answer for ten minutes; with the end of its log.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    env |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", **environment}
    command = [sys.executable, "-m", "flatquant", "serve", str(folder), "--port", str(port), *LIMITS, *options]
    with log.open("w") as out:
        server = Server(f"http://127.0.0.1:{port}/v1", subprocess.Popen(command, env=env, stdout=out, stderr=out))
        client = OpenAI(base_url=server.url, api_key="none", timeout=120, max_retries=0)
        try:
            start = time.monotonic()
            while True:
                try:
                    client.models.list()
                    break
                except OpenAIError:
                    if server.process.poll() is not None or time.monotonic() > start + 600:
                        raise RuntimeError(log.read_text()[-3000:]) from None
                    time.sleep(1)
            yield server
        finally:
            server.process.terminate()
            server.process.wait(60)


def _tree(pid: int) -> list[int]:
    """A process and all below it."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    below = [int(child) for child in children.read_text().split()] if children.exists() else []
    return [pid, *(p for child in below for p in _tree(child))]


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # it has ended
        return 0


# --------------------------------------------------------------------------------------------- requests


@dataclass(frozen=True)
class Request:
    """A prompt, and how many tokens are to follow."""

    prompt: list[int]
    tokens: int


def draw(count: int, vocabulary: int, seed: int) -> list[Request]:
    """Requests of random lengths."""
    r = random.Random(seed)
    return [
        Request([r.randrange(vocabulary) for _ in range(r.randint(1, 160))], r.randint(1, 40)) for _ in range(count)
    ]


async def answer(client: AsyncOpenAI, model: str, request: Request) -> list[str]:
    """The tokens that follow, greedily."""
    done = await client.completions.create(
        model=model,
        prompt=request.prompt,
        max_tokens=request.tokens,
        temperature=0,
        logprobs=0,
        extra_body={"ignore_eos": True},
    )
    return done.choices[0].logprobs.tokens


async def leave(client: AsyncOpenAI, model: str, request: Request, after: int) -> None:
    """Begin to read an answer, and close the connection after so many parts of it."""
    stream = await client.completions.create(
        model=model, prompt=request.prompt, max_tokens=255 - len(request.prompt), temperature=0, stream=True
    )
    parts = 0
    async for _ in stream:
        parts += 1
        if parts > after:
            break
    await stream.close()


async def load(server: Server, requests: list[Request], *, cancelled: float, minutes: float, seed: int) -> Any:
    """The samples: one a round.

    Args:
        cancelled: share of clients that leave in each round.
        minutes: rounds go on until so many have passed; there is one at least.
    """
    r = random.Random(seed)

    def fresh() -> AsyncOpenAI:  # the server closes connections that were idle for as long as a round may take
        return AsyncOpenAI(base_url=server.url, api_key="none", timeout=600, max_retries=0)

    async with fresh() as client:
        model = (await client.models.list()).data[0].id
        alone = [await answer(client, model, request) for request in requests]
    start, rounds = time.monotonic(), []
    while not rounds or time.monotonic() - start < 60 * minutes:
        async with fresh() as client:
            leaving = set(r.sample(range(len(requests)), round(cancelled * len(requests))))
            jobs = [
                leave(client, model, request, r.randint(0, 5)) if i in leaving else answer(client, model, request)
                for i, request in enumerate(requests)
            ]
            before = time.monotonic()
            found = await asyncio.gather(*jobs)
            seconds = time.monotonic() - before
            for _ in range(100):
                if server.idle():
                    break
                await asyncio.sleep(0.1)
            wrong = [i for i, tokens in enumerate(found) if i not in leaving and tokens != alone[i]]
            rounds.append(
                {
                    "minute": round((time.monotonic() - start) / 60, 2),
                    "seconds": round(seconds, 2),
                    "answered": len(requests) - len(leaving),
                    "tokens": sum(len(tokens) for tokens in found if tokens is not None),
                    "cancelled": len(leaving),
                    "different": len(wrong),
                    "idle": server.idle(),
                    "megabytes": round(server.megabytes(), 1),
                }
            )
            print(json.dumps(rounds[-1]), flush=True)
    return rounds


def summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """What documents show. Memory grows by what the rounds after the first quarter have more than it, a minute."""
    settled = rounds[len(rounds) // 4 :]
    minutes = settled[-1]["minute"] - settled[0]["minute"]
    grown = settled[-1]["megabytes"] - settled[0]["megabytes"]
    return {
        "rounds": len(rounds),
        "answered": sum(one["answered"] for one in rounds),
        "cancelled": sum(one["cancelled"] for one in rounds),
        "different": sum(one["different"] for one in rounds),
        "minutes": rounds[-1]["minute"],
        "always_idle_after": all(one["idle"] for one in rounds),
        "megabytes_first": rounds[0]["megabytes"],
        "megabytes_last": rounds[-1]["megabytes"],
        "megabytes_a_minute": round(grown / minutes, 2) if minutes else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--cancelled", type=float, default=0.2, help="share of clients that leave in each round")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path, required=True, help="file for what the server writes")
    parser.add_argument("--out", default=str(RESULTS))
    args = parser.parse_args()
    config = json.loads((args.folder / "config.json").read_text())
    requests = draw(args.requests, config["vocab_size"] - 2, args.seed)
    with serving(args.folder, log=args.log) as server:
        rounds = asyncio.run(load(server, requests, cancelled=args.cancelled, minutes=args.minutes, seed=args.seed))
    sizes = {name: config[name] for name in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")}
    metrics = {**summary(rounds), "scheme": config["quantization_config"]["scheme"], "model": sizes}
    write_result(Path(args.out) / "vllm-load.json", "vllm-load", seeds=[args.seed], samples=rounds, metrics=metrics)
    print(metrics)


if __name__ == "__main__":
    main()
