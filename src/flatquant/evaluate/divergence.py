"""How far one model's predictions are from another's: KL divergence and agreement of the likeliest token.

Perplexity asks whether the text became less likely; this asks whether the *distribution* moved, so that gains on some
tokens cannot hide losses on others, and a few hundred tokens already separate two quantisers.

To compare several candidates with one original, `reference_logits` runs the original once. It keeps float16 of the
logits minus their maximum: softmax and argmax do not notice the shift, and rounding is then finest where the
probability is.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from flatquant.errors import DataError, FlatQuantError
from flatquant.evaluate.perplexity import CHUNK, Progress, batches, forward


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """`kl`: mean KL(reference || model) over tokens, in nats; `top1`: share of tokens with the same argmax."""

    kl: float
    top1: float
    tokens: int


@torch.no_grad()
def divergence(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    windows: torch.Tensor,
    *,
    batch_size: int = 1,
    progress: Progress | None = None,
) -> Divergence:
    """Divergence of a model from a reference, both in eval mode, at every position of (N, T) int64 windows.

    `progress` is called with (windows done, windows).

    Raises:
        DataError: `windows` is not such a tensor, or the vocabularies differ.
        FlatQuantError: the divergence in a window is not finite.
    """
    logits = (row for ids in batches(reference, windows, batch_size) for row in forward(reference, ids))
    return _divergence(model, logits, windows, batch_size, progress)


@torch.no_grad()
def reference_logits(
    model: PreTrainedModel, windows: torch.Tensor, *, batch_size: int = 1, progress: Progress | None = None
) -> list[torch.Tensor]:
    """The logits that `divergence_from_logits` compares with: N float16 tensors (T, V) on the CPU, 2 T V bytes each.

    Each row is shifted to a maximum of 0. Raises DataError if `windows` is not (N, T) int64.
    """
    kept: list[torch.Tensor] = []
    for ids in batches(model, windows, batch_size):
        for logits in forward(model, ids):  # (T, V)
            pieces = [_shifted(piece).half().cpu() for piece in logits.split(CHUNK)]
            kept.append(torch.cat(pieces))  # (T, V)
        if progress is not None:
            progress(len(kept), len(windows))
    return kept


@torch.no_grad()
def divergence_from_logits(
    model: PreTrainedModel,
    logits: Sequence[torch.Tensor],
    windows: torch.Tensor,
    *,
    batch_size: int = 1,
    progress: Progress | None = None,
) -> Divergence:
    """`divergence` with the reference's part done: `logits` are N tensors (T, V) from `reference_logits`.

    Raises:
        DataError: as `divergence`, or `logits` are not of these windows.
        FlatQuantError: the divergence in a window is not finite.
    """
    if len(logits) != len(windows):
        raise DataError(f"the reference has logits of {len(logits)} windows, and there are {len(windows)}")
    return _divergence(model, iter(logits), windows, batch_size, progress)


def _divergence(
    model: PreTrainedModel,
    reference: Iterator[torch.Tensor],
    windows: torch.Tensor,
    batch_size: int,
    progress: Progress | None,
) -> Divergence:
    kl, same, done = 0.0, 0, 0
    for ids in batches(model, windows, batch_size):  # (B, T)
        for logits in forward(model, ids):  # (T, V)
            expected = next(reference)  # (T, V)
            if expected.shape != logits.shape:
                raise DataError(
                    f"the reference's logits are {tuple(expected.shape)} and the model's {tuple(logits.shape)}; "
                    "compare models of one vocabulary on the same windows"
                )
            for q, p in zip(logits.split(CHUNK), expected.split(CHUNK), strict=True):  # (C, V)
                p, q = _shifted(p.to(q.device)), _shifted(q)
                log_p, log_q = p.log_softmax(dim=-1), q.log_softmax(dim=-1)  # (C, V) float32
                part = float((log_p.exp() * (log_p - log_q)).sum(dim=-1).double().sum())
                if part != part:
                    raise FlatQuantError(
                        f"the divergence in window {done} is not finite; weights or activations overflow, "
                        "try another dtype"
                    )
                kl += part
                same += int((p.argmax(dim=-1) == q.argmax(dim=-1)).sum())
            done += 1
        if progress is not None:
            progress(done, len(windows))
    tokens = windows.numel()
    return Divergence(kl=kl / tokens, top1=same / tokens, tokens=tokens)


def _shifted(logits: torch.Tensor) -> torch.Tensor:
    """float32 logits with a maximum of 0 in each row, kept within what float16 can hold."""
    logits = logits.float()
    return (logits - logits.amax(dim=-1, keepdim=True)).clamp(min=-6e4)
