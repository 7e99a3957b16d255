"""Which engines serve what a method leaves, as the table in docs/families.md says."""

import pytest
from benchmarks.engines import engines_table

from flatquant import families
from flatquant.engines import parts
from flatquant.recipes import RECIPES
from flatquant.runtime.linear import IntegerLinear


def test_engines_are_those_that_take_a_method_s_model() -> None:
    """What kernels have no form for, by what the method leaves in a packed model; tests of engines run the rest."""
    rows = {row["method"]: row for row in engines_table()}
    assert rows.keys() == RECIPES.keys()
    without = {name for name, row in rows.items() if row["fused"] == "-"}
    assert without == {
        "direct",  # levels of its own
        "flattenquant",  # channels that are split
        "svdquant",  # branches
        "vptq",  # codebooks
    }
    assert all(row["fused"] == "w4a4kv4" for name, row in rows.items() if name not in without)
    assert all(row["vllm"] == row["modules"] for row in rows.values())  # tests/engines/vllm serves every method
    assert families.engines("qwen3") == ("modules", "fused", "vllm")
    assert families.engines("gemma2") == ("modules", "vllm")
    assert families.engines("bloom") == ("modules",)
    assert families.engines("stablelm") == ("modules", "vllm")
    assert families.engines("stablelm", {"use_parallel_residual": True}) == ("modules",)


def test_what_no_part_computes_is_not_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table asks the parts of engines, method by method."""
    monkeypatch.setattr(parts, "Linear", IntegerLinear)
    rows = {row["method"]: row["vllm"] for row in engines_table()}
    assert {method for method, served in rows.items() if served == "-"} == {"direct", "svdquant", "vptq"}
