"""A cache of packed 4-bit keys and values in pages that requests share."""

from jaxtyping import Float
from torch import Tensor

from flatquant.ops import HAS_TRITON
from flatquant.ops.kv_cache import Store
from flatquant.ops.paged_cache import reference
from flatquant.ops.paged_cache.reference import Batch, Short, attend, place_bytes, stores_of, write

__all__ = ["Batch", "Short", "attend", "decode", "place_bytes", "stores_of", "write"]


def decode(
    q: Float[Tensor, "tokens queries head_dim"],
    keys: Store,
    values: Store,
    batch: Batch,
    window: int | None,
    scaling: float,
    short: Short | None = None,
) -> Float[Tensor, "tokens queries head_dim"]:
    """`reference.decode`, or its kernel, which takes heads of multiples of four channels."""
    if q.is_cuda and HAS_TRITON and q.shape[-1] % 4 == 0:
        from flatquant.ops.paged_cache import triton

        return triton.decode(q, keys, values, batch, window, scaling, short)
    return reference.decode(q, keys, values, batch, window, scaling, short)
