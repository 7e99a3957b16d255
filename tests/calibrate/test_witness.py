"""What rounding one part alone changes: measured for all parts of a block at once, as it is for one after the other."""

import dataclasses

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

import flatquant
from flatquant import recipes
from flatquant.calibrate.witness import Part, Witness, put, relative, rounded_parts, through
from flatquant.spec import BlockPlan, Recipe
from tests.laws import everything, quick, tokens_for
from tests.tiny_models import FAMILIES, tiny_family, tiny_llama


def one_by_one(witness: Witness, index: int, block: nn.Module, plan: BlockPlan) -> dict[str, float]:
    """What each part changes in the block's output while all other grids are away, with the block run for it alone."""

    def output(rounded: Part | None) -> torch.Tensor:
        others = dict.fromkeys(part for part in rounded_parts(plan, index) if part != rounded)
        with put(block, witness._arch.attention, others):
            call = witness._sample_calls[index]
            return call.states(through(block, call, witness._samples[index]))

    exact = output(None)
    return {part.name: float(relative(output(part), exact)) for part in rounded_parts(plan, index)}


def seen(model: PreTrainedModel, recipe: Recipe, patch: pytest.MonkeyPatch) -> tuple[list, list]:
    """What a run measured, by block, and what is measured one by one."""
    expected, see = [], Witness.see_unrounded

    def noting(self: Witness, index: int, block: nn.Module, plan: BlockPlan) -> None:
        expected.append(one_by_one(self, index, block, plan))
        see(self, index, block, plan)

    patch.setattr(Witness, "see_unrounded", noting)
    given = tokens_for(model, 4, 12) if recipe.needs_data else None
    result = flatquant.quantize(model, recipe, given, device="cpu", held_out=tokens_for(model, 2, 16))
    assert result.verdict is not None
    return result.verdict["alone"], expected


@pytest.mark.filterwarnings("ignore::flatquant.errors.QualityWarning")
@pytest.mark.parametrize("name", FAMILIES)
def test_parts_measured_together_are_those_measured_one_by_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found, expected = seen(tiny_family(name), recipes.rtn(everything(name)), monkeypatch)
    assert len(found) == len(expected) > 0
    for got, want in zip(found, expected, strict=True):
        weights = got.pop("weights")
        assert got == pytest.approx(want, rel=1e-3)
        assert all(0 < change < 1 for change in (weights, *got.values()))


@pytest.mark.filterwarnings("ignore::flatquant.errors.QualityWarning")
@pytest.mark.parametrize(
    "recipe",
    [
        recipes.quarot("w4a4kv4"),
        quick("w4a4kv4"),
        dataclasses.replace(recipes.flattenquant("w4a4"), data=quick("w4").data),
        dataclasses.replace(recipes.direct("w4a3"), data=quick("w4").data),
    ],
    ids=lambda recipe: recipe.name,
)
def test_so_are_those_of_grids_of_every_kind(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """With transforms, online and of the residual stream; one scale a tensor, and learned levels."""
    found, expected = seen(tiny_llama(), recipe, monkeypatch)
    for got, want in zip(found, expected, strict=True):
        got.pop("weights")
        assert got == pytest.approx(want, rel=1e-3)


def test_a_part_that_changes_nothing_is_measured_as_nothing() -> None:
    """Values that lie on their grid, in a model whose blocks round nothing else."""
    model = tiny_llama(layers=2)
    for layer in range(2):
        model.get_parameter(f"model.layers.{layer}.self_attn.v_proj.weight").data.zero_()
    found = flatquant.quantize(model, recipes.rtn("v4"), device="cpu", held_out=tokens_for(model, 2, 16)).verdict
    assert found is not None
    assert found["alone"] == [{"values": 0.0, "weights": 0.0}] * 2
