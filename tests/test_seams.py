"""The seams fire: whatever transformers does otherwise than we assume ends in an error, never in other numbers.

Each test breaks one assumption on purpose. What merely has another name goes on working.
"""

import copy
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer

import flatquant
from flatquant import seams
from flatquant.errors import ModelError
from flatquant.runtime import fused, hf
from flatquant.seams import CACHE
from flatquant.versions import TESTED
from tests.tiny_models import tiny_llama

TOKENS = torch.randint(0, 120, (2, 9), generator=torch.Generator().manual_seed(0))
CONFIG_HOOKS = [name for name in ("update_tp_plan", "update_attn_implementation") if hasattr(HfQuantizer, name)]


class Turned(seams.KeyValue):
    """Keys on a coarse grid in a basis of their own, and queries in the same basis: a lost half is seen at once."""

    def __init__(self, head_dim: int = 6) -> None:
        super().__init__()
        self.basis = nn.Parameter(torch.linalg.qr(torch.randn(head_dim, head_dim))[0] * 3, requires_grad=False)

    def query(self, q: Tensor) -> Tensor:
        return q @ torch.linalg.inv(self.basis).mT

    def key(self, k: Tensor, angles: object = None) -> Tensor:
        return (k @ self.basis * 2).round() / 2

    def value(self, v: Tensor) -> Tensor:
        return (v * 4).round() / 4


@pytest.fixture
def model() -> PreTrainedModel:
    """A tiny model whose every attention module is attached."""
    made = tiny_llama(hidden=24, heads=4, kv_heads=2, head_dim=6, intermediate=40).requires_grad_(False)
    for block in made.model.layers:
        seams.attach(block.self_attn, Turned())
    seams.use_attention(made, "self_attn")
    return made


@torch.no_grad()
def test_a_compiled_model_passes_the_seams(model: PreTrainedModel) -> None:
    """A frame that breaks inside a module loses what its hooks note about the thread."""
    model.model.layers[0].register_forward_hook(lambda *_: torch._dynamo.graph_break())
    compiled = torch.compile(model, backend="eager")
    assert torch.equal(compiled(TOKENS, use_cache=False).logits, model(TOKENS, use_cache=False).logits)


def fails(what: str) -> AbstractContextManager[Any]:
    """The error of a broken assumption names what broke, the installed version, the tested ones and the way out."""
    low, high = TESTED
    rest = rf".*transformers {transformers.__version__} .*{low} to {high}.*pip install 'transformers>={low},<"
    return pytest.raises(ModelError, match=what + rest)


def logits(model: PreTrainedModel, cached: bool = True, tokens: Tensor = TOKENS, **kwargs: Any) -> Tensor:
    if not cached:
        return model(tokens, use_cache=False, **kwargs).logits
    cache = DynamicCache(config=model.config)
    return torch.cat([model(part, **{CACHE: cache}, **kwargs).logits for part in tokens.split([4, 1, 4], dim=1)], 1)


def reference(model: PreTrainedModel) -> Tensor:
    """The logits of `TOKENS`, and that the seams are in them."""
    want = logits(model)
    plain = copy.deepcopy(model)
    for block in plain.model.layers:
        seams.detach(block.self_attn)
    assert (logits(plain) - want).abs().max() > 0.05
    torch.testing.assert_close(logits(model, cached=False), want, rtol=1e-4, atol=1e-4)
    return want


class Passing(nn.Module):
    """Stands for the attention module in its block, and calls it in its own way."""

    def __init__(self, attention: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.attention, self.call = attention, call

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(self.attention, *args, **kwargs)


def otherwise(model: PreTrainedModel, call: Callable[..., Any]) -> None:
    """Have the blocks call their attention modules through `call(attention, *args, **kwargs)`."""
    for block in model.model.layers:
        block.self_attn = Passing(block.self_attn, call)


def with_signature(model: PreTrainedModel, signature: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace the signature of every attention module's forward."""
    for block in model.model.layers:
        block.self_attn.forward = signature(block.self_attn.forward)


# --------------------------------------------------------------------------------------------- the cache


def test_a_renamed_cache_is_found(model: PreTrainedModel) -> None:
    want = reference(model)

    def renamed(forward):
        def inner(hidden_states, *, memory=None, **kwargs):
            return forward(hidden_states=hidden_states, **{CACHE: memory}, **kwargs)

        return inner

    with_signature(model, renamed)
    otherwise(model, lambda attention, *args, **kwargs: attention(*args, memory=kwargs.pop(CACHE, None), **kwargs))
    assert torch.equal(logits(model), want)


def test_a_positional_cache_is_found(model: PreTrainedModel) -> None:
    want = reference(model)

    def positional(forward):
        def inner(memory, hidden_states, **kwargs):
            return forward(hidden_states=hidden_states, **{CACHE: memory}, **kwargs)

        return inner

    with_signature(model, positional)
    otherwise(model, lambda attention, **kwargs: attention(kwargs.pop(CACHE), **kwargs))
    assert torch.equal(logits(model), want)


def swallowing(forward):
    """A forward that knows no cache: one that is given lands among `kwargs`."""

    def inner(hidden_states, position_embeddings=None, attention_mask=None, **kwargs):
        kwargs.pop(CACHE, None)
        return forward(hidden_states, position_embeddings=position_embeddings, attention_mask=attention_mask, **kwargs)

    return inner


def test_a_swallowed_cache_is_an_error(model: PreTrainedModel) -> None:
    with_signature(model, swallowing)
    with fails("LlamaAttention of block 0 did not hand its keys and values to the cache's update"):
        logits(model)
    logits(model, cached=False)  # there is none to lose


def test_a_cache_that_is_filled_past_its_update_is_an_error(model: PreTrainedModel) -> None:
    def by_layer(forward):
        def inner(hidden_states, **kwargs):
            keys = torch.zeros(len(hidden_states), 2, hidden_states.shape[1], 6)
            kwargs.pop(CACHE).layers[0].update(keys, keys)
            return forward(hidden_states, **kwargs)

        return inner

    with_signature(model, by_layer)
    with fails("LlamaAttention of block 0 did not hand its keys and values"):
        logits(model)


# --------------------------------------------------------------------------------------------- attention and masks


@pytest.mark.parametrize("cached", [True, False])
def test_attention_that_calls_another_function_is_an_error(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, cached: bool
) -> None:
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, seams.ATTENTION, ALL_ATTENTION_FUNCTIONS["sdpa"])
    with fails("LlamaAttention of block 0 did not call the attention function"):
        logits(model, cached)


@pytest.mark.parametrize("cached", [True, False])
def test_hooks_that_are_passed_by_are_an_error(model: PreTrainedModel, cached: bool) -> None:
    otherwise(model, lambda attention, *args, **kwargs: attention.forward(*args, **kwargs))
    with fails("the forward hooks of LlamaAttention of block 0 were passed by"):
        logits(model, cached)


def test_another_implementation_is_an_error(model: PreTrainedModel) -> None:
    model.config._attn_implementation = "sdpa"
    with pytest.raises(ModelError, match="leave attn_implementation alone"):
        logits(model)


@pytest.mark.parametrize("table", [ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS])
def test_a_table_without_us_is_an_error(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, table: Any) -> None:
    monkeypatch.delitem(table._global_mapping, seams.ATTENTION)
    with fails("is not registered"):
        seams.use_attention(model, "self_attn")


def test_a_mask_that_is_not_ours_is_an_error(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers gives no mask to an implementation that it does not find: padding would be attended to."""
    mask = torch.ones_like(TOKENS)
    mask[0, :3] = 0
    want = logits(model, cached=False, attention_mask=mask)
    assert not torch.equal(logits(model, cached=False), want)
    finished = torch.ones(9, 9, dtype=torch.bool).tril()[None, None] & mask.bool()[:, None, None]
    got = logits(model, cached=False, attention_mask=finished, position_ids=torch.arange(9)[None])
    torch.testing.assert_close(got[:, 3:], want[:, 3:], rtol=1e-4, atol=1e-4)

    monkeypatch.delitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, seams.ATTENTION)
    for given in (mask, None):
        with fails("LlamaModel did not call the mask function"):
            logits(model, cached=False, attention_mask=given)
    logits(model, cached=False, attention_mask=finished)  # taken as it is


def test_a_model_without_our_attention_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    want = logits(model)
    seams.use_attention(model, "self_attn")
    assert torch.equal(logits(model), want)
    monkeypatch.delitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, seams.ATTENTION)
    model.config._attn_implementation = "sdpa"
    assert torch.equal(logits(model), want)


# --------------------------------------------------------------------------------------------- state


def test_threads_do_not_mix(model: PreTrainedModel) -> None:
    """Each of two threads keeps its own passes, whichever block the other is in."""
    want, meet, got = reference(model), threading.Barrier(2, timeout=30), {}

    def together(attention, *args, **kwargs):
        meet.wait()  # both are inside the block, and neither has called the attention module
        return attention(*args, **kwargs)

    otherwise(model, together)

    def work(name: int) -> None:
        got[name] = logits(model)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(got[i], want) for i in range(2))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_nothing_behind(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    want = reference(model)
    projection = model.model.layers[1].self_attn.o_proj

    def stops(x: Tensor) -> Tensor:
        raise error("stop")

    with monkeypatch.context() as patch:
        patch.setattr(projection, "forward", stops)
        with pytest.raises(error, match="stop"):
            logits(model)
    assert torch.equal(logits(model), want)
    assert not seams._open.calls


def test_an_error_of_ours_leaves_nothing_behind(model: PreTrainedModel) -> None:
    want, forwards = reference(model), [block.self_attn.forward for block in model.model.layers]
    with_signature(model, swallowing)
    with pytest.raises(ModelError):
        logits(model)
    for block, forward in zip(model.model.layers, forwards, strict=True):
        block.self_attn.forward = forward
    assert torch.equal(logits(model), want)


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_activations(model: PreTrainedModel, reentrant: bool) -> None:
    """Activation checkpointing runs a block's forward pass again, in the backward pass and in autograd's thread."""
    block = model.model.layers[0]
    block.self_attn.o_proj.weight.requires_grad_()
    x = torch.randn(2, 5, 24, requires_grad=True)
    positions = model.model.rotary_emb(x, torch.arange(5)[None])

    def run(x: Tensor) -> Tensor:
        out = block(x, position_embeddings=positions, attention_mask=None)
        return out[0] if isinstance(out, tuple) else out

    def gradient(y: Tensor) -> Tensor:
        block.zero_grad()
        y.square().sum().backward()
        return block.self_attn.o_proj.weight.grad.clone()

    want = gradient(run(x))
    assert torch.equal(gradient(checkpoint(run, x, use_reentrant=reentrant)), want)
    assert not seams._open.calls


def test_a_copy_has_hooks_of_its_own(model: PreTrainedModel) -> None:
    want, other = reference(model), copy.deepcopy(model)
    assert torch.equal(logits(other), want)
    for block in other.model.layers:
        seams.detach(block.self_attn)
    assert not torch.equal(logits(other), want)
    assert torch.equal(logits(model), want)
    with_signature(model, swallowing)
    with fails("LlamaAttention of block 0"):
        logits(model)


# --------------------------------------------------------------------------------------------- loading and generation


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("seams") / "model"
    flatquant.quantize(tiny_llama(), flatquant.recipes.rtn("w4a4kv4"), device="cpu").model.save_pretrained(output)
    return output


def without(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A transformers whose quantisers have no such method, and which therefore does not call it."""
    monkeypatch.delattr(HfQuantizer, name)
    monkeypatch.setattr(hf.FlatQuantizer, name, lambda self, config, *args, **kwargs: config)


def test_an_unregistered_quantiser_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    AutoModelForCausalLM.from_pretrained(folder)
    monkeypatch.delitem(AUTO_QUANTIZER_MAPPING, "flatquant")
    with pytest.raises(ValueError, match="Unknown quantization type, got flatquant"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_registration_without_effect_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.quantizers.auto.AUTO_QUANTIZER_MAPPING", {})
    source = Path(hf.__file__).read_text(encoding="utf-8")
    monkeypatch.setattr("transformers.quantizers.auto.register_quantizer", lambda name: lambda kind: kind)
    monkeypatch.setattr("transformers.quantizers.auto.register_quantization_config", lambda name: lambda kind: kind)
    with fails("register_quantizer did not register ours"):
        exec(compile(source, hf.__file__, "exec"), {"__name__": "flatquant.runtime.again"})


@pytest.mark.parametrize(
    "names", [CONFIG_HOOKS, ["_process_model_before_weight_loading"], ["_process_model_after_weight_loading"]], ids=str
)
def test_a_renamed_method_of_quantisers_is_an_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch, names: list[str]
) -> None:
    """Some releases have both hooks for the config; one is enough."""
    for name in names:
        without(monkeypatch, name)
    with fails(f"a quantiser of transformers has no .*{names[0]}"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_config_hook_that_is_not_called_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in CONFIG_HOOKS:
        monkeypatch.setattr(hf.FlatQuantizer, name, lambda self, config: config)
    with pytest.raises(OSError, match=r"model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_other_weights_in_the_folder_are_not_taken(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`save_pretrained` into a folder in use leaves the original's weights beside ours."""
    tiny_llama().save_pretrained(tmp_path)
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path)
    AutoModelForCausalLM.from_pretrained(tmp_path)
    for name in CONFIG_HOOKS:
        monkeypatch.setattr(hf.FlatQuantizer, name, lambda self, config: config)
    with fails("from_pretrained called neither"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_skipped_beginning_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf.FlatQuantizer, "_process_model_before_weight_loading", lambda self, model, **kwargs: None)
    with fails("from_pretrained did not call _process_model_before_weight_loading"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_skipped_end_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf.FlatQuantizer, "_process_model_after_weight_loading", lambda self, model, **kwargs: None)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(ModelError, match="leave attn_implementation alone"):
        model(TOKENS)


def test_generation_without_its_hook_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    kind = type(model)
    with monkeypatch.context() as patch:
        patch.setattr(kind, "generate", lambda self, *args, **kwargs: None, raising=False)  # calls no such hook
        with fails("LlamaForCausalLM does not call _prepare_cache_for_generation"):
            fused.attach(model)
    with monkeypatch.context() as patch:
        for owner in kind.__mro__:
            if "_prepare_cache_for_generation" in vars(owner):
                patch.delattr(owner, "_prepare_cache_for_generation")
        with fails("does not call _prepare_cache_for_generation"):
            fused.attach(model)
    fused.attach(model)
