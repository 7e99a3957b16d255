"""Zero-shot tasks from local files, scored by the harness; and by hand."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import flatquant
from flatquant.cli import app
from flatquant.errors import FlatQuantError
from flatquant.evaluate import TASKS, zero_shot
from tests.tiny_models import tiny_llama, tiny_tokenizer

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")

QUESTIONS = {
    "lambada_openai": [{"text": "the cat sat on the mat"}, {"text": "one two\nthree four"}, {"text": "a b c d"}],
    "hellaswag": [
        {"activity_label": "Cats", "ctx_a": "A cat sits.", "ctx_b": "it", "endings": ["runs.", "eats.", "x", "y [z]"],
         "label": "1"},
    ] * 3,
    "piqa": [{"goal": "sit", "sol1": "use a chair", "sol2": "use a sea", "label": 0}] * 3,
    "winogrande": [{"sentence": "Ann saw Bob so _ ran.", "option1": "Ann", "option2": "Bob", "answer": "2"}] * 3,
    "arc_easy": [{"id": "1", "question": "What is wet?", "choices": ["sand", "water", "fire"], "gold": 1}] * 3,
    "arc_challenge": [{"id": "1", "question": "What is dry?", "choices": ["sand", "water"], "gold": 0}] * 3,
}  # fmt: skip


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "zeroshot").mkdir()
    for task, rows in QUESTIONS.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "zeroshot" / f"{task}.jsonl").write_text(text)
    monkeypatch.setenv("FLATQUANT_DATA", str(tmp_path))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path


def by_hand(model: torch.nn.Module, context: str, ending: str) -> float:
    """Log-likelihood of an ending."""
    tokenizer = tiny_tokenizer()
    ids = tokenizer(context + ending, return_tensors="pt", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = model(ids).logits[0].log_softmax(-1)
    n = len(ending)
    return float(logits[-n - 1 : -1].gather(1, ids[0, -n:, None]).sum())


def test_every_task_reads_its_local_file_and_scores(data: Path) -> None:
    model = tiny_llama()
    kept: list[str] = []
    found = zero_shot(model, tiny_tokenizer(), batch_size=4, keep=lambda task, _: kept.append(task))
    assert list(found) == kept == list(TASKS)
    for task, score in found.items():
        assert score["samples"] == 3
        assert 0 <= score["value"] <= 1
        assert score["metric"] == ("acc" if task in ("lambada_openai", "winogrande") else "acc_norm")
    endings = [" sand", " water", " fire"]
    scores = [by_hand(model, "Question: What is wet?\nAnswer:", e) for e in endings]
    normed = [s / (len(e) - 1) for s, e in zip(scores, endings, strict=True)]
    assert found["arc_easy"]["acc"] == float(max(range(3), key=scores.__getitem__) == 1)
    assert found["arc_easy"]["value"] == float(max(range(3), key=normed.__getitem__) == 1)
    ran = [by_hand(model, f"Ann saw Bob so {who}", " ran.") for who in ("Ann", "Bob")]
    assert found["winogrande"]["value"] == float(ran[1] > ran[0])


def test_what_is_done_is_not_done_again(data: Path) -> None:
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    before = {"piqa": {"value": 0.123, "limit": None}, "winogrande": {"value": 0.5, "limit": 2}}
    kept: list[str] = []
    found = zero_shot(
        model, tokenizer, ["piqa", "winogrande"], done=before, keep=lambda task, _: kept.append(task), batch_size=2
    )
    assert found["piqa"]["value"] == 0.123
    assert kept == ["winogrande"]  # that one had another limit


def test_unknown_tasks(data: Path) -> None:
    with pytest.raises(FlatQuantError, match="unknown task 'magic'"):
        zero_shot(tiny_llama(), tiny_tokenizer(), ["magic"])


def test_without_the_harness_the_error_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['lm_eval'] = None\n"
        "from flatquant.evaluate import zero_shot\n"
        "try: zero_shot(None, None)\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(root / "src"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "FlatQuantError" in done.stdout
    assert "pip install lm-eval" in done.stdout


def test_command_line_keeps_tasks_and_shows_the_drop(data: Path) -> None:
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    model.save_pretrained(data / "original")
    tokenizer.save_pretrained(data / "original")
    folder = data / "model"
    flatquant.quantize(model, flatquant.recipes.rtn("w4"), tokenizer=tokenizer, output=folder, device="cpu")
    command = ["evaluate", str(folder), "--tasks", "piqa,arc_easy", "--save", "--device", "cpu", "--quiet"]
    command += ["--batch-size", "4"]
    done = CliRunner().invoke(app, [*command, "--divergence-from", str(data / "original")])
    assert done.exit_code == 0, done.output
    assert "against the original" in done.output
    kept = json.loads((folder / "flatquant_evaluation.json").read_text())
    assert set(kept["tasks"]) == set(kept["original"]["tasks"]) == {"piqa", "arc_easy"}
    assert "arc_easy, acc_norm" in (folder / "README.md").read_text()
    for file in (data / "zeroshot").iterdir():
        file.unlink()  # nothing is left to run: what is kept is shown
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 0, again.output
    assert "piqa" in again.output
