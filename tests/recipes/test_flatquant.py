"""The quick preset, which has little time to make good what its start does worse."""

import pytest
from transformers import PreTrainedModel

from flatquant.evaluate import divergence_from_logits, reference_logits
from flatquant.recipes import flatquant, rtn
from flatquant.spec import Recipe
from tests.laws import calibrated, tokens_for
from tests.tiny_models import tiny_family, tiny_llama


def _divergence(model: PreTrainedModel, recipe: Recipe) -> float:
    windows = tokens_for(model, 8, 32, seed=7)
    return divergence_from_logits(calibrated(model, recipe)[0], reference_logits(model, windows), windows).kl


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::flatquant.errors.FitWarning")  # at 8 bits there is nothing to gain
@pytest.mark.parametrize("scheme", ["w8a8", "w4a8", "w4a16", "w3a16", "kv8"])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_quick_is_not_worse_than_plain_rounding(name: str, scheme: str) -> None:
    model = tiny_llama() if name == "llama" else tiny_family(name)
    assert _divergence(model, flatquant(scheme, "quick")) <= _divergence(model, rtn(scheme))


@pytest.mark.parametrize("scheme", ["w8a8", "kv8"])
def test_a_clip_costs_nothing_where_it_starts(scheme: str) -> None:
    """At 8 bits the learned clips, untrained, are as good as none; 0.85 of the range would be many times worse."""
    model = tiny_llama()
    plain = rtn(scheme)
    learned = Recipe(name="start", scheme=flatquant(scheme, "quick").scheme, transforms={"mlp_in": ()})
    assert _divergence(model, learned) <= 1.2 * _divergence(model, plain)
