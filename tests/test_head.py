"""The output layer on a grid: the same model but for its rounded weights, wherever it goes."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

import flatquant
from flatquant import recipes
from flatquant.cli.quantize import rounded_end_rows
from flatquant.engines.vllm import support
from flatquant.errors import ModelError, SpecError
from flatquant.interchange import export_compressed, export_dense
from flatquant.runtime.artifact import inspect
from flatquant.runtime.linear import FrozenLinear, PackedLinear
from flatquant.spec import Recipe
from tests.laws import calibrated, quick, reloaded, rtn_by_hand, tokens_for
from tests.tiny_models import tiny_family, tiny_llama, tiny_tokenizer
from tests.tiny_wrappers import tiny_wrapper

# Capped logits, scaled ones, a layer of another name; embeddings that share the matrix, or not.
FAMILIES = ("llama", "gemma2", "granite", "cohere", "gpt_neox")
ALONE = "w16a16,lm_head=w8a16"  # nothing else is rounded

pytestmark = pytest.mark.filterwarnings("ignore::flatquant.errors.QualityWarning")


def head_of(model: PreTrainedModel) -> Any:
    return model.get_output_embeddings()


def embedding_of(model: PreTrainedModel) -> Any:
    return model.get_input_embeddings()


def numbers(weight: Tensor, bits: int = 8, group: int | None = None) -> Tensor:
    """What integers stand for, by numpy."""
    values, scale = rtn_by_hand(weight.reshape(-1, group or weight.shape[1]), bits)
    return torch.from_numpy(values * scale[:, None]).to(weight).view_as(weight)


def rounded(model: PreTrainedModel, bits: int = 8, ends: Sequence[Callable] = (head_of,)) -> PreTrainedModel:
    """A copy whose ends, the output layer or the embedding, have such numbers; the other one is as it was."""
    model = copy.deepcopy(model)
    for end in (end_of(model) for end_of in ends):
        end.weight = torch.nn.Parameter(numbers(end.weight.detach(), bits))
    model.config.tie_word_embeddings = False
    model.set_attn_implementation("eager")  # older versions of transformers choose one that forgets Gemma 2's cap
    return model


@torch.no_grad()
def logits_of(model: PreTrainedModel, ids: Tensor) -> Tensor:
    return model(ids).logits


def divergence(p: Tensor, q: Tensor) -> float:
    """Mean KL.  # of two (N, T, V)"""
    p, q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def judged(name: str, recipe: Recipe, output: Path) -> tuple[PreTrainedModel, Tensor, dict[str, Any], PreTrainedModel]:
    """A model, held-out tokens, the verdict on them, and what was quantised: the divergence is that of whole models."""
    model, held = tiny_family(name), tokens_for(tiny_family(name), 2, 16)
    given = tokens_for(model, recipe.data.samples, recipe.data.seqlen, seed=1) if recipe.needs_data else None
    result = flatquant.quantize(copy.deepcopy(model), recipe, given, output=output, held_out=held)
    assert result.verdict is not None
    model.set_attn_implementation("eager")  # as above
    far = divergence(logits_of(model, held), logits_of(result.model, held))
    assert result.verdict["kl"] == pytest.approx(far, rel=1e-3, abs=1e-6)
    assert result.verdict["packed"]["equal"]
    return model, held, dict(result.verdict), result.model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_has_a_rounded_layer_and_its_embeddings(name: str, tied: bool, tmp_path: Path) -> None:
    original = tiny_family(name, tied=tied)
    model, plan, _ = calibrated(original, recipes.rtn(ALONE))
    assert isinstance(head_of(model), FrozenLinear)
    assert plan.head is not None
    assert plan.head.tied == (head_of(original).weight is embedding_of(original).weight)
    assert torch.equal(embedding_of(model).weight, embedding_of(original).weight)
    ids = tokens_for(model, 2, 9)
    want = rounded(original)
    torch.testing.assert_close(logits_of(model, ids), logits_of(want, ids), rtol=1e-5, atol=1e-5)
    loaded = reloaded(model, plan, recipes.rtn(ALONE), tmp_path / "out")
    assert isinstance(head_of(loaded), PackedLinear)
    assert not loaded.config.tie_word_embeddings
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits_of(theirs, ids), logits_of(model, ids))
    theirs.save_pretrained(tmp_path / "again")
    assert torch.equal(logits_of(flatquant.load(tmp_path / "again"), ids), logits_of(model, ids))


@settings(max_examples=8, deadline=None)
@given(
    bits=st.integers(2, 8), groups=st.sampled_from((1, 2, 4)), inputs=st.sampled_from((16, 8, 6)), bias=st.booleans()
)
def test_integers_of_any_width_are_what_they_stand_for(bits: int, groups: int, inputs: int, bias: bool) -> None:
    model = tiny_llama(hidden=32)
    if bias:
        model.lm_head.bias = torch.nn.Parameter(torch.randn(model.config.vocab_size))
    weight = model.lm_head.weight.detach()  # (V, 32)
    group = f"g{32 // groups}" if groups > 1 else ""
    seen: list[Tensor] = []
    made, _, _ = calibrated(model, recipes.rtn(f"w16,lm_head=w{bits}{group}a{inputs}"))
    made.lm_head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    got = logits_of(made, tokens_for(model, 2, 9))
    x = seen[0] if inputs == 16 else numbers(seen[0], inputs, group=32)
    want = F.linear(x, numbers(weight, bits, 32 // groups), model.lm_head.bias)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("llama", recipes.rtn(ALONE)),
        ("gemma2", quick("w4a4kv4,lm_head=w4a16")),
        ("granite", recipes.quarot("w4a4kv4,lm_head=w4a8").tuned(samples=4, seqlen=12)),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_the_verdict_measures_the_model_that_is_served(name: str, recipe: Any, tmp_path: Path) -> None:
    """What the layer makes alone is the divergence of a model with this layer."""
    model, held, found, _ = judged(name, recipe, tmp_path / "out")
    want = logits_of(model, held)
    if not any(recipe.transforms.get("residual", ())):  # which turns the layer's rows before they are rounded
        bits = int(recipe.scheme.head.weights.bits)
        alone = divergence(want, logits_of(rounded(model, bits), held))
        assert found["head"] == pytest.approx(alone, rel=1e-3, abs=1e-6)
    assert 0 < found["head"] < found["kl"] * 1.01


@pytest.mark.parametrize("tied", [True, False])
def test_sizes_say_where_the_layer_is_a_copy(tied: bool, tmp_path: Path) -> None:
    model = tiny_llama(tied=tied)
    parameters, weight = sum(p.numel() for p in model.parameters()), model.lm_head.weight
    result = flatquant.quantize(model, recipes.rtn("w4a16,lm_head=w8a16"), output=tmp_path / "out", device="cpu")
    found = inspect(tmp_path / "out")
    assert found.parameters == parameters
    nbytes = weight.numel() + 4 * len(weight)
    assert (
        found.output_layer
        == {"grids": "w8a16", "bytes": nbytes, "tied": tied}
        == result.report["sizes"]["output_layer"]
    )
    assert ("a copy of the embeddings" in rounded_end_rows(found.output_layer, None)["output layer"]) == tied
    assert "output layer" not in found.unquantised_bytes
    assert found.unquantised_bytes["embeddings"] == embedding_of(model).weight.nbytes
    assert sum(found.bytes_by_kind.values()) == result.report["sizes"]["quantised_bytes"]
    plain = flatquant.quantize(tiny_llama(tied=tied), recipes.rtn("w4a16"), device="cpu").report
    with_head, without = (r["timing"]["estimate"]["disk"] for r in (result.report, plain))
    assert with_head - without == nbytes - (0 if tied else weight.nbytes)


@pytest.mark.parametrize("embedding", ["", ",embed_tokens=w8"])
def test_a_streamed_run_writes_the_same_bytes(embedding: str, tmp_path: Path) -> None:
    model = tiny_llama(tied=True)
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    tokens = tokens_for(model, 4, 12)
    hashes = set()
    for stream in (False, True):
        output, recipe = tmp_path / f"out{stream}", quick(f"w4a4kv4,lm_head=w8a16{embedding}")
        flatquant.quantize(tmp_path / "model", recipe, tokens, output=output, stream=stream, verdict=False)
        hashes.add(inspect(output).content_hash)
    assert len(hashes) == 1


def test_a_wrapper_s_layer(tmp_path: Path) -> None:
    original = tiny_wrapper("gemma3")
    model, plan, _ = calibrated(original, recipes.rtn(ALONE))
    ids = tokens_for(model, 2, 9)
    want = logits_of(rounded(original), ids)
    torch.testing.assert_close(logits_of(model, ids), want, rtol=1e-5, atol=1e-5)
    reloaded(model, plan, recipes.rtn(ALONE), tmp_path / "out")
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert torch.equal(logits_of(theirs, ids), logits_of(model, ids))


# --------------------------------------------------------------------------------------------- where it goes


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("scheme", ["w4a16,lm_head=w8a16", "w4a16,lm_head=w8g16a16"])
def test_compressed_tensors_holds_it(scheme: str, tied: bool, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    model, plan, _ = calibrated(tiny_llama(tied=tied, hidden=64, intermediate=64), recipes.rtn(scheme))
    assert any("output layer" in line for line in export_compressed(model, plan, tmp_path / "out"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = tokens_for(model, 2, 9)
    torch.testing.assert_close(logits_of(loaded, ids), logits_of(model, ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_a_dense_checkpoint_has_its_numbers(tied: bool, tmp_path: Path) -> None:
    model, plan, _ = calibrated(tiny_llama(tied=tied), recipes.rtn("w4a16,lm_head=w8a16"))
    export_dense(model, plan, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = tokens_for(model, 2, 9)
    torch.testing.assert_close(logits_of(loaded, ids), logits_of(model, ids), rtol=1e-4, atol=1e-4)
    rounded_inputs, plan, _ = calibrated(tiny_llama(), recipes.rtn("w4a16,lm_head=w8a8"))
    with pytest.raises(ModelError, match="--weights-only"):
        export_dense(rounded_inputs, plan, tmp_path / "none")


def test_vllm_refuses_it_in_one_line(tmp_path: Path) -> None:
    flatquant.quantize(tiny_llama(), recipes.rtn("w4a16,lm_head=w8a16"), output=tmp_path / "out", verdict=False)
    with pytest.raises(
        ModelError, match="a rounded output layer, which vLLM does not compute; quantise without lm_head="
    ):
        support.open_folder(tmp_path / "out")


def test_groups_that_do_not_divide_are_refused() -> None:
    with pytest.raises(SpecError, match=r"group size 24 does not divide the 64 inputs of lm_head"):
        flatquant.quantize(tiny_llama(hidden=64), recipes.rtn("w4a16,lm_head=w8g24a16"))
