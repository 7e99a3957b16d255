"""`QuantizedCache` against `DynamicCache`: the same numbers in fewer bytes."""

import dataclasses
from typing import Literal

import pytest
import torch
from transformers import DynamicCache, MistralConfig, MistralForCausalLM

from flatquant.calibrate.pipeline import calibrate
from flatquant.errors import ModelError
from flatquant.recipes import rtn
from flatquant.runtime.kvcache import QuantizedCache, token_bytes
from flatquant.seams import CACHE
from flatquant.spec import QuantSpec

SCHEMES = ["w4a4kv4", "k4v4", "k3", "k16v2", "k8v5", "w4a4kv4,0.k8", "kv4,0.kv16", "k2v3,1.k16v8", "w4,1.k3"]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True], ids=["", "offset"])
def test_generation_equals_that_of_a_plain_cache(quantised, scheme: str, dtype: torch.dtype, bias: bool) -> None:
    q = quantised(scheme, dtype=dtype, bias=bias)
    assert all((block.key_offset is not None) == (bias and block.keys is not None) for block in q.plan.blocks)
    mask = torch.ones(4, 9, dtype=torch.long)
    mask[0, :5] = mask[1, :2] = 0  # left padding
    outputs = []
    for cache in (DynamicCache(config=q.model.config), QuantizedCache(q.model)):
        outputs.append(
            q.model.generate(
                q.tokens[:, :9],
                attention_mask=mask,
                **{CACHE: cache},
                max_new_tokens=12,
                min_new_tokens=12,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
        )
        assert cache.get_seq_length() == 20
    plain, ours = outputs
    assert torch.equal(plain.sequences, ours.sequences)
    for a, b in zip(plain.logits, ours.logits, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("scheme", ["k4v4", "w16a16k3"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "offset"])
def test_decoding_equals_the_uncached_forward(quantised, scheme: str, bias: bool) -> None:
    q = quantised(scheme, bias=bias)
    want = q.model(q.tokens).logits
    cache = QuantizedCache(q.model)
    steps = [q.model(part, **{CACHE: cache}).logits for part in q.tokens.split([5, 1, 1, 4, 5], dim=1)]
    torch.testing.assert_close(torch.cat(steps, 1), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bias", [False, True], ids=["", "offset"])
def test_beams(quantised, bias: bool) -> None:
    q = quantised("w4a4kv4", bias=bias)
    beams = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False}
    plain, ours = (
        q.model.generate(q.tokens[:2, :6], **{CACHE: cache}, **beams)
        for cache in (DynamicCache(config=q.model.config), QuantizedCache(q.model))
    )
    assert torch.equal(plain, ours)


def filled(q, tokens) -> tuple[QuantizedCache, DynamicCache]:
    caches = QuantizedCache(q.model), DynamicCache(config=q.model.config)
    for cache in caches:
        q.model(tokens, **{CACHE: cache})
    return caches


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.crop(-3),
        lambda c: c.crop(0),
        lambda c: c.reorder_cache(torch.tensor([2, 2, 0, 1])),
        lambda c: c.batch_repeat_interleave(2),
        lambda c: c.batch_select_indices(torch.tensor([3, 1])),
    ],
    ids=["crop", "crop nothing", "reorder", "repeat", "select"],
)
@pytest.mark.parametrize("bias", [False, True], ids=["", "offset"])
def test_changes_do_what_they_do_to_a_plain_cache(quantised, change, bias: bool) -> None:
    q = quantised("k4v3", bias=bias)
    ours, plain = filled(q, q.tokens[:, :8])
    for cache in (ours, plain):
        change(cache)
    assert ours.get_seq_length() == plain.get_seq_length()
    assert ours.get_mask_sizes(2, 0) == plain.get_mask_sizes(2, 0)
    new = torch.tensor([[5, 6]]).expand(plain.layers[0].keys.shape[0], -1)
    assert torch.equal(q.model(new, **{CACHE: ours}).logits, q.model(new, **{CACHE: plain}).logits)


@pytest.mark.parametrize("bias", [False, True], ids=["", "offset"])
def test_reset_starts_over(quantised, bias: bool) -> None:
    q = quantised("k4v4", bias=bias)
    cache, _ = filled(q, q.tokens)
    cache.reset()
    assert cache.nbytes() == cache.get_seq_length() == 0
    assert not cache.is_initialized
    assert torch.equal(
        q.model(q.tokens, **{CACHE: cache}).logits,
        q.model(q.tokens, **{CACHE: QuantizedCache(q.model)}).logits,
    )


@pytest.mark.parametrize("scheme", SCHEMES)
def test_bytes_are_what_the_format_says(quantised, scheme: str) -> None:
    q = quantised(scheme, dtype=torch.bfloat16)
    cache, _ = filled(q, q.tokens)
    each = sum(token_bytes(10, block.keys) + token_bytes(10, block.values) for block in q.plan.blocks)
    assert cache.nbytes() == 2 * q.tokens.numel() * each  # heads x tokens


def test_a_head_of_128_channels_takes_69_bytes() -> None:
    assert token_bytes(128, QuantSpec(bits=4, symmetric=False)) == 64 + 4 + 1
    assert token_bytes(128, None) == 256


def test_unquantised_keys_and_values_need_no_such_cache(quantised) -> None:
    with pytest.raises(ModelError, match="not quantised"):
        QuantizedCache(quantised("w4a4").model)


@pytest.mark.parametrize("offset", ["none", "mean"])
def test_sliding_windows(offset: Literal["none", "mean"]) -> None:
    """The mask cuts what a plain cache would have dropped."""
    config = MistralConfig(
        hidden_size=36,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=10,
        intermediate_size=42,
        num_hidden_layers=2,
        vocab_size=128,
        sliding_window=6,
    )
    torch.manual_seed(0)
    model = MistralForCausalLM(config).eval().requires_grad_(False)
    tokens = torch.randint(0, 120, (2, 16))
    recipe = rtn(dataclasses.replace(rtn("w4a4kv4").scheme, key_offset=offset))
    calibrate(model, recipe, tokens, device=torch.device("cpu"), dtype=torch.float32)
    logits = []
    for cache in (DynamicCache(config=config), QuantizedCache(model)):
        parts = tokens.split([9, 1, 1, 5], dim=1)
        logits.append(torch.cat([model(part, **{CACHE: cache}).logits for part in parts], 1))
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits[1], model(tokens).logits, rtol=1e-4, atol=1e-4)
