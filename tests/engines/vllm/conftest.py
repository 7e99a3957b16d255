"""Folders for vLLM to serve, and vLLM in this process."""

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.vllm_parity import engine  # first: it sets what vLLM reads when it is imported
from transformers import AutoConfig, PreTrainedModel
from vllm import LLM, SamplingParams, __version__
from vllm.model_executor.models import registry

from flatquant import recipes
from flatquant.api import quantize
from flatquant.engines.vllm import support
from flatquant.spec import DataSpec, Recipe
from tests.tiny_models import FAMILIES, VOCAB, randomised, tiny_tokenizer

OLDER = not __version__.startswith(support.TESTED[-1])  # without our cache in 4 bits, and without experts
collect_ignore = ["test_cache.py"] if OLDER else []
not_older = pytest.mark.skipif(OLDER, reason="takes the newest of the tested releases of vLLM")
TOKENS = torch.randint(0, 120, (4, 16), generator=torch.Generator().manual_seed(0))
PROMPTS = [torch.randint(0, 120, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (40, 17, 3)]
NEW = 6  # tokens that are generated

# vLLM looks at a model's class in a new process, so that CUDA stays free. The process imports vLLM: seconds a family.
registry._run_in_subprocess = lambda look: look()


def tiny(name: str, **more: Any) -> PreTrainedModel:
    """A model of a family with heads that vLLM's attention on a CPU takes: 32 channels."""
    fields = {
        "hidden_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "vocab_size": VOCAB,
        "tie_word_embeddings": True,
        "max_position_embeddings": 512,
        "bos_token_id": VOCAB - 2,
        "eos_token_id": VOCAB - 1,
        "pad_token_id": VOCAB - 1,
    }
    return randomised(AutoConfig.for_model(name, **{**fields, **FAMILIES[name], **more}))


@pytest.fixture(scope="session")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`quantised("llama", recipe)`: the folder of a tiny model, made once."""
    made: dict[str, Path] = {}

    def make(family: str, recipe: Recipe | None = None, **more: Any) -> Path:
        recipe = recipe or recipes.flatquant("w4a16kv4")
        fit = None if recipe.fit is None else dataclasses.replace(recipe.fit, epochs=min(recipe.fit.epochs, 1))
        recipe = dataclasses.replace(recipe, data=DataSpec(samples=4, seqlen=16), fit=fit)
        key = repr((family, recipe, sorted(more.items())))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("vllm") / "model"
            model = tiny(family, **more)
            quantize(model, recipe, TOKENS, tokenizer=tiny_tokenizer(), output=made[key], verdict=False)
        return made[key]

    return make


def served(folder: Path, **options: Any) -> AbstractContextManager[LLM]:
    """An engine in this process."""
    return engine(folder, **{"dtype": "float32", "max_model_len": 256, "max_num_seqs": 4, **options})


def answers(llm: LLM, prompts: list[list[int]] = PROMPTS) -> list[tuple[list[int], list[float]]]:
    """Each prompt with what is generated, greedily, and the log-probability of every token but the first."""
    sampling = SamplingParams(
        max_tokens=NEW, temperature=0, prompt_logprobs=0, logprobs=0, detokenize=False, ignore_eos=True
    )
    found = []
    for prompt, out in zip(prompts, llm.generate([{"prompt_token_ids": p} for p in prompts], sampling), strict=True):
        new = list(out.outputs[0].token_ids)
        places = [*out.prompt_logprobs[1:], *out.outputs[0].logprobs]
        full = [*prompt, *new]
        found.append((full, [place[token].logprob for place, token in zip(places, full[1:], strict=True)]))
    return found


@torch.no_grad()
def expected(model: PreTrainedModel, tokens: list[int]) -> list[float]:
    """The same log-probabilities by transformers."""
    at = model(torch.tensor([tokens])).logits[0].float().log_softmax(-1)
    return at[:-1].gather(-1, torch.tensor(tokens[1:])[:, None])[:, 0].tolist()


def largest_difference(llm: LLM, model: PreTrainedModel) -> float:
    """Of all log-probabilities of `answers`; infinite if a greedy token is another."""
    worst = 0.0
    for tokens, theirs in answers(llm):
        ours = expected(model, tokens)
        worst = max(worst, *(abs(a - b) for a, b in zip(theirs, ours, strict=True)))
    return worst
