"""Mixtures of texts: shares add up, every text is present, every stretch is mixed; what is no mixture is refused."""

from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flatquant.errors import DataError
from flatquant.mixture import Mixture, Source, calibrated_on, divided, interleaved

SHARES = st.lists(st.fractions(Fraction(1, 50), 50, max_denominator=50), min_size=1, max_size=6)


def refusal(text: str) -> str:
    with pytest.raises(DataError) as caught:
        Mixture.parse(text)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------- shares


@given(st.integers(0, 300), SHARES)
def test_shares_add_up_to_the_total(total, shares):
    parts = divided(total, shares)
    assert sum(parts) == total
    assert min(parts) >= (1 if total >= len(shares) else 0)


@given(st.integers(1, 300), SHARES)
def test_a_part_is_its_quota_rounded_where_no_part_would_be_empty(total, shares):
    quotas = [total * share / sum(shares) for share in shares]
    if min(quotas) >= 1:
        assert all(abs(part - quota) < 1 for part, quota in zip(divided(total, shares), quotas, strict=True))


@given(st.integers(1, 300), SHARES, st.integers(1, 9))
def test_only_the_proportions_of_shares_count(total, shares, factor):
    assert divided(total, shares) == divided(total, [share * factor for share in shares])


@given(st.integers(1, 100), st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_a_larger_share_is_never_fewer_windows(total, shares):
    parts = divided(total, [Fraction(share) for share in shares])
    ordered = sorted(zip(shares, parts, strict=True))
    for (a, few), (b, many) in pairwise(ordered):
        assert few <= many or a == b


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(1, 8))
def test_windows_kept_back_divide_without_remainder_where_they_can(shares, fewest):
    mixture = Mixture(tuple(Source(f"{i}.txt", Fraction(share)) for i, share in enumerate(shares)))
    count = mixture.evenly(fewest, 8)
    exact = [n for n in range(fewest, 9) if all(n * share % sum(shares) == 0 for share in shares)]
    assert count == (exact[0] if exact else max(fewest, len(shares)))


def test_what_is_kept_back_of_the_usual_mixtures():
    kept = {
        text: Mixture.parse(text).evenly(2, 8)
        for text in ("c4", "wikitext2,c4", "wikitext2:1,c4:3", "c4:1,self:20", "wikitext2:2,c4:2,self:4")
    }
    assert list(kept.values()) == [2, 2, 4, 2, 4]


# ---------------------------------------------------------------------------------------------------- order


@given(st.lists(st.integers(0, 40), min_size=1, max_size=5))
def test_the_order_holds_every_window_once(counts):
    order = interleaved(counts)
    assert sorted(order) == [(source, i) for source, n in enumerate(counts) for i in range(n)]
    for source, n in enumerate(counts):
        assert [i for s, i in order if s == source] == list(range(n))


@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.data())
def test_every_stretch_has_about_the_shares_of_the_whole(counts, data):
    order, total = [source for source, _ in interleaved(counts)], sum(counts)
    first = data.draw(st.integers(0, total))
    last = data.draw(st.integers(first, total))
    for source, n in enumerate(counts):
        share = n / total
        # Counts are multiples rounded: off by a half each, and the place itself by a half of every text.
        off = 0.5 + share * len(counts) / 2
        assert abs(order[:last].count(source) - last * share) <= off + 1e-9
        assert abs(order[first:last].count(source) - (last - first) * share) <= 2 * off + 1e-9


def test_batches_of_the_usual_mixture_are_alike():
    order = [source for source, _ in interleaved((32, 96))]
    assert all(sorted(order[i : i + 4]) == [0, 1, 1, 1] for i in range(0, 128, 4))


# ---------------------------------------------------------------------------------------------------- writing it


NAMES = st.sampled_from(["wikitext2", "c4", "self", "a.txt", "folder/b.jsonl", "../c.raw", "C:\\d.txt"])


@given(st.lists(st.tuples(NAMES, st.integers(1, 99)), min_size=1, max_size=5, unique_by=lambda pair: pair[0]))
def test_what_is_written_is_read(pairs):
    found = Mixture.parse(" , ".join(f"{name}:{share}" for name, share in pairs))
    assert found.sources == tuple(Source(name, Fraction(share)) for name, share in pairs)


def test_a_share_that_is_not_given_is_one():
    assert Mixture.parse("wikitext2,c4:2.5,x.txt").sources == (
        Source("wikitext2"),
        Source("c4", Fraction(5, 2)),
        Source("x.txt"),
    )


def test_names_are_written_without_folders_and_shares_in_lowest_numbers():
    assert str(Mixture.parse("wikitext2:0.5,/somewhere/x.txt:1.5,c4:1")) == "wikitext2:1,x.txt:3,c4:2"
    assert str(Mixture.parse("folder/x.txt:7")) == "x.txt"
    assert str(Mixture.parse(Path("/somewhere/x.txt"))) == "x.txt"


def test_paths_that_exist_may_hold_commas_and_colons(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a,b.txt", "c:3", "d,e:2", "f.txt"):
        Path(name).write_text("text")
    assert Mixture.parse("a,b.txt").sources == (Source("a,b.txt"),)
    assert Mixture.parse("a,b.txt:3,c:3,c4,d,e:2:5,f.txt:2").sources == (
        Source("a,b.txt", Fraction(3)),
        Source("c:3"),
        Source("c4"),
        Source("d,e:2", Fraction(5)),
        Source("f.txt", Fraction(2)),
    )
    assert Mixture.parse(Path("no,such:4")).sources == (Source("no,such:4"),)
    assert Mixture.parse("C:\\texts\\no.txt").sources == (Source("C:\\texts\\no.txt"),)


def test_what_is_no_mixture(tmp_path):
    (tmp_path / "x.txt").write_text("text")
    assert "share '0' of calibration text c4 is no number above 0" in refusal("wikitext2,c4:0")
    for share in ("x", "-1", "1e3", "nan", ""):
        assert f"share {share!r} of calibration text c4" in refusal(f"c4:{share}")
    assert "share 'two' of calibration text" in refusal(f"{tmp_path / 'x.txt'}:two")
    for text in ("", ",", "c4,", ",c4", "wikitext2,,c4", ":3"):
        assert "lacks a name" in refusal(text)
    assert "names c4 twice" in refusal("c4:1,wikitext2,c4:2")
    with pytest.raises(DataError, match="2 windows are too few for 3 texts"):
        Mixture.parse("c4,wikitext2,self").divided(2)


def test_very_long_names_are_no_paths():
    assert len(Mixture.parse("x" * 5000 + ",c4").sources) == 2


def test_what_the_model_writes():
    assert Mixture.parse("wikitext2,c4").written(10) == 0
    assert Mixture.parse("wikitext2,self:4").written(10) == 8
    assert not Mixture.parse("c4").writes


# ---------------------------------------------------------------------------------------------------- telling


def test_a_report_says_how_much_of_each_text():
    data = {"source": "wikitext2:1,c4:3", "samples": 4, "seqlen": 16}
    data["sources"] = [{"source": "wikitext2", "windows": 1, "cut": "x"}, {"source": "c4", "windows": 3, "cut": "y"}]
    assert calibrated_on(data) == "wikitext2:1,c4:3, 4 windows of 16 tokens (1 of wikitext2 x, 3 of c4 y)"
    assert calibrated_on({**data, "sources": 2}) == "wikitext2:1,c4:3, 4 windows of 16 tokens"
    assert calibrated_on(None) == calibrated_on([]) == calibrated_on({"source": "imported", "samples": 0}) == ""
