"""`flatquant methods` and `flatquant compare`: rows that can be checked, resumed, refused, tabled and drawn."""

import builtins
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from flatquant import api, compare, methods
from flatquant.cli import app
from flatquant.cli.compare import _listed_schemes
from flatquant.errors import DataError, FlatQuantError, SpecError
from flatquant.models import load_model
from flatquant.recipes import RECIPES, recipe
from flatquant.runtime import artifact
from flatquant.runtime.kvcache import QuantizedCache
from flatquant.seams import CACHE
from flatquant.spec import Scheme
from flatquant.wiring.arch import Geometry
from flatquant.wiring.cost import online_flops
from tests.laws import SHAPES, bare, basis, family, wrap
from tests.tiny_models import tiny_llama, tiny_tokenizer

SMALL = ["--samples", "2", "--seqlen", "16", "--epochs", "1", "--batch-size", "2", "--windows", "3", "--window", "32"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and a text."""
    folder = tmp_path_factory.mktemp("compare")
    tiny_llama().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 40)
    return folder


def settings(place: Path, **changes) -> compare.Settings:
    text = str(place / "text.txt")
    defaults = {
        "model": str(place / "model"), "calibration": text, "perplexity": (text,), "device": "cpu",
        "samples": 2, "seqlen": 16, "epochs": 1, "batch_size": 2, "windows": 3, "window": 32, "divergence_windows": 2,
    }  # fmt: skip
    return compare.Settings(**{**defaults, **changes})


def run(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_a_second_comparison_in_one_folder_is_refused(place: Path, tmp_path: Path) -> None:
    beside: list[str] = []

    def again(stage: str, done: int, _: int) -> None:
        if stage == "compare" and done == 0:
            with pytest.raises(FlatQuantError, match="another comparison is writing") as caught:
                compare.run(settings(place), ["rtn"], ["w4a16"], tmp_path / "out", plot=False)
            beside.append(str(caught.value))

    compare.run(settings(place), ["rtn"], ["w4a16"], tmp_path / "out", plot=False, progress=again)
    assert len(beside) == 1
    assert "\n" not in beside[0]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "compare.json", "compare.md", "models", "rows", "settings.json",
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------- methods


def test_every_method_is_described() -> None:
    rows = {row["method"]: row for row in methods.table()}
    assert set(rows) == set(RECIPES)
    assert rows["rtn"] == {
        "method": "rtn", "scheme": "w4a4kv4", "transform": "-", "where": "-",
        "grid": "w4 a4 symmetric; k4 v4 asymmetric", "solver": "rtn", "objective": "-", "data": "-", "online": 0.0,
    }  # fmt: skip
    assert rows["oac"]["solver"] == "gptq (output_adaptive)"
    assert rows["autoround"]["solver"] == "rtn, learned in 200 steps"
    assert rows["vptq"]["scheme"] == "w4a16kv16"
    assert rows["vptq"]["grid"] == "w4 in codebooks of vectors of 4"
    flat = rows["flatquant"]
    assert flat["where"] == "attn_in, attn_out, mlp_in, mlp_mid, qk"
    assert flat["transform"] == "diagonal (absmax) + kronecker (orthogonal) + matrix (orthogonal)"
    assert flat["objective"] == "block outputs, 15 epochs"
    assert flat["data"] == "128 x 2048"
    quick = methods.describe("flatquant", "quick", ("w3g64a16",))
    assert quick["objective"] == "divergence of the model, 20 steps"
    assert quick["grid"] == "w3g64 symmetric, learned clip"
    with pytest.raises(SpecError, match="bits"):
        methods.describe("rtn", schemes=("w9",))


def test_methods_on_the_command_line() -> None:
    done = run("methods")
    assert done.exit_code == 0, done.output
    for method in RECIPES:
        assert method in done.stdout
    assert {row["method"] for row in json.loads(run("methods", "--json").stdout)} == set(RECIPES)


def test_families_on_the_command_line() -> None:
    done = CliRunner().invoke(app, ["methods", "--families"], env={"COLUMNS": "120"})
    assert done.exit_code == 0, done.output
    lines = {line.split()[1]: line for line in done.stdout.splitlines() if line.startswith("│")}
    assert lines["llama"].split("│")[2].strip() == "all"
    assert "w4a16 alone: affinequant, omniquant" in lines["qwen3_moe"]
    assert "w4a16 alone: affinequant" in lines["olmo2"]
    assert "not: quarot" in done.stdout
    rows = json.loads(run("methods", "--families", "--json").stdout)
    assert all(set(row) == {"family", "engines", *RECIPES} for row in rows)


def test_online_operations_are_those_of_the_factors() -> None:
    """Counted by hand from the tensors that a folded block holds."""
    model = family("llama", **SHAPES["odd"])
    plan, _ = wrap(model, bare(basis("inverse", "orthogonal")), force=True)
    geometry = Geometry.of(model.config)
    n = {"attn_in": 90, "attn_out": 90, "mlp_in": 90, "mlp_mid": 154}
    factors = {"attn_in": (9, 10), "attn_out": (9, 0), "mlp_in": (9, 10), "mlp_mid": (11, 14)}
    block = sum(2 * n[s] * sum(factors[s]) for s in n) + 2 * 10 * 10 * (9 + 3)
    assert online_flops(plan, geometry, model.model.layers) == block * model.config.num_hidden_layers
    model = family("llama")
    plan, _ = wrap(model, bare({}, Scheme.parse("w4a4kv4", clip="none")))
    assert online_flops(plan, geometry, model.model.layers) == 0


# ------------------------------------------------------------------------------------------------- compare


def test_a_comparison_has_a_row_for_every_pair(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run(
        *("compare", place / "model", "--output", out, "--methods", "rtn,gptq,flatquant", "--schemes", "w4a4kv4,w3a16"),
        *("--calibration", place / "text.txt", "--perplexity", place / "text.txt", "--device", "cpu", *SMALL),
    )
    assert done.exit_code == 0, done.output
    assert "compare.md" in done.stdout
    result = json.loads((out / "compare.json").read_text())
    pairs = [(row["scheme"], row["method"]) for row in result["rows"]]
    assert pairs == [(s, m) for s in ("w4a4kv4", "w3a16kv16") for m in ("rtn", "gptq", "flatquant")]
    rows = dict(zip(pairs, result["rows"], strict=True))
    assert not any("error" in row for row in rows.values())
    flat = rows["w4a4kv4", "flatquant"]
    assert flat["perplexity"].keys() == result["original"]["perplexity"].keys() == {"text.txt"}
    assert flat["online_flops_per_token"] > 0
    assert rows["w4a4kv4", "rtn"]["online_flops_per_token"] == 0
    assert 3 < rows["w3a16kv16", "rtn"]["bits_per_weight"] < 4 < flat["bits_per_weight"]
    for (scheme, _), row in rows.items():
        assert row["kl"] > 0
        assert row["seconds"] > 0
        assert row["peak_bytes"] is None or row["peak_bytes"] > 1e6
        assert row["bytes_per_token"] < result["original"]["bytes_per_token"]
        # The original's keys and values are counted in 16 bit; with grids, scales and zero points come on top.
        assert (row["kv_bytes_per_token"] < result["original"]["kv_bytes_per_token"]) == ("kv4" in scheme)
    table = (out / "compare.md").read_text().splitlines()
    assert len(table) == 2 + 1 + 6
    assert len({line.count("|") for line in table}) == 1
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert not list((out / "models").iterdir())  # models are measured and removed


def test_a_row_is_what_quantising_and_evaluating_gives(place: Path, tmp_path: Path) -> None:
    chosen = settings(place)
    result = compare.run(chosen, ["gptq"], ["w4a8kv4"], tmp_path / "out", plot=False)
    (row,) = result["rows"]
    text = chosen.perplexity[0]
    model, _ = load_model(chosen.model)
    parts = chosen.recipe("gptq", "w4a8kv4")
    made = api.quantize(chosen.model, parts, text, output=tmp_path / "folder", device="cpu")
    assert row["bytes_per_token"] + model.get_input_embeddings().weight[:0].nbytes == api.stored_bytes(made.model)
    found = artifact.inspect(tmp_path / "folder")
    assert row["content_hash"] == found.content_hash
    assert row["bits_per_weight"] == found.bits_per_quantised_weight
    cache = QuantizedCache(made.model)
    with torch.no_grad():
        made.model(torch.zeros(1, 5, dtype=torch.int64), **{CACHE: cache})
    assert row["kv_bytes_per_token"] * 5 == cache.nbytes()
    assert result["original"]["bytes_per_token"] == 2 * sum(p.numel() for p in model.parameters())


def test_a_comparison_goes_on_where_it_stopped(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, out = settings(place), tmp_path / "out"
    whole = compare.run(chosen, ["rtn", "gptq"], ["w4a16"], tmp_path / "whole", plot=False)
    quantize, calls = api.quantize, []

    def killed_in_the_second(model, parts, *args, progress, **options):
        def stop(stage, done, total):
            if parts.name == "gptq" and (stage, done) == ("solve", 1):
                raise KeyboardInterrupt

        calls.append(parts.name)
        return quantize(model, parts, *args, progress=stop, **options)

    monkeypatch.setattr(api, "quantize", killed_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        compare.run(chosen, ["rtn", "gptq"], ["w4a16"], out, plot=False)
    assert [row["method"] for row in json.loads((out / "compare.json").read_text())["rows"]] == ["rtn"]
    assert list((out / "models").glob("gptq-*.partial/solved-*"))  # the second goes on from its first block
    monkeypatch.setattr(api, "quantize", lambda *a, **k: (calls.append("again"), quantize(*a, **k))[1])
    again = compare.run(chosen, ["rtn", "gptq"], ["w4a16"], out, plot=False)
    assert calls == ["rtn", "gptq", "again"]
    assert [r["content_hash"] for r in again["rows"]] == [r["content_hash"] for r in whole["rows"]]
    assert [r["kl"] for r in again["rows"]] == [r["kl"] for r in whole["rows"]]
    monkeypatch.setattr(api, "quantize", None)  # nothing is computed twice
    assert compare.run(chosen, ["rtn", "gptq"], ["w4a16", "w4"], out, plot=False) == again


def test_a_refused_combination_is_a_row(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def weights_only(scheme: str, preset: str = "reference"):
        if Scheme.parse(scheme).activations is not None:
            raise SpecError("weights | only:\nno activations")
        return recipe("rtn", scheme, preset)

    monkeypatch.setitem(RECIPES, "picky", weights_only)
    chosen = settings(place)
    result = compare.run(chosen, ["picky", "rtn"], ["w4g5a16", "w4a4", "w4a16"], tmp_path / "out", plot=True)
    errors = {(r["method"], r["scheme"]): r.get("error") for r in result["rows"]}
    assert errors["picky", "w4a4kv16"] == "weights | only: no activations"
    assert "group size 5" in errors["rtn", "w4g5a16kv16"]
    assert errors["picky", "w4a16kv16"] is errors["rtn", "w4a4kv16"] is None
    assert "weights \\| only" in (tmp_path / "out" / "compare.md").read_text()
    assert methods.describe("picky")["scheme"] == "w4a16kv16"


def test_what_is_wrong_with_the_whole_comparison_is_an_error(place: Path, tmp_path: Path) -> None:
    chosen, out = settings(place), tmp_path / "out"
    with pytest.raises(SpecError, match=r"unknown method magic, voodoo; known: .*flatquant"):
        compare.run(chosen, ["magic", "rtn", "voodoo"], ["w4"], out)
    with pytest.raises(SpecError, match="expected something like"):
        compare.run(chosen, ["rtn"], ["4bits"], out)
    for none in (([], ["w4"]), (["rtn"], [])):
        with pytest.raises(SpecError, match="name at least one method and one scheme"):
            compare.run(chosen, *none, out, plot=False)
    assert not out.exists()
    compare.run(chosen, ["rtn"], ["w4"], out, plot=False)
    with pytest.raises(FlatQuantError, match="differs in seed, window"):
        compare.run(settings(place, seed=1, window=16), ["rtn"], ["w4"], out)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    with pytest.raises(FlatQuantError, match="not empty"):
        compare.run(chosen, ["rtn"], ["w4"], tmp_path / "mine")
    done = run("compare", tmp_path / "none", "--output", tmp_path / "new", "--methods", "rtn", "--device", "cpu")
    assert done.exit_code == 1
    assert "no such model folder" in done.output


def test_a_text_that_cannot_be_measured_on_stops_before_a_model_is_made(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, quantize = tmp_path / "out", compare.api.quantize
    monkeypatch.setattr(compare.api, "quantize", lambda *_, **__: pytest.fail("a model was made"))
    for perplexity, window in ((("nowhere.txt",), 32), (settings(place).perplexity, 100_000)):
        chosen = replace(settings(place), perplexity=perplexity, window=window)
        with pytest.raises(DataError):
            compare.run(chosen, ["rtn"], ["w4"], out, plot=False)
    monkeypatch.setattr(compare.api, "quantize", quantize)
    # Nothing was made: the folder takes other settings.
    rows = compare.run(settings(place), ["rtn"], ["w4"], out, plot=False)["rows"]
    assert "error" not in rows[0]


def test_without_matplotlib_the_error_comes_first(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(FlatQuantError, match=r"pip install 'flatquant\[plot\]', or leave it out with --no-plot"):
        compare.run(settings(place), ["rtn"], ["w4"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_override_belongs_to_the_scheme_before_it() -> None:
    assert _listed_schemes("w4a4kv4,0.k8, 1.kv16, w4,mlp_mid=w8a8,1.attn_in=a8,w3 ,") == [
        "w4a4kv4,0.k8,1.kv16",
        "w4,mlp_mid=w8a8,1.attn_in=a8",
        "w3",
    ]
