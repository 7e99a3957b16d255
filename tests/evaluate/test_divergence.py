"""Laws of the divergence between two models."""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flatquant.errors import DataError, FlatQuantError
from flatquant.evaluate import divergence, divergence_from_logits, reference_logits
from tests.tiny_models import VOCAB, tiny_llama

MODEL = tiny_llama()
OTHER = tiny_llama(seed=1)


def windows(n: int, t: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCAB, (n, t), generator=torch.Generator().manual_seed(seed))


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 3), st.integers(2, 40))
def test_of_a_model_with_itself_is_nothing(seed, n, t):
    model = tiny_llama(seed=seed, layers=1)
    result = divergence(model, model, windows(n, t))
    assert (result.kl, result.top1, result.tokens) == (0.0, 1.0, n * t)


def test_is_the_textbook_formula():
    ids = windows(3, 20)
    p, q = (model(ids).logits.detach().double().log_softmax(dim=-1) for model in (OTHER, MODEL))
    result = divergence(MODEL, OTHER, ids)
    assert result.kl == pytest.approx(float((p.exp() * (p - q)).sum(dim=-1).mean()), rel=1e-4)
    assert result.top1 == pytest.approx(float((p.argmax(dim=-1) == q.argmax(dim=-1)).double().mean()))


def test_is_positive_and_not_symmetric():
    ids = windows(2, 30)
    there, back = divergence(MODEL, OTHER, ids), divergence(OTHER, MODEL, ids)
    assert there.kl > 0
    assert back.kl > 0
    assert there.kl != pytest.approx(back.kl, rel=1e-3)
    assert there.top1 == back.top1


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 5), st.integers(1, 50))
def test_chunks_and_batches_change_nothing(batch_size, chunk):
    ids = windows(4, 33)
    expected = divergence(MODEL, OTHER, ids)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[divergence.__module__], "CHUNK", chunk)
        result = divergence(MODEL, OTHER, ids, batch_size=batch_size)
    assert result.kl == pytest.approx(expected.kl, rel=1e-4)
    assert result.top1 == expected.top1


@pytest.mark.parametrize("batch_size", [1, 3])
def test_kept_logits_stand_for_the_reference(batch_size):
    ids = windows(3, 40)
    kept = reference_logits(OTHER, ids, batch_size=batch_size)
    assert [tuple(logits.shape) for logits in kept] == [(40, VOCAB)] * 3
    assert all(logits.dtype == torch.float16 and float(logits.max()) == 0 for logits in kept)
    expected = divergence(MODEL, OTHER, ids)
    result = divergence_from_logits(MODEL, kept, ids, batch_size=batch_size)
    assert result.kl == pytest.approx(expected.kl, rel=2e-3)
    assert result.top1 == pytest.approx(expected.top1)
    itself = divergence_from_logits(OTHER, kept, ids, batch_size=batch_size)
    assert abs(itself.kl) < 1e-5
    assert itself.top1 == 1


def test_huge_logits_do_not_overflow():
    model = tiny_llama(tied=False)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e6)
    ids = windows(1, 8)
    assert abs(divergence_from_logits(model, reference_logits(model, ids), ids).kl) < 1e-3


def test_progress():
    seen = []
    divergence(MODEL, OTHER, windows(5, 8), batch_size=2, progress=lambda *at: seen.append(at))
    assert seen == [(2, 5), (4, 5), (5, 5)]
    seen.clear()
    reference_logits(MODEL, windows(2, 8), progress=lambda *at: seen.append(at))
    assert seen == [(1, 2), (2, 2)]


def test_overflow_names_the_window():
    model = tiny_llama(tied=False)
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = torch.nan
    ids = windows(3, 8) % 7
    ids[2, 0] = 7
    with pytest.raises(FlatQuantError, match=r"^the divergence in window 2 [^\n]*$"):
        divergence(model, MODEL, ids)


def test_what_does_not_fit_together():
    ids = windows(2, 8) % 64
    with pytest.raises(DataError, match=r"^[^\n]*one vocabulary[^\n]*$"):
        divergence(tiny_llama(vocab=64), MODEL, ids)
    with pytest.raises(DataError, match="1 windows, and there are 2"):
        divergence_from_logits(MODEL, reference_logits(MODEL, ids[:1]), ids)
    with pytest.raises(DataError, match="windows"):
        reference_logits(MODEL, ids[0])
