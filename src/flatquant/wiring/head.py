"""The output layer and the embedding on grids: planned beside the blocks, and rounded to the nearest.

Neither has a transform: their weights have more bits than those of blocks, and only logits come after the one, only the
first block after the other. The embedding is rounded before anything is calibrated, so that fits know its error; the
output layer once the blocks are done. A layer that shares the embedding's matrix shares its integers too, where both
have the same grid; else it gets a rounded copy, and the embedding stays as the scheme says.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flatquant.errors import ModelError, SpecError
from flatquant.quantizers import WeightGrid
from flatquant.runtime.build import install_embedding, install_head, multiplier_of
from flatquant.runtime.embedding import RoundedEmbedding
from flatquant.runtime.linear import FrozenLinear
from flatquant.spec import EMBEDDING, HEAD, EmbeddingPlan, HeadPlan, Plan, QuantSpec, Recipe, SitePlan
from flatquant.wiring.arch import submodule
from flatquant.wiring.plan import rotates_residual
from flatquant.wiring.residual import ROWS


def with_ends(plan: Plan, recipe: Recipe, model: PreTrainedModel) -> Plan:
    """A plan with the model's output layer and embedding, where the scheme has grids for them.

    Raises:
        ModelError: the model has no linear output layer, an embedding that does more than look rows up, or no parameter
            but its matrices.
        SpecError: a group size that does not divide; a rounded embedding in a residual stream that is rotated.
    """
    scheme = recipe.scheme
    output, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if scheme.head is not None:
        path = _path(model, output)
        if not isinstance(output, nn.Linear) or path is None:
            raise ModelError(f"{type(model).__name__} has no linear output layer; leave {HEAD}={scheme.head} out")
        _check_group(scheme.head.weights, output.in_features, f"inputs of {path}")
        site = SitePlan(
            readers=(path,),
            shape=(1, output.in_features),
            weights=scheme.head.weights,
            activations=scheme.head.activations,
        )
        plan = replace(plan, head=HeadPlan(site=site, tied=output.weight is embedding.weight))
    if scheme.embedding is not None:
        path = _path(model, embedding)
        if path is None or not isinstance(embedding, nn.Embedding) or multiplier_of(embedding) is None:
            raise ModelError(f"the embedding is a {type(embedding).__name__}, not a table; leave {EMBEDDING}= out")
        if rotates_residual(recipe, plan):
            raise SpecError(f"{recipe.name} rotates the residual stream with its embedding; leave {EMBEDDING}= out")
        if not any(p.ndim == 1 and not name.endswith("bias") for name, p in model.named_parameters()):
            raise ModelError(
                f"the norms of {type(model).__name__} have no weights, which would tell its dtype and device "
                f"without the embedding's; leave {EMBEDDING}= out"
            )
        _check_group(scheme.embedding, embedding.embedding_dim, f"numbers of a row of {path}")
        shared = plan.head is not None and plan.head.tied and plan.head.weights == scheme.embedding
        table = EmbeddingPlan(path=path, width=embedding.embedding_dim, weights=scheme.embedding, shared=shared)
        plan = replace(plan, embedding=table)
    return plan


def _path(model: PreTrainedModel, end: nn.Module | None) -> str | None:
    return next((name for name, module in model.named_modules() if module is end), None)


def _check_group(spec: QuantSpec, n: int, what: str) -> None:
    if spec.group_size and n % spec.group_size:
        raise SpecError(f"group size {spec.group_size} does not divide the {n} {what}")


@torch.no_grad()
def round_embedding(model: PreTrainedModel, plan: EmbeddingPlan, device: torch.device) -> None:
    """Put a `RoundedEmbedding` with rows of its own in the place of a model's embedding.

    Args:
        device: that rounds, some rows at a time; the embedding stays where it is.
    """
    embedding = submodule(model, plan.path)
    assert isinstance(embedding, nn.Embedding)
    state = _rounded(embedding.weight.detach(), plan.weights, device)
    install_embedding(model, replace(plan, shared=False), None, packed=False)
    rounded = submodule(model, plan.path)
    assert isinstance(rounded, RoundedEmbedding)
    assert rounded.table is not None
    rounded.table.load_state_dict(state, assign=True)
    model.config.tie_word_embeddings = False


@torch.no_grad()
def round_head(model: PreTrainedModel, plan: Plan, device: torch.device) -> None:
    """Put a `FrozenLinear` in the place of a model's output layer, which a shared embedding then looks rows up in.

    Args:
        device: that rounds, some rows at a time; the layer stays where it is.
    """
    head = plan.head
    assert head is not None
    output = submodule(model, head.path)
    assert isinstance(output, nn.Linear)
    if plan.embedding is not None and plan.embedding.shared:
        sharing = submodule(model, plan.embedding.path)
        assert isinstance(sharing, RoundedEmbedding)
        state = dict(sharing.integers.state_dict())
    else:
        sharing, state = None, _rounded(output.weight.detach(), head.weights, device)
    if output.bias is not None:
        state["bias"] = output.bias.detach()
    install_head(model, head, packed=False)
    rounded = submodule(model, head.path)
    assert isinstance(rounded, FrozenLinear)
    rounded.load_state_dict(state, assign=True)
    if sharing is not None:
        sharing.share(rounded)
    model.config.tie_word_embeddings = False


def _rounded(weight: Tensor, spec: QuantSpec, device: torch.device) -> dict[str, Tensor]:
    """The tensors of a `FrozenLinear`.  # of (o, n)"""
    grid, (o, n) = WeightGrid(spec), weight.shape
    state = {
        "values": weight.new_empty((o, n), dtype=torch.int8),
        "scale": weight.new_empty((o, n // (spec.group_size or n)), dtype=torch.float32),
    }
    for start in range(0, o, ROWS):
        rows = slice(start, start + ROWS)
        part = grid.nearest(weight[rows].to(device).float())
        state["values"][rows], state["scale"][rows] = part.values, part.scale
    return state
