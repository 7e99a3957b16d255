"""How integers on a uniform grid lie in a file. What they stand for is `flatquant.qtensor.QTensor`'s."""

from __future__ import annotations

import torch

from flatquant.formats.base import Layout, Part
from flatquant.ops.pack.reference import packed_width
from flatquant.spec import QuantSpec


def layout(spec: QuantSpec, o: int, n: int) -> Layout:
    """The tensors that an (o, n) matrix is stored as."""
    grid = Part(torch.float32, (o, n // (spec.group_size or n)), "grids")
    packed = {"packed": Part(torch.uint8, (o, packed_width(n, spec.bits)), "packed"), "scale": grid}
    return packed if spec.symmetric else packed | {"zero": grid}
