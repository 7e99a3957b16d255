"""An embedding on a grid: a token's row is dequantised when it is looked up.

The table is one of our linears that nothing is multiplied by. Where the output layer has the same integers, the
embedding looks up rows of the output layer and holds no tensor itself.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flatquant.runtime.linear import IntegerLinear


class RoundedEmbedding(nn.Module):
    """Stands where an `nn.Embedding` was.

    Attributes:
        table: its integers, if they are not those of the output layer.
        dtype: of what is looked up.
        multiplier: that a family's own embedding applies to every row.
    """

    table: IntegerLinear | None

    def __init__(self, integers: IntegerLinear, *, own: bool, dtype: torch.dtype, multiplier: float = 1.0) -> None:
        """
        Args:
            own: no output layer has these integers.
        """
        super().__init__()
        self.dtype, self.multiplier = dtype, multiplier
        if own:
            self.table, self._head = integers, []
        else:
            self.share(integers)

    def share(self, head: IntegerLinear) -> None:
        """From now on, look up rows of the output layer, which has the same ones."""
        self.table, self._head = None, [head]  # a list hides a module: its tensors belong to the output layer

    @property
    def integers(self) -> IntegerLinear:
        """V rows of h integers."""
        return self._head[0] if self.table is None else self.table

    @property
    def num_embeddings(self) -> int:
        """V."""
        return self.integers.scale.shape[0]

    @property
    def device(self) -> torch.device:
        """Where rows are looked up."""
        return self.integers.scale.device

    @property
    def weight(self) -> Tensor:
        """All rows as numbers, made anew on each call.  # (V, h)"""
        return self.integers.qweight().dequantize(self.dtype)

    def forward(self, ids: Tensor) -> Tensor:
        """Rows of token ids.  # int64, (..) -> (.., h)"""
        # The output layer may lie on another device than the first block.
        rows = self.integers.lookup(ids.flatten().to(self.device)).dequantize(self.dtype)
        rows = rows.view(*ids.shape, -1).to(ids.device)
        return rows if self.multiplier == 1 else rows * torch.tensor(self.multiplier, dtype=self.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True):
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype  # a cast of the model
        return super()._apply(fn, recurse)


def cast_embedding(model: PreTrainedModel) -> None:
    """Have a rounded embedding give the dtype of the rest of its model, once that has been read."""
    embedding = model.get_input_embeddings()
    if isinstance(embedding, RoundedEmbedding):
        embedding.dtype = model.dtype


def embedding_device(model: PreTrainedModel) -> torch.device:
    """Where a model's embedding looks token ids up."""
    embedding = model.get_input_embeddings()
    return embedding.device if isinstance(embedding, RoundedEmbedding) else next(embedding.parameters()).device
