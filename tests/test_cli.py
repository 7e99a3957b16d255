"""The command line as a user meets it: round trip, JSON, bad input, interruption."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from flatquant import quantize
from flatquant.calibrate.memory import Estimate
from flatquant.cli import app
from flatquant.cli.display import Display
from flatquant.cli.options import recipe_of
from flatquant.recipes import recipe
from flatquant.spec import QuantSpec, Recipe, RoundingSpec, Scheme, SolverSpec
from tests.tiny_models import tiny_llama, tiny_tokenizer

ROOT = Path(__file__).parents[1]
QUICK = ["--samples", "2", "--seqlen", "16", "--epochs", "1", "--batch-size", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, a text, and a quantised model."""
    folder = tmp_path_factory.mktemp("cli")
    tiny_llama().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 40)
    (folder / "short.txt").write_text("too short")
    (folder / "data" / "wikitext-2-raw").mkdir(parents=True)
    shutil.copy(folder / "text.txt", folder / "data" / "wikitext-2-raw" / "wiki.valid.raw")
    done = run("quantize", folder / "model", "--output", folder / "out", "--calibration", folder / "text.txt", *QUICK)
    assert done.exit_code == 0, done.output
    return folder


@pytest.fixture(autouse=True)
def data(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The text that is read where none is named."""
    monkeypatch.setenv("FLATQUANT_DATA", str(place / "data"))


def run(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def refused(done, message: str) -> None:
    """One line on stderr that begins with `error:`, exit code 1, nothing on stdout."""
    assert done.exit_code == 1, (done.output, done.exception)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("[")]  # progress
    assert len(lines) == 1, done.stderr
    assert re.search(f"^error: .*{message}", lines[0]), lines[0]
    assert done.stdout == ""


# ------------------------------------------------------------------------------------------------- the main road


def test_a_destroyed_model_is_written_and_fails_unless_it_is_accepted(place: Path, tmp_path: Path) -> None:
    arguments = ["quantize", place / "model", "--method", "rtn", "--scheme", "w2a2kv2", "--output"]
    done = run(*arguments, tmp_path / "a")
    assert done.exit_code == 3, (done.output, done.exception)
    assert "destroyed: KL divergence" in done.stdout
    assert re.search(r"\nerror: .*a was written, but the model in it is destroyed .*try --scheme w\d", done.stderr)
    accepted = run(*arguments, tmp_path / "b", "--accept", "--quiet")
    assert (accepted.exit_code, accepted.stdout, accepted.stderr) == (0, "", "")
    for folder in (tmp_path / "a", tmp_path / "b"):
        seen = run("inspect", folder)
        assert seen.exit_code == 0, seen.output
        assert "destroyed: KL divergence" in seen.stdout
        assert not folder.with_name(f"{folder.name}.partial").exists()
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("try --scheme "))
    better = run("quantize", place / "model", "--method", "rtn", "--output", tmp_path / "c", "--scheme",
                 line.removeprefix("try --scheme ").partition(":")[0], "--json")  # fmt: skip
    first = json.loads((tmp_path / "a" / "flatquant_report.json").read_text())["verdict"]
    assert json.loads(better.stdout)["verdict"]["kl"] < first["kl"]


def test_a_fit_that_ends_beyond_all_numbers_is_an_error(place: Path, tmp_path: Path) -> None:
    done = run(
        *("quantize", place / "model", "--output", tmp_path / "out", "--calibration", place / "text.txt"),
        *(*QUICK, "--lr", "1e6"),
    )
    refused(done, "block 0: .* is not finite once the transforms are folded into it; try a lower --lr")
    assert not (tmp_path / "out").exists()


def test_a_fit_that_was_undone_is_a_warning_and_a_row(place: Path, tmp_path: Path) -> None:
    done = run("quantize", place / "model", "--output", tmp_path / "a", "--calibration", place / "text.txt", "--lr",
               "3", "--samples", "2", "--seqlen", "256", "--epochs", "1", "--batch-size", "2", "--device", "cpu",
               "--losses", "--accept")  # fmt: skip
    assert done.exit_code == 0, (done.output, done.exception)
    lines = [line for line in done.stderr.splitlines() if "undone" in line]
    assert lines
    assert all(line.startswith("warning: block") and ".py" not in line for line in lines)
    assert re.search(r"block 0 .*, undone", done.stdout)


def test_losses_of_learned_rounding_are_shown(place: Path, tmp_path: Path) -> None:
    done = run("quantize", place / "model", "--output", tmp_path / "a", "--calibration", place / "text.txt", "--method",
               "autoround", "--scheme", "w4a16", "--samples", "2", "--seqlen", "16", "--rounding-steps", "2",
               "--losses", "--device", "cpu")  # fmt: skip
    assert done.exit_code == 0, (done.output, done.exception)
    assert re.search(r"block 0, rounding +. +\d", done.stdout)


def test_nobodys_warnings_are_printed(place: Path, tmp_path: Path) -> None:
    """In a process of its own, since pytest takes warnings and logs for itself."""
    model, text, out = place / "model", place / "text.txt", tmp_path / "out"
    commands = [
        ["quantize", model, "--output", out, "--calibration", text, *QUICK],
        ["generate", out, "--prompt", "the", "--max-new-tokens", "4"],
        [
            "evaluate",
            out,
            "--perplexity",
            text,
            "--seqlen",
            "16",
            "--windows",
            "2",
            "--divergence-from",
            place / "model",
        ],
        ["report", out, "--collect", model, "--tokens", "16"],
        ["export", out, "--weights-only", "--output", tmp_path / "dense"],
        ["generate", tmp_path / "dense", "--prompt", "the", "--max-new-tokens", "4"],
    ]
    code = "import json, sys; from flatquant.cli import app\n"
    code += "for command in json.loads(sys.argv[1]): app(command, standalone_mode=False)"
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps([[str(a) for a in command] for command in commands])],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert "collect, 4/4" in done.stderr
    assert not re.findall(r"(?i).*(?:warning|deprecat|it/s).*", done.stderr)


def test_quantize_says_what_it_did(place: Path, tmp_path: Path) -> None:
    arguments = ["quantize", place / "model", "--method", "rtn", "--scheme", "w4a8"]
    done = run(*arguments, "--output", tmp_path / "a")
    assert done.exit_code == 0, done.output
    first, *rest = done.stdout.splitlines()
    assert re.search(r"a: rtn w4a8kv16, 0\.3 MB -> 0\.1 MB \(\d\.\d\d x\), \d+\.\d s$", first)
    for row in ("seconds", "memory", r"left unquantised .* embeddings 0\.0 MB", "without a grid .* keys, values"):
        assert re.search(row, done.stdout), row
    verdict = r"^\w+: KL divergence .*\(2 windows of 128 tokens of built-in prose\)$"
    (said,) = (line for line in rest if re.search(verdict, line))
    assert "solve, block 2/2" in done.stderr
    done = run(*arguments, "--output", tmp_path / "b", "--quiet")
    assert (done.exit_code, done.stdout, done.stderr) == (0, "", "")
    done = run(*arguments, "--output", tmp_path / "c", "--json")
    assert done.stderr == ""
    result = json.loads(done.stdout)
    assert result["output"] == str(tmp_path / "c")
    assert said.startswith(f"{result['verdict']['word']}: ")
    assert result["scheme"] == "w4a8kv16"
    assert result["sizes"]["quantised_bytes"] < result["sizes"]["original_bytes"]


def test_options_reach_the_recipe(place: Path, tmp_path: Path) -> None:
    done = run(
        *("quantize", place / "model", "--output", tmp_path / "out", "--calibration", "self", *QUICK),
        *("--scheme", "w3a16", "--lr", "1e-3", "--solver", "gptq", "--seed", "5", "--dtype", "float32"),
    )
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "out" / "flatquant_report.json").read_text())
    recipe = report["recipe"]
    assert (recipe["fit"]["epochs"], recipe["fit"]["batch_size"]) == (1, 2)
    assert (recipe["fit"]["lr"], recipe["fit"]["clip_lr"]) == pytest.approx((1e-3, 1e-2))
    assert recipe["solver"]["kind"] == "gptq"
    assert recipe["data"] == {"samples": 2, "seqlen": 16, "text": "self"}
    assert report["seed"] == 5
    assert report["data"]["source"] == "self"


def test_options_reach_the_solver() -> None:
    def made(method: str = "gptq", scheme: str = "w4g16a16", **options: object) -> Recipe:
        own = dict.fromkeys(("calibration", "samples", "seqlen", "epochs", "batch_size", "lr", "solver"))
        return recipe_of(method, scheme, "reference", **(own | options))  # type: ignore[arg-type]

    assert made("gptq", "wnvfp4", update_scales=True).solver.updates_scales
    assert not made("gptq", "wnvfp4", update_scales=True).solver.act_order
    formats = made("rtn", "mxfp4", weight_clip="search", activation_clip="search")
    assert formats.scheme.weights == formats.scheme.activations == QuantSpec(bits=4, kind="mxfp4", clip="search")
    authors = made(act_order=False, damping=0.02, gram_inputs="original", weight_clip="none")
    assert authors.solver == SolverSpec(kind="gptq", act_order=False, damping=0.02, inputs="original")
    assert authors.scheme == Scheme.parse("w4g16a16", clip="none")
    assert made(weight_clip="search").scheme.weights == QuantSpec(bits=4, group_size=16, clip="search")
    learned = made("flatquant", solver="gptq", act_order=True, rounding_steps=7, batch_size=3)
    assert learned.solver == SolverSpec(kind="gptq", act_order=True, learned=RoundingSpec(steps=7, batch_size=3))
    assert learned.fit is not None
    assert learned.fit.batch_size == 3
    assert made("rtn", rounding_steps=7).needs_data
    assert not made("autoround", rounding_steps=0).needs_data
    assert made("autoround", batch_size=2).solver.learned == RoundingSpec(batch_size=2)
    assert made("flatquant", ranks=2).transforms["mlp_mid"][-1].ranks == 2


def test_options_reach_the_end_to_end_fit() -> None:
    recipe = recipe_of("flatquant", "w4a4kv4", "quick", None, 4, 32, None, 1, 1e-3, "gptq")
    assert recipe.scheme.key_offset == "auto"
    assert recipe_of("rtn", "kv4", "quick", *[None] * 8, "mean").scheme.key_offset == "mean"
    assert recipe.end_to_end is not None
    assert recipe.end_to_end.batch_size == 1
    assert (recipe.end_to_end.lr, recipe.end_to_end.clip_lr) == pytest.approx((1e-3, 1e-2))
    assert recipe.solver.kind == "gptq"


def test_one_rate_scales_all_of_both_fits() -> None:
    base, recipe = (
        recipe_of("flatquant", "w4a4kv4", "best", None, None, None, epochs, None, lr, None)
        for epochs, lr in ((None, None), (2, 1e-2))
    )
    assert base.fit is not None
    assert base.end_to_end is not None
    assert recipe.fit == dataclasses.replace(base.fit, epochs=2, lr=1e-2, clip_lr=1e-1, rotation_lr=3.0, code_lr=2e-3)
    rates = ("lr", "clip_lr", "rotation_lr", "weight_lr", "code_lr")
    doubled = {name: 2 * getattr(base.end_to_end, name) for name in rates}
    assert recipe.end_to_end == dataclasses.replace(base.end_to_end, **doubled)


def test_evaluate(place: Path, tmp_path: Path) -> None:
    text = str(place / "text.txt")
    arguments = ["evaluate", place / "out", "--perplexity", text, "--windows", "3", "--seqlen", "32", "--device", "cpu"]
    done = run(*arguments, "--divergence-from", place / "model", "--json", "-")
    assert done.exit_code == 0, done.output
    assert done.stderr == ""
    result = json.loads(done.stdout)
    assert result.keys() == {"perplexity", "divergence"}
    assert result["perplexity"].keys() == {text}
    assert result["perplexity"][text].keys() == {"value", "windows"}
    assert result["perplexity"][text]["windows"] == 3
    assert result["divergence"].keys() == {"kl", "top1"}
    assert result["divergence"]["kl"] > 0
    assert 0 <= result["divergence"]["top1"] <= 1
    done = run(*arguments, "--json", tmp_path / "file.json")
    assert done.exit_code == 0, done.output
    assert "perplexity" in done.stdout
    assert json.loads((tmp_path / "file.json").read_text()) == {"perplexity": result["perplexity"]}


def test_results_are_against_the_original_that_was_named(place: Path, tmp_path: Path) -> None:
    """From one, from another, from the first again: its own scores stand beside the model's, and nothing is lost."""
    shutil.copytree(place / "out", tmp_path / "out")
    shutil.copytree(place / "model", tmp_path / "a")
    tiny_llama(seed=1).save_pretrained(tmp_path / "b")
    tiny_tokenizer().save_pretrained(tmp_path / "b")
    text, kept = str(place / "text.txt"), {}
    for name in "aba":
        done = run(
            *("evaluate", tmp_path / "out", "--perplexity", text, "--windows", "2", "--seqlen", "16", "--save"),
            *("--divergence-from", tmp_path / name, "--device", "cpu", "--quiet"),
        )
        assert done.exit_code == 0, done.output
        found = json.loads((tmp_path / "out" / "flatquant_evaluation.json").read_text())
        shown = {key: found[key] for key in ("original", "divergence")}
        assert shown["original"]["name"] == name
        assert kept.setdefault(name, shown) == shown
    assert kept["a"]["original"]["perplexity"] != kept["b"]["original"]["perplexity"]
    assert found["others"] == {kept["b"]["original"]["sha256"]: kept["b"]}


def test_results_for_a_card_without_a_place_are_said(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "out", tmp_path / "out")
    (tmp_path / "out" / "README.md").write_text("Mine.")
    options = ("--perplexity", place / "text.txt", "--windows", "2", "--seqlen", "16", "--save", "--device", "cpu")
    done = run("evaluate", tmp_path / "out", *options)
    assert done.exit_code == 0, done.output
    assert "README.md is its owner's" in done.stderr
    assert (tmp_path / "out" / "README.md").read_text() == "Mine."


def test_evaluate_an_original_on_its_own_text(place: Path) -> None:
    done = run(
        *("evaluate", place / "model", "--divergence-from", place / "model", "--device", "cpu"),
        *("--windows", "2", "--seqlen", "16", "--json", "-"),
    )
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result == {"divergence": {"kl": pytest.approx(0, abs=1e-6), "top1": 1.0}}


def test_generate(place: Path) -> None:
    arguments = ["generate", place / "out", "--prompt", "the lazy", "--max-new-tokens", "6", "--device", "cpu"]
    done = run(*arguments)
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("the lazy")
    assert re.search(r"\[\d tokens, .* of keys and values\]", done.stderr)
    first, again, sampled = (json.loads(run(*arguments, "--json", *more).stdout) for more in ([], [], SAMPLED))
    assert first.keys() == {"prompt", "text", "tokens", "seconds", "cache_bytes"}
    assert first["text"] == again["text"]
    assert sampled["text"] != first["text"]
    assert sampled["text"] == json.loads(run(*arguments, "--json", *SAMPLED).stdout)["text"]
    assert first["cache_bytes"] > 0


SAMPLED = ["--temperature", "2", "--seed", "3"]


def test_generate_with_an_unquantised_cache(place: Path) -> None:
    done = run("generate", place / "model", "--prompt", "a", "--max-new-tokens", "3", "--json", "--device", "cpu")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["cache_bytes"] is None


def test_generate_chat(place: Path, tmp_path: Path) -> None:
    arguments = ["--prompt", "a", "--max-new-tokens", "3", "--chat", "--device", "cpu"]
    refused(run("generate", place / "out", *arguments), "no chat template; leave out --chat")
    shutil.copytree(place / "model", tmp_path / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "model")
    done = run("generate", tmp_path / "model", *arguments)
    assert done.exit_code == 0, done.output
    for template, reason in (("{{ raise_exception('no users') }}", "no users"), ("{{ damaged(", "unexpected")):
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path / "model")
        refused(run("generate", tmp_path / "model", *arguments), rf"refuses a turn \({reason}.*leave out --chat")


def test_generate_with_another_model_s_tokenizer(tmp_path: Path) -> None:
    tiny_llama(vocab=100).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    done = run("generate", tmp_path / "model", "--prompt", "zebra", "--device", "cpu")
    refused(done, "a prompt with token ids outside the model's 100; use the model's own tokenizer")


@pytest.mark.parametrize("option", [["--seed", str(2**64)], ["--seed", "-1"]])
def test_a_seed_that_nothing_takes(place: Path, tmp_path: Path, option: list[str]) -> None:
    for command in (
        ["generate", place / "out", "--prompt", "a"],
        ["quantize", place / "model", "--output", tmp_path / "out"],
        ["compare", place / "model", "--output", tmp_path / "out", "--methods", "rtn"],
        ["evaluate", place / "out", "--divergence-from", place / "model"],
    ):
        done = run(*command, *option)
        assert done.exit_code == 2
        assert re.search(r"'--seed': Input should be (less|greater) than or equal to", done.stderr)
    assert not list(tmp_path.iterdir())


def test_inspect_of_a_damaged_report(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "out", tmp_path / "out")
    file = tmp_path / "out" / "flatquant_report.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"sizes": 3}))
    refused(run("inspect", tmp_path / "out"), "flatquant_report.json in .* is damaged")


def test_inspect(place: Path) -> None:
    done = run("inspect", place / "out")
    assert done.exit_code == 0, done.output
    assert "w4a4kv4" in done.stdout
    assert "whole" in done.stdout
    result = json.loads(run("inspect", place / "out", "--json").stdout)
    assert result["scheme"] == "w4a4kv4"
    assert result["damaged"] == []
    assert result["bits_per_quantised_weight"] > 4
    words = " ".join(re.sub("[│┃]", " ", done.stdout).split())
    assert "calibration text.txt, 2 windows of 16 tokens (2 of text.txt across documents)" in words


def test_version_and_help_are_fast() -> None:
    code = "import sys; from flatquant.cli import main; sys.argv = ['flatquant', '--help']; main()"
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert time.perf_counter() - start < 5  # a third of a second where nothing else runs
    for command in ("quantize", "evaluate", "generate", "inspect", "demo"):
        assert command in done.stdout
    code = "import sys; import flatquant.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=environment(), timeout=60).returncode == 0
    assert re.fullmatch(r"flatquant \d+\.\d+\.\d+\n", run("--version").stdout)


class Clock:
    """A time that tests set."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What was shown on stderr, without the time."""
    text = capsys.readouterr().err
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", text)  # no control characters but the end of a line
    return [line.partition("] ")[2] for line in text.splitlines()]


def test_a_file_gets_a_line_every_ten_seconds_and_where_a_stage_begins_and_ends(
    capsys: pytest.CaptureFixture[str],
) -> None:
    clock = Clock()
    with Display(silent=False, epochs=3, clock=clock) as display:
        for step in range(25):
            clock.now = 4.0 * step
            display("fit", step / 4, 6)
    assert lines_of(capsys) == [
        "fit, block 1/2, epoch 0/6; estimating the time left",
        "fit, block 1/2, epoch 0/6; 1 min 24 s left",
        "fit, block 1/2, epoch 1/6; 1 min 12 s left",
        "fit, block 1/2, epoch 2/6; 1 min 00 s left",
        "fit, block 1/2, epoch 3/6; 48 s left",
        "fit, block 2/2, epoch 3/6; 36 s left",
        "fit, block 2/2, epoch 4/6; 24 s left",
        "fit, block 2/2, epoch 5/6; 12 s left",
        "fit, block 2/2, epoch 6/6",
    ]


def test_a_stage_that_says_nothing_is_not_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with Display(silent=False, every=0.1) as display:
        display("load", 0, 1)
        time.sleep(1)
        display("load", 1, 1)
    lines = lines_of(capsys)
    assert lines[0] == "load; estimating the time left"
    assert lines[-1] == "load, done"
    assert 3 <= len(lines) <= 12
    assert set(lines[1:-1]) == {"load; estimating the time left"}


def test_the_time_left_passes_while_a_stage_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with Display(silent=False, clock=clock, every=60.0) as display:
        display("fold", 0, 4)
        clock.now = 10.0
        display("fold", 1, 4)
        clock.now = 20.0
        display._speak()
    assert lines_of(capsys)[-1] == "fold, block 1/4; 20 s left"


def test_the_whole_run_is_told_once_it_is_planned(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    plan = {"device": 1, "host": 1, "disk": 1, "place": "device", "windows": 1, "side_by_side": 1}
    estimate = Estimate(**plan, streamed=False, shared=True, work={"text": 1.0, "solve": 9.0})
    with Display(silent=False, clock=clock) as display:
        display.expect(estimate)
        for clock.now in (0.0, 5.0, 10.0):
            display("text", clock.now, 10)
        display("solve", 0, 3)
    first, begun, ended, solve = lines_of(capsys)
    assert first.startswith("estimate, counted from shapes")
    assert begun == "text, token 0/10; estimating the time left; whole run: estimating the time left"
    assert ended == "text, token 10/10; whole run: 1 min 30 s left"
    assert solve == "solve, block 0/3; 1 min 30 s left; whole run: 1 min 30 s left"


def test_a_terminal_gets_bars(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    clock = Clock()
    with Display(silent=False, clock=clock) as display:
        assert display.bars is not None
        display("solve", 0, 4)
        clock.now = 5.0
        display("solve", 1, 4)
    shown = capsys.readouterr().err
    assert "solve, block 1/4" in shown
    assert "15 s left" in shown


@pytest.mark.parametrize("method", ["flatquant", "rtn", "gptq"])
def test_every_stage_says_that_it_begins_and_ends(place: Path, tmp_path: Path, method: str) -> None:
    calls: list[tuple[str, float, int]] = []
    parts = recipe(method, "w4a4kv4", "quick").tuned(samples=4, seqlen=16)
    text = str(place / "text.txt") if parts.needs_data else None
    estimates: list[Estimate] = []
    quantize(
        str(place / "model"),
        parts,
        text,
        output=tmp_path / "out",
        device="cpu",
        progress=lambda *call: calls.append(call),
        notice=estimates.append,
    )
    stages = list(dict.fromkeys(stage for stage, _, _ in calls))
    fitted = ["end to end"] if method == "flatquant" else []
    text_stages = ["text", "capture", "full precision"] if parts.needs_data else []
    proof = ["hash", "preflight", "texts"]
    assert sorted({*stages} - {"blame"}) == sorted(["load", *proof, *text_stages, *fitted, "fold", "solve", "save"])
    for stage in stages:
        done = [d for s, d, _ in calls if s == stage]
        assert done[0] == 0
        assert done == sorted(done)
        assert (stage, done[-1]) == next((s, t) for s, _, t in reversed(calls) if s == stage)
    assert set(estimates[0].work) <= set(stages)  # what is planned does happen


def test_losses_are_told_on_demand(place: Path, tmp_path: Path) -> None:
    command = ["quantize", place / "model", "--calibration", place / "text.txt", *QUICK]
    silent = run(*command, "--output", tmp_path / "a")
    told = run(*command, "--output", tmp_path / "b", "--losses")
    assert silent.exit_code == told.exit_code == 0
    assert "after / before" not in silent.stdout
    report = json.loads((tmp_path / "b" / "flatquant_report.json").read_text())
    for block in report["blocks"]:
        row = rf"block {block['block']} .*{block['before']:.4g} .*{block['after']:.4g} "
        assert re.search(row, told.stdout), told.stdout
    refused(run("quantize", place / "model", "-o", tmp_path / "c", "--method", "rtn", "--losses"), "leave out --losses")


def test_an_end_to_end_fit_that_was_not_worth_it_is_told(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["quantize", place / "model", "-o", out, "--calibration", place / "text.txt", "--preset", "quick"]
    done = run(*command, "--scheme", "kv8", "--samples", "2", "--seqlen", "300", "--device", "cpu", "--losses")
    assert done.exit_code == 0, (done.output, done.exception)
    report = json.loads((out / "flatquant_report.json").read_text())
    found = report["end_to_end"]
    assert found["losses"] == []
    assert found["undone"]
    assert found["plain"] == found["held_out"][1] < 1e-3
    assert re.search(rf"end to end +. - +. - +. - +. {found['plain']:.4g} plainly", done.stdout), done.stdout
    assert re.search(r"end to end, step (\d+)/\1;", done.output), done.output  # the time left counts it as done


def test_an_output_layer_of_its_own_is_told(place: Path, tmp_path: Path) -> None:
    command = ["quantize", place / "model", "--method", "quarot", "--calibration", place / "text.txt"]
    done = run(*command, "--output", tmp_path / "out", "--samples", "2", "--seqlen", "16")
    assert done.exit_code == 0, done.output
    for shown in (done.stdout, run("inspect", tmp_path / "out").stdout):
        words = " ".join(re.sub("[│┃]", " ", shown).split())
        assert "output layer 0.0 MB (of its own since the embedding is rotated or rounded)" in words
    report = json.loads((tmp_path / "out" / "flatquant_report.json").read_text())
    assert report["sizes"]["untied"] is True
    sizes = report["sizes"]["unquantised_bytes"]
    assert sizes["output layer"] == sizes["embeddings"] > 0
    found = json.loads(run("inspect", tmp_path / "out", "--json").stdout)
    assert found["unquantised_bytes"] == sizes


# ------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--scheme", "w4a4w4"], "scheme 'w4a4w4': expected something like"),
        (["--scheme", "w9a4"], "9 bits: a grid has 2 to 8 bits"),
        (["--scheme", "w4a4,mlp_mid=w1"], "1 bits"),
        (["--scheme", "w4g5"], "group size 5 does not divide the 64 inputs"),
        (["--method", "magic"], "unknown method 'magic'; known: .*flatquant"),
        (["--preset", "slow"], "unknown preset 'slow'; known: best, quick, reference"),
        (
            ["--method", "rtn", "--epochs", "3"],
            "method rtn with preset reference has no block-wise fit: leave out --epochs",
        ),
        (["--method", "rtn", "--lr", "3"], "method rtn fits nothing: leave out --lr$"),
        (["--method", "rtn", "--samples", "3"], "reads no calibration text: leave out --samples"),
        (["--method", "rtn", "--calibration", "c4"], "reads no calibration text: leave out --calibration"),
        (["--method", "rtn", "--solver", "gptq"], "rounds with rtn: leave out --solver"),
        (["--solver", "codebook"], "fits round weights to a uniform grid, which codebooks are not"),
        (["--method", "vptq", "--scheme", "w2a8"], "vptq quantises weights only"),
        (["--method", "gptq", "--hessian", "output_adaptive"], "rounds with gptq: leave out --hessian"),
        (["--hessian", "output_adaptive"], "the solver rtn uses no Hessian"),
        (["--act-order"], "the solver rtn uses no Hessian: leave out --act-order, or take gptq"),
        (["--solver", "gptq", "--damping", "0"], "damping 0.0: must be positive"),
        (["--method", "gptq", "--gram-inputs", "mine"], "'mine' is not one of 'quantised', 'original'"),
        (["--method", "oac", "--gram-inputs", "original"], "output_adaptive has no Gram matrix of original inputs"),
        (["--weight-clip", "none"], "leaves no ranges to choose: leave out --weight-clip"),
        (["--activation-clip", "none"], "leaves no ranges to choose: leave out --activation-clip"),
        (["--method", "rtn", "--weight-clip", "fixed"], "unknown weight clip 'fixed'; known: none, search"),
        (["--rounding-steps", "-1"], "rounding steps -1: at least 0"),
        (["--scheme", "a4", "--rounding-steps", "5"], "does not quantise weights: leave out --rounding-steps"),
        (["--method", "vptq", "--scheme", "w2a16", "--rounding-steps", "5"], "rounding is learned on a grid"),
        (["--method", "flattenquant", "--rounding-steps", "5"], "not with one for a tensor"),
        (["--method", "direct", "--rounding-steps", "5"], "the fit chooses levels and codes of weights"),
        (["--method", "autoround", "--lr", "1"], "method autoround fits nothing: leave out --lr"),
        (["--preset", "quick", "--epochs", "3"], "preset quick has no block-wise fit: leave out --epochs"),
        (["--scheme", "w4", "--key-offset", "mean"], "does not quantise keys: leave out --key-offset"),
        (["--key-offset", "median"], "'median' is not one of 'auto', 'none', 'bias', 'mean'"),
        (["--solver", "magic"], "'magic' is not one of 'rtn', 'gptq', 'codebook'"),
        (["--samples", "2", "--batch-size", "4"], "batch size 4 exceeds 2 samples"),
        (["--samples", "0"], "too few to calibrate"),
        (["--epochs", "-1"], "epochs -1: at least 0"),
        (["--method", "rtn", "--ranks", "2"], "recipe rtn: nothing at attn_out and mlp_mid mixes what ranks hold"),
        (["--dtype", "int4"], "unknown dtype 'int4'; known: float16"),
        (["--device", "toaster"], "unknown device 'toaster'"),
        (["--device", "meta"], "device meta is neither the CPU nor a CUDA device"),
        (["--calibration", "nowhere.txt", "--device", "cpu"], "no such text: nowhere.txt"),
        (["--calibration", "wikitext2:3,nowhere.txt"], "no such text: nowhere.txt"),
        (["--calibration", "wikitext2:3,self:none"], "share 'none' of calibration text self is no number above 0"),
        (["--preset", "best"], "FLATQUANT_DATA has no c4/"),  # a part of its default text
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_contradictory_options(place: Path, tmp_path: Path, options: list[str], message: str) -> None:
    refused(run("quantize", place / "model", "--output", tmp_path / "out", *options), message)
    assert not list(tmp_path.iterdir())


def test_all_mistakes_are_told_at_once(place: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    options = {
        "--scheme": ("w9a4", "9 bits"),
        "--method": ("magic", "unknown method 'magic'"),
        "--calibration": ("nowhere.txt", "no such text: nowhere.txt"),
        "--output": (tmp_path / "out", "not empty"),
        "--device": ("toaster", "unknown device"),
        "--dtype": ("int4", "unknown dtype"),
        "--max-memory": ("plenty", "memory 'plenty'"),
    }
    given = [part for name, (value, _) in options.items() for part in (name, value)]
    done = run("quantize", place / "modle", *given)
    assert (done.exit_code, done.stdout) == (1, "")
    lines = done.stderr.splitlines()
    assert all(line.startswith("error: ") for line in lines)
    for message in [*(message for _, message in options.values()), f"there is {place / 'model'}"]:
        assert sum(message in line for line in lines) == 1, message
    assert len(lines) == 8
    done = run("quantize", place / "model", "--output", tmp_path / "new", "--preset", "slow", "--scheme", "w0")
    assert [line.partition(";")[0] for line in done.stderr.splitlines()][1:] == ["error: unknown preset 'slow'"]
    assert not (tmp_path / "new").exists()


def test_texts_beyond_the_model_s_positions_are_warned_of(place: Path, tmp_path: Path) -> None:
    message = r"warning: .* of {} tokens are longer than the 512 positions that the model was made for\n"
    prompt = ["--prompt", "a" * 509, "--device", "cpu", "--json"]
    assert run("generate", place / "out", *prompt, "--max-new-tokens", "3").stderr == ""
    done = run("generate", place / "out", *prompt, "--max-new-tokens", "4")
    assert done.exit_code == 0, done.output
    assert re.fullmatch(message.format(513), done.stderr)
    windows = ["--perplexity", place / "text.txt", "--seqlen", "600", "--json", "-", "--device", "cpu"]
    done = run("evaluate", place / "out", *windows, "--divergence-from", place / "model")
    assert done.exit_code == 0, done.output
    assert re.fullmatch(message.format(600), done.stderr)
    options = ["--method", "gptq", "--samples", "1", "--seqlen", "600", "--device", "cpu", "--quiet"]
    done = run("quantize", place / "model", "--output", tmp_path / "out", *options)
    assert done.exit_code == 0, done.output
    assert re.fullmatch(message.format(600), done.stderr)


def test_short_text(place: Path, tmp_path: Path) -> None:
    done = run("quantize", place / "model", "--output", tmp_path / "o", "--calibration", place / "short.txt", *QUICK)
    refused(done, "short.txt has 9 tokens, and one window needs 16")
    assert not list(tmp_path.iterdir())


def test_missing_model(tmp_path: Path) -> None:
    for command in (["quantize", "--output", tmp_path / "out"], ["evaluate", "--divergence-from", "x"]):
        refused(run(command[0], tmp_path / "none", *command[1:]), "no such model folder")
    refused(run("generate", tmp_path / "none", "--prompt", "a"), "no such model folder")
    refused(run("inspect", tmp_path / "none"), "is not a folder")
    assert not list(tmp_path.iterdir())


def test_unknown_architecture(place: Path, tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=128, bos_token_id=1, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tiny_tokenizer().save_pretrained(tmp_path / "gpt2")
    done = run("quantize", tmp_path / "gpt2", "--output", tmp_path / "out", "--calibration", place / "text.txt")
    lines = [line for line in done.stderr.splitlines() if not line.startswith("[")]
    assert (done.exit_code, done.stdout) == (1, "")
    assert lines[0].startswith("error: model type 'gpt2' is not supported; ")
    assert len(lines[0]) <= 200
    assert "    attn.c_attn: Conv1D 16x48" in lines[1:]
    assert {path.name for path in tmp_path.iterdir()} == {"gpt2"}


def test_output_in_the_way(place: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    refused(run("quantize", place / "model", "--output", tmp_path), "not empty; choose another")
    assert (tmp_path / "file").read_text() == "mine"


def test_nan_in_a_block(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "model", tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.self_attn.o_proj.weight"][0, 0] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    for options in (["--method", "rtn"], ["--calibration", place / "text.txt", *QUICK]):
        done = run("quantize", tmp_path / "model", "--output", tmp_path / "out", *options)
        refused(done, "block 1: self_attn.o_proj.weight holds NaN or infinity; check the model file")
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def _truncate(folder: Path) -> None:
    file = folder / "flatquant.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _flip(folder: Path) -> None:
    file = folder / "flatquant.safetensors"
    data = bytearray(file.read_bytes())
    data[-50] ^= 4
    file.write_bytes(data)


def _other_version(folder: Path) -> None:
    file = folder / "config.json"
    file.write_text(file.read_text().replace('"format_version": 1', '"format_version": 99'))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, "flatquant.safetensors is (missing or )?damaged.*copy the folder again"),
        (_flip, "damaged.*copy the folder again"),
        (_other_version, "format version 99, this library reads 1"),
    ],
)
def test_damaged_folder(place: Path, tmp_path: Path, damage, message: str) -> None:
    shutil.copytree(place / "out", tmp_path / "out")
    damage(tmp_path / "out")
    refused(run("generate", tmp_path / "out", "--prompt", "a"), message)
    refused(run("evaluate", tmp_path / "out", "--perplexity", place / "text.txt"), message)
    done = run("inspect", tmp_path / "out", "--json")
    assert done.exit_code == 1
    if damage is _other_version:
        assert re.fullmatch(f"error: .*{message}.*\n", done.stderr)
    else:
        assert re.fullmatch("error: .*damaged or missing: flatquant.safetensors; copy the folder again\n", done.stderr)
        assert json.loads(done.stdout)["damaged"] == ["flatquant.safetensors"]
    (tmp_path / "out" / "flatquant.safetensors").unlink()
    assert run("inspect", tmp_path / "out").exit_code == 1


def test_nothing_to_evaluate(place: Path) -> None:
    done = run("evaluate", place / "model")
    refused(done, "nothing to evaluate; give --perplexity TEXT, --tasks all or --divergence-from")


def test_quantised_twice(place: Path, tmp_path: Path) -> None:
    done = run("quantize", place / "out", "--output", tmp_path / "again", "--method", "rtn")
    refused(done, "already quantised")


def test_result_file_cannot_be_written(place: Path, tmp_path: Path) -> None:
    done = run(
        *("evaluate", place / "model", "--perplexity", place / "text.txt", "--seqlen", "16", "--windows", "1"),
        *("--json", tmp_path / "none" / "file.json", "--device", "cpu"),
    )
    refused(done, "cannot write .*file.json: no such folder")
    assert "[" not in done.stderr  # nothing was evaluated


def test_a_defect_keeps_its_traceback(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flatquant.api.quantize", lambda *_, **__: 1 / 0)
    done = run("quantize", place / "model", "--output", tmp_path / "out", "--method", "rtn")
    assert isinstance(done.exception, ZeroDivisionError)


# ------------------------------------------------------------------------------------------------- memory


def test_a_streamed_run_within_limits_writes_the_same_folder(place: Path, tmp_path: Path) -> None:
    options = ("--calibration", place / "text.txt", "--stream", "--max-memory", "2GiB", "--max-host-memory", "2GiB")
    done = run("quantize", place / "model", "--output", tmp_path / "out", *options, *QUICK)
    assert done.exit_code == 0, done.output
    assert re.search(r"s\] estimate, counted from shapes: .* [MG]iB in memory.*, streamed, ", done.stderr)
    same, other = (json.loads((folder / "config.json").read_text()) for folder in (place / "out", tmp_path / "out"))
    assert same["quantization_config"]["content_hash"] == other["quantization_config"]["content_hash"]


def test_memory_that_cannot_be_had_or_read(place: Path, tmp_path: Path) -> None:
    quantize = ("quantize", place / "model", "--output", tmp_path / "out", "--method", "rtn")
    refused(run(*quantize, "--max-memory", "plenty"), "memory 'plenty': give something like 20GiB")
    refused(
        run(*quantize, "--max-memory", "10KB", "--device", "cpu"), "needs at least .* raise the limit.* or --stream"
    )
    refused(run(*quantize, "--preset", "quick", "--method", "flatquant", "--stream"), "end-to-end fit .*--no-stream")


# ------------------------------------------------------------------------------------------------- other processes


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def command(*arguments: object) -> list[str]:
    code = "from flatquant.cli import main; main()"
    return [sys.executable, "-c", code, *map(str, arguments)]


@pytest.mark.slow
def test_disk_full(place: Path, tmp_path: Path) -> None:
    """Files may not grow beyond a size, as on a full disk: one line, no output folder, nothing temporary."""
    resource = pytest.importorskip("resource")
    done = subprocess.run(
        command("quantize", place / "model", "--output", tmp_path / "out", "--method", "rtn"),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (16_000, 16_000)),
    )
    assert done.returncode == 1, done.stderr
    errors = [line for line in done.stderr.splitlines() if not line.startswith("[")]
    assert len(errors) == 1, done.stderr
    assert re.match(r"error: .*cannot write .*; free space", errors[0])
    assert {path.name for path in tmp_path.iterdir()} == {"out.partial"}
    assert not list((tmp_path / "out.partial").glob("*.tmp"))


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
@pytest.mark.parametrize("how", ["SIGKILL", "SIGINT"])
def test_killed_and_resumed(place: Path, tmp_path: Path, how: str) -> None:
    arguments = ["--calibration", place / "text.txt", *QUICK, "--epochs", "20", "--solver", "gptq", "--quiet"]
    # Of ten blocks, most are still to come when the first has been fitted, however late that is seen here.
    model = tmp_path / "model"
    tiny_llama(layers=10).save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    out = tmp_path / "out"
    process = subprocess.Popen(
        command("quantize", model, "--output", out, *arguments),
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which what runs the tests may ignore
    )
    try:
        deadline = time.monotonic() + 100
        while not (tmp_path / "out.partial" / "fitted-00000.safetensors").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(getattr(signal, how))
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert not out.exists()
    if how == "SIGINT":
        assert process.returncode == 130
        assert re.fullmatch(r"error: interrupted; go on .* --resume \(the state is in .*out.partial\)\n", errors)
    else:
        assert process.returncode == -signal.SIGKILL
    refused(run("quantize", model, "--output", out, *arguments), "unfinished run .*--resume")
    for options in (["--output", out, "--resume"], ["--output", tmp_path / "whole"]):
        done = run("quantize", model, *arguments, *options, "--accept")  # ten random blocks at four bits
        assert done.exit_code == 0, done.output
    assert {path.name for path in tmp_path.iterdir()} == {"model", "out", "whole"}
    for path in (tmp_path / "whole").iterdir():
        if path.name != "flatquant_report.json":
            assert path.read_bytes() == (out / path.name).read_bytes(), path.name
    reports = [json.loads((folder / "flatquant_report.json").read_text()) for folder in (out, tmp_path / "whole")]
    for report in reports:
        del report["timing"]
    assert reports[0] == reports[1]


# ------------------------------------------------------------------------------------------------- demo


@pytest.mark.parametrize("data", [False, True], ids=["no data", "data"])
def test_demo(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bool) -> None:
    import dataclasses

    from flatquant import demo, recipes
    from flatquant.spec import DataSpec, FitSpec

    def small(method: str, scheme: str, preset: str = "reference"):
        if method == "rtn":
            return recipes.rtn(scheme)
        small_fit = FitSpec(epochs=1, batch_size=2)
        return dataclasses.replace(recipes.flatquant(scheme), data=DataSpec(samples=2, seqlen=16), fit=small_fit)

    monkeypatch.setattr(demo, "recipe", small)
    monkeypatch.setattr(demo, "MODEL", str(place / "model"))
    monkeypatch.setattr(demo, "SIZE", demo.Size(windows=2, seqlen=16, wikitext_seqlen=32, new_tokens=4))
    monkeypatch.delenv("FLATQUANT_DATA", raising=False)
    if data:
        (tmp_path / "data" / "wikitext-2-raw").mkdir(parents=True)
        shutil.copy(place / "text.txt", tmp_path / "data" / "wikitext-2-raw" / "wiki.test.raw")
        monkeypatch.setenv("FLATQUANT_DATA", str(tmp_path / "data"))
    out = tmp_path / "out"
    done = run("demo", "--output", out)
    assert done.exit_code == 0, done.output
    for word in ("original", "RTN", "FlatQuant", "KL divergence", "top-1", "saved in", "s in all", demo.PROMPT):
        assert word in done.stdout
    assert ("perplexity, WikiText-2" in done.stdout) == data
    assert re.search(r"^\w+: KL divergence from the original .*those given, kept back", done.stdout, re.MULTILINE)
    refused(run("demo", "--output", out), "already holds a quantised model; replace it with --overwrite")
    again = run("demo", "--output", out, "--overwrite", "--json")
    assert again.exit_code == 0, again.output
    rows = json.loads(again.stdout)["rows"]
    assert list(rows) == ["original", "RTN", "FlatQuant"]
    assert rows["FlatQuant"]["kl"] > 0
    refused(run("demo", "--output", place, "--overwrite"), "not empty and no quantised model")
    assert (place / "model").is_dir()
