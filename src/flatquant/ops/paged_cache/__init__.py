"""A cache of packed 4-bit keys and values in pages that requests share."""

from flatquant.ops.paged_cache.reference import Batch, attend, place_bytes, stores_of, write

__all__ = ["Batch", "attend", "place_bytes", "stores_of", "write"]
