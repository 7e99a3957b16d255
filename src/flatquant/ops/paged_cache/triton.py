"""Attention of one new token of every request over its pages: the kernel of `ops.kv_cache`, with a table of pages."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from flatquant.ops.kron_quantize.reference import merged
from flatquant.ops.kv_cache import triton as dense
from flatquant.ops.kv_cache.reference import Store
from flatquant.ops.paged_cache.reference import Batch, Short
from flatquant.ops.triton import early, on_device


@on_device
def decode(
    q: Tensor,
    keys: Store,
    values: Store,
    batch: Batch,
    window: int | None,
    scaling: float,
    short: Short | None = None,
    *,
    parts: int = 32,
    least: int = 128,
    block: int = 64,
    warps: int = 2,
    stages: int = 3,
) -> Tensor:
    """See `reference.decode`.

    Args:
        parts, least, block: see `kv_cache.triton.attend`.
    """
    r, hq, d = q.shape
    hk, places = keys.scale.shape[1:]
    room = batch.table.shape[1] * places
    most, parts = parts, max(1, min(parts, triton.cdiv(room, least)))
    out = torch.empty((r, hq, parts, d), dtype=torch.float32, device=q.device)
    lse = torch.empty((r, hq, parts), dtype=torch.float32, device=q.device)
    lacking = (None,) * 4 if short is None else (short.amounts, short.angles, q, None)  # of q, only the type is read
    words = (x._replace(packed=x.packed.view(torch.int16)) for x in (keys, values))
    dense._attend[(r * hk, parts)](
        q.contiguous(), *(part for store in words for part in store), *lacking, out, lse, batch.lengths - 1, None,
        batch.table.contiguous(), room if window is None else window, scaling, batch.table.shape[1], parts, most, least,
        **dense.sizes(hq // hk, hk, d), B=block, SHORT=short is not None, PAGE=places, RUN=keys.zero.stride(1),
        APART=keys.zero.stride(0), EARLY=early(q, r), EMULATE=not q.is_cuda, launch_pdl=early(q, r), num_warps=warps,
        num_stages=stages,
    )  # fmt: skip
    return merged(out, lse).to(q.dtype).unflatten(-1, (hq, d))
