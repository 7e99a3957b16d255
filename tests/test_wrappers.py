"""Models of several parts: their text part is quantised where it is, and the rest stays as it was."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

import flatquant
from flatquant.calibrate import solve
from flatquant.calibrate.capture import capture, run_block
from flatquant.calibrate.samples import Samples
from flatquant.errors import FlatQuantError, ModelError
from flatquant.models import auto_class
from flatquant.recipes import autoround, gptq, oac
from flatquant.recipes import flatquant as flatquant_recipe
from flatquant.rotary import Angles, turned
from flatquant.runtime import artifact
from flatquant.runtime.artifact import save
from flatquant.runtime.experts import open_experts
from flatquant.solvers.hessian import InputGram
from flatquant.spec import Recipe, to_dict
from flatquant.wiring.arch import submodule
from flatquant.wiring.archs import arch_of
from flatquant.wiring.fold import fold_block
from tests.laws import (
    BASES,
    aligned,
    bare,
    blocks_of,
    calibrated,
    final_norm,
    inputs_of,
    quick,
    reinstalled,
    relative,
    tokens_for,
    wrap,
)
from tests.tiny_models import tiny_tokenizer
from tests.tiny_wrappers import WRAPPERS, image_inputs, tiny_wrapper, wrapper_config

PRESERVED = 1e-9


@torch.no_grad()
def said(model: PreTrainedModel) -> list[Tensor]:
    """Logits of a text, of a text with an image, and of the same token by token behind the image."""
    image = image_inputs(model)
    text = {"input_ids": tokens_for(model, 2, 9)}
    found = [model(**copy.deepcopy(inputs), use_cache=False).logits for inputs in (text, image)]
    short = {k: v[:, :-3] if v.shape == image["input_ids"].shape else v for k, v in image.items()}
    out = model.generate(
        **short, max_new_tokens=3, min_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    return [*found, torch.stack(out.logits)]


@pytest.mark.parametrize("name", WRAPPERS)
def test_changes_of_basis_leave_what_a_wrapper_says(name: str) -> None:
    original = tiny_wrapper(name, dtype=torch.float64)
    want = said(original)
    model = copy.deepcopy(original)
    plan, fits = wrap(model, bare(BASES["inverse orthogonal"]), force=True)
    for got, logits in zip(said(model), want, strict=True):
        assert relative(got, logits) < PRESERVED
    for fit in fits:
        fold_block(fit, dtype=torch.float64)
    for got, logits in zip(said(model), want, strict=True):
        assert relative(got, logits) < PRESERVED
    again = reinstalled(original, plan, model)
    for got, logits in zip(said(again), said(model), strict=True):
        assert torch.equal(got, logits)


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_quantised_wrapper_is_read_back(name: str, tmp_path: Path) -> None:
    recipe = quick("w4a4kv4")
    original = tiny_wrapper(name)
    model, plan, _ = calibrated(original, recipe)
    model.requires_grad_(False)  # on it the last bits of some of torch's products depend
    want = said(model)
    save(model, plan, tmp_path / "model", recipe=to_dict(recipe), report={})
    ours = flatquant.load(tmp_path / "model")
    theirs = auto_class(original.config.model_type).from_pretrained(tmp_path / "model")
    for loaded in (ours, aligned(theirs)):
        assert type(loaded) is type(original)
        for got, logits in zip(said(loaded), want, strict=True):
            assert torch.equal(got, logits)
        state, before = loaded.state_dict(), original.state_dict()
        rest = [key for key in before if not key.startswith(arch_of(original.config).blocks)]
        assert any("vis" in key or "audio" in key for key in rest)
        for key in rest:
            assert torch.equal(state[key], before[key])


@pytest.mark.parametrize("name", ["gemma3", "qwen3_vl", "qwen3_5_moe", "smolvlm", "qwen3_asr"])
def test_a_wrapper_s_folder_through_a_whole_run(name: str, tmp_path: Path) -> None:
    source, text = tmp_path / "source", tmp_path / "text.txt"
    tiny_wrapper(name).save_pretrained(source)
    tiny_tokenizer().save_pretrained(source)
    (source / "preprocessor_config.json").write_text("{}")
    text.write_text("It was the best of times, it was the worst of times. " * 40)
    recipe = quick("w4a4kv4")
    done = flatquant.quantize(source, recipe, text, output=tmp_path / "out")
    assert done.verdict is not None
    assert done.verdict["packed"]["equal"]
    assert (tmp_path / "out" / "preprocessor_config.json").read_text() == "{}"
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"AutoModelFor{'MultimodalLM' if name == 'qwen3_asr' else 'ImageTextToText'}.from_pretrained" in card
    assert "AutoProcessor" in card
    held = artifact.inspect(tmp_path / "out")
    assert not held.damaged
    assert held.unquantised_bytes["other parts"] > 0
    tied = name in ("gemma3", "qwen3_asr")  # whose embeddings are their output layer
    assert ("output layer" in held.unquantised_bytes) != tied
    if name == "gemma3":  # the names in its files are others
        with pytest.raises(ModelError, match=r"cannot be read tensor by tensor: .* load it whole"):
            flatquant.quantize(source, recipe, text, output=tmp_path / "streamed", stream=True)
        return
    flatquant.quantize(source, recipe, text, output=tmp_path / "streamed", stream=True)
    assert (tmp_path / "streamed" / "config.json").read_bytes() == (tmp_path / "out" / "config.json").read_bytes()


def test_a_wrapper_s_run_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    """As `killing.py` has it for text models: the same bytes."""
    tokens = tokens_for(tiny_wrapper("qwen3_vl"), 4, 12)
    folders = []
    for name in ("whole", "resumed"):
        if name == "resumed":
            with pytest.raises(KeyboardInterrupt):
                flatquant.quantize(
                    tiny_wrapper("qwen3_vl"), quick("w4a4kv4"), tokens, output=tmp_path / name, progress=_stop
                )
        resumed = flatquant.quantize(
            tiny_wrapper("qwen3_vl"), quick("w4a4kv4"), tokens, output=tmp_path / name, resume=True
        )
        folders.append((tmp_path / name / "config.json").read_bytes())
        assert resumed.plan.blocks_path == "model.language_model.layers"
    assert folders[0] == folders[1]


def _stop(stage: str, done: float, total: float) -> None:
    if stage == "solve" and done == 1:
        raise KeyboardInterrupt


def _has_offsets(name: str) -> bool:
    arch = arch_of(wrapper_config(name))
    return arch.rotary is not None and arch.latent is None


@torch.no_grad()
@pytest.mark.parametrize("name", list(filter(_has_offsets, WRAPPERS)))
def test_a_constant_of_keys_is_turned_as_its_description_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys moved by a constant before the rotary embedding are moved by the turned constant behind it."""
    model = tiny_wrapper(name, dtype=torch.float64)
    arch, inputs = arch_of(model.config), image_inputs(model)
    open_experts(blocks_of(model))
    keys: dict[int, Tensor] = {}
    angles: list[Angles] = []
    update = Cache.update

    def updated(self: Cache, key: Tensor, value: Tensor, layer: int, *args: Any, **kwargs: Any) -> Any:
        keys[layer] = key
        return update(self, key, value, layer, *args, **kwargs)

    def called(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        angles.extend(filter(None, map(Angles.among, (*args, *kwargs.values()))))

    def moved(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return output + constant.repeat(output.shape[-1] // len(constant))

    monkeypatch.setattr(Cache, "update", updated)
    model(**inputs, use_cache=True)
    before = dict(keys)
    for layer, block in enumerate(blocks_of(model)):
        kind = arch.of(block)
        if kind.attention is None:
            continue
        attention = submodule(block, kind.attention)
        constant = torch.randn(before[layer].shape[-1], dtype=torch.float64)
        norms = [part for part in map(attention._modules.get, ("k_norm", "k_layernorm")) if part is not None]
        handles = [
            attention.register_forward_pre_hook(called, with_kwargs=True),
            (norms[0] if norms else submodule(block, kind.keys)).register_forward_hook(moved),
        ]
        angles.clear()
        model(**inputs, use_cache=True)
        for handle in handles:
            handle.remove()
        want = constant.expand_as(keys[layer])
        if kind.turns(attention):
            want = turned(want, angles[0].of_pairs(arch.rotary), arch.rotary)
        torch.testing.assert_close(keys[layer] - before[layer], want, rtol=1e-5, atol=1e-5)  # Cohere turns in float32


# ------------------------------------------------------------------------------------------ samples with images


def samples_for(model: PreTrainedModel, count: int = 4) -> list[dict[str, Tensor]]:
    """Texts with images in different places, and of different shapes where the model takes such; of one length."""
    prompts = [2 + 2 * (seed % 3) for seed in range(count)]
    length = max(image_inputs(model, i, length=26, prompt=n)["input_ids"].shape[1] for i, n in enumerate(prompts))
    return [image_inputs(model, i, length=length, prompt=n) for i, n in enumerate(prompts)]


@torch.no_grad()
@pytest.mark.parametrize("name", WRAPPERS)
def test_blocks_are_called_as_the_model_calls_them_with_each_sample(name: str) -> None:
    """Window by window, some at a time, and in any order: the model's own last hidden states."""
    model = tiny_wrapper(name, dtype=torch.float64)
    samples, arch = Samples.of(samples_for(model)), arch_of(model.config)
    hidden, calls = capture(model, arch, samples)
    want = torch.cat([hidden_of(model, sample) for sample in samples.inputs])
    order = torch.tensor([2, 0, 3])
    some = hidden[order]
    for block, call in zip(blocks_of(model), calls, strict=True):
        some, hidden = call.of(order)(block, some), run_block(block, call, hidden, 3)
    assert relative(calls[-1].states(hidden), want) < PRESERVED
    assert relative(calls[-1].states(some), want[order]) < PRESERVED
    one, calls = capture(model, arch, samples[2:3])
    for block, call in zip(blocks_of(model), calls, strict=True):
        one = call(block, one)
    assert relative(calls[-1].states(one), want[2:3]) < PRESERVED


def hidden_of(model: PreTrainedModel, inputs: dict[str, Any]) -> Tensor:
    """Hidden states before the final norm.  # (1, T, h)"""
    with inputs_of(final_norm(model)) as seen:
        model(**inputs, use_cache=False)
    return seen[0]


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapper_is_fitted_to_samples_with_images(name: str, tmp_path: Path) -> None:
    model = tiny_wrapper(name)
    samples = samples_for(model)
    want = [model(**sample).logits for sample in samples]
    done = flatquant.quantize(model, quick("w8a8kv8", epochs=2), samples, output=tmp_path / "out")
    assert done.verdict is not None
    assert done.verdict["packed"]["equal"]
    assert done.verdict["seqlen"] == samples[0]["input_ids"].shape[1]
    losses = [loss for block in done.report["blocks"] for loss in block["losses"]]
    assert max(losses) < 0.01  # of outputs around 1: a window with another's mask or positions would be far off
    loaded = flatquant.load(tmp_path / "out")
    got = [loaded(**sample).logits for sample in samples]
    assert all(torch.equal(a, model(**sample).logits) for a, sample in zip(got, samples, strict=True))
    assert all(relative(a, b) < 0.15 for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("recipe", [gptq("w4"), autoround("w4a4kv4"), flatquant_recipe("w4a4kv4")])
def test_every_stage_takes_samples(recipe: Recipe) -> None:
    """Gram matrices, learned rounding, and an end-to-end fit."""
    model = tiny_wrapper("qwen3_vl")
    if recipe.end_to_end is not None:
        recipe = dataclasses.replace(recipe, end_to_end=dataclasses.replace(recipe.end_to_end, steps=3))
    if recipe.solver.learned is not None:
        solver = dataclasses.replace(recipe.solver, learned=dataclasses.replace(recipe.solver.learned, steps=8))
        recipe = dataclasses.replace(recipe, solver=solver)
    done = flatquant.quantize(model, recipe, samples_for(model))
    assert done.verdict is not None
    assert done.verdict["word"] != "destroyed"


def test_a_gram_matrix_counts_every_token_of_every_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    grams: list[InputGram] = []
    gram_of = solve._gram
    monkeypatch.setattr(solve, "_gram", lambda *args: grams.append(gram_of(*args)) or grams[-1])
    model = tiny_wrapper("qwen3_vl")
    samples = samples_for(model)
    flatquant.quantize(model, gptq("w4"), samples)
    tokens = sum(sample["input_ids"].numel() for sample in samples)
    assert grams
    assert {gram.tokens for gram in grams} == {tokens}


def test_samples_that_cannot_be_taken_are_named() -> None:
    model = tiny_wrapper("gemma3")
    good = samples_for(model)

    def message(samples: list[dict[str, Any]], recipe: Recipe | None = None) -> str:
        with pytest.raises(FlatQuantError) as caught:
            flatquant.quantize(model, recipe or quick("w4a4kv4"), samples)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "the list is empty" in message([])
    assert "sample 1 has no input_ids" in message([good[0], {"pixel_values": torch.ones(1)}])
    assert "sample 1 has 25 tokens, the first 26" in message([good[0], image_inputs(model, 1, length=25)])
    padded = {**good[1], "attention_mask": torch.tensor([[0] + [1] * 25])}
    assert "sample 1 has padding" in message([good[0], padded])
    fewer = {**good[1], "input_ids": good[1]["input_ids"].clamp(max=99)}
    assert "sample 1: Gemma3ForConditionalGeneration does not take it" in message([good[0], fewer])
    assert "learns from the text's cross entropy" in message(good, oac("w4"))
