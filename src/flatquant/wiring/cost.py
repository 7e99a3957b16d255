"""What a plan costs while serving: arithmetic that the original model does not do, for one token."""

from __future__ import annotations

from torch import nn

from flatquant.runtime.branch import BranchedLinear
from flatquant.spec import Plan, is_experts
from flatquant.wiring.arch import Geometry, linear_at, submodule


def online_flops(plan: Plan, geometry: Geometry, blocks: nn.ModuleList) -> int:
    """Floating-point operations for one token that the original does not do, two for a multiplication and its addition.

    A site of n1 x n2 channels takes 2 n (n1 + n2) for P1^T X P2, and 2 r (n + o) for a branch; every head of queries
    and keys 2 head_dim^2. Rounding to grids, which is one pass over what is there anyway, is not counted.

    Args:
        blocks: the model's, original or quantised.
    """
    total = 0
    for block, module in zip(plan.blocks, blocks, strict=True):
        for name, site in block.sites.items():
            n1, n2 = site.shape
            # A token's row is one for all experts on their way in, and one for each that it passes inside.
            chosen = min(geometry.experts, site.experts)
            rows = chosen if chosen and name == "mlp_mid" else 1
            total += rows * 2 * n1 * n2 * (n1 * site.left + n2 * site.right)
            if site.rank:
                sizes = [(sum(_outputs(module, path) for path in group), is_experts(group)) for group in site.groups]
                outputs = sum(o * chosen // site.experts if one_of_several else o for o, one_of_several in sizes)
                total += 2 * site.rank * (rows * n1 * n2 + outputs)
        if block.qk:
            total += 2 * block.key_dim**2 * (geometry.heads + (1 if block.latent else geometry.kv_heads))
        if block.latent is not None:
            n1, n2 = block.sites[block.latent.site].shape
            total += 2 * n1 * n2 * (n1 * block.latent.left + n2 * block.latent.right)
    return total


def _outputs(block: nn.Module, path: str) -> int:
    linear = submodule(block, path)
    return linear.up.shape[0] if isinstance(linear, BranchedLinear) else linear_at(block, path).out_features
