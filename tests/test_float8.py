"""Folders with weights in float8 and a scale for each block: read as the numbers they stand for, whole and streamed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flatquant import recipes
from flatquant.api import call
from flatquant.errors import ModelError
from flatquant.models import load_model, loaded_bytes, open_model
from flatquant.runtime.experts import open_experts
from tests.laws import tokens_for
from tests.test_streaming import SMALL, both
from tests.tiny_models import tiny_family, tiny_tokenizer

Tensors = dict[str, Tensor]
BLOCK = (16, 8)  # which divides few of the sizes
SAID = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(BLOCK)}


def numbers(weight: Tensor, scale: Tensor, block: tuple[int, int]) -> np.ndarray:
    """What a weight stands for, entry by entry."""
    w, s = weight.float().numpy(), scale.float().numpy()
    out = np.empty_like(w)
    for i, j in np.ndindex(*w.shape):
        out[i, j] = w[i, j] * s[i // block[0], j // block[1]]
    return out


def written(
    folder: Path,
    name: str = "deepseek_v3",
    *,
    block: tuple[int, int] = BLOCK,
    change: Callable[[Tensors], Tensors] = lambda tensors: tensors,
    said: dict[str, Any] | None = SAID,
) -> tuple[Path, Path]:
    """A model in float8, and the same in bfloat16, as folders."""
    g = torch.Generator().manual_seed(0)
    twin = folder / "twin"
    tiny_family(name, dtype=torch.bfloat16, tied=False).save_pretrained(twin)
    tiny_tokenizer().save_pretrained(twin)
    narrow, wide = {}, {}
    for key, tensor in load_file(twin / "model.safetensors").items():
        narrow[key] = wide[key] = tensor
        if key.endswith("proj.weight") or "with_mqa.weight" in key:
            blocks = [-(-size // b) for size, b in zip(tensor.shape, block, strict=True)]
            scale = 0.002 + 0.02 * torch.rand(blocks, generator=g)
            narrow[key] = (50 * tensor.float()).to(torch.float8_e4m3fn)
            narrow[f"{key}_scale_inv"] = scale
            wide[key] = torch.from_numpy(numbers(narrow[key], scale, block)).bfloat16()
        if key.endswith("correction_bias"):  # kept in float32, and not a number of bfloat16
            narrow[key] = wide[key] = tensor.float() + 1e-4
    model = folder / "model"
    model.mkdir()
    for file in twin.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    save_file(wide, twin / "model.safetensors", metadata={"format": "pt"})
    save_file(change(narrow), model / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration.Config"}  # as published folders have; the code is not run
    if said is not None:
        config["quantization_config"] = {**said, **({"weight_block_size": list(block)} if said is SAID else {})}
    (model / "config.json").write_text(json.dumps(config))
    return model, twin


@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v2 lite", "qwen3_moe", "llama"])
@pytest.mark.parametrize("block", [BLOCK, (128, 128)])
def test_whole_and_streamed_are_the_numbers_that_are_stood_for(
    name: str, block: tuple[int, int], tmp_path: Path
) -> None:
    model, twin = written(tmp_path, name, block=block)
    ours, _ = load_model(model)
    want, _ = load_model(twin)
    assert ours.dtype == torch.bfloat16
    assert not hasattr(ours.config, "quantization_config")
    assert ours.generation_config.to_dict() == want.generation_config.to_dict()
    found, wanted = ours.state_dict(), want.state_dict()
    assert found.keys() == wanted.keys()
    assert all(found[k].dtype == wanted[k].dtype and torch.equal(found[k], wanted[k]) for k in wanted)
    streamed, _, checkpoint = call._streamed(model)
    checkpoint.fill(streamed, "")
    for loaded in (ours, want):
        open_experts(loaded)  # a grouped product takes no such sizes
    with torch.no_grad():
        ids = tokens_for(want, 2, 9)
        assert torch.equal(ours(ids).logits, want(ids).logits)
        assert torch.equal(streamed(ids).logits, want(ids).logits)


@pytest.mark.parametrize("recipe", [SMALL, recipes.rtn("w4a4kv4,1.attn_in=w16a16,1.k16v16")], ids=["flatquant", "rtn"])
def test_a_streamed_run_writes_the_bytes_of_a_plain_one(recipe: Any, tmp_path: Path) -> None:
    model, twin = written(tmp_path)
    plain, streamed = both(model, recipe, tmp_path / "float8")
    assert plain == streamed
    (other, _) = both(twin, recipe, tmp_path / "bfloat16")
    weights = [name for name in plain if name.endswith(".safetensors")]
    assert weights
    assert all(plain[name] == other[name] for name in weights)


def test_a_block_of_further_predictions_is_left_out(tmp_path: Path) -> None:
    """DeepSeek's own folders have one behind the last block, of which transformers makes nothing."""

    def further(tensors: Tensors) -> Tensors:
        last = {k.replace("layers.1.", "layers.61."): t.clone() for k, t in tensors.items() if "layers.1." in k}
        return tensors | last | {"model.layers.61.eh_proj.weight": torch.ones(24, 48)}

    model, twin = written(tmp_path, change=further)
    found, wanted = (load_model(path)[0].state_dict() for path in (model, twin))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[k], wanted[k]) for k in wanted)
    streamed, _, checkpoint = call._streamed(model)
    assert len(streamed.model.layers) == 2
    assert checkpoint.read("model.layers.1.self_attn.o_proj.weight").dtype == torch.bfloat16


def test_a_folder_counts_as_what_it_is_in_memory(tmp_path: Path) -> None:
    model, twin = written(tmp_path)
    stored = (model / "model.safetensors").stat().st_size
    assert loaded_bytes(model) == 2 * stored
    assert loaded_bytes(twin) == (twin / "model.safetensors").stat().st_size
    place, limits = call.Place.of(tmp_path / "out"), call.Limits(host=stored + 1)
    assert call._open(model, recipes.rtn("w4"), None, place, limits, None)[2] is not None  # streamed


def without(part: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {k: t for k, t in tensors.items() if part not in k}


def other_scale(tensors: Tensors) -> Tensors:
    return tensors | {"model.layers.0.self_attn.o_proj.weight_scale_inv": torch.ones(3, 4)}


@pytest.mark.parametrize(
    "change, said, message",
    [
        (
            without("layers.0.self_attn.o_proj.weight_scale_inv"),
            SAID,
            r"o_proj\.weight of .* without its scales, .*_inv;",
        ),
        (other_scale, SAID, r"shape \(3, 4\): blocks of 16 x 8 of a weight of shape \(24, 32\) have \(2, 4\)"),
        (lambda tensors: tensors, None, r"is in float8, and config\.json does not say how"),
        (lambda tensors: tensors, {**SAID, "weight_block_size": None}, r"without blocks of two dimensions"),
        (without("layers.1.self_attn.kv_b_proj.weight"), SAID, r"kv_b_proj\.weight"),
    ],
)
def test_what_is_wrong_with_a_folder_is_one_line(
    change: Callable[[Tensors], Tensors], said: dict[str, Any] | None, message: str, tmp_path: Path
) -> None:
    model, _ = written(tmp_path, change=change, said=said)
    for load in (load_model, lambda path: open_model(path, lay_out=open_experts)):
        with pytest.raises(ModelError, match=message) as caught:
            load(model)
        assert "\n" not in str(caught.value)
