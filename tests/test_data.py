"""Windows: the protocol behind published figures, determinism, and errors that say what to do."""

import json
import os
import sys
import types

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flatquant.data import (
    ACROSS,
    INSIDE,
    WRITTEN,
    _kept_back,
    calibration_tokens,
    calibration_windows,
    check_source,
    evaluation_windows,
    read_parts,
    written_part,
)
from flatquant.errors import DataError
from flatquant.mixture import Mixture, interleaved
from tests.tiny_models import tiny_llama, tiny_tokenizer

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


def test_a_text_alone_is_drawn_as_ever(text):
    """Stripped lines joined with a blank line, starts from one call of randint: results depend on these windows."""
    stream = torch.tensor(ids(TEXT.strip()))
    for samples, seqlen, seed in ((1, 1, 0), (5, 40, 3), (64, 128, 17)):
        generator = torch.Generator().manual_seed(seed)
        starts = torch.randint(len(stream) - seqlen + 1, (samples,), generator=generator)
        expected = torch.stack([stream[start : start + seqlen] for start in starts])
        for source in (text, str(text), f"{text}:3"):
            assert torch.equal(
                calibration_tokens(source, TOKENIZER, samples=samples, seqlen=seqlen, seed=seed), expected
            )


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
    assert "give wikitext2, c4, or a .txt" in refusal(evaluation_windows, "wikitext3", TOKENIZER)
    assert "holds no" in refusal(evaluation_windows, tmp_path / "empty", TOKENIZER)
    assert "unknown kind" in refusal(evaluation_windows, tmp_path / "x.pdf", TOKENIZER)
    assert "UTF-8" in refusal(evaluation_windows, tmp_path / "x.txt", TOKENIZER)
    assert "itself" in refusal(evaluation_windows, "self", TOKENIZER)
    assert "samples" in refusal(calibration_tokens, "self", TOKENIZER, samples=0, seqlen=4, seed=0)
    assert "model=" in refusal(calibration_tokens, "self", TOKENIZER, samples=1, seqlen=4, seed=0)


# ------------------------------------------------------------------------------------------------------- mixtures


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Three texts with no character in common."""
    folder = tmp_path_factory.mktemp("three")
    for name, alphabet in (("a", "abcdefg"), ("b", "hijklmnop"), ("c", "qrstuvw")):
        (folder / f"{name}.txt").write_text("".join(alphabet[(i * i + i // 5) % len(alphabet)] for i in range(3000)))
    return folder


def of(window) -> str:
    """The text of a window."""
    (name,) = {"a" if t <= ord("g") else "b" if t <= ord("p") else "c" for t in window.tolist()}
    return name


@settings(max_examples=25, deadline=None)
@given(
    st.dictionaries(st.sampled_from("abc"), st.integers(1, 5), min_size=1), st.integers(3, 30), st.integers(0, 2**31)
)
def test_a_mixture_holds_each_text_as_drawn_alone_by_its_share(three, shares, samples, seed):
    source = ",".join(f"{three / name}.txt:{share}" for name, share in shares.items())
    arguments = {"seqlen": 20, "seed": seed}
    windows, kept = calibration_windows(source, TOKENIZER, samples=samples, kept=3, **arguments)
    counts = Mixture.parse(source).divided(samples)
    names = [of(window) for window in windows]
    assert names == [list(shares)[text] for text, _ in interleaved(counts)]
    assert kept is not None
    assert sorted(map(of, kept)) == sorted(list(shares)[t] for t, _ in interleaved(Mixture.parse(source).divided(3)))
    for name, count in zip(shares, counts, strict=True):
        own = windows[[i for i, found in enumerate(names) if found == name]]
        assert torch.equal(own, calibration_tokens(three / f"{name}.txt", TOKENIZER, samples=count, **arguments))
    again, without = calibration_windows(source, TOKENIZER, samples=samples, **arguments)
    assert torch.equal(again, windows)
    assert without is None


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 12), st.integers(2, 60), st.integers(2, 4), st.integers(0, 9))
def test_windows_of_a_mixture_kept_back_overlap_none(tmp_path_factory, samples, seqlen, kept, seed):
    folder = tmp_path_factory.mktemp("places")  # every three characters say where they stand
    for name, first in (("a", 32), ("b", 76)):
        digits = "".join(chr(first + i // 961) + chr(first + i // 31 % 31) + chr(first + i % 31) for i in range(900))
        (folder / f"{name}.txt").write_text("\n".join([digits]))
    source = f"{folder / 'a.txt'},{folder / 'b.txt'}:2"
    windows, back = calibration_windows(source, TOKENIZER, samples=samples, seqlen=seqlen, seed=seed, kept=kept)
    assert back is not None
    texts = [(folder / f"{name}.txt").read_text().strip() for name in "ab"]

    def places(window) -> set[tuple[int, int]]:
        piece = TOKENIZER.decode(window)
        text = int(any(ord(c) >= 76 for c in piece))
        if len(window) < 5:
            return set()  # too short to say where it stands
        assert texts[text].count(piece) == 1
        start = texts[text].index(piece)
        return {(text, place) for place in range(start, start + len(window))}

    trained = set().union(*map(places, windows))
    for window in back:
        assert not places(window) & trained


def test_windows_kept_back_are_as_short_as_the_shortest(three, tmp_path):
    (tmp_path / "short.txt").write_text("xyz" * 100)
    source, lengths = f"{three / 'a.txt'},{tmp_path / 'short.txt'}", set()
    for seed in range(9):
        windows, kept = calibration_windows(source, TOKENIZER, samples=2, seqlen=130, seed=seed, kept=2)
        assert windows.shape == (2, 130)
        assert kept is not None
        assert len(kept) == 2
        lengths.add(kept.shape[1])
    assert lengths == {130, 65}
    (tmp_path / "short.txt").write_text("xyz" * 50)
    assert calibration_windows(source, TOKENIZER, samples=2, seqlen=130, seed=0, kept=2)[1] is None


def test_a_model_writes_its_share(three):
    source, model = f"{three / 'a.txt'},self:3", tiny_llama()
    sizes = {"samples": 8, "seqlen": 16, "seed": 0, "kept": 4}
    windows, kept = calibration_windows(source, TOKENIZER, **sizes, model=model)
    assert (windows.shape, kept.shape) == ((8, 16), (4, 16))
    mixture = Mixture.parse(source)
    read, none = read_parts(mixture, TOKENIZER, **sizes)
    own = written_part(mixture, model, TOKENIZER, **sizes)
    assert none is None
    assert read is not None
    assert (read.cut, own.cut) == (ACROSS, WRITTEN)
    assert ([len(read.tokens), len(read.kept)], [len(own.tokens), len(own.kept)]) == ([2, 1], [6, 3])
    parts = [read.tokens, own.tokens]
    assert torch.equal(windows, torch.stack([parts[text][i] for text, i in interleaved((2, 6))]))
    assert "model=" in refusal(calibration_windows, source, TOKENIZER, **sizes)


def test_every_text_of_a_mixture_is_checked_at_once(three, tmp_path, no_data, monkeypatch):
    a = three / "a.txt"
    check_source(f"self,{a}:3")
    (tmp_path / "x.pdf").write_text("x")
    assert "no such text: missing.txt" in refusal(check_source, f"self,{a}:3,missing.txt:2")
    assert "unknown kind" in refusal(check_source, f"{a},{tmp_path / 'x.pdf'}:2")
    assert "share a.txt" in refusal(check_source, f"{a},{three}:2")
    monkeypatch.chdir(three)
    assert "share a.txt" in refusal(check_source, f"{a},a.txt:2")
    assert "share a.txt" in refusal(calibration_windows, f"{a},a.txt:2", TOKENIZER, samples=4, seqlen=4, seed=0)
    assert "no number above 0" in refusal(check_source, "c4:none")
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "downloading c4 needs" in refusal(check_source, f"{a},c4")
    assert "too few for 2 texts" in refusal(calibration_tokens, f"{a},self", TOKENIZER, samples=1, seqlen=4, seed=0)


# --------------------------------------------------------------------------------------------------------------- C4


@pytest.fixture
def c4(tmp_path, monkeypatch):
    """A C4 file of documents of 10, 20, ... 400 characters, each with its own beginning and end."""
    (tmp_path / "c4").mkdir()
    documents = [f"<{i:02}>" + chr(48 + i) * (10 * i - 8) + f"<{i:02}>" for i in range(1, 41)]
    documents = documents[::2] + documents[1::2]  # the halves have documents of every length
    file = tmp_path / "c4" / "c4-en-sample.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    monkeypatch.setenv("FLATQUANT_DATA", str(tmp_path))
    return documents


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 8), st.integers(0, 3), st.integers(5, 210), st.integers(0, 99))
def test_windows_of_c4_lie_inside_documents_that_evaluation_does_not_read(c4, samples, kept, seqlen, seed):
    mixture, sizes = Mixture.parse("c4"), {"samples": samples, "seqlen": seqlen, "seed": seed, "kept": kept}
    (part,) = read_parts(mixture, TOKENIZER, **sizes)
    assert part.cut == INSIDE
    windows, back = calibration_windows("c4", TOKENIZER, **sizes)
    assert torch.equal(part.tokens, windows)
    back = windows[:0] if back is None else back
    homes = [[i for i, text in enumerate(c4) if TOKENIZER.decode(window) in text] for window in [*windows, *back]]
    assert all(home and min(home) >= 20 for home in homes)
    if seqlen > 20:  # more than the ends, that documents do not share
        assert all(len(home) == 1 for home in homes)
        assert len({home[0] for home in homes}) == samples + len(back)
    assert torch.equal(windows, calibration_tokens("c4", TOKENIZER, samples=samples, seqlen=seqlen, seed=seed))


def test_documents_of_c4_are_joined_where_too_few_are_long_enough(c4):
    for samples, seqlen, cut in ((8, 210, INSIDE), (17, 210, ACROSS), (1, 401, ACROSS)):
        (part,) = read_parts(Mixture.parse("c4"), TOKENIZER, samples=samples, seqlen=seqlen, seed=0, kept=1)
        assert part.cut == cut
        assert part.tokens.shape == (samples, seqlen)


def test_c4_is_evaluated_on_the_other_documents(c4):
    joined = " ".join(c4[:20])
    windows = evaluation_windows("c4", TOKENIZER, seqlen=len(joined))
    assert TOKENIZER.decode(windows[0]) == joined
    assert len(windows) == 1


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
    assert TOKENIZER.decode(evaluation_windows("c4", TOKENIZER, seqlen=3)[0]) == "one"
    for source, expected in (("wikitext2", "valid"), ("c4", "two")):
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
        ("allenai/c4", "validation[1100:21100]"),
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
