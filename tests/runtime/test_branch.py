"""A model with low-rank branches from calibration to a folder and back."""

import dataclasses
from pathlib import Path

import pytest
import torch

from flatquant.api import stored_bytes
from flatquant.calibrate.state import RunState
from flatquant.errors import SpecError
from flatquant.recipes import recipe, svdquant
from flatquant.runtime.artifact import inspect, load, save
from flatquant.runtime.branch import BranchedLinear
from flatquant.runtime.codebook import CodebookLinear
from flatquant.runtime.linear import FrozenLinear, FrozenSite
from flatquant.spec import BranchSpec, CodebookSpec, DataSpec, Recipe, Scheme, SolverSpec, from_dict, to_dict
from flatquant.wiring.arch import Geometry, submodule
from flatquant.wiring.cost import online_flops
from flatquant.wiring.fold import fold_block
from tests.laws import BASES, SHAPES, bare, calibrated, family, hidden, quick, relative, same_bytes, tokens_for, wrap

READERS = tuple(f"self_attn.{p}_proj" for p in "qkvo") + tuple(f"mlp.{p}_proj" for p in ("gate", "up", "down"))
SITES = {"attn_in": READERS[:3], "attn_out": READERS[3:4], "mlp_in": READERS[4:6], "mlp_mid": READERS[6:]}
DATA = DataSpec(samples=8, seqlen=16)


def small(scheme: str = "w4a4kv4", rank: int = 4, **changes) -> Recipe:
    return dataclasses.replace(svdquant(scheme, rank=rank), data=DATA, **changes)


def output_error(model, original) -> float:
    tokens = tokens_for(original, 4, 16, seed=9)
    want = hidden(original, tokens)
    return float((hidden(model, tokens) - want).square().mean() / want.square().mean())


CASES = {
    "w4a4kv4": small(),
    "weights only": small("w3a16", rank=3),
    "sites apart": small("w4a4,mlp_mid=w8a8,1.attn_in=w16a16"),
    "refined": small("w4a4", branch=BranchSpec(rank=4, rounds=5)),
    "plain rounding": small("w4a4", solver=SolverSpec()),
    "rank above all": small("w4a4", rank=999),
}


@pytest.mark.parametrize("shape", ["mha", "biased", "mqa"])
@pytest.mark.parametrize("name", CASES)
def test_a_loaded_model_is_the_saved_one(tmp_path: Path, name: str, shape: str) -> None:
    original, chosen = family("llama", dtype=torch.float32, **SHAPES[shape]), CASES[name]
    model, plan, _ = calibrated(original, chosen)
    save(model, plan, tmp_path / "a", recipe=to_dict(chosen), report={})
    loaded = load(tmp_path / "a")
    tokens = tokens_for(original, 2, 9)
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    for ours, block_plan in zip(model.model.layers, plan.blocks, strict=True):
        for site, paths in SITES.items():
            for path in paths:
                linear = submodule(ours, path)
                assert isinstance(linear, BranchedLinear) == (block_plan.sites[site].weights is not None)
                if isinstance(linear, BranchedLinear):
                    assert type(linear.inner) is FrozenLinear
                    assert linear.site is ours.flatquant[site]  # one L2 for all readers of a site
                    assert linear.site.down.shape == (block_plan.sites[site].rank, linear.inner.values.shape[1])
                    assert linear.up.dtype == linear.site.down.dtype == torch.float16
    found = inspect(tmp_path / "a")
    assert sum(found.bytes_by_kind.values()) == stored_bytes(model)
    branches = sum(t.nbytes for n, t in model.state_dict().items() if n.endswith((".up", ".down", ".key_offset")))
    assert found.bytes_by_kind["transforms"] == branches
    assert from_dict(Recipe, to_dict(chosen)) == chosen
    save(loaded, plan, tmp_path / "b", recipe=to_dict(chosen), report={})
    assert inspect(tmp_path / "b").content_hash == found.content_hash


@pytest.mark.parametrize("shape", ["mha", "gqa", "biased"])
def test_branch_and_unrounded_rest_leave_the_function(shape: str) -> None:
    """Law 1 with the branch: split a folded block in float64 and keep the rest as it is."""
    from flatquant.calibrate.solve import _branch_off
    from flatquant.wiring.arch import replace_submodule

    model = family("llama", **SHAPES[shape])
    tokens = tokens_for(model, 2, 9)
    want = hidden(model, tokens)
    chosen = dataclasses.replace(
        bare(BASES["svd orthogonal"], Scheme.parse("w4", clip="none")), branch=BranchSpec(rank=3)
    )
    plan, fits = wrap(model, chosen)
    for fit, block_plan in zip(fits, plan.blocks, strict=True):
        fold_block(fit, dtype=torch.float64)
        for site in block_plan.sites.values():
            for path, up in _branch_off(fit.block, site, 1, None).items():
                replace_submodule(fit.block, path, BranchedLinear(submodule(fit.block, path), up))
    assert relative(hidden(model, tokens), want) < 1e-9


@pytest.mark.parametrize("scheme", ["w4a4", "w3a16"])
def test_the_branch_is_what_helps(scheme: str) -> None:
    errors = {}
    for seed in range(3):
        original = family("llama", dtype=torch.float32, hidden=64, heads=4, kv_heads=2, intermediate=96, seed=seed)
        chosen = small(scheme, rank=16)
        for name, changed in {
            "branch": chosen,
            "smoothing": dataclasses.replace(chosen, branch=None),
            "neither": dataclasses.replace(chosen, branch=None, transforms={}),
        }.items():
            errors.setdefault(name, []).append(output_error(calibrated(original, changed)[0], original))
    assert all(a < b for a, b in zip(errors["branch"], errors["smoothing"], strict=True)), errors
    assert sum(errors["branch"]) < sum(errors["neither"])


def test_without_a_branch_it_is_smoothing_and_the_solver() -> None:
    original = family("llama", dtype=torch.float32)
    ours, plan, _ = calibrated(original, dataclasses.replace(small(), branch=None))
    assert not any(isinstance(m, BranchedLinear) for m in ours.modules())
    assert all(site.rank == 0 for block in plan.blocks for site in block.sites.values())


def test_the_branch_reads_what_is_not_on_the_grid() -> None:
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
    model, _, _ = calibrated(family("llama", dtype=torch.float32), small("w4a4"))
    site = model.model.layers[0].flatquant["attn_in"]
    assert isinstance(site, FrozenSite)
    assert site.down is not None
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(site.branch(x), x @ site.down.float().mT)
    assert relative(site(x).dequantize() @ site.down.float().mT, site.branch(x)) > 1e-3
    linear = submodule(model.model.layers[0], "self_attn.q_proj")
    assert isinstance(linear, BranchedLinear)
    torch.testing.assert_close(linear(x), linear.inner(x) + site.branch(x) @ linear.up.float().mT)


@pytest.mark.parametrize(
    "chosen",
    [
        quick("w4a4kv4", branch=BranchSpec(rank=4)),
        quick("w3a8", branch=BranchSpec(rank=4), solver=SolverSpec(kind="gptq", hessian="output_adaptive")),
        dataclasses.replace(
            bare(BASES["svd hadamard"], Scheme.parse("w2a8", clip="none")),
            solver=SolverSpec(kind="codebook", codebook=CodebookSpec()),
            branch=BranchSpec(rank=4),
            data=DATA,
        ),
    ],
    ids=["learned transforms", "output-adaptive", "codebooks"],
)
def test_it_combines(tmp_path: Path, chosen: Recipe) -> None:
    original = family("llama", dtype=torch.float32, **SHAPES["biased"])
    model, plan, _ = calibrated(original, chosen)
    without, _, _ = calibrated(original, dataclasses.replace(chosen, branch=None))
    if chosen.solver.codebook is None:  # at 2 bits a tiny model's outputs are noise
        assert output_error(model, original) < output_error(without, original)
    save(model, plan, tmp_path / "a", recipe=to_dict(chosen), report={})
    tokens = tokens_for(original, 2, 9)
    loaded = load(tmp_path / "a")
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    linear = submodule(model.model.layers[0], "mlp.up_proj")
    assert isinstance(linear, BranchedLinear)
    assert type(linear.inner) is (CodebookLinear if chosen.solver.codebook else FrozenLinear)
    assert inspect(tmp_path / "a").quantised_parameters > 0


def test_a_killed_run_ends_with_the_same_bytes(tmp_path: Path) -> None:
    model = family("llama", dtype=torch.bfloat16)
    whole, _, _ = calibrated(model, small())

    def kill(stage: str, done: int, total: int) -> None:
        if stage == "solve":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrated(model, small(), state=RunState(tmp_path, {"run": 1}, resume=False), progress=kill)
    resumed, _, _ = calibrated(model, small(), state=RunState(tmp_path, {"run": 1}, resume=True))
    assert same_bytes(resumed, whole)


def test_its_operations_are_counted() -> None:
    original = family("llama", dtype=torch.float32)
    geometry = Geometry.of(original.config)
    model, plan, _ = calibrated(original, small(rank=4))
    sizes = {"attn_in": (24, 48), "attn_out": (24, 24), "mlp_in": (24, 80), "mlp_mid": (40, 24)}
    want = 2 * sum(2 * 4 * (n + o) for n, o in sizes.values())
    assert online_flops(plan, geometry, original.model.layers) == want
    assert online_flops(plan, geometry, model.model.layers) == want


def test_wrong_combinations_are_errors() -> None:
    with pytest.raises(SpecError, match="rank 0: at least 1"):
        svdquant("w4a4", rank=0)
    with pytest.raises(SpecError, match="refined by rounding to a grid"):
        Recipe(
            name="r",
            scheme=Scheme.parse("w2", clip="none"),
            solver=SolverSpec(kind="codebook", codebook=CodebookSpec()),
            branch=BranchSpec(rounds=2),
        )
    with pytest.raises(SpecError, match="unknown preset"):
        recipe("svdquant", "w4a4", "slow")
