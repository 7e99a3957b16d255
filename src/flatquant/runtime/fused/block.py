"""A decoder block as kernels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from flatquant.ops import int4_linear, kron_quantize, kv_cache
from flatquant.ops.kron_quantize import Site
from flatquant.ops.kron_quantize.reference import rms_norm
from flatquant.runtime.kernels import Product
from flatquant.runtime.packedcache import PackedCache, PackedLayer

Masks = Mapping[int | None, Tensor]  # by window

_PROGRAMS = 528  # that an H100 runs at once: four a multiprocessor


@dataclass(frozen=True)
class Norm:
    """An RMS norm."""

    gain: Tensor  # (n,)
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        """(.., n), in x's dtype"""
        if self.gain.dtype != x.dtype:
            return rms_norm(x, self.gain, self.eps).to(x.dtype)
        return F.rms_norm(x, (x.shape[-1],), self.gain, self.eps)


@dataclass(frozen=True)
class Block:
    """A decoder block."""

    norms: tuple[Norm, Norm]  # before attention, before the MLP
    sites: dict[str, Site]
    products: dict[str, Product]
    heads: kv_cache.Heads
    scaling: float
    window: int | None
    after: tuple[Norm, ...] = ()  # behind attention, behind the MLP
    activation: kron_quantize.Activation = "silu"
    turn: str | None = None  # the kind of rotary embedding, where there are several

    def _added(self, name: str, y: tuple[Tensor, Tensor], rows: Tensor, scratch: Tensor | None) -> Tensor:
        """The residual stream with what a site's product gives, after its norm if there is one.  # (B T, n)"""
        if not self.after:
            return self.products[name](*y, rows, rows.dtype, scratch)
        return rows + self.after[name == "mlp_mid"](self.products[name](*y, None, rows.dtype, scratch))

    def __call__(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        steps: Tensor,
        cache: PackedCache,
        layer: PackedLayer,
        masks: Masks,
        scratch: Tensor | None,
    ) -> Tensor:
        """The block's output, with keys and values stored.

        Args:
            x: hidden states, (B, T, n).
            cos, sin: (B or 1, T, head_dim).
            steps: see `kv_cache.Shortage`.
            masks: see `Fused.masks`.
            scratch: see `int4_linear.scratch`.
        """
        mask, room = masks.get(self.window), cache.room
        b, t, _ = x.shape
        form = int4_linear.form(x.device, x.dtype)
        rows = x.flatten(0, 1)
        y = kron_quantize.norm(rows, self.norms[0].gain, self.norms[0].eps, self.sites["attn_in"], form)
        qkv = self.products["attn_in"](*y, None, x.dtype, scratch).view(b, t, -1)
        keys, values = layer.stores
        q, k, v, amounts = kv_cache.append(qkv, cos, sin, self.heads, keys, values, room.used, dense=t > 1)
        site = self.sites["attn_out"]
        if t == 1:
            parts = max(1, _PROGRAMS // (b * self.heads.keys))
            short = None
            if amounts is not None:
                assert layer.angles is not None
                short = kv_cache.Shortage(amounts[:, :, 0], layer.angles, steps, room.gaps)
            z = kv_cache.attend(
                q[:, :, 0], keys, values, room.used, room.start, self.window, self.scaling, parts, short
            )
            y = kron_quantize.merge(*z, site, form)
        else:
            if room.length:  # a prompt that goes on: what came before counts too
                k, v = keys.read(room.length + t), values.read(room.length + t).to(x.dtype)
            if self.heads.offset is not None:
                assert layer.angles is not None
                k = k + self.heads.given_back(layer.angles[:, : room.length + t])
            k = k.to(x.dtype)
            if mask is not None:  # of the fast kernels, none takes both a mask and fewer heads of keys than of queries
                k, v = (s.repeat_interleave(q.shape[1] // s.shape[1], dim=1) for s in (k, v))
            z = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.scaling, enable_gqa=q.shape[1] != k.shape[1]
            )
            y = kron_quantize.plain(z.transpose(1, 2).reshape(b * t, -1), site, form)
        rows = self._added("attn_out", y, rows, scratch)
        y = kron_quantize.norm(rows, self.norms[1].gain, self.norms[1].eps, self.sites["mlp_in"], form)
        gate, up = self.products["mlp_in"](*y, None, x.dtype, scratch).chunk(2, dim=-1)
        y = kron_quantize.gate(up, gate, self.sites["mlp_mid"], form, self.activation)
        return self._added("mlp_mid", y, rows, scratch).view_as(x)
