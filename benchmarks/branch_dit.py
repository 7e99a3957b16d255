"""The low-rank branch in its own field: one block of a diffusion transformer at W4A4, from the same parts.

    python -m benchmarks.branch_dit

A random block of `diffusers` with adaptive norms, in which a few channels are made large, as trained ones have them.
Scales cannot go into adaptive norms: they run online here, as in the authors' code. The variants share grids (weights
in groups of 64, activations per token) and data; scales are the best of 20 exponents by each linear's own output error,
with the branch in place where there is one (arXiv 2411.05007, section 4.1 and the authors' configuration).
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import RESULTS, write_result
from flatquant.modules import share_inputs
from flatquant.quantizers import Dynamic, WeightGrid
from flatquant.runtime.branch import BranchedLinear
from flatquant.runtime.linear import FrozenLinear, FrozenSite
from flatquant.solvers import GPTQ, RTN, InputGram
from flatquant.solvers.lowrank import split
from flatquant.spec import QuantSpec
from flatquant.transforms.diagonal import absmax_scale
from flatquant.wiring.arch import linear_at, replace_submodule

DIM = 128
# Linears that read one tensor, in the order in which data meets them.
SITES = (("attn1.to_q", "attn1.to_k", "attn1.to_v"), ("attn1.to_out.0",), ("ff.net.0.proj",), ("ff.net.2",))
VARIANTS: dict[str, dict[str, Any]] = {
    "W4A4": {},
    "smoothing": {"alphas": True},
    "branch": {"rank": 16},
    "smoothing and branch": {"alphas": True, "rank": 16},
    "smoothing, branch, GPTQ": {"alphas": True, "rank": 16, "gptq": True},
}


def make_block(seed: int) -> nn.Module:
    """A block with adaptive norms whose scales have six large channels.

    Raises:
        SystemExit: diffusers is not there.
    """
    try:
        from diffusers.models.attention import BasicTransformerBlock
    except ImportError as error:
        raise SystemExit("this benchmark needs diffusers: pip install diffusers") from error
    torch.manual_seed(seed)
    block = BasicTransformerBlock(
        dim=DIM, num_attention_heads=4, attention_head_dim=32, activation_fn="gelu-approximate",
        num_embeds_ada_norm=10, attention_bias=True, norm_type="ada_norm_zero", norm_elementwise_affine=False,
    )  # fmt: skip
    with torch.no_grad():
        # Chunks of the modulation: shift, scale and gate of attention, then of the feed-forward part.
        bias = block.norm1.linear.bias.view(6, DIM)
        for chunk in (1, 4):
            bias[chunk, torch.randperm(DIM)[:6]] += 30 * torch.rand(6)
        bias[2] += 1
        bias[5] += 1
    return block.eval().requires_grad_(False)


def inputs(seed: int, samples: int) -> dict[str, Tensor]:
    """Latents, time steps and classes."""
    g = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(samples, 64, DIM, generator=g),
        "timestep": torch.randint(0, 1000, (samples,), generator=g),
        "class_labels": torch.randint(0, 10, (samples,), generator=g),
    }


def seen_by(block: nn.Module, path: str, batch: dict[str, Tensor]) -> Tensor:
    """What a linear receives.  # (tokens, n)"""
    seen: list[Tensor] = []
    handle = block.get_submodule(path).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    block(**batch)
    handle.remove()
    return seen[0].flatten(0, -2)


def quantised(block: nn.Module, batch: dict[str, Tensor], *, alphas: bool = False, rank: int = 0, gptq: bool = False):
    """A copy of the block with all linears of `SITES` on 4-bit grids; each site sees those before it quantised."""
    block = copy.deepcopy(block)
    for paths in SITES:
        linears = [linear_at(block, path) for path in paths]
        x, w = seen_by(block, paths[0], batch), torch.cat([linear.weight for linear in linears])
        scales = [torch.ones(x.shape[1])]
        if alphas:
            xmax, wmax = x.abs().amax(0), w.abs().amax(0)
            scales += [absmax_scale(xmax, wmax, i / 20) for i in range(1, 21)]
        made = [_site(x, w, scale, rank, gptq=False) for scale in scales]
        best = min(range(len(scales)), key=lambda i: _error(x, w, *made[i]))
        site, weight, up = _site(x, w, scales[best], rank, gptq) if gptq else made[best]
        rows = [linear.out_features for linear in linears]
        ups = [None] * len(rows) if up is None else up.split(rows)
        for path, linear, part, own in zip(paths, linears, weight.split(rows), ups, strict=True):
            served = FrozenLinear(site, part, linear.bias)
            replace_submodule(block, path, served if own is None else BranchedLinear(served, own))
    share_inputs(block)
    return block


def _site(x: Tensor, w: Tensor, scale: Tensor, rank: int, gptq: bool) -> tuple[FrozenSite, Any, Tensor | None]:
    """A site with x * scale on its grid, its readers' integers and their halves of the branch."""
    grid = WeightGrid(QuantSpec(bits=4, group_size=64))
    w, up, down = w / scale, None, None
    if rank:
        branch = split(w, rank)
        w, up, down = w - branch.weight(w), branch.up, branch.down
    site = FrozenSite(None, torch.diag(scale), Dynamic(QuantSpec(bits=4)), down)
    if not gptq:
        return site, RTN().solve(w, grid, None), up
    gram = InputGram(x.shape[1], "cpu")
    gram.add(site(x).dequantize())  # type: ignore[union-attr]
    return site, GPTQ(act_order=True).solve(w, grid, gram.hessian()), up


def _error(x: Tensor, w: Tensor, site: FrozenSite, weight: Any, up: Tensor | None) -> float:
    served = FrozenLinear(site, weight, None)
    y = served(x) if up is None else BranchedLinear(served, up)(x)
    return float((y - x @ w.mT).square().sum())


@torch.no_grad()
def measure(seed: int, samples: int = 8) -> dict[str, float]:
    """The squared error of the block's output, relative to what the block adds to its input, by variant."""
    block, batch, unseen = make_block(seed), inputs(seed, samples), inputs(seed + 1000, samples)
    want = block(**unseen)
    scale = (want - unseen["hidden_states"]).square().mean()
    found = {}
    for name, parts in VARIANTS.items():
        got = quantised(block, batch, **parts)(**unseen)
        found[name] = float((got - want).square().mean() / scale)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default=str(RESULTS))
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()
    samples = [{"seed": seed, **measure(seed)} for seed in range(args.seeds)]
    metrics = {name: sum(row[name] for row in samples) / len(samples) for name in VARIANTS}
    for name, value in metrics.items():
        print(f"{name:26} {value:.4f}")
    path = Path(args.out) / "branch-dit.json"
    write_result(path, "branch-dit", seeds=list(range(args.seeds)), metrics=metrics, samples=samples)


if __name__ == "__main__":
    main()
