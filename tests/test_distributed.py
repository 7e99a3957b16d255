"""Several ranks: the same bytes where they are promised, near losses where not, and how a run ends without one."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from flatquant import distributed
from flatquant.errors import RankError
from tests.tiny_models import tiny_llama, tiny_tokenizer

ROOT = Path(__file__).parents[1]
RANKS = Path(__file__).with_name("ranks.py")
QUICK = ["--samples", "4", "--seqlen", "16", "--batch-size", "2", "--device", "cpu", "--accept", "--quiet"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="forks, and reads /proc"),
]


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model whose blocks neither two nor three ranks divide evenly, and a text."""
    folder = tmp_path_factory.mktemp("ranks")
    tiny_llama(layers=5).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog and runs away from it again " * 200)
    (folder / "work").mkdir()
    return folder


@pytest.fixture(scope="module")
def trials(place: Path) -> Iterator[subprocess.Popen[str]]:
    """`ranks.py`, started once."""
    command = [sys.executable, RANKS, place / "model", place / "text.txt", place / "work"]
    process = subprocess.Popen(command, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    yield process
    process.kill()
    process.communicate()


def found(trials: subprocess.Popen[str], part: str) -> Any:
    """What a part of `ranks.py` finds."""
    assert trials.stdin
    assert trials.stdout
    trials.stdin.write(part + "\n")
    trials.stdin.flush()
    line = trials.stdout.readline()
    assert line, "ranks.py has ended"
    answer = json.loads(line)
    assert answer["part"] == part, "an earlier part was late"
    assert "error" not in answer, answer["error"]
    return answer["found"]


@pytest.mark.parametrize(
    "modes", ["rtn, fit, streamed, verdict", "gptq, output adaptive, fed by quantised blocks, learned rounding"]
)
def test_blocks_have_the_same_bytes_on_any_number_of_ranks(trials, modes: str) -> None:
    different = found(trials, f"same_bytes={modes}")
    assert len(different) == 8
    assert not any(different.values()), different


def test_an_end_to_end_fit_is_that_of_one_rank_but_for_the_order_of_sums(trials) -> None:
    far = found(trials, "data_parallel")
    assert len(far) == 10
    for name, steps in far.items():
        # The second loss has the first update in it. Later a weight may round the other way. A gradient in bfloat16
        # has other last bits if ranks sum it.
        assert steps[0] < 1e-5, name
        assert steps[1] < (1e-4 if "compact" in name else 1e-5), name
        assert max(steps) < 0.2, name


def test_weights_that_move_in_backward_passes_go_where_one_rank_has_them(trials) -> None:
    """But for the last bits of gradients in bfloat16, which decide where one that is nearly 0 goes."""
    far = found(trials, "consumed")
    assert far["2"] == far["3"] < 0.1 < 0.5 < far["alone"]


def test_evaluation_is_divided_by_windows(trials) -> None:
    alone, *others = found(trials, "evaluated")
    assert alone["windows"] == 5
    for result in others:
        assert (result["value"], result["windows"]) == (alone["value"], alone["windows"])
        assert result["kl"] == pytest.approx(alone["kl"], rel=1e-12)
        assert result["top1"] == pytest.approx(alone["top1"], rel=1e-12)


def test_a_comparison_is_divided_by_rows(trials) -> None:
    result = found(trials, "compared")
    alone = measured(result["one"])
    assert ["error" in row for row in alone["rows"]] == [False] * 4 + [True] * 2
    for name in ("two", "goes on"):
        assert measured(result[name]) == alone
        assert result[name]["left"] == []
    assert result["two"]["ranks"] == ["0", "1"]
    assert result["fails"]["codes"] == [1, 1]
    assert result["fails"]["said"].startswith("error: rank 1: ValueError: a defect\nTraceback ")
    assert result["fails"]["said"].count("error: rank") == 1
    kept = result["goes on"]["kept"]
    assert len(kept) > 2  # the original and what the failure left
    assert result["goes on"]["again"] == []
    assert 0 not in result["held"]["codes"]
    line = r"error: rank 0: another comparison is writing .* \(process \d+ holds it\); wait for it, .*\n"
    assert re.fullmatch(line, result["held"]["said"])


def test_the_ladder_is_divided_by_rows(trials) -> None:
    alone, divided, again = found(trials, "laddered")
    assert again == divided  # none is made again
    assert len(divided) == 3
    assert sorted(map(str, unchanging(divided))) == sorted(map(str, unchanging(alone)))


def measured(run: dict[str, Any]) -> dict[str, Any]:
    """What a comparison prints, without what is another each time."""
    assert not any(run["codes"]), run["said"]
    result = json.loads(run["said"])
    return {**result, "rows": unchanging(result["rows"])}


def unchanging(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    changing = {"seconds", "stages", "peak_bytes", "row_seconds"}
    return [{name: value for name, value in row.items() if name not in changing} for row in rows]


def test_a_run_that_lost_a_rank_goes_on_with_other_numbers_of_ranks(trials) -> None:
    result = found(trials, "killed")
    assert result["hit"] >= 3
    assert max(result["seconds"]) < 60
    assert result["different"] == result["left"] == []


def test_an_end_to_end_fit_goes_on_where_it_was(trials) -> None:
    assert found(trials, "end_to_end_resumed") == {"end to end": [], "sharded": []}


def test_divided_weights_go_on_with_another_number_of_ranks(trials) -> None:
    steps = found(trials, "sharded_resumed")
    assert max(steps[:2]) < 1e-5
    assert max(steps) < 0.2


def test_a_fit_of_divided_weights_that_made_the_model_worse_is_undone(trials) -> None:
    result = found(trials, "sharded_undone")
    alone, divided = result["reports"]
    assert alone["undone"]
    assert divided["undone"]
    assert divided["losses"][0] == pytest.approx(alone["losses"][0], rel=1e-5)
    assert divided["held_out"][0] == pytest.approx(alone["held_out"][0], rel=1e-5)
    assert divided["plain"] == pytest.approx(alone["plain"], rel=1e-5)
    assert result["different"] == ["README.md", "config.json", "flatquant_report.json"]  # no weight


def test_divided_weights_move_alike_where_batches_are_taken_in_parts(trials) -> None:
    alone, *divided = found(trials, "sharded_parts")
    for losses in divided:
        assert losses[:2] == pytest.approx(alone[:2], rel=1e-5)
        assert losses == pytest.approx(alone, rel=0.2)


def test_divided_weights_take_a_share_and_a_gathered_block(trials) -> None:
    for peak, estimated, whole in found(trials, "sharded_memory"):
        assert estimated == pytest.approx(peak, rel=0.25)
        assert peak < 0.75 * whole


def test_failures_are_one_line_that_names_the_rank(trials) -> None:
    result = found(trials, "failures")
    assert result["quiet"] == [[0, 0], ""]
    for name, line in (
        ("nan", "error: rank 1: block 1: the loss in float32 is not finite"),
        ("mistake", "error: rank 0: 99 bits: .*"),
        ("held", r"error: rank 0: another run is writing .*held \(process \d+ holds it\); wait for it, .*"),
    ):
        codes, said = result[name]
        assert 0 not in codes
        assert re.fullmatch(line + r"\n", said), said
    _, said = result["defect"]
    assert said.startswith("error: rank 1: ValueError: a defect\nTraceback ")
    assert said.count("Traceback") == 1


# ------------------------------------------------------------------------------------------------- the launcher


def launched(place: Path, output: Path, *arguments: object) -> list[str]:
    text = place / "text.txt"
    options = ["--output", output, "--calibration", text, "--devices", 2, *QUICK, *arguments]
    return [sys.executable, "-m", "flatquant", "quantize", *map(str, [place / "model", *options])]


def test_devices_starts_ranks(place: Path, tmp_path: Path) -> None:
    command = launched(place, tmp_path / "out", "--epochs", 1)
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_killed_rank_ends_the_run_in_one_line(place: Path, tmp_path: Path) -> None:
    command = launched(place, tmp_path / "out", "--epochs", 400)
    process = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 100
        while not (tmp_path / "out.partial" / "run.json").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(rank_of(process.pid, 1), signal.SIGKILL)
        before = time.monotonic()
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert time.monotonic() - before < 60
    assert process.returncode == 1
    line = r"error: rank 1 was ended by SIGKILL \(out of memory\?\); what is done is kept; "
    line += r"repeat the command to go on, quantize with --resume\n"
    assert re.fullmatch(line, said), said


def rank_of(launcher: int, rank: int) -> int:
    """The process of a rank."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
            variables = (entry / "environ").read_bytes().split(b"\0")
        except (OSError, IndexError):
            continue
        if int(parent) == launcher and f"RANK={rank}".encode() in variables:
            return int(entry.name)
    raise AssertionError("no such rank")


# ------------------------------------------------------------------------------------------------- one rank


def test_one_rank_communicates_with_nobody() -> None:
    assert (distributed.rank(), distributed.size(), distributed.leads()) == (0, 1, True)
    tensor, parameter = torch.ones(2), nn.Parameter(torch.ones(3))
    tensors, note = distributed.broadcast(({"t": tensor}, [1]))
    assert tensors["t"] is tensor
    assert note == [1]
    assert distributed.sum_gradients([parameter], torch.tensor(2.0)) == 2
    assert parameter.grad is None
    assert list(distributed.turns(3)) == [0, 1, 2]
    with distributed.joined(torch.device("cpu")):
        assert distributed.size() == 1


def test_a_connection_that_breaks_inside_of_a_pass_is_another_rank_that_has_ended(monkeypatch) -> None:
    lost = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error: Connection reset by peer"
    for ranks, message, error in ((2, lost, RankError), (1, lost, RuntimeError), (2, "a shape is wrong", RuntimeError)):
        monkeypatch.setattr(distributed, "size", lambda ranks=ranks: ranks)
        with pytest.raises(error) as caught, distributed.reaching_in_passes():
            raise RuntimeError(message)
        assert caught.type is error
