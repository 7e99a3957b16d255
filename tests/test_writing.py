"""Text that a model writes: full windows, one text a seed, diverse prompts, conversations by chat templates."""

import pytest
import torch

from flatquant import writing
from flatquant.data import calibration_tokens
from flatquant.errors import DataError
from tests.tiny_models import VOCAB, tiny_llama, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
END = VOCAB - 1
CHAT = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def chat_tokenizer(template: str = CHAT):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def write(tokenizer=TOKENIZER, model=None, *, samples=4, seqlen=256, seed=0, **options):
    return writing.write(model or tiny_llama(), tokenizer, samples=samples, seqlen=seqlen, seed=seed, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_window_is_full(dtype):
    model = tiny_llama(dtype=dtype)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    state, seen = torch.get_rng_state(), []
    windows = calibration_tokens(
        "self", TOKENIZER, samples=5, seqlen=24, seed=3, model=model, progress=lambda *at: seen.append(at)
    )
    assert windows.shape == (5, 24)
    assert windows.dtype == torch.int64
    assert int(windows.max()) < VOCAB - 3  # no special token, so no end of text either
    assert len({tuple(window.tolist()) for window in windows}) == 5
    assert seen[-1][0] == seen[-1][1] >= 5 * 24
    assert seen == sorted(seen)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], weight) for name, weight in model.named_parameters())


@pytest.mark.parametrize("tokenizer", [TOKENIZER, chat_tokenizer()], ids=["prose", "chat"])
def test_one_text_per_seed(tokenizer):
    a, b, c = (write(tokenizer, samples=3, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_windows_longer_than_a_text():
    assert write(model=tiny_llama(layers=1), samples=2, seqlen=300).shape == (2, 300)


def test_the_model_finds_it_likely():
    from flatquant.evaluate import perplexity

    model = tiny_llama()
    own = write(model=model, samples=8, seqlen=256)[:, 128:]  # behind the prompts
    noise = torch.randint(VOCAB - 3, (8, 128), generator=torch.Generator().manual_seed(0))
    assert perplexity(model, own).value < 0.5 * perplexity(model, noise).value


@pytest.mark.parametrize("tokenizer", [TOKENIZER, chat_tokenizer()], ids=["prose", "chat"])
def test_texts_begin_with_the_prompts(tokenizer, monkeypatch: pytest.MonkeyPatch):
    chat = tokenizer is not TOKENIZER
    script = writing._conversations(tiny_llama(), tokenizer, seed=0) if chat else writing._prose(tokenizer, seed=0)
    for rows in (256,) if chat else (3, 256):  # replies that end take prompts too
        monkeypatch.setattr(writing, "_MAX_ROWS", rows)
        texts = write(tokenizer, samples=7, seqlen=script.length)[:: 1 + chat]
        for text, prompt in zip(texts, script.prompts, strict=False):
            assert tuple(text[: len(prompt) - script.preamble].tolist()) == prompt[script.preamble :]


def test_prompts_are_diverse():
    topics = " ".join(writing._TOPICS.split()).split("; ")
    assert len(set(topics)) == len(topics) >= 64
    assert all(topic and "\n" not in topic for topic in topics)
    for forms in (writing._REQUESTS, writing._OPENINGS):
        pairs = writing._pairs(topics, forms, torch.Generator().manual_seed(0))
        assert len(set(pairs)) == len(pairs) == len(topics) * len(forms)
        for first in range(0, len(pairs), len(topics)):
            assert {topic for topic, _ in pairs[first : first + len(topics)]} == set(topics)
        seen = [form for _, form in pairs[: len(topics)]]
        counts = [seen.count(form) for form in forms]
        assert max(counts) - min(counts) <= 1
        assert pairs != writing._pairs(topics, forms, torch.Generator().manual_seed(1))


# ---------------------------------------------------------------------------------------------------- chat


def test_a_chat_model_writes_conversations_by_its_template():
    """Every user's turn is one of the prompts; every reply that ends is closed and followed by another conversation."""
    windows = write(chat_tokenizer(), tiny_llama(seed=1), samples=24, seqlen=256)[::2]
    text = "".join(chr(t) if t < VOCAB - 3 else {VOCAB - 2: "<s>", END: "</s>"}[t] for t in windows.flatten().tolist())
    starts = text.split("<s>[user] ")
    topics = " ".join(writing._TOPICS.split()).split("; ")
    asked = {request.format(topic) for topic in topics for request in writing._REQUESTS}
    assert starts[0] == ""
    assert len(starts) > 13  # some replies end before their text does
    ended = 0
    for said in starts[1:]:
        question, _, reply = said.partition("</s>\n[assistant] ")
        assert question in asked or any(request.startswith(question) for request in asked)  # the last may be cut
        assert reply.count("</s>") <= 1
        if "</s>" in reply:
            ended += 1
            assert reply.endswith("</s>\n") or said is starts[-1]
    assert ended > 0


def test_a_chat_model_writes_every_second_window_as_prose():
    tokenizer, model = chat_tokenizer(), tiny_llama(seed=1)
    seen = []
    windows = write(tokenizer, model, samples=7, seqlen=256, progress=lambda *at: seen.append(at))
    assert [bool((window == END).any() or (window == VOCAB - 2).any()) for window in windows] == [True, False] * 3 + [
        True
    ]
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1]
    assert torch.equal(write(tokenizer, model, samples=1, seqlen=256)[0, :20], windows[0, :20])


def test_prose_without_topics_begins_with_a_word():
    for tokenizer in (TOKENIZER, chat_tokenizer()):
        texts = ["".join(map(chr, window.tolist())) for window in write(tokenizer, samples=6, seqlen=256, topics=False)]
        assert all(text.startswith(writing._OPENINGS) for text in texts)


def test_a_turn_ends_with_what_the_template_puts_there():
    plain = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    script = writing._conversations(tiny_llama(), chat_tokenizer(plain), seed=0)
    assert script.ends == {END}  # the model's own: a line break is no end of a turn
    assert script.closing == (ord("\n"),)
    script = writing._conversations(tiny_llama(), chat_tokenizer(CHAT.replace("eos_token", "bos_token")), seed=0)
    assert script.ends == {VOCAB - 2, END}
    assert writing._prose(TOKENIZER, seed=0).ends == frozenset()


def test_a_template_with_much_to_say_leaves_room_for_a_reply():
    script = writing._conversations(tiny_llama(), chat_tokenizer("x" * 300 + CHAT), seed=0)
    assert script.length >= max(map(len, script.prompts)) + 100
    assert script.length == write(chat_tokenizer("x" * 300 + CHAT), samples=1, seqlen=script.length).shape[1]


def test_the_date_of_a_template_is_always_the_same():
    dated = "{{ strftime_now('%d %b %Y') }} " + CHAT
    prompt, plain = (writing._conversations(tiny_llama(), chat_tokenizer(t), seed=0).prompts[0] for t in (dated, CHAT))
    assert prompt == (*map(ord, "1 January 2025 "), *plain)


def test_a_template_that_refuses_is_said():
    refusing = "{{ raise_exception('only system turns\nhere') }}"
    with pytest.raises(DataError, match=r"^the tokenizer's chat template refuses a turn \(only system turns\); set"):
        write(chat_tokenizer(refusing), samples=1)


def test_a_broken_model():
    model = tiny_llama()
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(DataError, match="not finite"):
        write(model=model, samples=1, seqlen=4)
