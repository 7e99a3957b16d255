"""The low-rank branch on a diffusion transformer's block: without grids the same function, with them the best."""

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")

from benchmarks import branch_dit

from flatquant.qtensor import QTensor
from flatquant.runtime.branch import BranchedLinear
from flatquant.runtime.linear import DenseLinear, FrozenSite
from flatquant.solvers.lowrank import split
from flatquant.wiring.arch import linear_at, replace_submodule


@torch.no_grad()
def test_scales_and_branch_leave_the_function_without_grids() -> None:
    block = branch_dit.make_block(0).double()
    batch = {k: v.double() if v.is_floating_point() else v for k, v in branch_dit.inputs(0, 2).items()}
    want = block(**batch)
    for paths in branch_dit.SITES:
        linears: list[nn.Linear] = [linear_at(block, path) for path in paths]
        w = torch.cat([linear.weight for linear in linears])
        scale = torch.rand(w.shape[1], dtype=torch.float64) + 0.5
        branch = split(w / scale, 8)
        site = FrozenSite(None, torch.diag(scale), None, branch.down)
        rest = (w / scale - branch.weight(w)).split([linear.out_features for linear in linears])
        ups = branch.up.split([linear.out_features for linear in linears])
        for path, linear, part, up in zip(paths, linears, rest, ups, strict=True):
            replace_submodule(block, path, BranchedLinear(DenseLinear(site, part, linear.bias), up))
    # Time embeddings are float32 inside diffusers, on both sides alike.
    assert (block(**batch) - want).abs().max() < 1e-9 * want.abs().max()


def test_smoothing_and_branch_together_beat_either_and_neither() -> None:
    for seed in range(2):
        found = branch_dit.measure(seed, samples=4)
        both = found["smoothing and branch"]
        assert both < 0.5 * found["smoothing"] < 0.5 * found["W4A4"]
        assert both < 0.5 * found["branch"]
        assert found["smoothing, branch, GPTQ"] < both


@torch.no_grad()
def test_readers_of_one_tensor_share_one_site() -> None:
    block, batch = branch_dit.make_block(0), branch_dit.inputs(0, 2)
    ours = branch_dit.quantised(block, batch, rank=4)
    q, k, v = (ours.get_submodule(path) for path in branch_dit.SITES[0])
    assert isinstance(q, BranchedLinear)
    assert q.site is k.site is v.site
    x = branch_dit.seen_by(block, "attn1.to_q", batch)
    assert isinstance(q.site(x), QTensor)
    assert isinstance(block.get_submodule("attn1.to_q"), nn.Linear)  # the original is left alone
