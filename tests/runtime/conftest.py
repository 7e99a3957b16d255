"""Small quantised models, calibrated once per session and test module's wish."""

import copy
import dataclasses
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from flatquant.calibrate.pipeline import calibrate
from flatquant.recipes import flatquant
from flatquant.spec import DataSpec, FitSpec, Plan, Recipe, Scheme
from tests.tiny_models import tiny_llama


class Quantised(NamedTuple):
    """A quantised model in memory and how it came about."""

    model: torch.nn.Module
    plan: Plan
    recipe: Recipe
    tokens: Tensor  # (4, 16)


@cache
def _quantised(scheme: str, bias: bool, tied: bool, dtype: torch.dtype) -> Quantised:
    # Sizes that are no powers of two: rows of 3-bit integers end in the middle of a byte.
    model = tiny_llama(
        hidden=36, heads=4, kv_heads=2, head_dim=10, intermediate=42, bias=bias, mlp_bias=bias, tied=tied, dtype=dtype
    )
    model.requires_grad_(False)
    # `.to(bfloat16)` rounds the rotary frequencies too; `from_pretrained` and our `load` keep them in float32.
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    parsed = dataclasses.replace(Scheme.parse(scheme), key_offset="auto" if bias else "none")
    recipe = dataclasses.replace(
        flatquant(parsed), data=DataSpec(samples=4, seqlen=16), fit=FitSpec(epochs=1, batch_size=2)
    )
    tokens = torch.randint(0, 120, (4, 16), generator=torch.Generator().manual_seed(0))
    plan, _ = calibrate(model, recipe, tokens, device=torch.device("cpu"), dtype=torch.float32)
    return Quantised(model, plan, recipe, tokens)


@pytest.fixture(scope="session")
def quantised() -> Callable[..., Quantised]:
    """`quantised("w4a4kv4", bias=False, tied=True, dtype=float32)`: a model of its own for each call.

    With `bias`, its keys are cached less an offset.
    """

    def make(scheme: str, *, bias: bool = False, tied: bool = True, dtype: torch.dtype = torch.float32) -> Quantised:
        return copy.deepcopy(_quantised(scheme, bias, tied, dtype))

    return make
