"""The calibration benchmark's arithmetic: operations counted by hand, exponents of known laws, metrics from samples."""

import dataclasses

import pytest
import torch
from benchmarks.calibration import REFERENCE, TINY, Epochs, fit_operations, metrics, random_llama, slope

from flatquant.spec import DataSpec


def test_operations_are_those_of_the_products() -> None:
    model = random_llama(TINY, 1, torch.float32, torch.device("cpu"))  # 64 = 8 x 8, 160 = 10 x 16; 4 heads of 16
    recipe = dataclasses.replace(REFERENCE, data=DataSpec(samples=4, seqlen=10))
    linears = 64 * (64 + 32 + 32) + 64 * 64 + 3 * 64 * 160
    transforms = 64 * (8 + 8) + 64 * (4 + 16) + 64 * (8 + 8) + 160 * (10 + 16)
    attention = 2 * (10 / 2) * 64
    per = fit_operations(model, recipe)
    assert per["token"] == 3 * 2 * (linears + transforms + attention)
    weights = 64 * 128 * 16 + 64 * 64 * 20 + 64 * 320 * 16 + 160 * 64 * 26
    assert per["step"] == 3 * 2 * weights


def test_exponents_of_known_laws() -> None:
    x = [1.0, 2.0, 4.0, 8.0]
    assert slope(x, [3 * v**2 for v in x]) == pytest.approx(2)
    assert slope(x, [5 / v for v in x]) == pytest.approx(-1)
    assert slope([2.0], [1.0]) is None


def test_random_models_are_the_same_for_a_seed_and_have_outliers() -> None:
    a, b = (random_llama(TINY, 2, torch.float32, torch.device("cpu")) for _ in range(2))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    norm = a.model.layers[1].input_layernorm.weight.abs()
    assert norm.max() > 10 * norm.median()
    with torch.no_grad():
        assert torch.isfinite(a(torch.arange(9)[None]).logits).all()


def test_the_last_epoch_of_every_group_is_found() -> None:
    epochs = Epochs()
    epochs.ends = [0.0, 1.0, 3.0, 10.0, 12.0, 15.0]  # two groups of three
    assert epochs.last(3) == [2.0, 3.0]


def test_metrics_come_from_samples_alone() -> None:
    def grown(axis: str, value: int, seconds: float) -> dict:
        return {"part": "growth", "axis": axis, axis: value, "epoch_seconds": seconds, "operations": value**2}

    def same(layout: str, sha256: str, loss: float) -> dict:
        return {"part": "determinism", "layout": layout, "sha256": sha256, "losses": [[9.0, loss]]}

    found = metrics(
        [
            *(grown("hidden", n, 2.0 * n) for n in (1, 2, 4)),
            *(same(name, "a", 1.0) for name in ("plain", "again")),
            same("disk", "b", 1.0),
            same("two parts", "c", 1.1),
            same("two parts again, on disk, resumed", "c", 1.1),
            {"part": "smollm2", "error": "OutOfMemoryError: "},
        ]
    )
    assert found["failed"] == ["smollm2"]
    assert found["growth"]["hidden"]["exponent"] == pytest.approx(1)
    assert found["growth"]["hidden"]["exponent_of_operations"] == pytest.approx(2)
    assert found["determinism"]["same_bits"] == {"plain": True, "again": True, "disk": False}
    assert found["determinism"]["same_bits_in_two_parts"]
    assert found["determinism"]["last_loss_in_two_parts"] == pytest.approx(0.1)
