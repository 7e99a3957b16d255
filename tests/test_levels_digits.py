"""Learned levels on real images, on a small scale: they train, and what is rounded is what is served."""

import pytest
import torch

pytest.importorskip("sklearn")

from benchmarks import levels_digits


@pytest.fixture(scope="module")
def start() -> tuple:
    data = levels_digits.digits(0)
    torch.manual_seed(0)
    network = levels_digits.make_network()
    levels_digits.train(network, *data[:2], epochs=4, seed=0)
    return network, data


@pytest.mark.parametrize("bits, variant", [(2, "learned"), (1, "learned"), (2, "fixed"), (1, "total error")])
def test_a_network_of_few_levels_recognises_digits(start: tuple, bits: int, variant: str) -> None:
    network, (x, y, unseen_x, unseen_y) = start
    ours = levels_digits.quantised(network, bits, variant)
    levels_digits.train(ours, x, y, epochs=4, seed=1)
    assert levels_digits.accuracy(ours, unseen_x, unseen_y) > (0.93 if bits == 2 else 0.85)
    assert levels_digits.accuracy(network, unseen_x, unseen_y) > 0.95  # the start is left alone
    for index in (3, 7):
        w = ours[index].weight()
        assert all(len(torch.unique((row * 1e5).round())) <= 2**bits for row in w)
        if variant != "fixed":
            assert isinstance(ours[index].weight, levels_digits.LearnedLevels)
            assert (ours[index].weight.latent.abs() <= 1).all()
        seen = ours[index].activations(torch.rand(4, levels_digits.WIDTH, 3, 3))
        assert len(torch.unique(seen)) <= 2**bits
