"""The fit-able stage of keys, values and queries."""

from __future__ import annotations

from torch import Tensor

from flatquant.quantizers import Dynamic, LiveBlocks
from flatquant.rotary import Angles, constant_at
from flatquant.seams import KeyValue, position_angles
from flatquant.spec import Pairing
from flatquant.transforms import Factor, HeadDiagonal, Transform


class FitKeyValue(KeyValue):
    """k -> Q((k - o) P_h) + o P_h, q -> q P_h^-T, v -> Q(v): scores are unchanged, q P_h^-T (k P_h)^T = q k^T.

    o = R_j m is a constant m per channel, turned by the rotary embedding of the key's position j; 0 without `offset`.

    Attributes:
        offset: m of the original keys, (heads, head_dim).
        scale: a learned scale of keys before RoPE, which m then has too.
        latent: of latent attention, the transform T of the site that reads latent vectors: v -> Q(v T).
    """

    offset: Tensor | None

    def __init__(
        self,
        factor: Factor | None,
        keys: Dynamic | LiveBlocks | None,
        values: Dynamic | LiveBlocks | None,
        offset: Tensor | None = None,
        pairing: Pairing = "halves",
        scale: HeadDiagonal | None = None,
        latent: Transform | None = None,
        rotary: int | None = None,
    ) -> None:
        super().__init__()
        self.factor = factor
        self.keys = keys
        self.values = values
        self.register_buffer("offset", offset)
        self.pairing: Pairing = pairing
        self.scale = scale
        self.latent = latent
        self.rotary = rotary

    def constant(self) -> Tensor | None:
        """m as keys are written now.  # (heads, head_dim)"""
        if self.offset is None or self.scale is None:
            return self.offset
        return self.offset * self.scale.scale.view_as(self.offset)

    def query(self, q: Tensor) -> Tensor:
        return q if self.factor is None else q @ self.factor.inverse_t().to(q.dtype)

    def key(self, k: Tensor, angles: Angles | None = None) -> Tensor:
        m = self.constant()
        if m is None:
            return self._on_grid(self._transformed(k))
        o = constant_at(m, position_angles(angles, self.pairing), self.pairing)
        return (self._on_grid(self._transformed(k - o)) + self._transformed(o)).to(k.dtype)

    def _transformed(self, k: Tensor) -> Tensor:
        return k if self.factor is None else k @ self.factor.matrix().to(k.dtype)

    def _on_grid(self, k: Tensor) -> Tensor:
        return k if self.keys is None else self.keys(k)

    def value(self, v: Tensor) -> Tensor:
        x = v if self.latent is None else self.latent(v)
        return (x if self.values is None else self.values(x)).to(v.dtype)
