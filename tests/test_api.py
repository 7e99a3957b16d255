"""`quantize` and `load` from Python: what they return, write, refuse and survive."""

import dataclasses
import errno
import json
import os
import subprocess
import sys
import tomllib
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

import flatquant
from flatquant import recipes, store
from flatquant.calibrate.state import RunState
from flatquant.errors import ArtifactError, CalibrationError, DataError, FlatQuantError, ModelError, SpecError
from flatquant.spec import DataSpec, FitSpec, Recipe, SolverSpec
from tests.tiny_models import tiny_llama, tiny_tokenizer

ROOT = Path(__file__).parents[1]
KILLING = Path(__file__).with_name("killing.py")


@pytest.fixture
def recipe() -> Recipe:
    return dataclasses.replace(
        recipes.flatquant("w4a4kv4"), data=DataSpec(samples=2, seqlen=16), fit=FitSpec(epochs=1, batch_size=2)
    )


def tokens(samples: int = 2, seqlen: int = 16) -> torch.Tensor:
    return torch.randint(0, 120, (samples, seqlen), generator=torch.Generator().manual_seed(0))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# ------------------------------------------------------------------------------------------------- the package


def test_package_exports() -> None:
    assert flatquant.Recipe is Recipe
    assert flatquant.recipes.flatquant("w4a4kv4").name == "flatquant"
    assert set(flatquant.__all__) <= set(dir(flatquant))
    for name in flatquant.__all__:
        assert getattr(flatquant, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        flatquant.nothing  # noqa: B018


def test_one_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["hatch"]["version"]["path"] == "src/flatquant/__init__.py"
    assert f'__version__ = "{flatquant.__version__}"' in (ROOT / "src/flatquant/__init__.py").read_text()


def test_recipes_without_torch() -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'src')!r}); import flatquant; flatquant.recipes.rtn('w4');"
        "flatquant.Scheme; flatquant.Recipe; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


# ------------------------------------------------------------------------------------------------- quantize


def test_in_memory_and_saved_agree(recipe: Recipe, tmp_path: Path) -> None:
    seen: list[tuple[str, float, int]] = []
    result = flatquant.quantize(
        tiny_llama(),
        recipe,
        tokens(),
        tokenizer=tiny_tokenizer(),
        output=tmp_path / "out",
        device="cpu",
        progress=lambda *event: seen.append(event),
    )
    loaded = flatquant.load(tmp_path / "out")
    ids = tokens(1, 12)
    torch.testing.assert_close(loaded(ids).logits, result.model(ids).logits, rtol=0, atol=0)
    assert names(tmp_path) == {"out"}
    ends = [call for call in seen if call[0] in ("fit", "solve") and call[1] in (1, 2)]
    assert list(dict.fromkeys(ends)) == [("fit", 1, 2), ("solve", 1, 2), ("fit", 2, 2), ("solve", 2, 2)]
    assert len(result.plan.blocks) == 2


def test_report(recipe: Recipe, tmp_path: Path) -> None:
    result = flatquant.quantize(tiny_llama(), recipe, tokens(), output=tmp_path / "out", device="cpu", seed=3)
    report = json.loads((tmp_path / "out" / "flatquant_report.json").read_text())
    assert report == json.loads(json.dumps(result.report))
    assert report["data"]["source"] == "tokens"
    assert (report["data"]["samples"], report["data"]["seqlen"]) == (2, 16)
    assert report["seed"] == 3
    assert report["dtype"] == "float32"
    assert report["versions"].keys() == {"flatquant", "python", "torch", "transformers"}
    for index, block in enumerate(report["blocks"]):
        assert block["block"] == index
        assert (block["before"], block["after"]) == (block["losses"][0], block["losses"][-1])
        assert "seconds" not in block
    assert 0 < report["sizes"]["quantised_bytes"] < report["sizes"]["original_bytes"]
    assert report["timing"]["total"] > 0
    data = dataclasses.replace(recipe.data, text="tokens")
    assert flatquant.spec.from_dict(Recipe, report["recipe"]) == dataclasses.replace(recipe, data=data)


def test_a_model_goes_by_the_name_of_its_folder_and_not_by_its_path(recipe: Recipe, tmp_path: Path) -> None:
    folder = tmp_path / "Qwen-tiny"
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    named = flatquant.quantize(folder, recipes.rtn("w8"), output=tmp_path / "out", device="cpu").report["model"]
    assert (named["name"], named["title"]) == (None, "Qwen-tiny")
    assert str(tmp_path) not in (tmp_path / "out/flatquant_report.json").read_text()
    assert "# Qwen-tiny, w8a16kv16" in (tmp_path / "out/README.md").read_text()
    unnamed = flatquant.quantize(tiny_llama(), recipe, tokens(), device="cpu").report["model"]
    assert unnamed["title"] == "LlamaForCausalLM"


def test_stored_bytes_are_those_in_the_files(recipe: Recipe, tmp_path: Path) -> None:
    result = flatquant.quantize(tiny_llama(), recipe, tokens(), output=tmp_path / "out", device="cpu")
    from flatquant.runtime.artifact import inspect

    assert result.report["sizes"]["quantised_bytes"] == sum(inspect(tmp_path / "out").bytes_by_kind.values())


def test_same_seed_same_model_other_seed_other_model(recipe: Recipe) -> None:
    logits = [
        flatquant.quantize(tiny_llama(), recipe, tokens(), device="cpu", seed=seed).model(tokens()).logits
        for seed in (0, 0, 1)
    ]
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])


def test_shape_of_tokens_counts(recipe: Recipe) -> None:
    result = flatquant.quantize(tiny_llama(), recipe, tokens(3, 8), device="cpu")
    assert result.report["recipe"]["data"] == {"samples": 3, "seqlen": 8, "text": "tokens"}


def test_rounding_reads_no_text() -> None:
    assert flatquant.quantize(tiny_llama(), recipes.rtn("w4a4kv4"), device="cpu").report["data"] is None


# ------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("calibration", "error", "message"),
    [
        (None, DataError, "tokenizer"),  # the recipe's own text
        ("c4:x", DataError, "share 'x' of calibration text c4 is no number above 0"),
        ("self", DataError, "tokenizer"),
        (tokens().float(), DataError, "int64"),
        (tokens() + 100, DataError, "outside the model's 128"),
        (tokens(1), SpecError, "batch size 2 exceeds 1 samples"),
    ],
)
def test_bad_text(recipe: Recipe, tmp_path: Path, calibration, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        flatquant.quantize(tiny_llama(), recipe, calibration, output=tmp_path / "out", device="cpu")
    assert not names(tmp_path)


def test_unknown_architecture(recipe: Recipe, tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=128, bos_token_id=1, eos_token_id=2))
    with pytest.raises(ModelError, match="model type 'gpt2' is not supported"):
        flatquant.quantize(model, recipe, tokens(), output=tmp_path / "out", device="cpu")
    assert not names(tmp_path)


@pytest.mark.parametrize("method", ["rtn", "flatquant"])
def test_nan_in_a_block(recipe: Recipe, tmp_path: Path, method: str) -> None:
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = torch.nan
    chosen = recipes.rtn("w4") if method == "rtn" else recipe
    with pytest.raises(CalibrationError, match=r"block 1: mlp.up_proj.weight holds NaN or infinity; check the model"):
        flatquant.quantize(model, chosen, tokens(), output=tmp_path / "out", device="cpu")
    assert not names(tmp_path)


def test_output_is_checked_before_anything_else(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ArtifactError, match="not empty"):
        flatquant.quantize("no/such-model", recipe, "self", output=tmp_path)
    assert names(tmp_path) == {"file"}


@pytest.mark.parametrize("method", ["rtn", "flatquant"])
@pytest.mark.parametrize("text", ["text.txt", "self"])
def test_a_tokenizer_of_another_model_is_an_error(recipe: Recipe, tmp_path: Path, method: str, text: str) -> None:
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 40)
    chosen = recipes.rtn("w4") if method == "rtn" else recipe
    source = tmp_path / "text.txt" if text == "text.txt" else text
    with pytest.raises(DataError, match="a tokenizer with token ids outside the model's 100"):
        flatquant.quantize(
            tiny_llama(vocab=100), chosen, source, tokenizer=tiny_tokenizer(), output=tmp_path / "out", device="cpu"
        )
    assert names(tmp_path) == {"text.txt"}


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_nothing_takes(recipe: Recipe, tmp_path: Path, seed: int) -> None:
    with pytest.raises(SpecError, match=f"seed {seed}: give a whole number from 0"):
        flatquant.quantize(tiny_llama(), recipe, tokens(), output=tmp_path / "out", device="cpu", seed=seed)
    assert not names(tmp_path)


@pytest.mark.parametrize(
    ("device", "message"), [("meta", "neither the CPU nor a CUDA device"), ("toaster", "unknown device 'toaster'")]
)
def test_a_device_that_is_none(recipe: Recipe, device: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        flatquant.quantize(tiny_llama(), recipe, tokens(), device=device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_such_device(recipe: Recipe) -> None:
    with pytest.raises(ModelError, match="no CUDA device"):
        flatquant.quantize(tiny_llama(), recipe, tokens(), device="cuda")


# ------------------------------------------------------------------------------------------------- disk full


def test_disk_full_when_saving(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing half-written; once there is room, the run goes on and ends with the same bytes."""

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("flatquant.runtime.artifact.write._write_shard", full)
        with pytest.raises(ArtifactError, match="No space left"):
            flatquant.quantize(tiny_llama(), recipe, tokens(), output=tmp_path / "out", device="cpu")
    assert names(tmp_path) == {"out.partial"}
    flatquant.quantize(tiny_llama(), recipe, tokens(), output=tmp_path / "out", device="cpu", resume=True)
    flatquant.quantize(tiny_llama(), recipe, tokens(), output=tmp_path / "other", device="cpu")
    assert names(tmp_path) == {"out", "other"}
    for name in names(tmp_path / "out") - {"flatquant_report.json"}:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


def test_disk_full_when_keeping_a_block(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("flatquant.calibrate.state.save_file", full)
    with pytest.raises(CalibrationError, match=r"cannot write fitted-00000.safetensors: No space left .*--resume"):
        flatquant.quantize(tiny_llama(), recipe, tokens(), output=tmp_path / "out", device="cpu")
    assert names(tmp_path) == {"out.partial"}
    assert names(tmp_path / "out.partial") == {"run.json"}


# ------------------------------------------------------------------------------------------------- resume


class Stop(Exception):
    """Ends a run early."""


def interrupted(model, recipe: Recipe, calibration, output: Path, **settings) -> None:
    def stop(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("solve", 1):
            raise Stop

    with pytest.raises(Stop):
        flatquant.quantize(model, recipe, calibration, output=output, device="cpu", progress=stop, **settings)


def test_resume_needs_asking_and_the_same_settings(recipe: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupted(tiny_llama(), recipe, tokens(), out)
    with pytest.raises(CalibrationError, match=r"unfinished run .*--resume, or delete"):
        flatquant.quantize("no/such-model", recipe, tokens(), output=out)
    changes = [
        ("seed", {"seed": 1}, tiny_llama(), recipe, tokens()),
        ("recipe", {}, tiny_llama(), dataclasses.replace(recipe, solver=SolverSpec(kind="gptq")), tokens()),
        ("model", {}, tiny_llama(seed=1), recipe, tokens()),
        ("data", {}, tiny_llama(), recipe, tokens() + 1),
    ]
    for what, settings, model, changed, text in changes:
        with pytest.raises(CalibrationError, match=f"differs in {what};"):
            flatquant.quantize(model, changed, text, output=out, device="cpu", resume=True, **settings)
    flatquant.quantize(tiny_llama(), recipe, tokens(), output=out, device="cpu", resume=True)
    assert names(tmp_path) == {"out"}


@pytest.mark.parametrize("resume", [True, False])
def test_a_second_run_beside_a_live_one_is_refused(recipe: Recipe, tmp_path: Path, resume: bool) -> None:
    """From its first call to its last, wherever the first run is; and the first ends as if alone."""
    beside: list[str] = []

    def again(*_: object) -> None:
        with pytest.raises(CalibrationError, match=f"another run .*process {os.getpid()} .*choose another") as caught:
            flatquant.quantize(tiny_llama(), recipe, tokens(), output=tmp_path / "out", device="cpu", resume=resume)
        beside.append(str(caught.value))

    for name, progress in (("out", again), ("whole", None)):
        flatquant.quantize(
            tiny_llama(), recipe, tokens(), output=tmp_path / name, device="cpu", progress=progress, resume=resume
        )
    assert len(beside) > 3
    assert "\n" not in beside[0]
    assert names(tmp_path) == {"out", "whole"}
    for file in ("config.json", "flatquant.safetensors"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_the_state_of_a_dead_run_is_gone_on_with_and_swept(recipe: Recipe, tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def kill(stage: str, done: int, _: int) -> None:
        if (stage, done) == ("solve", 1):
            raise Killed

    options = {"output": tmp_path / "out", "device": "cpu"}
    with pytest.raises(Killed):
        flatquant.quantize(tiny_llama(), recipe, tokens(), progress=kill, **options)
    state = tmp_path / "out.partial"
    kept = names(state)
    (state / store.LOCK_FILE).write_text("99999999\n")  # of a process that is no more, and what it was writing
    (state / ".solved-00001.safetensors.tmp-0123abcd").write_bytes(b"half")
    with pytest.raises(Killed):
        flatquant.quantize(tiny_llama(), recipe, tokens(), progress=kill, resume=True, **options)
    assert names(state) == kept
    flatquant.quantize(tiny_llama(), recipe, tokens(), resume=True, **options)
    assert names(tmp_path) == {"out"}


def test_resume_without_a_run_starts_one(recipe: Recipe, tmp_path: Path) -> None:
    flatquant.quantize(tiny_llama(), recipe, tokens(), output=tmp_path / "out", device="cpu", resume=True)
    assert names(tmp_path) == {"out"}


def test_resume_of_a_finished_run_finds_it(recipe: Recipe, tmp_path: Path) -> None:
    first = flatquant.quantize(tiny_llama(), recipe, tokens(), output=tmp_path / "out", device="cpu")
    again = flatquant.quantize(tiny_llama(), recipe, tokens(), output=tmp_path / "out", device="cpu", resume=True)
    assert again.report == first.report
    assert again.plan == first.plan
    with pytest.raises(ArtifactError, match="not empty"):
        flatquant.quantize(tiny_llama(), recipe, tokens(), output=tmp_path / "out", device="cpu", resume=True, seed=1)


def test_own_text_is_written_once(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(tiny_llama(), recipe, "self", tmp_path / "out", tokenizer=tiny_tokenizer())
    monkeypatch.setattr("flatquant.api.run.written_part", lambda *_, **__: pytest.fail("wrote it again"))
    result = flatquant.quantize(
        tiny_llama(), recipe, "self", tokenizer=tiny_tokenizer(), output=tmp_path / "out", device="cpu", resume=True
    )
    assert result.report["data"]["source"] == "self"
    assert len(result.report["data"]["sha256"]) == 64


# ------------------------------------------------------------------------------------------------- mixtures


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A folder of two texts."""
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("abc def, ghi. " * 60)
    (folder / "b.txt").write_text("123 456, 789. " * 60)
    return folder


def test_a_run_says_what_it_was_calibrated_on(recipe: Recipe, tmp_path: Path, texts: Path) -> None:
    recipe = recipe.tuned(samples=8)
    mixture = f"{texts / 'a.txt'}:1,{texts / 'b.txt'}:2,self:1"
    options = {"tokenizer": tiny_tokenizer(), "device": "cpu"}
    result = flatquant.quantize(tiny_llama(), recipe, mixture, output=tmp_path / "out", **options)
    data = result.report["data"]
    told = "a.txt:1,b.txt:2,self:1"
    assert (data["source"], data["samples"], data["seqlen"]) == (told, 8, 16)
    assert [(part["source"], part["windows"]) for part in data["sources"]] == [("a.txt", 2), ("b.txt", 4), ("self", 2)]
    assert result.report["recipe"]["data"]["text"] == told
    verdict = result.report["verdict"]
    assert (verdict["source"], verdict["kept_back"], verdict["windows"]) == (told, True, 8)
    line = (
        f"{told}, 8 windows of 16 tokens (2 of a.txt across documents, 4 of b.txt across documents, 2 of self written"
    )
    assert line in (tmp_path / "out" / "README.md").read_text()
    inspected = flatquant.runtime.artifact.inspect(tmp_path / "out").report
    assert inspected is not None
    assert inspected["data"] == data
    assert str(tmp_path) not in (tmp_path / "out" / "flatquant_report.json").read_text()


def test_a_recipe_names_its_text(recipe: Recipe, texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(texts)
    named = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, text="a.txt,b.txt"))
    options = {"tokenizer": tiny_tokenizer(), "device": "cpu"}
    own = flatquant.quantize(tiny_llama(), named, **options).report
    given = flatquant.quantize(tiny_llama(), recipe, "a.txt:3,b.txt:3", **options).report
    assert own["data"] == given["data"]
    assert own["data"]["source"] == "a.txt:1,b.txt:1"
    assert own["run"] == given["run"]
    other = flatquant.quantize(tiny_llama(), named, "a.txt", **options).report
    assert other["data"]["source"] == "a.txt"
    presets = {preset: recipes.flatquant("w4a4kv4", preset).data.text for preset in ("reference", "best", "quick")}
    assert presets == {"reference": "wikitext2", "best": "wikitext2:1,c4:3", "quick": "wikitext2"}


@pytest.mark.parametrize("own", ["", ",self:2"], ids=["read", "partly written"])
def test_a_run_is_gone_on_with_by_its_own_mixture_alone(
    recipe: Recipe, tmp_path: Path, texts: Path, own: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe.tuned(samples=6)
    a, b = texts / "a.txt", texts / "b.txt"
    options = {"tokenizer": tiny_tokenizer(), "device": "cpu"}
    flatquant.quantize(tiny_llama(), recipe, f"{a},{b}:2{own}", output=tmp_path / "whole", **options)
    out = tmp_path / "out"
    interrupted(tiny_llama(), recipe, f"{a},{b}:2{own}", out, tokenizer=tiny_tokenizer())
    monkeypatch.setattr("flatquant.api.run.written_part", lambda *_, **__: pytest.fail("wrote it again"))
    for other in (f"{a}:2,{b}{own}", f"{b}:2,{a}{own}", f"{a}"):
        with pytest.raises(CalibrationError, match="differs in data"):
            flatquant.quantize(tiny_llama(), recipe, other, output=out, resume=True, **options)
    text = a.read_text()
    a.write_text(text.replace("d", "e"))
    with pytest.raises(CalibrationError, match="differs in data"):
        flatquant.quantize(tiny_llama(), recipe, f"{a},{b}:2{own}", output=out, resume=True, **options)
    a.write_text(text)
    flatquant.quantize(tiny_llama(), recipe, f"{a},{b}:2{own}", output=out, resume=True, **options)
    for file in ("config.json", "flatquant.safetensors"):
        assert (out / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_damaged_state_is_said(recipe: Recipe, tmp_path: Path) -> None:
    interrupted(tiny_llama(), recipe, tokens(), tmp_path / "out")
    state = sorted((tmp_path / "out.partial").glob("*.safetensors"))
    for path in state:
        path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(FlatQuantError, match="damaged"):
        flatquant.quantize(tiny_llama(), recipe, tokens(), output=tmp_path / "out", device="cpu", resume=True)


def test_killed_savers_are_swept_up(recipe: Recipe, tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for process in (dead.pid, os.getppid()):
        (tmp_path / f"out.tmp-{process}-0123abcd").mkdir()
    flatquant.quantize(tiny_llama(), recipe, tokens(), output=tmp_path / "out", device="cpu")
    assert names(tmp_path) == {"out", f"out.tmp-{os.getppid()}-0123abcd"}


def test_state_is_closed_to_other_runs(tmp_path: Path) -> None:
    RunState(tmp_path / "run", {"a": 1}, resume=False)
    with pytest.raises(CalibrationError, match="differs in a"):
        RunState(tmp_path / "run", {"a": 2}, resume=True)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("recipe_name", ["rtn", "gptq", "end to end"])
def test_killed_runs_end_with_the_same_bytes(recipe_name: str, tmp_path: Path) -> None:
    model, text = tmp_path / "model", tmp_path / "text.txt"
    tiny_llama().save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 40)
    (tmp_path / "work").mkdir()
    path = os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, KILLING, recipe_name, model, text, tmp_path / "work", "9"],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout)
    assert result["different"] == []
    assert result["left"] == []
    assert result["kills"] >= 4


def test_the_fit_runs_in_half_precision_only_on_a_gpu() -> None:
    from flatquant.api.checks import fit_dtype

    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    half, brain = tiny_llama(dtype=torch.float16), tiny_llama(dtype=torch.bfloat16)
    recipe, squares = recipes.flatquant("w4a4kv4", preset="best"), recipes.oac("w3a16")
    assert fit_dtype(half, recipe, gpu) == torch.float16
    assert fit_dtype(brain, recipe, gpu) == torch.bfloat16
    assert fit_dtype(tiny_llama(dtype=torch.float32), recipe, gpu) == torch.float32
    assert fit_dtype(half, recipe, cpu) == torch.float32
    assert fit_dtype(half, squares, gpu) == torch.float32  # small gradients, squared, vanish in float16
    assert fit_dtype(brain, squares, gpu) == torch.bfloat16


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize(
    "device", ["meta", *([pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else [])]
)
def test_a_model_is_lent_to_a_device_and_keeps_its_tensors(device: str, quantised: bool) -> None:
    """Also where what is done there fails: the same modules hold the same memory, and compute the same."""
    from flatquant.api.checks import copied_to

    model = tiny_llama()
    if quantised:
        flatquant.quantize(model, recipes.rtn("w4a4kv4"), device="cpu")

    def places() -> dict[str, int]:
        named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
        return {name: tensor.data_ptr() for name, tensor in named}

    before, want = places(), model(tokens()).logits
    lent = ExitStack()
    lent.enter_context(copied_to(torch.device(device), model))
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {device}
    with pytest.raises(KeyboardInterrupt), lent:
        raise KeyboardInterrupt
    assert places() == before
    assert torch.equal(model(tokens()).logits, want)
