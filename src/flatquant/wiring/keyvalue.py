"""The fit-able stage of keys, values and queries."""

from __future__ import annotations

from torch import Tensor

from flatquant.quantizers import Dynamic
from flatquant.seams import KeyValue
from flatquant.transforms import Factor


class FitKeyValue(KeyValue):
    """k -> Q(k P_h), q -> q P_h^-T, v -> Q(v): scores are unchanged, q P_h^-T (k P_h)^T = q k^T."""

    def __init__(self, factor: Factor | None, keys: Dynamic | None, values: Dynamic | None) -> None:
        super().__init__()
        self.factor = factor
        self.keys = keys
        self.values = values

    def query(self, q: Tensor) -> Tensor:
        return q if self.factor is None else q @ self.factor.inverse_t().to(q.dtype)

    def key(self, k: Tensor) -> Tensor:
        if self.factor is not None:
            k = k @ self.factor.matrix().to(k.dtype)
        return k if self.keys is None else self.keys(k)

    def value(self, v: Tensor) -> Tensor:
        return v if self.values is None else self.values(v)
