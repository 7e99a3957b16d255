"""The verdict: what is measured is what `evaluate` measures, blame finds what was broken, and nothing else changes."""

import copy
import dataclasses
import json
import warnings
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

import flatquant
from flatquant import recipes, seams
from flatquant.errors import ArtifactError, DataError, QualityWarning
from flatquant.evaluate import divergence, perplexity
from flatquant.evaluate.prose import PROMPTS
from flatquant.evaluate.verdict import continuations
from flatquant.grade import BOUNDS, BUILT_IN, DESTROYED, RANDOM, WORDS, readable, sentences, word
from flatquant.runtime import artifact
from flatquant.spec import DataSpec, Recipe
from tests.laws import quick
from tests.tiny_models import tiny_family, tiny_llama, tiny_tokenizer

CPU = "cpu"


def tokens(samples: int = 4, seqlen: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 120, (samples, seqlen), generator=torch.Generator().manual_seed(seed))


def qwen(*, bias: float = 0.0, stretch: float = 1.0) -> PreTrainedModel:
    """A model that may have a channel in the keys of block 0 which takes all levels of a grid of a few bits.

    Args:
        bias: added to the channel: it is nearly constant.
        stretch: times the channel and its partner under RoPE, undone in the queries: the function is the same.
    """
    config = Qwen2Config(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(config).float().eval()
    attention, half = model.model.layers[0].self_attn, 32 // 2
    attention.k_proj.bias.data[3] += bias
    for channel in (3, 3 + half):
        for projection, rows, factor in (
            (attention.k_proj, [channel], stretch),
            (attention.q_proj, [channel, 32 + channel], 1 / stretch),  # both heads that read these keys
        ):
            projection.weight.data[rows] *= factor
            projection.bias.data[rows] *= factor
    return model


def judged(model: PreTrainedModel, recipe: Recipe) -> dict:
    """The verdict on a copy of a model, for recipes that read no text."""
    vocabulary = model.config.vocab_size
    held_out = torch.randint(0, vocabulary, (2, 128), generator=torch.Generator().manual_seed(1))
    result = flatquant.quantize(copy.deepcopy(model), recipe, device=CPU, held_out=held_out)
    assert result.verdict is not None
    return result.verdict


# ------------------------------------------------------------------------------------------------- words


def test_words_follow_their_bounds() -> None:
    assert [*BOUNDS.values()] == sorted(BOUNDS.values())
    for name, bound in BOUNDS.items():
        assert word(bound) == name
        assert word(bound * 1.001) == WORDS[WORDS.index(name) + 1]
    assert word(0.0) == "excellent"
    assert word(None) == DESTROYED
    assert word(float("nan")) == DESTROYED


@pytest.mark.parametrize("damaged", [None, {}, [], "good", {"word": 3}, {"word": "good", "perplexity": None}])
def test_what_is_no_verdict_reads_as_nothing(damaged: object) -> None:
    assert readable(damaged) == []


# ------------------------------------------------------------------------------------------------- measured


@pytest.mark.parametrize("recipe", [recipes.rtn("w4a4kv4"), recipes.quarot("w4a4kv4"), quick("w4a8kv4", seqlen=32)])
def test_it_measures_what_evaluate_measures(recipe: Recipe) -> None:
    """Also where the residual stream is rotated, and the head with it."""
    original, held_out = tiny_llama(layers=3), tokens(seed=1)
    result = flatquant.quantize(
        copy.deepcopy(original), recipe, tokens() if recipe.needs_data else None, device=CPU, held_out=held_out
    )
    found = result.verdict
    assert found is not None
    far = divergence(result.model, original, held_out)
    assert found["kl"] == pytest.approx(far.kl, rel=1e-3)
    assert found["top1"] == pytest.approx(far.top1, abs=0.02)
    assert found["perplexity"]["original"] == pytest.approx(perplexity(original, held_out).value, rel=1e-4)
    assert found["perplexity"]["quantised"] == pytest.approx(perplexity(result.model, held_out).value, rel=1e-3)
    assert (found["windows"], found["seqlen"], found["kept_back"]) == (4, 32, True)
    assert found["word"] == word(found["kl"])
    assert len(found["blocks"]) == 3
    assert all(0 < error < 2 for error in found["blocks"])


@pytest.mark.parametrize("name", ["gemma2", "cohere", "stablelm", "mixtral"])
def test_a_model_in_half_precision_is_measured_in_float32_on_a_cpu(name: str) -> None:
    """Scaled and capped logits, norms and routers that take no inputs of another dtype; and it stays in half."""
    model, held_out = tiny_family(name, dtype=torch.bfloat16), tokens(16, 24)
    original = copy.deepcopy(model).float()
    seams.use_attention(original, "self_attn")  # transformers 5.17's default for Gemma 2 leaves out the cap of scores
    result = flatquant.quantize(model, recipes.rtn("w4a8kv4"), device=CPU, held_out=held_out)
    assert result.verdict is not None
    assert {p.dtype for p in result.model.parameters()} == {torch.bfloat16}
    wide = torch.nn.Module.to(copy.deepcopy(result.model), torch.float32)
    assert result.verdict["kl"] == pytest.approx(divergence(wide, original, held_out).kl, rel=0.1)


def test_nothing_quantised_is_excellent() -> None:
    found = judged(tiny_llama(), recipes.rtn("w16a16"))
    assert found["word"] == "excellent"
    assert found["kl"] < 1e-6
    assert found["top1"] == 1
    assert max(found["blocks"]) < 1e-5


def test_a_model_that_overflows_is_destroyed() -> None:
    model = tiny_llama()
    model.model.layers[1].mlp.down_proj.weight.data.mul_(1e-3)[0, 0] = 3e38  # a scale that times 8 is infinite
    found = judged(model, recipes.rtn("w2"))
    assert (found["word"], found["kl"], found["perplexity"]["quantised"]) == (DESTROYED, None, None)
    json.dumps(found, allow_nan=False)
    assert "not finite" in sentences(found)[0]


@pytest.mark.parametrize("method", ["rtn", "flatquant"])
def test_measuring_changes_no_bit_of_the_model(method: str) -> None:
    recipe = recipes.rtn("w4a4kv4") if method == "rtn" else quick("w4a4kv4", seqlen=32)
    states = [
        flatquant.quantize(
            qwen(stretch=300.0), recipe, tokens() if recipe.needs_data else None, device=CPU, verdict=verdict
        ).model.state_dict()
        for verdict in (True, False)
    ]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(a, b) for a, b in zip(*(state.values() for state in states), strict=True))


# ------------------------------------------------------------------------------------------------- on what


def test_without_text_it_is_measured_on_prose_or_on_random_tokens() -> None:
    for tokenizer, source in ((tiny_tokenizer(), BUILT_IN), (None, RANDOM)):
        result = flatquant.quantize(tiny_llama(), recipes.rtn("w8"), device=CPU, tokenizer=tokenizer)
        assert result.verdict is not None
        assert (result.verdict["source"], result.verdict["windows"], result.verdict["seqlen"]) == (source, 2, 128)
        assert "kept back" not in sentences(result.verdict)[0]


def test_tokens_that_were_trained_on_are_said_to_be() -> None:
    result = flatquant.quantize(tiny_llama(), quick("w8"), tokens(4, 12), device=CPU)
    assert result.verdict is not None
    assert (result.verdict["kept_back"], result.verdict["windows"]) == (False, 4)
    assert "which it was calibrated on" in sentences(result.verdict)[0]


def test_a_text_gives_windows_that_are_kept_back(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 40)
    recipe = quick("w4", samples=4, seqlen=24)
    result = flatquant.quantize(tiny_llama(), recipe, tmp_path / "text.txt", tokenizer=tiny_tokenizer(), device=CPU)
    assert result.verdict is not None
    assert (result.verdict["kept_back"], result.verdict["source"]) == (True, "text.txt")


def test_bad_held_out_tokens_are_refused() -> None:
    with pytest.raises(DataError, match="a window of one token predicts nothing"):
        flatquant.quantize(tiny_llama(), recipes.rtn("w4"), device=CPU, held_out=tokens(3, 1))
    with pytest.raises(DataError, match="held-out windows with token ids outside the model's 128"):
        flatquant.quantize(tiny_llama(), recipes.rtn("w4"), device=CPU, held_out=tokens() + 100)


# ------------------------------------------------------------------------------------------------- blame


@pytest.fixture(scope="module")
def broken() -> dict:
    return judged(qwen(stretch=300.0), recipes.rtn("kv4"))


def test_blame_names_the_block_whose_keys_are_broken(broken: dict) -> None:
    assert WORDS.index(broken["word"]) > WORDS.index(judged(qwen(), recipes.rtn("kv4"))["word"])
    kinds = {entry["kind"]: entry["kl"] for entry in broken["blame"] if entry["block"] is None}
    assert kinds.keys() == {"keys", "values"}
    assert kinds["keys"] < 0.25 * broken["kl"] < kinds["values"]
    blocks = [entry for entry in broken["blame"] if entry["block"] is not None]
    assert (blocks[0]["kind"], blocks[0]["block"]) == ("keys", 0)
    assert blocks[0]["kl"] < 0.25 * min(entry["kl"] for entry in blocks[1:])
    assert any("with keys in 16 bits" in line and "block 0 (" in line for line in sentences(broken))


def test_the_proposal_is_better_and_as_measured(broken: dict) -> None:
    proposal = broken["proposal"]
    assert proposal["scheme"].endswith(",0.k8")
    again = judged(qwen(stretch=300.0), recipes.rtn(proposal["scheme"]))
    assert WORDS.index(again["word"]) < WORDS.index(broken["word"])
    assert proposal["kl"] < 0.5 * proposal["before"]
    assert again["kl"] == pytest.approx(proposal["kl"], rel=0.5)  # of other tokens of the same kind


def test_a_constant_channel_in_the_keys_does_no_harm_or_is_found() -> None:
    """k_proj.bias[3] = 300: a method that keeps a constant out of the grid does not notice it."""
    without, found = (judged(qwen(bias=bias), recipes.rtn("kv4")) for bias in (0.0, 300.0))
    if found["kl"] > 2 * without["kl"]:
        first = next(entry for entry in found["blame"] if entry["block"] is not None)
        assert (first["kind"], first["block"]) == ("keys", 0)
        assert found["proposal"]["scheme"].endswith(",0.k8")
        again = judged(qwen(bias=300.0), recipes.rtn(found["proposal"]["scheme"]))
        assert WORDS.index(again["word"]) < WORDS.index(found["word"])


def test_blame_names_keys_that_the_rest_was_fitted_to() -> None:
    """As a constant in keys, without an offset: what rounding them does alone tells, also after a fit."""

    def fitted(scheme: str) -> dict:
        recipe = quick(scheme, epochs=4, samples=16, seqlen=32)
        recipe = dataclasses.replace(recipe, scheme=dataclasses.replace(recipe.scheme, key_offset="none"))
        held_out = torch.randint(0, 512, (2, 128), generator=torch.Generator().manual_seed(1))
        model = qwen(bias=300.0)
        found = flatquant.quantize(model, recipe, tokens(16, 32), device=CPU, held_out=held_out).verdict
        assert found is not None
        return found

    with pytest.warns(QualityWarning):
        found = fitted("w4a4kv4")
    errors = {(e["kind"], e["block"]): e["error"] for e in found["blame"] if e["block"] is not None}
    assert errors["keys", 0] > 0.4 > 0.1 > errors["keys", 1]
    assert errors["keys", 0] == found["alone"][0]["keys"]
    assert any(line.startswith("rounding keys alone changes the output of block 0 by") for line in sentences(found))
    assert "0.k" in found["proposal"]["scheme"]
    again = fitted(found["proposal"]["scheme"])
    assert again["kl"] < 0.7 * found["kl"]


def test_what_a_part_changes_alone_adds_up() -> None:
    """One part is rounded: its change is the block's whole error, and the others have none."""
    held_out = tokens(1, 64)
    found = flatquant.quantize(tiny_llama(layers=2), recipes.rtn("w4"), device=CPU, held_out=held_out).verdict
    assert found is not None
    assert found["alone"][0] == {"weights": pytest.approx(found["blocks"][0], rel=1e-4)}
    found = flatquant.quantize(tiny_llama(layers=2), recipes.rtn("k3"), device=CPU, held_out=held_out).verdict
    assert found is not None
    assert found["alone"][0] == {"keys": pytest.approx(found["blocks"][0], rel=1e-4), "weights": 0.0}


def test_activations_are_blamed_by_site() -> None:
    found = judged(tiny_llama(layers=3), recipes.rtn("w8a2"))
    parts = [entry for entry in found["blame"] if entry["kind"] == "activations"]
    assert parts[0]["block"] is None
    assert all(entry["site"] in ("attn_in", "attn_out", "mlp_in", "mlp_mid") for entry in parts[1:])
    assert found["proposal"]["kl"] < 0.5 * found["proposal"]["before"]
    again = judged(tiny_llama(layers=3), recipes.rtn(found["proposal"]["scheme"]))
    assert again["kl"] < 0.6 * found["kl"]


def test_weights_are_blamed_by_what_they_cause_alone() -> None:
    found = judged(tiny_llama(layers=3), recipes.rtn("w2a8"))
    weights = [entry for entry in found["blame"] if entry["kind"] == "weights"]
    assert weights[0]["alone"] == pytest.approx(found["kl"], rel=0.3)
    errors = [entry["error"] for entry in weights[1:]]
    assert errors == sorted(errors, reverse=True)
    assert {entry["block"] for entry in weights[1:]} <= {0, 1, 2}
    assert found["proposal"]["scheme"].startswith("w4a8")
    assert found["proposal"]["kl"] is None


def test_a_good_model_is_not_searched() -> None:
    found = judged(tiny_llama(), recipes.rtn("w8a8"))
    assert (found["blame"], found["proposal"], len(sentences(found))) == ([], None, 1)


# ------------------------------------------------------------------------------------------------- said


def test_python_is_warned_of_what_is_not_good() -> None:
    with pytest.warns(QualityWarning, match=r"KL divergence from the original .*; with keys in 16 bits, .*--scheme"):
        flatquant.quantize(qwen(stretch=300.0), recipes.rtn("kv4"), device=CPU)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flatquant.quantize(tiny_llama(), recipes.rtn("w8"), device=CPU)


def test_both_models_write_to_the_same_prompts() -> None:
    result = flatquant.quantize(tiny_llama(), recipes.rtn("w8"), device=CPU, tokenizer=tiny_tokenizer())
    assert result.verdict is not None
    texts = result.verdict["texts"]
    assert len(texts) == len(PROMPTS)
    for text, prompt in zip(texts, PROMPTS, strict=True):
        assert prompt.startswith(text["prompt"])
        assert text["original"]
        assert text["quantised"]


def test_continuations_are_the_likeliest_tokens() -> None:
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    for found in continuations(model, tokenizer):
        ids = torch.tensor([tokenizer(found["prompt"])["input_ids"]])
        for _ in range(5):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        written = tokenizer.decode(ids[0], skip_special_tokens=True)
        assert (found["prompt"] + found["text"]).startswith(written)


# ------------------------------------------------------------------------------------------------- the folder


def test_the_packed_folder_is_compared_with_the_model_in_memory(tmp_path: Path) -> None:
    recipe = dataclasses.replace(quick("w4a4kv4"), data=DataSpec(samples=4, seqlen=12))
    result = flatquant.quantize(tiny_llama(), recipe, tokens(4, 12), device=CPU, output=tmp_path / "out")
    assert result.verdict is not None
    same = {"tokens": 12, "kl": pytest.approx(0, abs=1e-6), "equal": True, "error": 0.0}
    assert result.verdict["packed"] == same
    stored = json.loads((tmp_path / "out/flatquant_report.json").read_text())["verdict"]
    assert stored == json.loads(json.dumps(result.verdict))
    found = artifact.inspect(tmp_path / "out").report
    assert found is not None
    assert found["verdict"] == stored
    card = (tmp_path / "out/README.md").read_text()
    assert f"- {stored['word']}: KL divergence" in card


def test_a_folder_that_reads_back_as_another_model_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = artifact.load

    def damaged(folder: Path) -> PreTrainedModel:
        model = load(folder)
        model.model.layers[1].mlp.down_proj.scale.mul_(1.5)
        return model

    monkeypatch.setattr(artifact, "load", damaged)
    with pytest.raises(ArtifactError, match="out was written, but read back it is not the model in memory"):
        flatquant.quantize(tiny_llama(), recipes.rtn("w4"), device=CPU, output=tmp_path / "out")
    assert (tmp_path / "out/config.json").is_file()
