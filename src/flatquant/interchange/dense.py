"""Plain checkpoints, out."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flatquant import seams
from flatquant.errors import ModelError
from flatquant.models import auto_class, keep_dtypes, quiet
from flatquant.ops.kron.reference import kron_matmul
from flatquant.runtime.artifact import check_output
from flatquant.runtime.branch import BranchedLinear
from flatquant.runtime.embedding import RoundedEmbedding
from flatquant.runtime.experts import stacked_again
from flatquant.runtime.linear import FrozenSite, SiteLinear
from flatquant.spec import Plan
from flatquant.wiring.arch import submodule


@torch.no_grad()
def export_dense(
    model: PreTrainedModel,
    plan: Plan,
    output: Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    weights_only: bool = False,
) -> None:
    """Write an ordinary checkpoint: rounded weights as numbers, transforms folded back.

    Args:
        weights_only: leave out the grids of activations, keys and values, which such a checkpoint cannot hold.

    Raises:
        ModelError: there are such grids, and `weights_only` was not asked for.
        ArtifactError: something is in the way of `output`.
    """
    check_output(output)
    grids = [s.activations for b in plan.blocks for s in b.sites.values()]
    grids += [grid for b in plan.blocks for grid in (b.keys, b.values)]
    grids += [plan.head.site.activations] if plan.head else []
    if any(grids) and not weights_only:
        raise ModelError(
            "an ordinary checkpoint cannot round activations, keys and values; with --weights-only it is written "
            "without their grids, and is then a better model than the quantised one"
        )
    if any(site.shift != "none" for block in plan.blocks for site in block.sites.values()):
        raise ModelError("an ordinary checkpoint has no place for a shift of channels")
    config = plain_config(model)
    plain = auto_class(config.model_type).from_config(config, dtype=model.dtype)
    state = dict(model.state_dict())
    blocks = submodule(model, plan.blocks_path)
    for index, block_plan in enumerate(plan.blocks):
        prefix = f"{plan.blocks_path}.{index}."
        block = submodule(blocks, str(index))
        for name, site in block_plan.sites.items():
            frozen = submodule(block, f"flatquant.{name}")
            assert isinstance(frozen, FrozenSite)
            for path in site.readers:
                linear = submodule(block, path)
                assert isinstance(linear, SiteLinear | BranchedLinear)
                weight = linear.plain()
                runs: Any = frozen
                if block_plan.latent is not None and block_plan.attended and block_plan.latent.site == name:
                    runs = seams.attached(submodule(block, plan.attention))  # its factors run before the cache
                left, right = (None if f is None else f.mT for f in (runs.left, runs.right))
                if left is not None or right is not None:
                    weight = kron_matmul(weight, left, right)  # W P^T, with (P1 (x) P2)^T = P1^T (x) P2^T
                state[f"{prefix}{path}.weight"] = weight.to(model.dtype)
                if linear.bias is not None:
                    state[f"{prefix}{path}.bias"] = linear.bias.to(model.dtype)
    if plan.head is not None:
        rounded = submodule(model, plan.head.path)
        assert isinstance(rounded, SiteLinear)
        state[f"{plan.head.path}.weight"] = rounded.plain().to(model.dtype)
    if plan.embedding is not None:
        embedding = submodule(model, plan.embedding.path)
        assert isinstance(embedding, RoundedEmbedding)
        state[f"{plan.embedding.path}.weight"] = embedding.weight.to(model.dtype)
    keep_dtypes(plain)
    wanted = plain.state_dict()
    owners = {n: submodule(plain, n.rpartition(".")[0]) for n in wanted}
    plain.load_state_dict({n: state[n] if n in state else stacked_again(state, n, owners[n]) for n in wanted})
    plain.generation_config = copy.deepcopy(model.generation_config)
    with quiet():
        plain.save_pretrained(output)
    if tokenizer is not None:
        tokenizer.save_pretrained(output)


def plain_config(model: PreTrainedModel) -> Any:
    config: Any = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config._attn_implementation = None
    return config
