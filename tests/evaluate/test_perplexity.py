"""Laws of perplexity."""

import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flatquant.errors import DataError, FlatQuantError
from flatquant.evaluate import perplexity
from tests.tiny_models import VOCAB, tiny_llama

MODEL = tiny_llama()


def windows(n: int, t: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCAB, (n, t), generator=torch.Generator().manual_seed(seed))


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 3), st.integers(2, 40), st.integers(5, 200))
def test_uniform_logits_have_the_vocabulary_as_perplexity(n, t, vocab):
    model = tiny_llama(tied=False, vocab=vocab, layers=1)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert perplexity(model, windows(n, t) % vocab).value == pytest.approx(vocab, rel=1e-5)


def test_is_the_textbook_formula():
    ids = windows(3, 20)
    log_p = MODEL(ids).logits.detach().double().log_softmax(dim=-1)
    nll = -log_p[:, :-1].gather(2, ids[:, 1:, None])[..., 0].mean(dim=1)
    result = perplexity(MODEL, ids)
    assert result.nll == pytest.approx(nll.tolist(), rel=1e-5)
    assert result.value == pytest.approx(math.exp(nll.mean()), rel=1e-5)
    assert (result.windows, result.seqlen) == (3, 20)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 5), st.integers(1, 50))
def test_chunks_and_batches_change_nothing(batch_size, chunk):
    ids = windows(4, 33)
    expected = perplexity(MODEL, ids).nll
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[perplexity.__module__], "CHUNK", chunk)
        assert perplexity(MODEL, ids, batch_size=batch_size).nll == pytest.approx(expected, rel=1e-5)


def test_half_precision_is_close():
    ids = windows(2, 64)
    half = perplexity(tiny_llama(dtype=torch.bfloat16), ids).value
    assert half == pytest.approx(perplexity(MODEL, ids).value, rel=0.1)


def test_progress_and_no_cache():
    model, seen, used = tiny_llama(), [], []
    forward = model.forward
    model.forward = lambda **arguments: used.append(arguments["use_cache"]) or forward(**arguments)
    perplexity(model, windows(5, 8), batch_size=2, progress=lambda *at: seen.append(at))
    assert seen == [(2, 5), (4, 5), (5, 5)]
    assert used == [False] * 3


def test_overflow_names_the_window():
    model = tiny_llama(tied=False)
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = torch.nan
    ids = windows(3, 8) % 7
    ids[1, 3] = 7
    with pytest.raises(FlatQuantError, match=r"^the model's likelihood of window 1 is nan.*$"):
        perplexity(model, ids, batch_size=3)


@pytest.mark.parametrize(
    "ids",
    [
        torch.zeros(4, dtype=torch.int64),
        torch.zeros(1, 1, dtype=torch.int64),
        torch.zeros(0, 8, dtype=torch.int64),
        torch.zeros(1, 8),
        torch.full((1, 8), VOCAB),
        torch.full((1, 8), -1),
    ],
)
def test_bad_windows(ids):
    with pytest.raises(DataError, match=r"^windows [^\n]*$"):
        perplexity(MODEL, ids)


def test_bad_batch_size():
    with pytest.raises(DataError, match="batch_size"):
        perplexity(MODEL, windows(1, 8), batch_size=0)
