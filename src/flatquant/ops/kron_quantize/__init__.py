"""A site's input to integers in one operator: norm, gate or merge, Kronecker transform, clip, scale, rounding.

`torch.ops.flatquant.kron_quantize` is the operator: on CUDA one kernel, where there is one for the shape; elsewhere the
reference. It has no gradient.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import cast

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from flatquant.ops import HAS_TRITON, operator
from flatquant.ops.kron_quantize import reference
from flatquant.ops.kron_quantize.reference import Activation, Form
from flatquant.ops.pack.reference import packed_width

__all__ = ["Activation", "Form", "Site", "gate", "merge", "norm", "plain"]


def _unsupported(shape: tuple[int, int], left: bool, right: bool, bits: int, device: torch.device) -> str | None:
    """Why there is no kernel for a site with these factors, or None if there is one."""
    if not HAS_TRITON:
        return "Triton is not installed"
    from flatquant.ops.kron_quantize import triton

    return triton.supports(shape, left, right, bits, triton.shared_memory(device))


def _fused(shape: tuple[int, int], left: bool, right: bool, bits: int, device: torch.device) -> bool:
    """Whether a kernel computes it."""
    return device.type == "cuda" and _unsupported(shape, left, right, bits, device) is None


@dataclass(frozen=True)
class Site:
    """What happens to every row: transform, clip, grid.

    Attributes:
        shape: (n1, n2), n1 the slow index.
        left, right: P1 (n1, n1) and P2 (n2, n2), float32, None for the identity.
        ratios: shares of a row's ends that the grid covers, float32, (2,).
        bits: of the symmetric grid.
        operands: P1 and P2 as the operator takes them on the device of `ratios`. They are found here and not in a call,
            since torch.compile cannot look into what a GPU has room for.
    """

    shape: tuple[int, int]
    left: Tensor | None
    right: Tensor | None
    ratios: Tensor
    bits: int
    operands: tuple[Tensor | None, Tensor | None] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        fused = _fused(self.shape, *self._given, self.bits, self.ratios.device)
        object.__setattr__(self, "operands", self.factors if fused else (self.left, self.right))

    @property
    def _given(self) -> tuple[bool, bool]:
        return self.left is not None, self.right is not None

    @cached_property
    def factors(self) -> tuple[Tensor | None, Tensor | None]:
        """P1 and P2 as the kernel takes them: in bfloat16; as they are where Triton is interpreted, which has none."""
        dtype = torch.bfloat16 if self.ratios.is_cuda else torch.float32
        left, right = (None if p is None else p.to(dtype).contiguous() for p in (self.left, self.right))
        return left, right

    def unsupported(self) -> str | None:
        """Why there is no kernel for it, or None if there is one."""
        return _unsupported(self.shape, *self._given, self.bits, self.ratios.device)

    def __call__(
        self, x: Tensor, other: Tensor | None, source: str, form: Form, eps: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """The operator; see the functions below."""
        return torch.ops.flatquant.kron_quantize(
            x, other, *self.operands, self.ratios, *self.shape, self.bits, source, form, eps
        )


def _run(
    x: Tensor,
    other: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
    ratios: Tensor,
    n1: int,
    n2: int,
    bits: int,
    source: str,
    form: str,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The operator.

    Args:
        x: (T, n1 n2) in 16 or 32 bits; of "merge", (T, heads, parts, head_dim).
        other: a gain (n1 n2,) of "norm", a gate (T, n1 n2) of "gate" and "gelu", log-sum-exps (T, heads, parts) of
            "merge".
        left, right: see `Site.operands`.
        source: "plain", "norm", "gate", "gelu" or "merge".
        form: see `reference.Form`.

    Returns:
        As `reference.kron_quantize`.
    """
    if (other is None) != (source == "plain"):
        raise ValueError(f"kron_quantize: {source!r} with{'out' if other is None else ''} a second tensor")
    shape, known = (n1, n2), cast(Form, form)
    if _fused(shape, left is not None, right is not None, bits, x.device):
        from flatquant.ops.kron_quantize import triton

        return triton.launch(x, other, source, shape, left, right, ratios, bits, known, eps)
    match source, other:
        case "plain", None:
            y = x
        case "norm", Tensor():
            y = reference.rms_norm(x, other, eps)
        case "gate", Tensor():
            y = reference.gated(x, other)
        case "gelu", Tensor():
            y = reference.gated(x, other, "gelu")
        case "merge", Tensor():
            y = reference.merged(x, other)
        case _:
            raise ValueError(f"kron_quantize: unknown source {source!r}")
    return reference.kron_quantize(y, left, right, ratios, bits, known)


def _fake(x: Tensor, other, left, right, ratios, n1: int, n2: int, bits: int, source: str, form: str, eps: float):
    n = n1 * n2
    size, dtype = {
        "planes": (n, torch.int8),
        "either": (n, torch.int8),
        "float8": (n, torch.float8_e4m3fn),
        "packed": (packed_width(n, bits), torch.uint8),
    }[form]
    scale = x.new_empty((x.shape[0], 1), dtype=torch.promote_types(x.dtype, torch.float32))
    return x.new_empty((x.shape[0], size), dtype=dtype), scale


operator("kron_quantize", _run, _fake)


def plain(
    x: Float[Tensor, "tokens n"], site: Site, form: Form
) -> tuple[Shaped[Tensor, "tokens width"], Float[Tensor, "tokens 1"]]:
    """Integers of x and their scales.  # (T, n) -> (T, n) in `form`, (T, 1)"""
    return site(x, None, "plain", form)


def norm(
    x: Float[Tensor, "tokens n"], gain: Float[Tensor, " n"], eps: float, site: Site, form: Form
) -> tuple[Shaped[Tensor, "tokens width"], Float[Tensor, "tokens 1"]]:
    """Integers of the RMS norm of x, with gain (n,).  # (T, n) -> (T, n) in `form`, (T, 1)"""
    return site(x, gain, "norm", form, eps)


def gate(
    x: Float[Tensor, "tokens n"], g: Float[Tensor, "tokens n"], site: Site, form: Form, activation: Activation = "silu"
) -> tuple[Shaped[Tensor, "tokens width"], Float[Tensor, "tokens 1"]]:
    """Integers of silu(g) x, or of another activation.  # (T, n), (T, n) -> (T, n) in `form`, (T, 1)"""
    return site(x, g, "gate" if activation == "silu" else "gelu", form)


def merge(
    parts: Float[Tensor, "tokens heads parts head_dim"],
    lse: Float[Tensor, "tokens heads parts"],
    site: Site,
    form: Form,
) -> tuple[Shaped[Tensor, "tokens width"], Float[Tensor, "tokens 1"]]:
    """Integers of attention that was computed in parts.

    Args:
        parts, lse: see `reference.merged`, (T, heads, parts, head_dim) and (T, heads, parts), float32.
    """
    return site(parts, lse, "merge", form)
