"""Calibration windows that are more than token ids: texts with images, each with the inputs that a model is given.

A processor makes them, one sample at a time. All have as many tokens, and no padding: a block is fitted to every token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flatquant.errors import DataError

UNSCORED = -100  # in the place of a token that says nothing, an image's or a sound's, where predictions are scored


@dataclass(frozen=True)
class Samples:
    """Samples in a row; they are counted and cut as windows of token ids are."""

    inputs: tuple[Mapping[str, Any], ...]

    @classmethod
    def of(cls, given: Sequence[Mapping[str, Any]], what: str = "calibration") -> Samples:
        """Check what a processor has made of each sample.

        Raises:
            DataError: a sample without `input_ids` of (1, T), of another length than the first, or with padding.
        """
        if not given:
            raise DataError(f"{what} samples: the list is empty")
        length = None
        for i, sample in enumerate(given):
            ids = sample.get("input_ids") if isinstance(sample, Mapping) else None
            if not isinstance(ids, Tensor) or ids.dtype != torch.int64 or ids.ndim != 2 or ids.shape[0] != 1:
                raise DataError(
                    f"{what} sample {i} has no input_ids of (1, tokens), int64; call the processor once for each "
                    "sample, with return_tensors='pt'"
                )
            length = length or ids.shape[1]
            if ids.shape[1] != length:
                raise DataError(
                    f"{what} sample {i} has {ids.shape[1]} tokens, the first {length}; cut all to one length "
                    "(truncation=True, max_length=..)"
                )
            mask = sample.get("attention_mask")
            if isinstance(mask, Tensor) and mask.ndim == 2 and not bool(mask.all()):
                raise DataError(f"{what} sample {i} has padding, which would be fitted to; cut longer ones instead")
        return cls(tuple(given))

    @property
    def shape(self) -> tuple[int, int]:
        """Samples, and the tokens of each."""
        return len(self.inputs), self.inputs[0]["input_ids"].shape[1]

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, rows: slice) -> Samples:
        return Samples(self.inputs[rows])

    def ids(self, unscored: int | None = None) -> Tensor:
        """Token ids, with `UNSCORED` in the place of one of them.  # int64, (N, T)"""
        ids = torch.cat([sample["input_ids"] for sample in self.inputs])
        return ids if unscored is None else ids.masked_fill(ids == unscored, UNSCORED)

    def tensors(self) -> Iterator[Tensor]:
        """All there are, in an order that their names decide."""
        for sample in self.inputs:
            yield from (sample[name] for name in sorted(sample) if isinstance(sample[name], Tensor))


Windows = Tensor | Samples


def placeholder(config: Any) -> int | None:
    """The token in whose places a model of several parts puts an image or a sound; it may have no embedding."""
    return getattr(config, "image_token_id", getattr(config, "audio_token_id", None))


def inputs_of(windows: Windows) -> list[dict[str, Any]]:
    """What a model is called with, window by window."""
    if isinstance(windows, Samples):
        return [dict(sample) for sample in windows.inputs]
    return [{"input_ids": window} for window in windows.split(1)]


def cut(windows: Windows, count: int, tokens: int) -> Windows:
    """The first windows, and of token ids the first tokens: a text with an image is not cut."""
    return windows[:count] if isinstance(windows, Samples) else windows[:count, :tokens]


def scored(windows: Windows, config: Any) -> Tensor:
    """The ids that predictions are compared with.  # int64, (N, T)"""
    return windows.ids(placeholder(config)) if isinstance(windows, Samples) else windows
