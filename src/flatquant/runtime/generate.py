"""Text from a model, with a KV cache that holds integers where the model has grids for them."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from flatquant import seams
from flatquant.errors import DataError, FlatQuantError, ModelError
from flatquant.models import check_ids, render_chat, warn_of_positions
from flatquant.runtime import fused
from flatquant.runtime.keyvalue import FrozenKeyValue
from flatquant.runtime.kvcache import QuantizedCache
from flatquant.runtime.packedcache import PackedCache


@dataclass(frozen=True, kw_only=True)
class Generated:
    """What was written after the prompt; `cache_bytes` of keys and values, None for a plain cache."""

    text: str
    tokens: int
    seconds: float
    cache_bytes: int | None


@torch.no_grad()
def generate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    chat: bool = False,
    stream: bool = False,
) -> Generated:
    """Continue a prompt.

    Args:
        temperature: of sampling from all tokens; 0 takes the likeliest one.
        chat: put the prompt into the tokenizer's chat template.
        stream: print prompt and text to stdout as they come.

    Warns (PositionsWarning) where the text may become longer than the model's positions.

    Raises:
        DataError: an empty prompt, one that the chat template refuses, or tokens that the model does not know.
        ModelError: `chat` without a template.
        FlatQuantError: probabilities that are not finite.
    """
    ids = _prompt_ids(tokenizer, prompt, chat)  # (1, T)
    check_ids(ids, model, "a prompt")
    ids = ids.to(model.device)
    places = ids.shape[1] + max_new_tokens
    warn_of_positions(model, places, f"a prompt of {ids.shape[1]} tokens and up to {max_new_tokens} new ones: texts")
    cache = _cache(model, places)
    # The model's own defaults for sampling would only mix with what was asked for; its ends of text stay.
    config = copy.deepcopy(model.generation_config)
    assert config is not None
    config.do_sample = temperature > 0
    config.temperature = temperature or None
    config.top_k, config.top_p = (0, 1.0) if temperature > 0 else (None, None)
    config.max_new_tokens, config.max_length = max_new_tokens, None
    pad: Any = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    config.pad_token_id = pad
    streamer = TextStreamer(tokenizer, skip_prompt=chat, skip_special_tokens=True) if stream else None  # type: ignore[arg-type]
    devices = [model.device] if model.device.type == "cuda" else []
    start = time.perf_counter()
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        try:
            out = model.generate(  # type: ignore[operator]
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=config,
                streamer=streamer,
                **{seams.CACHE: cache},
            )
        except RuntimeError as error:
            if "probability tensor" not in str(error):
                raise
            raise FlatQuantError("the model's probabilities are not finite; try --dtype float32") from error
    new = out[0, ids.shape[1] :]
    return Generated(
        text=str(tokenizer.decode(new, skip_special_tokens=True)),
        tokens=len(new),
        seconds=time.perf_counter() - start,
        cache_bytes=None if isinstance(cache, DynamicCache) else cache.nbytes(),
    )


def _cache(model: PreTrainedModel, places: int) -> DynamicCache | QuantizedCache | PackedCache:
    """The smallest cache that serves the model on its device."""
    runtime = fused.runtime(model) if fused.serves(model) else None
    if runtime is not None:
        cache = runtime.cache_for(1, places)
        cache.masks_grow = True
        return cache
    quantised = any(isinstance(m, FrozenKeyValue) and (m.keys or m.values) for m in model.modules())
    return QuantizedCache(model) if quantised else DynamicCache(config=model.config)


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, chat: bool) -> torch.Tensor:
    if chat:
        if not tokenizer.chat_template:
            raise ModelError("the tokenizer has no chat template; leave out --chat")
        text = render_chat(tokenizer, [("user", prompt)], "leave out --chat")
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        ids = tokenizer(prompt)["input_ids"]
    if not ids:
        raise DataError("the prompt is empty; give some text to go on from")
    return torch.tensor([ids], dtype=torch.int64)
