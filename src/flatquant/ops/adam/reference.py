"""Adam on weights of 24 bits, of which a model sees those of bfloat16, with moments in 8 bits, all rounded by chance.

A step is a small share of a weight, less than bfloat16 can tell: rounded to that by chance, weights would walk at
random further than the fit moves them. With 8 bits more, the walk is a sixteenth of that.

Moments share a scale in blocks of 256 neighbours, their largest magnitude (8-bit Optimizers via Block-wise
Quantization, arXiv 2110.02861). Their levels here are powers of two in even steps of the exponent: a moment is known to
a share of itself, down to 2^-16 of its block's largest first moment and 2^-24 of its largest second one. A second
moment decays by a thousandth a step, far less than a step of the levels: rounded to nearest it would never move. So
moments, and weights (stochastic rounding: Revisiting BFloat16 Training, arXiv 2010.06192), are rounded up or down by
chance, and right on average. Second moments below the least level are put on it: nothing is divided by less.

Chance is a hash of the element's number, the number of the step and a key, so that a step that is repeated has the same
bits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import BFloat16, Float, Float32, Int8, Int64, Shaped, UInt8
from torch import Tensor

BLOCK = 256  # neighbours with one scale
BETA1, BETA2 = 0.9, 0.999
# Exponents between neighbouring levels, and the number of levels below the largest one.
FIRST_GAP, FIRST_LEVELS = 1 / 8, 126
SECOND_GAP, SECOND_LEVELS = 3 / 32, 255
_CHUNK = 1 << 16  # elements at a time, for what they need in float32
_BITS = 0xFFFFFFFF


def fresh_state(p: Float[Tensor, "*shape"]) -> dict[str, Tensor]:
    """Of a weight before its first step: what bfloat16 leaves of it, codes and scales of the moments, steps done.

    Args:
        p: of any shape, with N elements.

    Returns:
        `rest` int8 (N,), in units of a 256th of the last place of p; `exp_avg` int8 and `exp_avg_sq` uint8 (N,);
        `exp_avg_scale` and `exp_avg_sq_scale` float32 (N / 256, rounded up); `step` float32 ().
    """
    n, blocks = p.numel(), -(-p.numel() // BLOCK)
    return {
        "rest": torch.zeros(n, dtype=torch.int8, device=p.device),
        "exp_avg": torch.zeros(n, dtype=torch.int8, device=p.device),
        "exp_avg_sq": torch.zeros(n, dtype=torch.uint8, device=p.device),
        "exp_avg_scale": torch.zeros(blocks, device=p.device),
        "exp_avg_sq_scale": torch.zeros(blocks, device=p.device),
        "step": torch.zeros((), device=p.device),
    }


@torch.no_grad()
def adam_step(
    p: BFloat16[Tensor, "*shape"],
    grad: Float[Tensor, "*shape"],
    state: dict[str, Tensor],
    *,
    lr: Float[Tensor, ""],
    hold: Shaped[Tensor, ""],
    eps: float,
    key: int,
) -> None:
    """Move p against its gradient by a step of Adam, in place; where `hold` is not 0, change nothing.

    Args:
        p: bfloat16, contiguous.
        grad: of p's shape, in any floating dtype, finite unless held.
        state: as `fresh_state` made it; changed in place.
        lr, hold: scalars on p's device.
        key: of the chance by which is rounded.
    """
    state["step"].add_(hold == 0)
    whole = {"p": p.view(-1), **{name: t for name, t in state.items() if name != "step"}}
    gradient = grad.reshape(-1)
    for start in range(0, p.numel(), _CHUNK):
        stop = min(start + _CHUNK, p.numel())
        blocks = slice(start // BLOCK, -(-stop // BLOCK))
        old = {name: t[blocks if name.endswith("_scale") else slice(start, stop)] for name, t in whole.items()}
        chance = noise(torch.arange(start, stop, device=p.device), state["step"], key)
        new = _moved(old, gradient[start:stop].float(), chance, state["step"], lr, eps)
        for name, before in old.items():
            before.copy_(torch.where(hold == 0, new[name], before))


def _moved(
    old: dict[str, Tensor], g: Tensor, chance: tuple[Tensor, Tensor], step: Tensor, lr: Tensor, eps: float
) -> dict[str, Tensor]:
    """Weights and moments after a step, of whole blocks but for the end of the last."""
    n, (a, b) = len(g), chance
    first = BETA1 * decoded_first(old["exp_avg"], old["exp_avg_scale"]) + (1 - BETA1) * g
    second = BETA2 * decoded_second(old["exp_avg_sq"], old["exp_avg_sq_scale"]) + (1 - BETA2) * g * g
    denominator = (second / (1 - BETA2**step)).sqrt() + eps
    moved = joined(old["p"], old["rest"]) - lr * (first / (1 - BETA1**step)) / denominator
    first_scale, second_scale = (_blocks(x).abs().amax(-1) for x in (first, second))
    p, rest = rounded(moved, a & 0xFF)
    return {
        "p": p,
        "rest": rest,
        "exp_avg": encoded_first(first, _of_block(first_scale, n), _share(a >> 16)),
        "exp_avg_sq": encoded_second(second, _of_block(second_scale, n), _share(b >> 16)),
        "exp_avg_scale": first_scale,
        "exp_avg_sq_scale": second_scale,
    }


def rounded(
    x: Float32[Tensor, "*shape"], chance: Int64[Tensor, "*shape"]
) -> tuple[BFloat16[Tensor, "*shape"], Int8[Tensor, "*shape"]]:
    """float32 to one of the two nearest numbers of 24 bits, to the farther one as often as it is near.

    Args:
        chance: int64 from 0 to 255, evenly distributed.

    Returns:
        The nearest bfloat16 and, as int8, how far that is from it, in units of a 256th of its last place.
    """
    bits = (x.view(torch.int32) + chance.to(torch.int32)) >> 8
    high = (bits + 128) >> 8
    return high.to(torch.int16).view(torch.bfloat16), (bits - (high << 8)).to(torch.int8)


def joined(p: BFloat16[Tensor, "*shape"], rest: Int8[Tensor, "*shape"]) -> Float32[Tensor, "*shape"]:
    """What `rounded` has taken apart.  # float32"""
    return ((p.view(torch.int16).to(torch.int32) << 16) + (rest.to(torch.int32) << 8)).view(torch.float32)


def decoded_first(codes: Int8[Tensor, " n"], scale: Float[Tensor, " blocks"]) -> Float[Tensor, " n"]:
    """First moments: 0, or the sign times the scale times 2^((|code| - 127) / 8).  # float32, (n,)"""
    size = torch.exp2((codes.abs().float() - 1 - FIRST_LEVELS) * FIRST_GAP) * codes.sign()
    return size * _of_block(scale, len(codes))


def encoded_first(x: Float[Tensor, " n"], scale: Float[Tensor, " n"], share: Float[Tensor, " n"]) -> Int8[Tensor, " n"]:
    """The codes of `decoded_first`, below the least level 0 or that.  # int8, (n,)

    Args:
        scale: of each element's block, (n,).
        share: of chance, in [0, 1), (n,).
    """
    r = torch.where(scale > 0, x.abs() / scale, 0.0)
    e = (r.log2() / FIRST_GAP).floor().clamp(-1 - FIRST_LEVELS, 0)
    low = torch.where(e < -FIRST_LEVELS, 0.0, torch.exp2(e * FIRST_GAP))
    up = share * (torch.exp2((e + 1) * FIRST_GAP) - low) < r - low
    return ((1 + FIRST_LEVELS + e + (up & (e < 0))) * x.sign()).to(torch.int8)


def decoded_second(codes: UInt8[Tensor, " n"], scale: Float[Tensor, " blocks"]) -> Float[Tensor, " n"]:
    """Second moments: the scale times 2^(3 (code - 255) / 32).  # float32, (n,)"""
    return torch.exp2((codes.float() - SECOND_LEVELS) * SECOND_GAP) * _of_block(scale, len(codes))


def encoded_second(
    x: Float[Tensor, " n"], scale: Float[Tensor, " n"], share: Float[Tensor, " n"]
) -> UInt8[Tensor, " n"]:
    """The codes of `decoded_second`, below the least level that.  # uint8, (n,)"""
    r = torch.where(scale > 0, x / scale, 0.0)
    e = (r.log2() / SECOND_GAP).floor().clamp(-SECOND_LEVELS, 0)
    low = torch.exp2(e * SECOND_GAP)
    up = share * (torch.exp2((e + 1) * SECOND_GAP) - low) < r - low
    return (SECOND_LEVELS + e + (up & (e < 0))).to(torch.uint8)


def noise(
    index: Int64[Tensor, " n"], step: Shaped[Tensor, ""], key: int
) -> tuple[Int64[Tensor, " n"], Int64[Tensor, " n"]]:
    """Two hashes of each element, 32 bits each.  # int64, (n,)

    Args:
        index: int64, below 2^32.
        step: a scalar, a whole number.
        key: below 2^32.
    """
    start = _mixed((step.long() * 0x9E3779B1 + key) & _BITS)
    a = _mixed(_mixed((index + start) & _BITS) ^ start)
    return a, _mixed((a + 0x9E3779B9) & _BITS)


def _mixed(h: Tensor) -> Tensor:
    """The finaliser of MurmurHash3, in 32 of the 64 bits."""
    h = (h ^ (h >> 16)) * 0x85EBCA6B & _BITS
    h = (h ^ (h >> 13)) * 0xC2B2AE35 & _BITS
    return h ^ (h >> 16)


def _share(bits: Tensor) -> Tensor:
    """16 bits as a number between 0 and 1."""
    return (bits.float() + 0.5) / (1 << 16)


def _blocks(x: Tensor) -> Tensor:
    """(n,) in blocks, the last filled up with zeros.  # (blocks, 256)"""
    return F.pad(x, (0, -len(x) % BLOCK)).view(-1, BLOCK)


def _of_block(scale: Tensor, n: int) -> Tensor:
    """The scale of each element's block.  # (n,)"""
    return scale.repeat_interleave(BLOCK)[:n]
