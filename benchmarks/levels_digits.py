"""Learned levels in their own field: a small convolutional network on scikit-learn's digits, at 2 and at 1 bit.

    python -m benchmarks.levels_digits

Weights and activations of all convolutions but the first are quantised; first convolution and classifier stay in full
precision. Every network starts from the same trained one of its seed and is trained as long again. Compared are

- `learned`: codes and levels trained directly, activation levels by each channel's error (arXiv 2012.13762);
- `total error`: the same weights, activation levels by the total error;
- `fixed`: full-precision weights rounded to levels that stay where the trained network's weights put them, with
  straight-through gradients, and activation levels likewise fixed;
- `full precision`: trained as long, not quantised.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import RESULTS, write_result
from flatquant.quantizers.levels import ascending, levels_of, nearest, solved, weights_of

WIDTH = 24
VARIANTS = ("learned", "total error", "fixed")
_FLOOR = 1e-8  # of levels


class _Sign(torch.autograd.Function):
    """sign(a) with sign(0) = 1; gradients pass where |a| <= 1."""

    @staticmethod
    def forward(ctx, a: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(a)
        return torch.where(a >= 0, 1.0, -1.0).to(a.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[override]
        (a,) = ctx.saved_tensors
        return torch.where(a.abs() <= 1, grad, 0.0)


class LearnedLevels(nn.Module):
    """A weight as W = B v: K codes of +1 or -1 for every weight, K basis values for every output.

    There is no full-precision weight. `levels` v (o, K) and `latent` A (o, n, K) are trained, B = sign(A); a code flips
    when its latent crosses 0, which moves the quantised weight to another of the 2^K sums of +-v_k. Call `settle` after
    every step. Weight decay belongs on the value of `forward`, not on the latents: it would drive them to 0, where
    codes flip at random.
    """

    floor: Tensor  # (o, K)

    def __init__(self, levels: Tensor, latent: Tensor) -> None:
        super().__init__()
        self.levels = nn.Parameter(levels)
        self.latent = nn.Parameter(latent)
        # Where a norm follows, nothing holds the scale of a row: left alone, its levels wander to 0 and stay there.
        self.register_buffer("floor", (levels.detach() / 10).clamp(min=_FLOOR))

    @classmethod
    @torch.no_grad()
    def from_weight(cls, w: Tensor, bits: int) -> LearnedLevels:
        """Start at a full-precision weight, (o, n), by greedy residual binarisation.

        v_k is the mean of |r|, b_k the sign of what is left, r; the latent is r / (2 v_k), so that it is as far from
        flipping as the weight is from the threshold.
        """
        rest, levels, latents = w.clone(), [], []
        for _ in range(bits):
            v = rest.abs().mean(-1, keepdim=True).clamp(min=_FLOOR)  # (o, 1)
            levels.append(v)
            latents.append((rest / (2 * v)).clamp(-1, 1))
            rest = rest - v * torch.where(rest >= 0, 1.0, -1.0)
        return cls(torch.cat(levels, 1), torch.stack(latents, -1))

    def forward(self) -> Tensor:
        """The quantised weight.  # (o, n)"""
        codes = _Sign.apply(self.latent)  # (o, n, K)
        # A level's gradient is a sum over all weights: it is scaled, its value is not.
        share = (self.latent.shape[1] * self.latent.shape[2]) ** -0.5
        levels = self.levels * share + (self.levels * (1 - share)).detach()
        return (codes * levels[:, None]).sum(-1)  # type: ignore[operator]

    @torch.no_grad()
    def settle(self) -> None:
        """After a step: latents back into [-1, 1], where gradients reach them, levels above a tenth of their start."""
        self.latent.clamp_(-1, 1)
        self.levels.copy_(torch.maximum(self.levels, self.floor))


class RoundedLevels(nn.Module):
    """A full-precision weight rounded to fixed levels, gradients straight through: what `LearnedLevels` replaces."""

    def __init__(self, w: Tensor, bits: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(w.clone())
        start = LearnedLevels.from_weight(w, bits)
        signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * bits).view(-1, bits)
        self.register_buffer("levels", (start.levels.detach() @ signs.mT).sort(1).values)  # (o, 2^bits)

    def forward(self) -> Tensor:
        distance = (self.weight.detach()[..., None] - self.levels[:, None]).abs()  # (o, n, 2^bits)
        q = self.levels.gather(1, distance.argmin(-1))
        return self.weight + (q - self.weight).detach()

    def settle(self) -> None:
        pass


class ChannelLevels(nn.Module):
    """Activations after a ReLU on 2^K levels, the sums of K learned values; 0 is one, the largest is a clip.

    One set of levels for all channels, so that a convolution stays one of integers, but fitted to the mean of the
    *relative* errors of the channels. Every training step moves the levels a tenth of the way to the solution for the
    batch's codes.

    Args:
        bits: K.
        by_channel: weigh channels; without, the total error is minimised.
        momentum: how much of the levels, and of the channels' power, a step keeps; 1 freezes what the first step found.
    """

    basis: Tensor  # (K,)
    power: Tensor  # mean square of each channel, (C,); empty before the first step

    def __init__(self, bits: int, *, by_channel: bool = True, momentum: float = 0.9) -> None:
        super().__init__()
        self.by_channel, self.momentum = by_channel, momentum
        self.register_buffer("basis", torch.zeros(bits))
        self.register_buffer("power", torch.zeros(0))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, ..) on its levels; the gradient passes where 0 < x < the largest level."""
        if self.training:
            self._learn(x.detach())
        values, _ = ascending(self.basis)
        q = values[nearest(x.detach(), values)]
        inside = (x > 0) & (x < values[-1])
        return torch.where(inside, x, 0.0) + (q - torch.where(inside, x, 0.0)).detach()

    @torch.no_grad()
    def _learn(self, x: Tensor) -> None:
        channels = x.transpose(0, 1).flatten(1).double().contiguous()  # (C, N)
        power = channels.square().mean(1)
        if self.power.numel():
            if self.momentum == 1:
                return
            power = self.momentum * self.power.double() + (1 - self.momentum) * power
        weights = weights_of(power, by_channel=self.by_channel)
        if weights is None:
            return
        if not self.power.numel():
            self.basis.copy_(levels_of(channels, weights, len(self.basis), bounded=False))
        else:
            target, _ = solved(self.basis, channels, weights)
            self.basis.copy_(self.momentum * self.basis + (1 - self.momentum) * target)
        self.power = power.to(self.basis.dtype)


class Convolution(nn.Module):
    """Activation levels, then a 3 x 3 convolution with weights from levels."""

    def __init__(self, of: nn.Conv2d, bits: int, variant: str) -> None:
        super().__init__()
        self.shape = of.weight.shape
        flat = of.weight.detach().flatten(1)
        self.weight = RoundedLevels(flat, bits) if variant == "fixed" else LearnedLevels.from_weight(flat, bits)
        momentum = 1.0 if variant == "fixed" else 0.9
        self.activations = ChannelLevels(bits, by_channel=variant == "learned", momentum=momentum)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(self.activations(x), self.weight().view(self.shape), padding=1)


def make_network() -> nn.Sequential:
    """Three convolutions, the last two to be quantised, and a classifier."""
    return nn.Sequential(
        nn.Conv2d(1, WIDTH, 3, padding=1, bias=False), nn.BatchNorm2d(WIDTH), nn.ReLU(),
        nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False), nn.BatchNorm2d(WIDTH), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False), nn.BatchNorm2d(WIDTH), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(4 * WIDTH, 10),
    )  # fmt: skip


def quantised(network: nn.Sequential, bits: int, variant: str) -> nn.Sequential:
    """A copy with its second and third convolution quantised."""
    network = copy.deepcopy(network)
    for i in (3, 7):
        of = network[i]
        assert isinstance(of, nn.Conv2d)
        network[i] = Convolution(of, bits, variant)
    return network


def digits(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images (N, 1, 8, 8) and labels to train on, and those of a fifth to test on.

    Raises:
        SystemExit: scikit-learn is not there.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise SystemExit("this benchmark needs scikit-learn: pip install scikit-learn") from error
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    test, train = order[: len(order) // 5], order[len(order) // 5 :]
    return images[train], labels[train], images[test], labels[test]


def train(network: nn.Module, x: Tensor, y: Tensor, epochs: int, seed: int) -> None:
    """AdamW with a cosine; codes rest for the last tenth, so that batch statistics settle."""
    g = torch.Generator().manual_seed(seed)
    levels = [m for m in network.modules() if isinstance(m, LearnedLevels | RoundedLevels)]
    learned = [m for m in levels if isinstance(m, LearnedLevels)]
    own = {id(p) for m in learned for p in m.parameters()}
    groups = [
        {"params": [p for p in network.parameters() if id(p) not in own], "lr": 3e-3},
        {"params": [m.latent for m in learned], "lr": 1e-2},
        {"params": [m.levels for m in learned], "lr": 3e-4},  # a few per cent of a level, as for other weights
    ]
    optimiser = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)
    steps = epochs * (len(x) // 64)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    network.train()
    for step in range(steps):
        if step % (len(x) // 64) == 0:
            order = torch.randperm(len(x), generator=g)
        batch = order[step % (len(x) // 64) * 64 :][:64]
        loss = F.cross_entropy(network(x[batch]), y[batch])
        optimiser.zero_grad()
        loss.backward()
        if step >= 0.9 * steps:
            for m in learned:
                m.latent.grad = None
        optimiser.step()
        schedule.step()
        for m in levels:
            m.settle()


@torch.no_grad()
def accuracy(network: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of images that are recognised."""
    return float((network.eval()(x).argmax(1) == y).float().mean())


def measure(seed: int, epochs: int = 20) -> dict[str, float]:
    """Accuracy on unseen images, by variant and bits."""
    x, y, unseen_x, unseen_y = digits(seed)
    torch.manual_seed(seed)
    start = make_network()
    train(start, x, y, epochs, seed)
    networks = {"full precision": copy.deepcopy(start)}
    networks |= {f"{variant}, {bits} bit": quantised(start, bits, variant) for bits in (2, 1) for variant in VARIANTS}
    found = {}
    for name, network in networks.items():
        train(network, x, y, epochs, seed + 1)
        found[name] = accuracy(network, unseen_x, unseen_y)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default=str(RESULTS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=15)
    args = parser.parse_args()
    samples = []
    for seed in range(args.seeds):
        samples.append({"seed": seed, **measure(seed, args.epochs)})
        print(samples[-1], flush=True)
    metrics = {name: sum(row[name] for row in samples) / len(samples) for name in samples[0] if name != "seed"}
    for name, value in metrics.items():
        print(f"{name:22} {value:.4f}")
    path = Path(args.out) / "levels-digits.json"
    write_result(path, "levels-digits", seeds=list(range(args.seeds)), metrics=metrics, samples=samples)


if __name__ == "__main__":
    main()
