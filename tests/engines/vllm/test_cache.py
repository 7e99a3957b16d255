"""Keys and values in 4 bits in vLLM's own pages."""

from typing import Any

import pytest
import torch

from flatquant import recipes
from flatquant.engines.vllm import cache
from flatquant.engines.vllm.cache import PackedImpl
from flatquant.engines.vllm.support import PACKED
from flatquant.errors import ModelError
from flatquant.ops.paged_cache import decode
from flatquant.runtime.artifact import load
from tests.engines.vllm.conftest import NEW, answers, largest_difference, served
from tests.tensor_bytes import TensorBytes

pytestmark = pytest.mark.vllm

BOUND = 1e-4  # as in test_vllm.py
OPTIONS = {"kv_cache_dtype": PACKED, "block_size": 16}  # the longest prompt takes three pages


@pytest.mark.parametrize("family, more", [("qwen2", {}), ("stablelm", {"qk_layernorm": False})])
def test_one_new_token_at_a_time_as_on_cuda(quantised, family: str, more: dict[str, Any], monkeypatch) -> None:
    """The operation that has a kernel there, and here its reference. Heads of StableLM are turned in part: without."""
    calls: list[int] = []

    def counted(q: torch.Tensor, *args: Any) -> torch.Tensor:
        calls.append(len(q))
        return decode(q, *args)

    monkeypatch.setattr(cache, "KERNELS", {"cpu"})
    monkeypatch.setattr(cache, "decode", counted)
    folder = quantised(family, **more)
    with served(folder, **OPTIONS) as llm:
        assert largest_difference(llm, load(folder)) < BOUND
    assert (max(calls, default=0) == 3) == (family == "qwen2")  # three requests are answered side by side


@pytest.mark.parametrize(
    "family, more",
    [
        ("qwen2", {}),
        # It caps scores, and every other block sees a window that is shorter than a prompt.
        ("gemma2", {"query_pre_attn_scalar": 32, "sliding_window": 16}),
    ],
)
def test_a_cache_of_integers_holds_what_a_wide_one_holds(quantised, family: str, more: dict[str, Any]) -> None:
    """Log-probabilities are those of `load`, in parts and from shared pages too. A place takes 4 bits and its grid."""
    folder = quantised(family, **more)
    views: dict[int, torch.Tensor] = {}  # by their address: layers with and without a window share memory

    def watch(vllm_model: torch.nn.Module) -> None:
        for module in vllm_model.modules():
            if isinstance(getattr(module, "impl", None), PackedImpl):
                view: Any = module.kv_cache
                views[view.data_ptr()] = view

    with served(folder, **OPTIONS, enable_prefix_caching=True, max_num_batched_tokens=16) as llm:
        llm.apply_model(watch)
        first, again = answers(llm), answers(llm)
        assert largest_difference(llm, load(folder)) < BOUND
    for (tokens, one), (others, two) in zip(first, again, strict=True):
        assert tokens == others
        assert one == pytest.approx(two, abs=BOUND)
    held = {view.untyped_storage().data_ptr(): view.untyped_storage().nbytes() for view in views.values()}
    places = sum(view.shape[:3].numel() for view in views.values())
    assert {view.dtype for view in views.values()} == {torch.uint8}
    assert sum(held.values()) == places * 2 * (32 // 2 + 4 + 1)  # of heads of 32 channels; in 16 bits 2 * 32 * 2


@pytest.mark.parametrize(
    "family, more, tokens, places",
    [
        ("qwen2", {}, 125, 16),  # at a time: half a prompt
        ("qwen2", {}, 125, 48),  # pages do not divide the longest prompt
        ("gemma2", {"query_pre_attn_scalar": 32, "sliding_window": 16}, 500, 16),  # two prompts
    ],
)
def test_no_batch_takes_more_memory_than_vllm_measured(
    quantised, family: str, more: dict[str, Any], tokens: int, places: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of the greatest length, and then one token of every request."""
    forward = PackedImpl.forward
    peaks: dict[bool, list[int]] = {True: [], False: []}  # by whether vLLM measures

    def measured(*given: Any, **more: Any) -> torch.Tensor:
        with TensorBytes() as tensors:
            out = forward(*given, **more)
        peaks[given[6] is None].append(tensors.peak)
        return out

    monkeypatch.setattr(cache, "KERNELS", {"cpu"})
    monkeypatch.setattr(PackedImpl, "forward", measured)
    monkeypatch.setenv("VLLM_DISABLE_COMPILE_CACHE", "1")
    # On a CPU vLLM has a profile run where it compiles.
    options = OPTIONS | {"block_size": places, "max_num_batched_tokens": tokens, "enforce_eager": False}
    with served(quantised(family, **more), **options) as llm:
        answers(llm, [[token] * (256 - NEW) for token in (1, 2, 3, 4)])
    assert len(peaks[True]) == 2  # blocks
    assert max(peaks[False]) <= max(peaks[True]) < 1.2 * max(peaks[False])


def test_keys_and_values_of_other_widths_are_refused(quantised) -> None:
    folder = quantised("llama", recipes.flatquant("w4a16"))
    with pytest.raises(ModelError, match="the keys of block 0 are no 4-bit integers"), served(folder, **OPTIONS):
        pass
