"""The ladder: a row for every rung and scheme of any model, kept as it is made, and made again only when asked for."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
from benchmarks import ladder, tables

from flatquant.compare import Bench
from flatquant.errors import SpecError
from flatquant.spec import SITES, QuantSpec
from tests.tiny_models import tiny_llama, tiny_tokenizer

MODEL = "Tiny-2.5-Base"  # a dot that begins no ending


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ladder")
    tiny_llama(layers=3).save_pretrained(folder / MODEL)
    tiny_tokenizer().save_pretrained(folder / MODEL)
    (folder / "code.txt").write_text("def f(x):\n    return x + 1\n" * 40)
    (folder / "data" / "wikitext-2-raw").mkdir(parents=True)
    (folder / "data" / "c4").mkdir()
    for name in ("valid", "test"):
        (folder / "data" / "wikitext-2-raw" / f"wiki.{name}.raw").write_text("A river rises in the hills.\n" * 60)
    documents = "".join(json.dumps({"text": f"{i} sheep are in the meadow. " * 9}) + "\n" for i in range(40))
    (folder / "data" / "c4" / "c4-en-sample.jsonl").write_text(documents)
    return folder


@pytest.fixture
def run(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run the script, and return the content of its results file."""
    monkeypatch.setenv("FLATQUANT_DATA", str(place / "data"))

    def call(*arguments: object) -> dict:
        given = [str(place / MODEL), "--tiny", "--device", "cpu", "--out", str(tmp_path), *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", ["ladder", *given])
        ladder.main()
        (file,) = tmp_path.glob("*.json")
        assert file.name == "ladder-tiny-2.5-base.json"
        return json.loads(file.read_text())

    return call


def test_rows_are_kept_and_not_made_twice(run, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rungs = ("--methods", "rtn", "best", "--schemes", "w4a4kv4")
    first = run(*rungs, "--texts", place / "code.txt")
    rows = {(s["rung"], s["scheme"]): s for s in first["samples"]}
    assert list(rows) == [("rtn", "w4a4kv4"), ("best", "w4a4kv4")]
    for row in rows.values():
        assert row["perplexity"].keys() == row["divergence"].keys() == {"wikitext2", "c4", "code.txt"}
        assert row["kl"] == row["divergence"]["wikitext2"]["kl"] > 0
        assert row["verdict"]["word"] in ("excellent", "good", "degraded", "destroyed")
        assert row["seconds"] > 0
    assert rows["rtn", "w4a4kv4"]["calibration"] is None
    assert rows["best", "w4a4kv4"]["calibration"] == "wikitext2:1,c4:3"
    assert first["metrics"]["rows"].keys() == {"rtn/w4a4kv4", "best/w4a4kv4"}
    assert first["metrics"]["original"]["perplexity"].keys() == {"wikitext2", "c4", "code.txt"}
    assert str(place) not in json.dumps(first)

    made: list[str] = []
    measure = Bench.measure
    monkeypatch.setattr(Bench, "measure", lambda self, parts: (made.append(parts.name), measure(self, parts))[1])
    second = run(*rungs, "--texts", place / "code.txt", "--methods", "rtn", "best", "quarot")
    assert made == ["quarot"]
    assert second["samples"][:2] == first["samples"]
    run("--methods", "rtn", "--schemes", "w4a4kv4", "--texts", place / "code.txt", "--again")
    assert made == ["quarot", "rtn"]
    other = run("--methods", "rtn", "--schemes", "w4a4kv4")  # measured on less: another row
    assert made == ["quarot", "rtn", "rtn"]
    assert len(other["samples"]) == 4
    assert other["metrics"]["rows"].keys() == {"rtn/w4a4kv4"}


def test_what_a_method_refuses_is_a_row(run, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self):
        raise SpecError("not this\nscheme")

    monkeypatch.setattr(ladder.Job, "recipe", refuse)
    found = run("--methods", "rtn", "--schemes", "kv4", "--only-texts", "--texts", place / "code.txt")
    (row,) = found["samples"]
    assert (row["rung"], row["scheme"], row["error"]) == ("rtn", "w16a16kv4", "not this scheme")
    assert found["metrics"]["rows"] == {"rtn/w16a16kv4": {"error": "not this scheme"}}


def test_every_rung_takes_every_scheme() -> None:
    for rung in (*ladder.RUNGS, *ladder.PRESETS):
        for scheme in ladder.SCHEMES:
            made = ladder.Job(rung, scheme, 0).recipe()
            assert str(made.scheme) == ladder.Job(rung, scheme, 0).key["scheme"]


def test_a_rung_changes_its_recipe() -> None:
    plain = ladder.Job("best", "w4a4kv4", 0).recipe()
    made = ladder.Job("best:end_to_end.steps=800:scheme.key_offset=mean:factors=hadamard", "w4a4kv4", 0).recipe()
    assert plain.end_to_end is not None
    assert made.end_to_end == dataclasses.replace(plain.end_to_end, steps=800)
    assert made.scheme == dataclasses.replace(plain.scheme, key_offset="mean")
    assert [t.init for t in made.transforms["mlp_in"]] == ["second_moment", "hadamard"]
    assert (made.fit, made.data, made.solver) == (plain.fit, plain.data, plain.solver)


def test_a_rung_puts_matrices_into_blocks() -> None:
    """Of the size in which weights share scales, learned where products were, fixed where nothing was."""

    def sizes(rung: str, scheme: str) -> dict[str, list[tuple[str, str, int]]]:
        made = ladder.Job(rung, scheme, 0).recipe()
        return {site: [(t.kind, t.parameters, t.size) for t in chain] for site, chain in made.transforms.items()}

    scale, head = ("diagonal", "inverse", 0), ("matrix", "inverse", 0)
    for scheme, own in (("nvfp4", 16), ("mxfp4kv4", 32), ("w4g64a4", 64)):
        learned = ("blocks", "inverse", own)
        assert sizes("best:blocks=own", scheme) == {
            "attn_in": [scale, learned],
            "attn_out": [learned],
            "mlp_in": [scale, learned],
            "mlp_mid": [scale, learned],
            "qk": [head],
        }
    assert sizes("rtn:blocks=8", "w4a4") == {site: [("blocks", "fixed", 8)] for site in SITES}


def test_a_rung_searches_scales_of_formats() -> None:
    made = ladder.Job("rtn:clip=search", "nvfp4,mlp_mid=w8a8", 0).recipe().scheme
    assert made.weights == made.activations == QuantSpec(bits=4, kind="nvfp4", clip="search")
    plain = ladder.Job("rtn", "w4a4", 0).recipe()
    assert ladder.Job("rtn:clip=search", "w4a4", 0).recipe() == plain


@pytest.mark.parametrize(
    "change",
    [
        "nothing.steps=1",
        "end_to_end.stps=1",
        "scheme.key_offset=7",
        "factors=7",
        "blocks=own",
        "blocks=x",
        "scheme.weights.clip=x",
    ],
)
def test_a_change_of_nothing_is_refused(change: str) -> None:
    with pytest.raises(SpecError):
        ladder.Job(f"best:{change}", "w4a4kv4", 0).recipe()


def test_a_table_of_formats_joins_files(run, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = ("--texts", place / "code.txt")
    found = run("--methods", "rtn", "rtn:blocks=own", "--schemes", "w4g16a4", "w4a4", *code)
    other = run("--methods", "rtn", "--schemes", "w4g32a4", *code)
    for name, content in (("fp4", found), ("fp4-2", other)):
        (tmp_path / f"{name}-smollm2-135m.json").write_text(json.dumps(content))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    monkeypatch.setattr(tables, "LADDER", ("smollm2-135m",))
    table = tables.fp4()
    assert [line.split(" | ")[:2] for line in table[2:]] == [
        ["| smollm2-135m, `w4a4`", "`rtn`"],
        ["| smollm2-135m, `w4a4`", "`rtn:blocks=own`"],
        ["| smollm2-135m, `w4g16a4`", "`rtn`"],
        ["| smollm2-135m, `w4g16a4`", "`rtn:blocks=own`"],
        ["| smollm2-135m, `w4g32a4`", "`rtn`"],
    ]
    assert all(line.count("|") == table[0].count("|") for line in table)
    assert "name a size" in table[3]
    assert "| 0% |" in table[2]


def test_means_are_over_seeds() -> None:
    row = {
        "rung": "rtn",
        "scheme": "w4a4kv4",
        "settings": {},
        "original": {"perplexity": {"t": 2.5}},
        "calibration": None,
        "bits_per_weight": 4.0,
    }
    row |= {"perplexity": {"t": 3.0}, "divergence": {"t": {"kl": 1.0}}, "verdict": {"word": "good"}, "seconds": 1.0}
    other = {**row, "seed": 1, "divergence": {"t": {"kl": 3.0}}, "peak_bytes": None, "verdict": {"word": "degraded"}}
    found = ladder.summary([{**row, "seed": 0, "peak_bytes": 7}, other])["rows"]["rtn/w4a4kv4"]
    assert (found["seeds"], found["kl"], found["verdicts"]) == ([0, 1], {"t": 2.0}, ["good", "degraded"])
    assert (found["perplexity"], found["original"]) == ({"t": 3.0}, {"t": 2.5})
    assert found["peak_bytes"] == 7
