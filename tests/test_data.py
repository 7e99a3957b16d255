"""Windows: the protocol behind published figures, determinism, and errors that say what to do."""

import json
import os
import sys
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flatquant.data import _kept_back, calibration_tokens, calibration_windows, evaluation_windows
from flatquant.errors import DataError
from tests.tiny_models import VOCAB, tiny_llama, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
TEXT = "".join(chr(32 + (i * i + i // 7) % 90) for i in range(997))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def no_data(monkeypatch):
    monkeypatch.delenv("FLATQUANT_DATA", raising=False)


def ids(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def refusal(function, *args, **kwargs) -> str:
    with pytest.raises(DataError) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------- from a text


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 400), st.integers(0, 2**31))
def test_calibration_windows_are_pieces_of_the_text(tmp_path_factory, samples, seqlen, seed):
    path = tmp_path_factory.mktemp("text") / "text.raw"
    path.write_text(TEXT)
    state = torch.get_rng_state()
    windows = calibration_tokens(path, TOKENIZER, samples=samples, seqlen=seqlen, seed=seed)
    assert windows.shape == (samples, seqlen)
    assert windows.dtype == torch.int64
    stream = TEXT.strip()
    assert all(TOKENIZER.decode(window) in stream for window in windows)
    assert torch.equal(windows, calibration_tokens(path, TOKENIZER, samples=samples, seqlen=seqlen, seed=seed))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("name", ["text.txt", "text.raw", "text.jsonl", "folder"])
def test_a_byte_order_mark_is_no_text(tmp_path, name):
    pieces = [TEXT, TEXT[::-1]] if name == "folder" else [TEXT]
    read = []
    for mark in (b"", b"\xef\xbb\xbf"):
        path = tmp_path / str(len(mark)) / name
        (path if name == "folder" else path.parent).mkdir(parents=True)
        for index, piece in enumerate(pieces):
            file = path / f"{index}.txt" if name == "folder" else path
            content = json.dumps({"text": piece}) if name.endswith(".jsonl") else piece
            file.write_bytes(mark + content.encode())
        read.append(
            (
                calibration_tokens(path, TOKENIZER, samples=9, seqlen=50, seed=0),
                evaluation_windows(path, TOKENIZER, seqlen=50),
            )
        )
    for plain, marked in zip(*read, strict=True):
        assert torch.equal(plain, marked)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(2, 120), st.integers(1, 4), st.integers(0, 3))
def test_windows_kept_back_overlap_nothing_and_change_nothing(samples, seqlen, kept, seed):
    stream = torch.arange(997)  # each token is its own place
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(stream) - seqlen + 1, (samples,), generator=generator)
    found = _kept_back(stream, starts, seqlen, kept, generator)
    if found is None:
        assert samples * 2 * seqlen + kept * 2 * seqlen > 900  # no room
        return
    assert found.shape[0] == kept
    assert min(64, seqlen) <= found.shape[1] <= seqlen
    assert (found.diff(dim=1) == 1).all()
    trained = (starts[:, None] + torch.arange(seqlen)).unique()
    assert found.unique().numel() == found.numel()
    assert not torch.isin(found, trained).any()


def test_windows_kept_back_leave_the_others_as_they_were(text):
    arguments = {"samples": 2, "seqlen": 50, "seed": 0}
    windows, kept = calibration_windows(text, TOKENIZER, **arguments, kept=2)
    assert torch.equal(windows, calibration_tokens(text, TOKENIZER, **arguments))
    assert kept is not None
    assert kept.shape == (2, 50)
    assert calibration_windows(text, TOKENIZER, **arguments)[1] is None


def test_where_there_is_no_room_nothing_is_kept_back(text):
    size = len(ids(TEXT.strip()))
    windows, kept = calibration_windows(text, TOKENIZER, samples=2, seqlen=size, seed=0, kept=2)
    assert windows.shape == (2, size)
    assert kept is None


def test_a_model_writes_the_windows_that_are_kept_back_too():
    windows, kept = calibration_windows("self", TOKENIZER, samples=2, seqlen=8, seed=0, kept=3, model=tiny_llama())
    assert kept is not None
    assert (windows.shape, kept.shape) == ((2, 8), (3, 8))


def test_other_seed_other_windows(text):
    a, b = (calibration_tokens(text, TOKENIZER, samples=4, seqlen=50, seed=seed) for seed in (0, 1))
    assert not torch.equal(a, b)


def test_last_token_can_be_drawn(text):
    size = len(ids(TEXT.strip()))
    windows = calibration_tokens(text, TOKENIZER, samples=200, seqlen=size - 1, seed=0)
    assert {tuple(window.tolist()) for window in windows} == {
        tuple(ids(TEXT.strip())[:-1]),
        tuple(ids(TEXT.strip())[1:]),
    }


def test_calibration_joins_stripped_lines(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("  one \n\n \n two\n")
    windows = calibration_tokens(path, TOKENIZER, samples=1, seqlen=8, seed=0)
    assert TOKENIZER.decode(windows[0]) == "one\n\ntwo"


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 400), st.one_of(st.none(), st.integers(1, 20)))
def test_evaluation_windows_are_disjoint_and_in_order(tmp_path_factory, seqlen, limit):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    windows = evaluation_windows(path, TOKENIZER, seqlen=seqlen, windows=limit)
    count = len(TEXT) // seqlen if limit is None else min(limit, len(TEXT) // seqlen)
    assert windows.shape == (count, seqlen)
    assert windows.flatten().tolist() == ids(TEXT)[: count * seqlen]


def test_evaluation_keeps_newlines_and_empties_blank_rows(tmp_path):
    path = tmp_path / "text.raw"
    path.write_text(" = A = \n \nb\n")
    expected = " = A = \n" + "\n\n" + "" + "\n\n" + "b\n"
    windows = evaluation_windows(path, TOKENIZER, seqlen=len(expected))
    assert TOKENIZER.decode(windows[0]) == expected


def test_jsonl_and_folders(tmp_path):
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "third"}) + "\n\n" + json.dumps({"text": "fourth"}) + "\n")
    (tmp_path / "a.txt").write_text("first\nsecond\n")
    (tmp_path / "ignored.md").write_text("no")
    joined = "first\n\nsecond\n\nthird\n\nfourth"
    windows = calibration_tokens(tmp_path, TOKENIZER, samples=1, seqlen=len(joined), seed=0)
    assert TOKENIZER.decode(windows[0]) == joined
    windows = evaluation_windows(tmp_path / "b.jsonl", TOKENIZER, seqlen=12)
    assert TOKENIZER.decode(windows[0]) == "third fourth"


def test_text_beyond_the_context_is_no_warning(text, recwarn):
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 16
    assert evaluation_windows(text, tokenizer, seqlen=100).shape == (9, 100)
    assert not recwarn.list


def test_too_short(text):
    for message in (
        refusal(calibration_tokens, text, TOKENIZER, samples=1, seqlen=2000, seed=0),
        refusal(evaluation_windows, text, TOKENIZER, seqlen=2000),
    ):
        assert "997" in message or str(len(TEXT.strip())) in message
        assert "2000" in message


@pytest.mark.parametrize("name,content", [("x.jsonl", "{"), ("x.jsonl", '{"a": 1}'), ("x.jsonl", '{"text": 1}')])
def test_bad_jsonl_names_the_line(tmp_path, name, content):
    (tmp_path / name).write_text("\n" + content)
    assert "line 2" in refusal(evaluation_windows, tmp_path / name, TOKENIZER, seqlen=4)


def test_bad_sources(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.pdf").write_text("x")
    (tmp_path / "x.txt").write_bytes(b"\xff\xfe\x00")
    assert "no such text" in refusal(evaluation_windows, "wikitext3", TOKENIZER)
    assert "holds no" in refusal(evaluation_windows, tmp_path / "empty", TOKENIZER)
    assert "unknown kind" in refusal(evaluation_windows, tmp_path / "x.pdf", TOKENIZER)
    assert "UTF-8" in refusal(evaluation_windows, tmp_path / "x.txt", TOKENIZER)
    assert "itself" in refusal(evaluation_windows, "self", TOKENIZER)
    assert "samples" in refusal(calibration_tokens, "self", TOKENIZER, samples=0, seqlen=4, seed=0)
    assert "model=" in refusal(calibration_tokens, "self", TOKENIZER, samples=1, seqlen=4, seed=0)


# --------------------------------------------------------------------------------------------------- named sources


def test_named_sources_come_from_the_data_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FLATQUANT_DATA", str(tmp_path))
    assert "wiki.test.raw" in refusal(evaluation_windows, "wikitext2", TOKENIZER)
    (tmp_path / "wikitext-2-raw").mkdir()
    (tmp_path / "wikitext-2-raw" / "wiki.test.raw").write_text("test\n")
    (tmp_path / "wikitext-2-raw" / "wiki.valid.raw").write_text("valid\n")
    (tmp_path / "c4").mkdir()
    (tmp_path / "c4" / "c4-en-sample.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    assert TOKENIZER.decode(evaluation_windows("wikitext2", TOKENIZER, seqlen=5)[0]) == "test\n"
    assert TOKENIZER.decode(evaluation_windows("c4", TOKENIZER, seqlen=7)[0]) == "one two"
    for source, expected in (("wikitext2", "valid"), ("c4", "one\n\ntwo")):
        windows = calibration_tokens(source, TOKENIZER, samples=1, seqlen=len(expected), seed=0)
        assert TOKENIZER.decode(windows[0]) == expected


def test_c4_stops_at_256_windows(tmp_path, monkeypatch):
    monkeypatch.setenv("FLATQUANT_DATA", str(tmp_path))
    (tmp_path / "c4").mkdir()
    (tmp_path / "c4" / "c4-en-sample.jsonl").write_text(json.dumps({"text": TEXT}) + "\n")
    assert len(evaluation_windows("c4", TOKENIZER, seqlen=2)) == 256
    assert len(evaluation_windows("c4", TOKENIZER, seqlen=2, windows=300)) == 300


def test_download_asks_for_the_published_splits(no_data, monkeypatch):
    asked = []

    def load_dataset(path, **arguments):
        asked.append((path, arguments["split"]))
        return {"text": [" = A = \n", "", "body\n"]}

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert TOKENIZER.decode(evaluation_windows("wikitext2", TOKENIZER, seqlen=17)[0]) == " = A = \n\n\n\n\nbody\n"
    calibration_tokens("wikitext2", TOKENIZER, samples=1, seqlen=4, seed=0)
    evaluation_windows("c4", TOKENIZER, seqlen=4)
    calibration_tokens("c4", TOKENIZER, samples=1, seqlen=4, seed=0)
    assert asked == [
        ("Salesforce/wikitext", "test"),
        ("Salesforce/wikitext", "train"),
        ("allenai/c4", "validation[0:1100]"),
        ("allenai/c4", "validation[1100:6100]"),
    ]


def test_unreachable_says_what_to_do(no_data, monkeypatch):
    def load_dataset(path, **arguments):
        raise ConnectionError("Couldn't reach the hub\nat all")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    for source in ("wikitext2", "c4"):
        message = refusal(evaluation_windows, source, TOKENIZER)
        assert "FLATQUANT_DATA" in message
        assert "--calibration self" in message
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install datasets" in refusal(evaluation_windows, "c4", TOKENIZER)


@pytest.mark.skipif(not os.environ.get("FLATQUANT_DATA"), reason="FLATQUANT_DATA names no folder of published texts")
def test_published_texts_are_read_whole():
    windows = evaluation_windows("wikitext2", TOKENIZER)
    assert windows.shape[1] == 2048
    assert len(windows) > 500  # one token a character
    assert "Robert Boulter" in TOKENIZER.decode(windows[0])


# ------------------------------------------------------------------------------------------------- from the model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_self_fills_every_window(dtype):
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
    assert seen[-1] == (120, 120)
    assert seen == sorted(seen)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], weight) for name, weight in model.named_parameters())


def test_self_is_one_text_per_seed():
    a, b, c = (
        calibration_tokens("self", TOKENIZER, samples=3, seqlen=16, seed=seed, model=tiny_llama()) for seed in (0, 0, 1)
    )
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_self_windows_longer_than_a_text():
    windows = calibration_tokens("self", TOKENIZER, samples=2, seqlen=300, seed=0, model=tiny_llama(layers=1))
    assert windows.shape == (2, 300)


def test_self_writes_what_the_model_finds_likely():
    from flatquant.evaluate import perplexity

    model = tiny_llama()
    own = calibration_tokens("self", TOKENIZER, samples=8, seqlen=32, seed=0, model=model)
    noise = torch.randint(VOCAB - 3, (8, 32), generator=torch.Generator().manual_seed(0))
    assert perplexity(model, own).value < 0.5 * perplexity(model, noise).value


def test_self_of_a_broken_model():
    model = tiny_llama()
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    assert "not finite" in refusal(calibration_tokens, "self", TOKENIZER, samples=1, seqlen=4, seed=0, model=model)
