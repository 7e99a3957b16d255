"""The rotation of the residual stream: what happens outside the blocks, at the two ends of the stream.

Embedding rows take R, E <- E R; the head takes over the final norm's gain and undoes R, W <- W diag(g) R; the final
norm's gain is then 1, so that it commutes with R (QuaRot, section 3, stage 1a; SpinQuant, section 3.1). Blocks take
their share in `wrap_block`. A head that shared the embedding's matrix gets its own.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flatquant.spec import Plan, Recipe
from flatquant.transforms import Factor, make_factor
from flatquant.wiring.arch import Arch, submodule
from flatquant.wiring.plan import rotates_residual

ROWS = 8192  # of an embedding, in float64 at a time


def residual_factor(
    model: PreTrainedModel, recipe: Recipe, plan: Plan, generator: torch.Generator, *, force: bool = False
) -> Factor | None:
    """The rotation that all blocks share, if the recipe has one that takes effect.  # (h, h)"""
    if not rotates_residual(recipe, plan, force):
        return None
    return make_factor(recipe.transforms["residual"][0], model.config.get_text_config().hidden_size, generator)


@torch.no_grad()
def rotate_ends(model: PreTrainedModel, arch: Arch, residual: Factor) -> None:
    """Rotate a model's embedding and head, in float64; its blocks are rotated already."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    norm = submodule(model, arch.final_norm)
    assert isinstance(embedding, nn.Embedding)
    assert isinstance(head, nn.Linear)
    gain = norm.weight
    assert isinstance(gain, Tensor)
    wide: Factor = copy.deepcopy(residual).to(embedding.weight.device, torch.float64)
    r = wide.matrix()  # (h, h)
    written, read = _times(embedding.weight, r), _times(head.weight, (gain.to(r) + arch.norm_offset)[:, None] * r)
    embedding.weight = nn.Parameter(written, requires_grad=False)
    head.weight = nn.Parameter(read, requires_grad=False)
    gain.fill_(1 - arch.norm_offset)
    model.config.tie_word_embeddings = False


def _times(weight: Tensor, matrix: Tensor) -> Tensor:
    """weight @ matrix in the matrix's dtype, as weight's.  # (V, h)"""
    return torch.cat([(rows.to(matrix) @ matrix).to(weight) for rows in weight.split(ROWS)])
