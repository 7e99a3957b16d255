"""How fast the runtime is: kernels against the bytes they move, products and whole models against bfloat16.

Every row is checked first - the same inputs through the kernel and through its reference - and a row that fails its
check has no time and no ratio. On CUDA all sides run as replayed graphs, on inputs that rotate past the cache; times
are medians with the tenth and ninetieth percentile. Weights are random, of the true shapes; nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from flatquant.bench.checks import BLOCK_ERROR, block_error, kernels_error, random_store
from flatquant.bench.kernels import (
    PRODUCT_ERROR,
    SITE_ERROR,
    in_order,
    make_site,
    products,
    relative_error,
    site_error,
    sites,
)
from flatquant.bench.shapes import SHAPES, Shape, config_of, shape_of
from flatquant.bench.timing import Row, Times, copies, in_turn, measure, moves
from flatquant.bench.whole import TRANSFORMS, decoding, models, packed_model, prefill, runtime_of
from flatquant.calibrate.memory import release
from flatquant.errors import SpecError

SIZES = (4096, 5120, 8192, 11008, 14336, 18944, 28672)
TOKENS = (1, 16, 2048, 8192)

__all__ = [
    "BLOCK_ERROR",
    "PRODUCT_ERROR",
    "SHAPES",
    "SITE_ERROR",
    "SIZES",
    "TOKENS",
    "TRANSFORMS",
    "Row",
    "Shape",
    "Times",
    "block_error",
    "config_of",
    "copies",
    "decoding",
    "in_order",
    "in_turn",
    "kernels_error",
    "make_site",
    "measure",
    "models",
    "moves",
    "packed_model",
    "prefill",
    "products",
    "random_store",
    "relative_error",
    "release",
    "run",
    "runtime_of",
    "shape_of",
    "site_error",
    "sites",
]


def run(
    device: torch.device, what: Sequence[str], shapes: Sequence[str], *, tiny: bool = False
) -> tuple[list[Row], dict[str, dict[str, int]]]:
    """All measurements that were asked for.

    Args:
        what: of "sites", "products", "models".
        shapes: of models and of their products.
        tiny: sizes for a machine without a GPU: the way is the same, the figures mean nothing.

    Returns:
        Rows, and for every model the bytes of its weights and of its cache.

    Raises:
        SpecError: an unknown shape, or one for which the device has no memory.
    """
    rows: list[Row] = []
    memory: dict[str, dict[str, int]] = {}
    if "sites" in what:
        rows += sites(device, (64, 96) if tiny else SIZES, (1, 5) if tiny else TOKENS)
    for shape in shapes:
        config = config_of(shape)
        if "products" in what:
            n, i, kv = config.hidden_size, config.intermediate_size, config.num_key_value_heads * config.head_dim
            matrices = ((n + 2 * kv, n), (n, n), (2 * i, n), (n, i))
            rows += products(device, matrices, (1, 5) if tiny else (1, 4, 16, 64, 2048))
        if "models" in what:
            options: dict[str, Any] = {"prompt": 16, "batches": (1, 2)} if tiny else {}
            try:
                made, memory[shape] = models(shape, device, **options)
            except torch.OutOfMemoryError as error:
                raise SpecError(f"{shape} needs more memory than {device} has; name another with --shapes") from error
            rows += made
            release(device)
    return rows, memory
