"""Folders served by a real vLLM on a CPU compute what `flatquant.load` computes."""

from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.engines import engines_table
from vllm.compilation.partition_rules import should_split
from vllm.model_executor.layers.quantization import get_quantization_config

from flatquant import recipes
from flatquant.engines.parts import Joined
from flatquant.engines.vllm import plugin, register
from flatquant.engines.vllm.support import EXPERTS, PACKED
from flatquant.errors import ModelError
from flatquant.ops import int4_linear
from flatquant.ops.int4_linear import reference
from flatquant.ops.kron_quantize.reference import FEW
from flatquant.runtime.artifact import load
from flatquant.runtime.kernels import KernelLinear
from flatquant.spec import Scheme
from tests.engines.vllm.conftest import OLDER, answers, expected, largest_difference, not_older, served

pytestmark = pytest.mark.vllm

# In float32: measured are 5e-6 and less. A key or value that is rounded to the neighbouring integer changes far more,
# but these models have few enough of them that none is.
BOUND = 1e-4

FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 16},  # shorter than a prompt
    "qwen2": {},
    "qwen3": {},
    "granite": {},
    "gemma2": {"query_pre_attn_scalar": 32, "sliding_window": 16},
    "gemma3_text": {"query_pre_attn_scalar": 32, "sliding_window": 16},
    "phi3": {},
    "glm4": {},
    "stablelm": {"qk_layernorm": False},
    "cohere": {},
    "mixtral": {},
    "qwen3_moe": {},
}
# Whose blocks have what no other of these has: a window, biases, norms of queries and keys, norms behind, experts.
QUICK = {"llama", "mistral", "qwen2", "qwen3", "gemma3_text", "mixtral"}


def test_the_plugin_is_found_and_may_be_registered_again() -> None:
    (point,) = entry_points(group="vllm.general_plugins", name="flatquant")
    for _ in range(2):
        point.load()()
        register()
    assert get_quantization_config("flatquant").__module__ == "flatquant.engines.vllm.plugin"


@pytest.mark.parametrize(
    "family", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_families(quantised, family: str) -> None:
    """Weights in 4 bits, a transform online, keys less an offset and values in 4 bits; activations in 16."""
    folder = quantised(family, **FAMILIES[family])
    if OLDER and family in EXPERTS:
        with pytest.raises(ModelError, match="has experts, which were not tested with"), served(folder):
            pass
        return
    with served(folder) as llm:
        assert largest_difference(llm, load(folder)) < BOUND


@pytest.mark.parametrize(
    "recipe",
    [
        recipes.flatquant("w3g32a16k4v2"),
        recipes.flatquant("w4a16kv4,mlp_mid=w8a16,1.attn_in=w16a16"),
        *(
            pytest.param(recipe, marks=pytest.mark.slow)
            for recipe in (recipes.svdquant("w4a16", rank=4), recipes.rtn("wnvfp4a16"), recipes.vptq("w4a16"))
        ),
    ],
    ids=lambda recipe: f"{recipe.name}-{recipe.scheme}",
)
def test_schemes(quantised, recipe) -> None:
    folder = quantised("qwen2", recipe, tie_word_embeddings=False)
    with served(folder) as llm:
        assert largest_difference(llm, load(folder)) < BOUND


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(recipes.RECIPES))
def test_methods(quantised, method: str) -> None:
    """As the table of engines says."""
    (schemes,) = (row["vllm"] for row in engines_table() if row["method"] == method)
    assert "w4a16" in schemes
    folder = quantised("llama", recipes.recipe(method, "w4a16"))
    with served(folder) as llm:
        assert largest_difference(llm, load(folder)) < BOUND


@pytest.mark.parametrize(
    "recipe, kernels",
    [
        (recipes.flatquant("w4a4kv4"), False),
        (recipes.flatquant("w4a4kv4"), True),
        pytest.param(recipes.quarot("w4a8kv4"), False, marks=pytest.mark.slow),
        pytest.param(recipes.rtn("nvfp4kv4"), False, marks=pytest.mark.slow),
    ],
)
def test_rounded_activations_layer_by_layer(quantised, recipe, kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the very tensors that vLLM's layers are given. From end to end, one integer that differs changes all after.

    Args:
        kernels: linears are the operators that have kernels on CUDA, and here the same bits.
    """
    if kernels:
        monkeypatch.setattr(plugin, "KERNELS", {"cpu"})
    folder = quantised("qwen2", recipe)
    model = load(folder)
    seen: list[tuple[str, torch.Tensor, torch.Tensor]] = []
    bases: list = []

    def watch(vllm_model: torch.nn.Module) -> None:
        for name, module in vllm_model.named_modules():
            if name.endswith("_proj"):
                assert isinstance(module.flatquant, KernelLinear if kernels else Joined)
            if name.endswith(("qkv_proj", "o_proj", "gate_up_proj", "down_proj")):
                module.register_forward_hook(lambda _, x, y, name=name: seen.append((name, x[0].clone(), y[0].clone())))
            if name.endswith("self_attn.attn.flatquant"):
                module.register_forward_hook(lambda m, x, y: bases.append((m, x, y)))

    with served(folder) as llm:
        llm.apply_model(watch)
        answers(llm)
    joined = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
    assert len({name for name, _, _ in seen}) == 8
    for name, x, y in seen:
        parent, _, leaf = name.rpartition(".")
        parts = [model.get_submodule(f"{parent}.{part}")(x) for part in joined.get(leaf, (leaf,))]
        assert torch.equal(torch.cat(parts, dim=-1), y), name
    assert len({id(module) for module, _, _ in bases}) == 2


def test_prefix_caching_and_chunked_prefill(quantised) -> None:
    folder = quantised("qwen2")
    model = load(folder)
    with served(folder, enable_prefix_caching=True, max_num_batched_tokens=16, enable_chunked_prefill=True) as llm:
        first, again = answers(llm), answers(llm)
        assert largest_difference(llm, model) < BOUND
    for (tokens, one), (others, two) in zip(first, again, strict=True):
        assert tokens == others
        assert one == pytest.approx(two, abs=BOUND)


def test_bfloat16(quantised) -> None:
    """vLLM in bfloat16 is as near to float32 as `load` in bfloat16 is."""
    folder = quantised("qwen2", recipes.flatquant("w4a16"))
    exact, ours = load(folder), load(folder, dtype=torch.bfloat16)
    with served(folder, dtype="bfloat16") as llm:
        found = answers(llm)
    want = torch.tensor([x for tokens, _ in found for x in expected(exact, tokens)])
    mine = torch.tensor([x for tokens, _ in found for x in expected(ours, tokens)])
    theirs = torch.tensor([x for _, logprobs in found for x in logprobs])
    assert 0 < (theirs - want).square().mean() < 2 * (mine - want).square().mean()


@pytest.mark.parametrize(
    "cached", [pytest.param("auto", marks=[] if OLDER else pytest.mark.slow), pytest.param(PACKED, marks=not_older)]
)
def test_torch_compile(quantised, cached: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_DISABLE_COMPILE_CACHE", "1")
    folder = quantised("qwen2")
    with served(folder, enforce_eager=False, kv_cache_dtype=cached, block_size=32) as llm:
        assert largest_difference(llm, load(folder)) < BOUND


@pytest.mark.parametrize("offset", ["mean", "none"])
def test_keys_with_an_offset_are_changed_between_captured_graphs(quantised, offset: Any) -> None:
    """Where vLLM compiles in pieces, as on CUDA; here it never does. Else positions would be those of the capture."""
    attention = "vllm::unified_attention_with_output"
    folder = quantised("qwen2", recipes.flatquant(replace(Scheme.parse("w4a16kv4"), key_offset=offset)))
    with served(folder, compilation_config={"splitting_ops": [attention]}) as llm:
        found = llm.llm_engine.vllm_config.compilation_config.splitting_ops
    node = torch.fx.Graph().call_function(torch.ops.flatquant.key_value.default)
    assert should_split(node, found) == (offset == "mean")
    assert not should_split(node, [attention])


def test_compiled_products_take_the_form_of_their_rows(quantised, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU with float8 units: the model is traced with many tokens, and then answers one at a time."""
    found: set[tuple[bool, torch.dtype]] = set()

    def multiply(x: torch.Tensor, *args: Any) -> torch.Tensor:
        found.add((len(x) > FEW, x.dtype))
        return product(x, *args)

    product = reference.int4_linear
    monkeypatch.setenv("VLLM_DISABLE_COMPILE_CACHE", "1")
    monkeypatch.setattr(plugin, "KERNELS", {"cpu"})
    monkeypatch.setattr(int4_linear, "_has_float8", lambda device: True)
    monkeypatch.setattr(reference, "int4_linear", multiply)
    folder = quantised("qwen2", recipes.flatquant("w4a4kv4"))
    with served(folder, enforce_eager=False, dtype="bfloat16") as llm:
        answers(llm, [[1] * 100, [2] * 30])
    assert found == {(True, torch.float8_e4m3fn), (False, torch.int8)}


@pytest.mark.parametrize("operator", ["linear", "key_value"])
def test_names_of_layers_are_no_constants_of_compiled_graphs(operator: str) -> None:
    """Else every layer of a model would be compiled for itself, where vLLM compiles in pieces."""
    (name,) = (a for a in getattr(torch.ops.flatquant, operator).default._schema.arguments if a.name == "name")
    assert str(name.type) == "PyObject"  # vLLM's `LayerName`


# --------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "options, said",
    [
        ({"kv_cache_dtype": "fp8"}, "is not served with a cache of fp8"),
        ({"enable_lora": True}, "is not served with LoRA adapters"),
    ],
)
def test_what_was_not_tried_is_refused(quantised, options: dict, said: str) -> None:
    with pytest.raises(ModelError, match=said), served(quantised("llama"), **options):
        pass


def test_a_damaged_folder_is_refused(quantised, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in quantised("llama").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    data = bytearray((folder / "flatquant.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "flatquant.safetensors").write_bytes(data)
    with pytest.raises(Exception, match=r"flatquant.safetensors is damaged: its sha256"), served(folder):
        pass


# --------------------------------------------------------------------------------------------- last


@pytest.mark.slow
def test_speculation_by_ngrams(quantised) -> None:
    """The last test of this process: it makes vLLM load numba, and vLLM starts no other engine beside that."""
    folder = quantised("llama")
    with served(folder) as llm:
        plain = [tokens for tokens, _ in answers(llm)]
    ngrams = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
    with served(folder, speculative_config=ngrams) as llm:
        assert [tokens for tokens, _ in answers(llm)] == plain
