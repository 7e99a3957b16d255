"""A cache of packed 4-bit keys and values: written in one kernel, read by attention without being unpacked."""

from jaxtyping import Float, Integer
from torch import Tensor

from flatquant.ops import HAS_TRITON
from flatquant.ops.kv_cache import reference
from flatquant.ops.kv_cache.reference import STEPS, Appended, Heads, Shortage, Store, offset_matrix, shortage

__all__ = ["STEPS", "Appended", "Heads", "Shortage", "Store", "append", "attend", "offset_matrix", "shortage"]


def append(
    qkv: Float[Tensor, "batch tokens n"],
    cos: Float[Tensor, "_ tokens head_dim"],
    sin: Float[Tensor, "_ tokens head_dim"],
    heads: Heads,
    keys: Store,
    values: Store,
    at: Integer[Tensor, "1"],
    *,
    dense: bool = True,
) -> Appended:
    """`reference.append`, or its kernel, of which keys and values need `dense`, and what is short its absence."""
    if qkv.is_cuda and HAS_TRITON:
        from flatquant.ops.kv_cache import triton

        return triton.append(qkv, cos, sin, heads, keys, values, at, dense=dense)
    return reference.append(qkv, cos, sin, heads, keys, values, at)


def attend(
    q: Float[Tensor, "batch queries head_dim"],
    keys: Store,
    values: Store,
    last: Integer[Tensor, "1"],
    start: Integer[Tensor, " batch"],
    window: int | None,
    scaling: float,
    parts: int,
    short: Shortage | None = None,
) -> tuple[Float[Tensor, "batch queries parts head_dim"], Float[Tensor, "batch queries parts"]]:
    """`reference.attend`, or its kernel, which cuts the tokens that count into at most `parts` parts."""
    if q.is_cuda and HAS_TRITON:
        from flatquant.ops.kv_cache import triton

        return triton.attend(q, keys, values, last, start, window, scaling, short, parts=parts)
    return reference.attend(q, keys, values, last, start, window, scaling, short)
