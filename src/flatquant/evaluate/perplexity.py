"""Perplexity of a text: the exponential of the mean negative log-likelihood of its tokens.

Windows count equally, and the first token of each is not predicted, as in every published figure. The logits of one
batch exist in the model's dtype; their float32 log-softmax only for a few positions at a time, because for a
vocabulary of 128k it would be the largest tensor of the program. Running the LM head itself in pieces would save
more, but some families scale or cap the logits after it, so the model's own forward is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from flatquant.errors import DataError, FlatQuantError
from flatquant.models import check_ids, warn_of_positions
from flatquant.runtime.embedding import embedding_device

Progress = Callable[[int, int], None]

CHUNK = 256  # positions whose float32 logits exist at once, per row of the batch


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """`value` is exp(mean(nll)); `nll` holds each window's mean over its last seqlen - 1 tokens, in nats."""

    value: float
    windows: int
    seqlen: int
    nll: tuple[float, ...]

    @classmethod
    def of(cls, nll: Sequence[float], seqlen: int) -> Perplexity:
        """From each window's mean, one or more."""
        mean = math.fsum(nll) / len(nll)
        # exp overflows a float above 709 nats a token
        value = math.exp(mean) if mean < 709 else math.inf
        return cls(value=value, windows=len(nll), seqlen=seqlen, nll=tuple(nll))


@torch.no_grad()
def perplexity(
    model: PreTrainedModel, windows: torch.Tensor, *, batch_size: int = 1, progress: Progress | None = None
) -> Perplexity:
    """Perplexity of a model in eval mode.

    Args:
        model: any causal LM; no KV cache is used.
        windows: (N, T) int64 token ids, T at least 2.
        batch_size: windows at a time.
        progress: called with (windows done, windows).

    Raises:
        DataError: `windows` is not such a tensor.
        FlatQuantError: a window's likelihood is not finite.
    """
    nll: list[float] = []
    for ids in batches(model, windows, batch_size):  # (B, T)
        logits = forward(model, ids)  # (B, T, V)
        total = torch.zeros(len(ids), dtype=torch.float64)  # (B,)
        for start in range(0, ids.shape[1] - 1, CHUNK):
            stop = min(start + CHUNK, ids.shape[1] - 1)
            target = ids[:, start + 1 : stop + 1].to(logits.device)  # (B, C)
            loss = cross_entropy(logits[:, start:stop].float().flatten(0, 1), target.flatten(), reduction="none")
            total += loss.view(target.shape).double().sum(dim=1).cpu()
        for value in (total / (ids.shape[1] - 1)).tolist():
            if not math.isfinite(value):
                raise FlatQuantError(
                    f"the model's likelihood of window {len(nll)} is {value}; its weights or activations overflow, "
                    "try another dtype"
                )
            nll.append(value)
        if progress is not None:
            progress(len(nll), len(windows))
    return Perplexity.of(nll, windows.shape[1])


def batches(model: PreTrainedModel, windows: torch.Tensor, batch_size: int) -> Iterator[torch.Tensor]:
    """(B, T) pieces of checked (N, T) windows, on the device of the model's embedding."""
    if windows.ndim != 2 or windows.dtype != torch.int64 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise DataError(
            f"windows must be (N, T) int64 with N >= 1 and T >= 2, not {tuple(windows.shape)} {windows.dtype}"
        )
    if batch_size < 1:
        raise DataError(f"batch_size must be at least 1, not {batch_size}")
    check_ids(windows, model, "windows")
    device = embedding_device(model)
    warn_of_positions(model, windows.shape[1], "windows")
    for piece in windows.split(batch_size):
        yield piece.to(device)


def forward(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """(B, T) token ids to (B, T, V) logits in the model's dtype."""
    return model(input_ids=ids, use_cache=False).logits
