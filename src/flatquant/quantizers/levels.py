"""Few levels that are learned: weights that are codes and levels, activations that mind every channel.

After arXiv 2012.13762 (IJCAI 2020), of which only the abstract could be read. Stated there: quantised weights and their
levels are updated directly by gradients, rather than full-precision weights that are rounded on the way; activation
levels minimise each channel's error, rather than a total that a few channels of high variance decide. All formulas
here are a reconstruction from that, in the manner of LQ-Nets (arXiv 1807.10029).
"""

from __future__ import annotations

import itertools

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from flatquant.formats.base import Codes
from flatquant.formats.levels import LEVELS, Levels
from flatquant.modules import Bounded, ExactBuffers, Trainable
from flatquant.spec import QuantSpec

_RIDGE = 1e-4  # keeps least squares solvable where a code is unused
_FLOOR = 1e-8  # of levels and of channels' power
_ROUNDS = 10  # of least squares before a weight is trained


class WeightLevels(Trainable, Bounded):
    """A weight matrix on levels of its rows, or of groups of its rows, while it is fitted.

    Levels are the sums of K numbers with signs, and no full-precision weight is left. A weight's code is one `position`
    among its row's levels in ascending order, to the nearest whole: so that a step takes it to a neighbouring level,
    where the sign of one of several numbers, flipped, would take it far away. Levels are relative to the mean magnitude
    of their row, so that one learning rate suits them all.
    """

    group = "code"
    unit: Tensor  # (o * g, 1)
    floor: Tensor  # (o * g, K)

    def __init__(self, spec: QuantSpec, w: Tensor) -> None:
        """Start at a full-precision weight, (o, n), with levels by least squares."""
        super().__init__()
        self.spec = spec
        self.groups = w.shape[1] // (spec.group_size or w.shape[1])
        rows = w.detach().unflatten(-1, (self.groups, -1)).flatten(0, 1)  # (o * g, n / g)
        unit = rows.abs().mean(-1, keepdim=True)
        self.register_buffer("unit", torch.where(unit > 0, unit, 1.0))
        rows = rows / self.unit
        self.levels = nn.Parameter(least_squares_levels(rows, spec.bits))  # (o * g, K)
        self.register_buffer("floor", (self.levels.detach() / 10).clamp(min=_FLOOR))
        self.position = nn.Parameter(_position(rows, _sums(self.levels.detach())[0]))  # (o * g, n / g)

    def _nearest(self) -> Tensor:
        # A fit that diverged is to end by its loss, with a reason, not by an index that no level has.
        return self.position.detach().nan_to_num().round().clamp(0, (1 << self.spec.bits) - 1).long()

    def forward(self) -> Tensor:
        """The weight on its levels, differentiable; a position's slope is the mean distance of levels.  # (o, n)"""
        values, order = _sums(self.levels.detach())  # (o * g, 2^K)
        spacing = (values[:, -1:] - values[:, :1]) / (values.shape[1] - 1)
        moved = spacing * (self.position - self.position.detach())  # 0, with a gradient
        codes = _signs(self.spec.bits, values)[order.gather(1, self._nearest())]  # (o * g, n / g, K)
        # Not values.gather(..): its gradient adds in any order on a GPU, or takes long.
        rows = ((codes * self.levels[:, None]).sum(-1) + moved) * self.unit
        return rows.unflatten(0, (-1, self.groups)).flatten(1)

    @torch.no_grad()
    def settle(self) -> None:
        self.position.clamp_(0, (1 << self.spec.bits) - 1)
        self.levels.copy_(torch.maximum(self.levels, self.floor))

    @torch.no_grad()
    def frozen(self) -> Codes:
        """The codes, and the levels."""
        _, order = _sums(self.levels)
        indices = order.gather(1, self._nearest()).to(torch.uint8).unflatten(0, (-1, self.groups)).flatten(1)
        levels = (self.levels * self.unit).float().unflatten(0, (-1, self.groups))
        form = Levels(self.spec.bits, self.spec.group_size)
        return Codes(codes=indices.contiguous(), parts={LEVELS: levels.contiguous()}, format=form)


def _signs(bits: int, like: Tensor) -> Tensor:
    """Bit k of a row's number as a sign.  # (2^K, K)"""
    places = torch.arange(bits, device=like.device)
    set_bits = torch.arange(1 << bits, device=like.device)[:, None] >> places & 1
    return (2 * set_bits - 1).to(like.dtype)


def _sums(levels: Tensor) -> tuple[Tensor, Tensor]:
    """All sums of (rows, K) numbers with signs, ascending, and which signs they have.  # both (rows, 2^K)"""
    return (levels @ _signs(levels.shape[1], levels).mT).sort(-1)


def _position(w: Tensor, values: Tensor) -> Tensor:
    """Where w, (rows, n), lies among ascending values, (rows, k), linear between them: halfway rounds at a half."""
    below = torch.searchsorted(values, w.contiguous(), right=True).clamp(1, values.shape[1] - 1) - 1
    low, high = values.gather(1, below), values.gather(1, below + 1)
    share = (w - low) / (high - low).clamp(min=_FLOOR)
    return (below + share).clamp(0, values.shape[1] - 1).to(w.dtype)


def least_squares_levels(w: Float[Tensor, "rows n"], bits: int) -> Float[Tensor, "rows {bits}"]:
    """K numbers for every row of w, (rows, n), whose sums with signs lie near the row's weights.  # (rows, K)

    Alternating least squares (LQ-Nets, arXiv 1807.10029) from two starts: greedy residual binarisation, and numbers
    that halve from one to the next, which are a uniform grid. A row keeps the best that it has had.
    """
    rest, greedy = w, []
    for _ in range(bits):
        greedy.append(rest.abs().mean(-1, keepdim=True).clamp(min=_FLOOR))  # (rows, 1)
        rest = rest - greedy[-1] * torch.where(rest >= 0, 1.0, -1.0)
    halves = 2.0 ** -torch.arange(1, bits + 1, device=w.device).to(w.dtype)
    starts = (torch.cat(greedy, 1), w.abs().amax(-1, keepdim=True).clamp(min=_FLOOR) * halves)
    # Of ascending weights, those nearest to one level are neighbours: ends of their runs say all that is needed.
    ascending = w.sort(-1).values.double()
    before = torch.nn.functional.pad(ascending.cumsum(-1), (1, 0))  # sums of the first 0 .. n, (rows, n + 1)
    square = ascending.square().sum(-1)  # (rows,)
    signs = _signs(bits, ascending)  # (2^K, K)
    ridge = _RIDGE * torch.eye(bits, dtype=torch.float64, device=w.device)
    best, least = starts[0], torch.full_like(square, torch.inf)
    for start in starts:
        levels = start.double()
        for remaining in range(_ROUNDS, -1, -1):
            values, order = _sums(levels)  # (rows, 2^K)
            ends = torch.searchsorted(ascending, (values[:, 1:] + values[:, :-1]) / 2)
            ends = torch.nn.functional.pad(ends, (0, 1), value=w.shape[1])  # of each level's run, exclusive
            counts = torch.diff(ends, dim=-1, prepend=torch.zeros_like(ends[:, :1])).double()
            total = before.gather(1, ends)
            sums = torch.diff(total, dim=-1, prepend=torch.zeros_like(total[:, :1]))
            error = square - 2 * (sums * values).sum(-1) + (counts * values.square()).sum(-1)
            best = torch.where((error < least)[:, None], levels.to(w.dtype), best)
            least = torch.minimum(error, least)
            if remaining:
                b = signs[order]  # (rows, 2^K, K)
                gram = b.mT @ (counts[..., None] * b) + ridge
                levels = torch.linalg.solve(gram, b.mT @ sums[..., None])[..., 0].abs().clamp(min=_FLOOR)
    return best


class ActivationLevels(ExactBuffers):
    """Activations with signs on a token's largest magnitude times levels that all tokens of a site share.

    One bit is the sign, the others choose among sums of `basis`, found by `levels_of`.
    """

    basis: Tensor  # float32, (K - 1,)

    def __init__(self, spec: QuantSpec, basis: Tensor) -> None:
        super().__init__()
        self.spec = spec
        self.register_buffer("basis", basis)

    @classmethod
    @torch.no_grad()
    def found(cls, spec: QuantSpec, rows: Tensor) -> ActivationLevels:
        """The levels for some tokens' activations, (tokens, n)."""
        rows = rows.float()
        channels = (rows.abs() / _reach(rows)).mT.double().contiguous()  # (n, tokens)
        weights = weights_of(channels.square().mean(1), by_channel=spec.weigh == "channels")
        if weights is None:
            return cls(spec, torch.zeros(spec.bits - 1, device=rows.device))
        return cls(spec, levels_of(channels, weights, spec.bits - 1, bounded=True))

    def forward(self, x: Tensor) -> Tensor:
        """The nearest levels; the gradient passes straight through below the largest.  # x's shape and dtype"""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        reach = _reach(wide)  # (.., 1)
        u = wide / reach
        codes = (_signs(len(self.basis), wide) + 1) / 2  # (2^(K-1), K - 1)
        values = (codes @ self.basis.to(wide)).sort().values
        q = values[nearest(u.detach().abs().contiguous(), values)] * u.detach().sign()
        inside = torch.where(u.abs() < values[-1], u, 0.0)
        return (reach * (inside + (q - inside).detach())).to(x.dtype)


def _reach(x: Tensor) -> Tensor:
    """The largest magnitude of every token.  # (.., 1)"""
    return x.abs().amax(-1, keepdim=True).clamp(min=_FLOOR)


# Magnitudes on 2^K levels, the sums of some of K numbers; 0 is one, the largest is a clip. All channels share them, so
# that products stay those of integers, but they can be fitted to the mean of the *relative* errors of the channels: a
# least squares problem with the inverse power of each channel as weight.


def weights_of(power: Float[Tensor, " channels"], *, by_channel: bool) -> Float[Tensor, " channels"] | None:
    """How much the error of each channel counts, of their mean squares, (C,); None where all are silent.

    Without `by_channel`, the total error is what counts.
    """
    alive = power > _FLOOR
    if not bool(alive.any()):
        return None
    weights = torch.where(alive, 1 / power.clamp(min=_FLOOR), 0.0) if by_channel else alive.double()
    return weights / weights.sum()


def levels_of(
    channels: Float[Tensor, "channels n"], weights: Float[Tensor, " channels"], bits: int, *, bounded: bool
) -> Float[Tensor, " {bits}"]:
    """K numbers for channels, float64, (C, N): the best of even levels up to several tops, each after some rounds.

    Args:
        bounded: no more total error than even levels up to the largest value have, which is plain rounding. Relative
            errors let one channel be cut off for a small gain in each of many others, even the channel that all
            outputs depend on.
    """
    even, found = 2.0 ** torch.arange(bits, device=channels.device) / (2**bits - 1), []
    for halvings in range(8):  # rounds find what is near alone
        basis = (channels.max() / 2**halvings * even).float()
        for _ in range(20):
            target, errors = solved(basis, channels, weights)
            found.append((float((weights * errors).sum()), float(errors.sum()), basis))
            basis = target.float()
    most = found[0][1] if bounded else float("inf")
    return min((some for some in found if some[1] <= most), key=lambda some: some[0])[2]


def solved(
    basis: Float[Tensor, " bits"], channels: Float[Tensor, "channels n"], weights: Float[Tensor, " channels"]
) -> tuple[Float[Tensor, " bits"], Float[Tensor, " channels"]]:
    """argmin over u of sum_c w_c mean |x - B u|^2, the codes B as the levels are now, (K,), and every channel's error
    now, (C,).
    """
    values, codes = ascending(basis)
    chosen = nearest(channels, values.double())  # (C, N)
    errors = (channels - values.double()[chosen]).square().mean(1)
    counts = torch.zeros(len(values), dtype=torch.float64, device=channels.device)
    sums = torch.zeros_like(counts)
    each = weights[:, None].expand_as(channels) / channels.shape[1]
    counts.index_add_(0, chosen.flatten(), each.flatten())
    sums.index_add_(0, chosen.flatten(), (each * channels).flatten())
    b = codes.double()
    gram = b.mT @ (counts[:, None] * b) + _RIDGE * torch.eye(len(basis), dtype=torch.float64, device=b.device)
    return torch.linalg.solve(gram, b.mT @ sums).clamp(min=_FLOOR), errors


def ascending(basis: Float[Tensor, " bits"]) -> tuple[Float[Tensor, " codes"], Float[Tensor, "codes bits"]]:
    """The levels of K numbers in ascending order, (2^K,), and the codes that they are of, (2^K, K)."""
    codes = torch.tensor(list(itertools.product((0.0, 1.0), repeat=len(basis))), device=basis.device)
    values, order = (codes @ basis).sort()
    return values, codes[order]


def nearest(x: Float[Tensor, "*any"], values: Float[Tensor, " codes"]) -> Int64[Tensor, "*any"]:
    """Which of ascending values lie nearest."""
    return torch.bucketize(x, (values[1:] + values[:-1]) / 2)
