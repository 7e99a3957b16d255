"""The documents' examples run as printed, on a tiny model, and what is generated for them is whole."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from transformers import PreTrainedModel

import flatquant
from flatquant import compare, formats
from flatquant.errors import ArtifactError, SpecError
from flatquant.recipes import RECIPES
from flatquant.spec import Recipe, from_dict, to_dict
from tests.tiny_models import tiny_llama, tiny_tokenizer

DOCS = Path(__file__).parents[1] / "docs"


def example(name: str, page: str = "methods.md") -> str:
    """The block of a document under this mark."""
    found = re.findall(
        rf"^<!-- example: {name} -->\n```python\n(.*?)^```", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE
    )
    assert len(found) == 1
    return found[0]


def at_hand(code: str, model: PreTrainedModel, folder: Path) -> str:
    """An example that takes a tiny model and a text from `folder` for those that it names."""
    model.save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 60)
    for name, here in {"smollm2-135m": "model", "wikitext2": "text.txt"}.items():
        assert f'"{name}"' in code
        code = code.replace(f'"{name}"', repr(str(folder / here)))
    return code


def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hooks", DOCS / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_new_method_runs_from_its_recipe_to_a_compared_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = example("method")
    assert len(code.splitlines()) <= 40
    assert "turnscale" not in RECIPES
    code = at_hand(code, tiny_llama(), tmp_path)
    real = compare.Settings
    less = {"samples": 4, "seqlen": 16, "window": 32, "device": "cpu"}
    monkeypatch.setattr(compare, "Settings", lambda **given: real(**{**given, **less}))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    try:
        exec(compile(code, "methods.md", "exec"), names)
        rows = {row["method"]: row for row in names["result"]["rows"]}
        assert RECIPES["turnscale"]("w4a4kv4").name == "turnscale"
    finally:
        RECIPES.pop("turnscale", None)
    assert "divergence of the model, 20 steps" in capsys.readouterr().out
    assert not any("error" in row for row in rows.values())
    assert rows["turnscale"]["kl"] < rows["rtn"]["kl"]
    assert rows["turnscale"]["online_flops_per_token"] > 0


def test_a_format_from_outside_is_fitted_stored_and_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = example("format", "formats.md")
    assert len(code.splitlines()) <= 60
    code = at_hand(code, tiny_llama(hidden=64, intermediate=96), tmp_path)
    real = flatquant.quantize

    def on_little_text(model: str, recipe: Recipe, text: str, output: str) -> None:
        real(model, recipe.tuned(samples=8, seqlen=16), text, output=output, device="cpu")

    monkeypatch.setattr(flatquant, "quantize", on_little_text)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    try:
        exec(compile(code, "formats.md", "exec"), names)
        weight = names["model"].model.layers[0].self_attn.q_proj.qweight()
        assert isinstance(weight.format, names["Toy"])
        assert int(weight.codes.max()) == 7
    finally:
        formats._FACTS.pop("toy3", None)
    out = capsys.readouterr().out
    assert "gptq wtoy3a16kv16 5.00 bits a weight" in out
    assert "flatquant toy3kv4,mlp_mid=w4a8" in out
    with pytest.raises(ArtifactError, match="unknown format 'toy3'; known: mxfp4, nvfp4"):
        flatquant.load(tmp_path / "flatquant-toy3")


def test_the_combinations_are_recipes_and_what_does_not_combine_says_so() -> None:
    names: dict[str, Any] = {}
    exec(compile(example("combinations"), "methods.md", "exec"), names)
    made = {name: value for name, value in names.items() if isinstance(value, Recipe)}
    assert set(made) == {
        "with_gptq", "with_oac", "with_branch", "with_learned_rounding", "books", "rotated_books",
    }  # fmt: skip
    for recipe in made.values():
        assert from_dict(Recipe, to_dict(recipe)) == recipe
    assert made["with_oac"].solver.hessian == "output_adaptive"
    assert made["with_branch"].transforms == RECIPES["flatquant"]("w4a4kv4").transforms
    assert made["with_learned_rounding"].solver.learns
    assert made["rotated_books"].solver.codebook is not None
    with pytest.raises(SpecError, match="codebooks are not"):
        names["replace"](made["with_gptq"], solver=made["books"].solver)


def test_the_page_lists_every_method_and_its_source() -> None:
    page = hooks().on_page_markdown((DOCS / "methods.md").read_text())
    assert "<!-- methods" not in page
    for name in RECIPES:
        assert f"| `{name}` |" in page
        (section,) = re.findall(rf"^### {name}\n\n(.*?)(?=^##)", page, re.DOTALL | re.MULTILINE)
        assert name == "rtn" or re.search(r"arXiv \d{4}\.\d{5}", section), name
    readme = (DOCS.parent / "README.md").read_text()
    assert all(f"`{name}`" in readme for name in RECIPES)
