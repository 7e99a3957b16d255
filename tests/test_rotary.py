"""Our rotary embedding of a constant against what transformers' own does to keys."""

import importlib

import pytest
import torch
from transformers import AutoConfig

from flatquant.rotary import Angles, turned, turned_back

# Family, pairing, channels that are turned of 12.
CASES = [
    ("llama", "halves", 12),
    ("qwen2", "halves", 12),
    ("gemma2", "halves", 12),
    ("phi3", "halves", 8),
    ("glm4", "neighbours", 8),
    ("cohere", "interleaved", 12),
]


def angles_of(family: str, r: int, positions: torch.Tensor) -> Angles:
    """As the family's own rotary embedding gives them."""
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    config = AutoConfig.for_model(
        family,
        hidden_size=48,
        num_attention_heads=4,
        head_dim=12,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": r / 12},
    )
    name = next(n for n in dir(module) if n.endswith("RotaryEmbedding") and n.lower().startswith(family))
    return Angles(*getattr(module, name)(config)(torch.zeros(1, dtype=torch.float64), positions))


@pytest.mark.parametrize("family, pairing, r", CASES)
def test_it_turns_as_the_family_does(family: str, pairing, r: int) -> None:
    positions = torch.tensor([[0, 1, 2, 9, 50], [7, 0, 3, 4, 5]])
    angles = angles_of(family, r, positions)
    assert angles.cos.shape == (2, 5, r)
    x = torch.randn(2, 3, 5, 12, dtype=torch.float64)
    apply = importlib.import_module(f"transformers.models.{family}.modeling_{family}").apply_rotary_pos_emb
    want = apply(x, x, *angles)[1]
    pairs = angles.of_pairs(pairing)
    assert pairs.shape == (2, 5, r)
    near = 1e-6 if family == "cohere" else 1e-12  # which turns in float32
    torch.testing.assert_close(turned(x, pairs, pairing), want, rtol=near, atol=near)
    torch.testing.assert_close(turned_back(want, pairs, pairing), x, rtol=10 * near, atol=10 * near)


def test_a_scaled_rotation_is_undone() -> None:
    angle = torch.rand(1, 4, 3, dtype=torch.float64).repeat(1, 1, 2)
    pairs = Angles(1.3 * angle.cos(), 1.3 * angle.sin()).of_pairs("halves")
    x = torch.randn(2, 1, 4, 6, dtype=torch.float64)
    y = turned(x, pairs, "halves")
    torch.testing.assert_close(y.norm(dim=-1), 1.3 * x.norm(dim=-1))
    torch.testing.assert_close(turned_back(y, pairs, "halves"), x)


def test_angles_are_found_by_what_they_are() -> None:
    pair = torch.zeros(1, 4, 6), torch.ones(1, 4, 6)
    assert Angles.among(pair) == pair
    assert Angles.among(list(pair)) is not None
    for other in (None, pair[0], (pair[0],), (pair[0], None), (pair[0], pair[1][:, :2]), (pair[0].long(),) * 2):
        assert Angles.among(other) is None
    assert Angles.among((torch.zeros(4, 6),) * 2) is None
