"""The benchmark of DeepSeek-V3's shape: rates are those of the runs they come from, counts those of the shape."""

import dataclasses
import json
import math
from typing import Any

import pytest
import torch
from benchmarks.common import RESULTS
from benchmarks.latent import TINY, V3, Rates, blocks, check, empty, llama_weights, metrics, part, shape_of

from flatquant.recipes import flatquant
from flatquant.spec import DataSpec, FitSpec, SitePlan
from flatquant.wiring.arch import Geometry
from flatquant.wiring.archs import arch_of
from flatquant.wiring.plan import make_plan


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    return json.loads((RESULTS / "calibration-h100.json").read_text())


def test_rates_give_the_epochs_that_they_come_from(measured: dict[str, Any]) -> None:
    rates = Rates.of(measured)
    assert all(rate > 0 for rate in dataclasses.astuple(rates))
    for name in ("llama-3-70b", "llama-3-70b-batch-1"):
        run = shape_of(measured, name)
        weights = llama_weights(run)
        seconds = rates.epoch(run["samples"] * run["seqlen"], run["samples"] // run["batch"], weights, weights)
        assert seconds == pytest.approx(sum(run["last_epoch_seconds"]) / len(run["last_epoch_seconds"]))
    found = check(measured, rates)
    assert 2 / 3 < found["planned"] / found["measured"] < 3 / 2  # of a shape that they do not come from


def test_a_token_passes_its_experts_and_what_all_pass() -> None:
    def site(*readers: str) -> SitePlan:
        return SitePlan(readers=readers, shape=(1, 4))

    experts = [f"mlp.experts.{e}.{name}" for e in range(64) for name in ("gate_proj", "up_proj")]
    assert part(site("mlp.gate_proj", "mlp.up_proj")) == 1
    assert part(site(*experts)) == 8 / 64
    assert part(site("mlp.shared.gate_proj", "mlp.shared.up_proj", *experts)) == 9 / 65


def test_weights_are_those_of_the_paper() -> None:
    """671 billion in all, 37 a token (DeepSeek-V3, section 1), embeddings and head included."""
    from flatquant.calibrate.memory import linear_weights

    model, modules = empty(256)
    plan = make_plan(flatquant("w4a4kv4"), arch_of(model.config), Geometry.of(model.config), modules)
    counts = []
    for index in (0, 3):
        weights, sites = linear_weights(modules[index], plan.blocks[index]), plan.blocks[index].sites.values()
        counts.append((sum(weights), sum(w * part(s) for w, s in zip(weights, sites, strict=True))))
    ends = 2 * V3["vocab_size"] * V3["hidden_size"]
    (dense, _), (sparse, passed) = counts
    assert round((3 * dense + 58 * sparse + ends) / 1e9) == 671
    assert math.isclose(3 * dense + 58 * passed + ends, 37.5e9, rel_tol=0.02)


def test_a_dry_run_measures_both_caches() -> None:
    recipe = dataclasses.replace(
        flatquant("w4a4kv4"), data=DataSpec(samples=2, seqlen=12), fit=FitSpec(epochs=1, batch_size=1)
    )
    row = blocks(4, recipe, torch.device("cpu"), prompt=12, tiny=True)
    assert row["agrees"]
    sizes = metrics([row])["cache_bytes_of_a_token_and_block"]
    latent, rotary = TINY["kv_lora_rank"], TINY["qk_rope_head_dim"]
    assert sizes["original"] == 4 * (latent + rotary)  # float32 on a CPU
    angles = 4 * rotary / 2  # of keys with an offset, once for both blocks
    assert sizes["packed"] == (latent + rotary) / 2 + 2 * 5 + angles  # integers, with a scale and a zero point each
    assert len(row["packed"]["token_ms"]) == len(row["fits"]) == 2
