"""Models of several parts: their text part is quantised where it is, and the rest stays as it was."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedModel

import flatquant
from flatquant.errors import ModelError
from flatquant.runtime import artifact
from flatquant.runtime.artifact import save
from flatquant.spec import to_dict
from flatquant.wiring.apply import fold_block
from flatquant.wiring.archs import arch_of
from tests.laws import BASES, bare, calibrated, quick, reinstalled, relative, tokens_for, wrap
from tests.tiny_models import WRAPPERS, image_inputs, tiny_tokenizer, tiny_wrapper

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
    want = said(model)
    save(model, plan, tmp_path / "model", recipe=to_dict(recipe), report={})
    ours = flatquant.load(tmp_path / "model")
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    for loaded in (ours, theirs):
        assert type(loaded) is type(original)
        for got, logits in zip(said(loaded), want, strict=True):
            assert torch.equal(got, logits)
        state, before = loaded.state_dict(), original.state_dict()
        rest = [key for key in before if not key.startswith(arch_of(original.config).blocks)]
        assert any("vis" in key for key in rest)
        for key in rest:
            assert torch.equal(state[key], before[key])


@pytest.mark.parametrize("name", ["gemma3", "qwen3_vl"])
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
    assert "AutoModelForImageTextToText.from_pretrained" in card
    assert "AutoProcessor" in card
    held = artifact.inspect(tmp_path / "out")
    assert not held.damaged
    assert held.unquantised_bytes["other parts"] > 0
    assert ("output layer" in held.unquantised_bytes) == (name != "gemma3")  # whose embeddings are its output layer
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
