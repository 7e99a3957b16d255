"""What a site does to its input: (norm | gate | merge) -> Kronecker transform -> clip -> scale -> integers."""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor

from flatquant.ops.kron.reference import kron_matmul
from flatquant.ops.pack.reference import pack_bits
from flatquant.ops.quantize.reference import quantize, row_grid

# How integers leave: one a byte, even channels before odd ones, as nibbles lie in packed weights; one a byte as a
# float8 (e4m3, exact up to 16), in order; or packed fields of `bits` bits. "either" is planes of few rows and float8 of
# many, both as int8: the operators choose when they run, and a traced number of rows chooses nothing.
Form = Literal["planes", "float8", "packed", "either"]
FEW = 64  # rows of which "either" is planes


def of_rows(form: Form, rows: int) -> Form:
    """The form of so many rows: never "either"."""
    return form if form != "either" else "planes" if rows <= FEW else "float8"


def rms_norm(x: Float[Tensor, "*batch n"], gain: Float[Tensor, " n"], eps: float) -> Float[Tensor, "*batch n"]:
    """x / rms(x) * gain, in float32.  # (.., n)"""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * gain.float()


Activation = Literal["silu", "gelu"]


def gated(
    x: Float[Tensor, "*batch n"], gate: Float[Tensor, "*batch n"], activation: Activation = "silu"
) -> Float[Tensor, "*batch n"]:
    """silu(gate) x, or GELU in its approximation by tanh, in float32 (arXiv 2002.05202).  # (.., n)"""
    g = gate.float()
    return (F.silu(g) if activation == "silu" else F.gelu(g, approximate="tanh")) * x.float()


def merged(
    parts: Float[Tensor, "tokens heads parts head_dim"], lse: Float[Tensor, "tokens heads parts"]
) -> Float[Tensor, "tokens n"]:
    """Attention over all tokens from attention over parts of them (Flash-Decoding).

    Args:
        parts: attention over each part, (T, heads, parts, head_dim).
        lse: log-sum-exps of its scores, (T, heads, parts); minus infinity for an empty part.

    Returns:
        float32, (T, heads * head_dim).
    """
    weight = lse.float().softmax(-1)  # (T, heads, parts)
    return (parts.float() * weight[..., None]).sum(-2).flatten(-2)


def kron_quantize(
    x: Float[Tensor, "tokens n"],
    left: Float[Tensor, "n1 n1"] | None,
    right: Float[Tensor, "n2 n2"] | None,
    ratios: Float[Tensor, "2"],
    bits: int,
    form: Form,
) -> tuple[Shaped[Tensor, "tokens width"], Float[Tensor, "tokens 1"]]:
    """Transform rows, and put each on its own symmetric grid (FlatQuant, section 3.1 and figure 4).

    Args:
        x: (T, n).
        left, right: P1 (n1, n1) and P2 (n2, n2), each None for the identity.
        ratios: shares of a row's lower and upper end that the grid covers, (2,).
        bits: of the grid.

    Returns:
        Integers in `form`, (T, n) or (T, n * bits / 8), and scales, float32, (T, 1).
    """
    y = kron_matmul(x.to(torch.promote_types(x.dtype, torch.float32)), left, right)
    return on_grid(y, y, ratios, bits, form)


def on_grid(
    y: Float[Tensor, "tokens n"], ends: Float[Tensor, "tokens m"], ratios: Float[Tensor, "2"], bits: int, form: Form
) -> tuple[Shaped[Tensor, "tokens width"], Float[Tensor, "tokens 1"]]:
    """Put each row on its own symmetric grid.

    Args:
        y: transformed, (T, n).
        ends: numbers whose smallest and largest are those of the row that y is all or a part of, (T, m).
        ratios, bits, form: as for `kron_quantize`.
    """
    low, high = -(1 << bits - 1), (1 << bits - 1) - 1
    scale, _ = row_grid(ends, ratios[0], ratios[1], low, high)
    q = quantize(y, scale, None, low, high)
    match of_rows(form, len(q)):
        case "planes":
            return torch.cat((q[..., ::2], q[..., 1::2]), -1).to(torch.int8), scale
        case "packed":
            return pack_bits((q - low).to(torch.uint8), bits), scale
        case _:
            q = q.to(torch.float8_e4m3fn)
            return q.view(torch.int8) if form == "either" else q, scale
