"""The main job on the real SmolLM2-135M: quantise, save, load, evaluate, generate."""

import dataclasses
from pathlib import Path

import pytest
import torch

import flatquant
from flatquant.data import calibration_tokens
from flatquant.evaluate import divergence_from_logits, perplexity, reference_logits
from flatquant.models import load_model
from flatquant.runtime.generate import generate_text
from flatquant.spec import DataSpec

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_smollm2_at_w4a4kv4(tmp_path: Path) -> None:
    model, tokenizer = load_model("smollm2-135m", dtype=torch.float32)
    # English that comes with the repository: one text to calibrate on, another to test on.
    texts = {"calibration.txt": "LICENSE", "test.txt": "CONTRIBUTING.md"}
    for name, source in texts.items():
        (tmp_path / name).write_text((ROOT / source).read_text())
    held_out = calibration_tokens(tmp_path / "test.txt", tokenizer, samples=2, seqlen=128, seed=0)
    logits = reference_logits(model, held_out)
    recipe = flatquant.recipes.flatquant("w4a4kv4", preset="quick")
    recipe = dataclasses.replace(
        recipe,
        data=DataSpec(samples=4, seqlen=128),
        end_to_end=dataclasses.replace(recipe.end_to_end, steps=2),
    )
    kl = {}
    for name, parts in (("rtn", flatquant.recipes.rtn("w4a4kv4")), ("flatquant", recipe)):
        current, _ = load_model("smollm2-135m", dtype=torch.float32)
        text = tmp_path / "calibration.txt" if parts.needs_data else None
        options = {"tokenizer": tokenizer, "output": tmp_path / name, "device": "cpu", "verdict": name == "flatquant"}
        result = flatquant.quantize(current, parts, text, **options)
        loaded = flatquant.load(tmp_path / name)
        with torch.no_grad():
            assert torch.equal(loaded(held_out).logits, result.model(held_out).logits)
        in_memory, packed = perplexity(result.model, held_out).value, perplexity(loaded, held_out).value
        assert abs(in_memory - packed) < 1e-3
        kl[name] = divergence_from_logits(loaded, logits, held_out).kl
    assert kl["flatquant"] < 0.3 * kl["rtn"], kl
    # What it says token by token, from the packed cache, is likely given the text as a whole too. Not always likeliest:
    # a sum in another order may round one activation to the next integer, and that spreads through the blocks.
    prompt = "The capital of France is"
    written = generate_text(loaded, tokenizer, prompt, max_new_tokens=8)
    start = tokenizer(prompt, return_tensors="pt").input_ids.shape[1]
    ids = tokenizer(prompt + written.text.rstrip(), return_tensors="pt").input_ids
    assert ids.shape[1] >= start + 4
    with torch.no_grad():
        said = loaded(ids, use_cache=False).logits[0, start - 1 : -1]  # (tokens, V)
    behind = said.amax(-1) - said.gather(-1, ids[0, start:, None])[:, 0]
    assert behind.mean() < 0.5, behind
