"""The embedding on a grid: the same model but for its rounded rows, wherever it goes."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

import flatquant
from flatquant import recipes
from flatquant.cli.quantize import rounded_end_rows
from flatquant.engines.vllm import support
from flatquant.errors import ArtifactError, ModelError, SpecError
from flatquant.grade import sentences
from flatquant.interchange import export_compressed, export_dense
from flatquant.runtime.artifact import inspect
from flatquant.runtime.embedding import RoundedEmbedding
from flatquant.runtime.folder import plan_from_json, plan_to_json
from flatquant.runtime.linear import FrozenLinear, PackedLinear
from tests import tiny_models
from tests.laws import calibrated, quick, reloaded, tokens_for
from tests.test_head import FAMILIES, embedding_of, head_of, judged, logits_of, numbers, rounded
from tests.tiny_models import tiny_family, tiny_llama
from tests.tiny_wrappers import tiny_wrapper

ALONE, BOTH = "w16a16,embed_tokens=w8", "w16a16,lm_head=w8a16,embed_tokens=w8"  # nothing else is rounded

pytestmark = pytest.mark.filterwarnings("ignore::flatquant.errors.QualityWarning")


def is_tied(model: PreTrainedModel) -> bool:
    return head_of(model).weight is embedding_of(model).weight


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("scheme", [ALONE, BOTH])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_looks_rounded_rows_up(name: str, scheme: str, tied: bool, tmp_path: Path) -> None:
    original = tiny_family(name, tied=tied)
    model, plan, _ = calibrated(original, recipes.rtn(scheme))
    assert plan.embedding is not None
    assert plan.embedding.shared == (is_tied(original) and scheme == BOTH)
    ids = tokens_for(model, 2, 9)
    want = logits_of(rounded(original, ends=(head_of, embedding_of) if scheme == BOTH else (embedding_of,)), ids)
    torch.testing.assert_close(logits_of(model, ids), want, rtol=1e-5, atol=1e-5)
    loaded = reloaded(model, plan, recipes.rtn(scheme), tmp_path / "out")
    assert isinstance(embedding_of(loaded), RoundedEmbedding)
    assert isinstance(embedding_of(loaded).integers, PackedLinear)
    assert not loaded.config.tie_word_embeddings
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits_of(theirs, ids), logits_of(model, ids))
    theirs.save_pretrained(tmp_path / "again")
    assert torch.equal(logits_of(flatquant.load(tmp_path / "again"), ids), logits_of(model, ids))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in tiny_models.FAMILIES if name != "olmo"])
def test_so_does_every_family(name: str, tmp_path: Path) -> None:
    original = tiny_family(name)
    model, plan, _ = calibrated(original, recipes.rtn(BOTH))
    ids = tokens_for(model, 2, 9)
    got, want = logits_of(model, ids), logits_of(rounded(original, ends=(head_of, embedding_of)), ids)
    assert float((got - want).abs().max()) < 1e-5 * float(want.abs().max())
    assert torch.equal(logits_of(reloaded(model, plan, recipes.rtn(BOTH), tmp_path / "out"), ids), got)


@settings(max_examples=8, deadline=None)
@given(bits=st.integers(2, 8), groups=st.sampled_from((1, 2, 4)), tied=st.booleans())
def test_integers_of_any_width_are_what_they_stand_for(bits: int, groups: int, tied: bool) -> None:
    model = tiny_llama(hidden=32, tied=tied)
    weight = embedding_of(model).weight.detach()
    group = f"g{32 // groups}" if groups > 1 else ""
    scheme = f"w16,embed_tokens=w{bits}{group}" + (f",lm_head=w{bits}{group}a16" if tied else "")
    made, plan, _ = calibrated(model, recipes.rtn(scheme))
    assert plan.embedding is not None
    assert plan.embedding.shared == tied
    want = numbers(weight, bits, 32 // groups)
    every = torch.arange(model.config.vocab_size)
    torch.testing.assert_close(embedding_of(made)(every), want, rtol=1e-5, atol=1e-6)
    assert torch.equal(embedding_of(made).weight, embedding_of(made)(every))
    assert torch.equal(embedding_of(made)(every[3]), embedding_of(made)(every)[3])


def test_shared_integers_are_the_output_layer_s(tmp_path: Path) -> None:
    model = tiny_llama(tied=True)
    weight = embedding_of(model).weight
    result = flatquant.quantize(model, recipes.rtn(BOTH), output=tmp_path / "out", device="cpu")
    assert isinstance(head_of(result.model), FrozenLinear)
    assert embedding_of(result.model).integers is head_of(result.model)
    found, nbytes = inspect(tmp_path / "out"), weight.numel() + 4 * len(weight)
    assert found.output_layer == {"grids": "w8a16", "bytes": nbytes, "tied": False}
    assert found.embedding == {"grids": "w8", "bytes": 0, "shared": True} == result.report["sizes"]["embedding"]
    assert rounded_end_rows(found.output_layer, found.embedding)["embedding"] == "w8, the output layer's integers"
    assert not {"output layer", "embeddings"} & found.unquantised_bytes.keys()
    assert found.parameters == sum(p.numel() for p in tiny_llama(tied=True).parameters())
    assert found.quantised_parameters == weight.numel()
    plain = flatquant.quantize(tiny_llama(tied=True), recipes.rtn("w16"), device="cpu").report
    with_ends, without = (r["timing"]["estimate"]["disk"] for r in (result.report, plain))
    assert with_ends - without == nbytes - weight.nbytes
    loaded = flatquant.load(tmp_path / "out")
    moved = copy.deepcopy(loaded)
    assert embedding_of(moved).integers is head_of(moved)
    assert embedding_of(moved).integers is not head_of(loaded)


@pytest.mark.parametrize(
    "scheme, tied", [(ALONE, True), (ALONE, False), (BOTH, False), ("w16,lm_head=w8,embed_tokens=w4", True)]
)
def test_sizes_are_those_of_the_files(scheme: str, tied: bool, tmp_path: Path) -> None:
    model = tiny_llama(tied=tied)
    parameters, weight, bits = sum(p.numel() for p in model.parameters()), embedding_of(model).weight, int(scheme[-1])
    result = flatquant.quantize(model, recipes.rtn(scheme), output=tmp_path / "out", device="cpu")
    found = inspect(tmp_path / "out")
    heads = "lm_head" in scheme
    one, other = weight.numel() * bits // 8 + 4 * len(weight), weight.numel() + 4 * len(weight)
    assert found.bytes_by_kind["packed"] + found.bytes_by_kind["grids"] == one + heads * other
    # A layer that had the matrix has it for itself now.
    assert found.parameters == parameters + (weight.numel() if tied and not heads else 0)
    plain = flatquant.quantize(tiny_llama(tied=tied), recipes.rtn("w16"), device="cpu").report
    with_ends, without = (r["timing"]["estimate"]["disk"] for r in (result.report, plain))
    gone = weight.nbytes * ((0 if not heads else 1) if tied else 1 + heads)
    assert with_ends - without == one + heads * other - gone


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("llama", recipes.rtn("w16a16,embed_tokens=w3")),
        ("gemma2", quick("w4a4kv4,lm_head=w4a16,embed_tokens=w4")),
        ("granite", quick("w4a4kv4,embed_tokens=w8")),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_the_verdict_measures_the_model_that_is_served(name: str, recipe: Any, tmp_path: Path) -> None:
    model, held, found, quantised = judged(name, recipe, tmp_path / "out")
    assert found["kl"] > 0
    rows, exact = embedding_of(quantised)(held), embedding_of(model)(held).detach()
    error = float(((rows - exact).norm(dim=-1) / exact.norm(dim=-1)).mean())
    assert found["embedding"] == pytest.approx(error, rel=1e-3)
    assert f"the embedding's rows are off by {error:.1%} of their size" in sentences(found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scheme", [ALONE, BOTH])
def test_rows_have_the_dtype_of_the_model(scheme: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_family("gemma2", tied=True).to(dtype)
    made = flatquant.quantize(model, recipes.rtn(scheme), output=tmp_path / "out", device="cpu", verdict=False).model
    ids = tokens_for(model, 2, 9)
    for loaded in (
        made,
        flatquant.load(tmp_path / "out"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "out"),
        flatquant.load(tmp_path / "out", dtype=torch.float32).to(dtype),
    ):
        rows = embedding_of(loaded)(ids)
        assert rows.dtype == dtype
        assert torch.equal(rows, embedding_of(made)(ids))
    assert embedding_of(flatquant.load(tmp_path / "out", dtype=torch.float32))(ids).dtype == torch.float32


def test_a_wrapper_s_embedding(tmp_path: Path) -> None:
    original = tiny_wrapper("gemma3")
    model, plan, _ = calibrated(original, recipes.rtn(BOTH))
    ids = tokens_for(model, 2, 9)
    want = logits_of(rounded(original, ends=(head_of, embedding_of)), ids)
    torch.testing.assert_close(logits_of(model, ids), want, rtol=1e-5, atol=1e-5)
    reloaded(model, plan, recipes.rtn(BOTH), tmp_path / "out")
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert torch.equal(logits_of(theirs, ids), logits_of(model, ids))


# --------------------------------------------------------------------------------------------- where it goes


@pytest.mark.parametrize("scheme", [ALONE, BOTH])
def test_a_dense_checkpoint_has_its_numbers(scheme: str, tmp_path: Path) -> None:
    model, plan, _ = calibrated(tiny_llama(tied=True), recipes.rtn(scheme))
    export_dense(model, plan, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = tokens_for(model, 2, 9)
    torch.testing.assert_close(logits_of(loaded, ids), logits_of(model, ids), rtol=1e-4, atol=1e-4)


def test_others_refuse_it_in_one_line(tmp_path: Path) -> None:
    result = flatquant.quantize(tiny_llama(), recipes.rtn(ALONE), output=tmp_path / "out", verdict=False)
    with pytest.raises(
        ModelError, match="rounded embedding, which vLLM does not compute; quantise without embed_tokens"
    ):
        support.open_folder(tmp_path / "out")
    with pytest.raises(ModelError, match="an embedding in 16 bit here; quantise without embed_tokens="):
        export_compressed(result.model, result.plan, tmp_path / "packed")


def test_what_cannot_be_is_refused() -> None:
    model = tiny_llama(hidden=64)
    with pytest.raises(
        SpecError, match=r"group size 24 does not divide the 64 numbers of a row of model\.embed_tokens"
    ):
        flatquant.quantize(model, recipes.rtn("w4a16,embed_tokens=w8g24"))
    rotating = recipes.quarot("w4a4kv4,embed_tokens=w8").tuned(samples=4, seqlen=12)
    with pytest.raises(
        SpecError, match="quarot rotates the residual stream with its embedding; leave embed_tokens= out"
    ):
        flatquant.quantize(model, rotating)
    with pytest.raises(ModelError, match=r"the norms of OlmoForCausalLM have no weights, .* leave embed_tokens= out"):
        flatquant.quantize(tiny_family("olmo"), recipes.rtn("w4a16,embed_tokens=w8"))
    model.model.embed_tokens = Scaled(128, 64)
    with pytest.raises(ModelError, match="the embedding is a Scaled, not a table; leave embed_tokens= out"):
        flatquant.quantize(model, recipes.rtn("w4a16,embed_tokens=w8"))


class Scaled(torch.nn.Embedding):
    """Of a family that does something else with its rows."""


def test_a_damaged_plan_is_refused() -> None:
    _, plan, _ = calibrated(tiny_llama(tied=True), recipes.rtn(BOTH))
    data = plan_to_json(plan)
    assert plan_from_json(copy.deepcopy(data)) == plan
    for part, change in (("head", None), ("embedding", {"shared": 3}), ("embedding", {"path": ""})):
        damaged = copy.deepcopy(data)
        damaged[part] = None if change is None else damaged[part] | change
        with pytest.raises(ArtifactError, match="damaged"):
            plan_from_json({key: value for key, value in damaged.items() if value is not None})
