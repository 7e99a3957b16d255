"""A cache of packed 4-bit keys and values in pages that requests share."""

from flatquant.ops import dispatched
from flatquant.ops.paged_cache import reference
from flatquant.ops.paged_cache.reference import Batch, Short, attend, place_bytes, stores_of, write

__all__ = ["Batch", "Short", "attend", "decode", "place_bytes", "stores_of", "write"]

# Its kernel takes heads of multiples of four channels.
decode = dispatched(reference.decode, lambda q, *_: q.is_cuda and q.shape[-1] % 4 == 0)
