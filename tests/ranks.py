"""Runs `quantize` and others on one to three ranks over gloo, kills ranks, resumes with other numbers, compares.

    python tests/ranks.py MODEL_FOLDER TEXT WORK_FOLDER

A program of its own: every rank is a fork of a process that has imported all, which costs a tenth of a start from
nothing. It stands in for torchrun's agent, without ending ranks that others have left. Reads parts, PART[=MODE, ..],
one a line, and answers each with a line of JSON: {"part": .., "found": ..} or {"part": .., "error": ..}.
"""

import contextlib
import dataclasses
import gc
import io
import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from benchmarks import ladder
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed import TCPStore

from flatquant import api, cli, compare, distributed, recipes, store
from flatquant.calibrate import end2end
from flatquant.calibrate.blockwise import Fitted
from flatquant.calibrate.pipeline import fit as stage
from flatquant.errors import CalibrationError, RankError
from flatquant.evaluate.job import Evaluation
from flatquant.spec import DataSpec, EndToEndSpec, FitSpec, Recipe, Scheme, SolverSpec

CPU = torch.device("cpu")
_STORES: list[TCPStore] = []
DATA = DataSpec(samples=4, seqlen=16)
FIT = dataclasses.replace(recipes.flatquant("w4a4kv4"), data=DATA, fit=FitSpec(epochs=2, batch_size=2))
STEPS = EndToEndSpec(steps=6, batch_size=2, lr=1e-3, clip_lr=1e-2)


def fed(recipe: Recipe) -> Recipe:
    assert recipe.fit is not None
    fit = dataclasses.replace(recipe.fit, epochs=2, batch_size=2)
    return dataclasses.replace(recipe, data=DATA, fit=fit)


def learned() -> Recipe:
    recipe = recipes.recipe("autoround", "w3a16", "reference")
    assert recipe.solver.learned is not None
    steps = dataclasses.replace(recipe.solver.learned, steps=4, checks=2, batch_size=2)
    return dataclasses.replace(recipe, data=DATA, solver=dataclasses.replace(recipe.solver, learned=steps))


# What is promised the same bytes on any number of ranks.
BLOCK_WISE = {
    "rtn": recipes.rtn("w4a4kv4"),
    "fit": FIT,
    "gptq": dataclasses.replace(FIT, solver=SolverSpec(kind="gptq")),
    "output adaptive": dataclasses.replace(FIT, solver=SolverSpec(kind="gptq", hessian="output_adaptive")),
    "fed by quantised blocks": fed(recipes.recipe("omniquant", "w4a4", "reference")),
    "learned rounding": learned(),
}
END_TO_END = {
    "end to end": dataclasses.replace(FIT, end_to_end=STEPS),
    "weights": dataclasses.replace(
        FIT, end_to_end=dataclasses.replace(STEPS, weight_lr=1e-3, batch_size=4), solver=SolverSpec(kind="gptq")
    ),
    "sharded": dataclasses.replace(
        FIT, end_to_end=dataclasses.replace(STEPS, weight_lr=1e-3, batch_size=4, memory="sharded")
    ),
    # On three ranks, one has no window. Its batches are taken in parts.
    "sharded, few windows": dataclasses.replace(
        FIT, end_to_end=dataclasses.replace(STEPS, weight_lr=1e-3, memory="sharded")
    ),
    # On three ranks, one has no window. Nothing is rounded but stored weights, to bfloat16: where ranks sum gradients,
    # one weight in thousands has another last bit, and on grids of 4 bits that alone would move a loss.
    "compact": dataclasses.replace(
        FIT,
        scheme=Scheme.parse("w4", clip="none"),
        end_to_end=dataclasses.replace(
            STEPS, weight_lr=1e-3, memory="compact", objective="cross_entropy", round_weights=False
        ),
    ),
}


def start(ranks: int, body: Callable[[], None]) -> list[int]:
    """Fork ranks; their processes. The store of what they say of themselves is this process's, as it is the agent's.

    All begin once all are there: a thread of the store looks up the names of who connects, and a fork at that moment
    would find the C library's lock taken for good.
    """
    agent = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    agent.set("connected", "")
    agent.get("connected")  # this process's own connection has been looked up
    forked, all_forked = os.pipe()
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    processes = []
    gc.freeze()  # what is there already is nothing for a rank to collect
    for rank in range(ranks):
        sys.stdout.flush()
        if child := os.fork():
            processes.append(child)
            continue
        code = 1
        try:
            os.close(all_forked)
            os.read(forked, 1)  # nothing comes; it ends when the last process has closed the other end
            if ranks > 1:
                number, count = str(rank), str(ranks)
                os.environ |= {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
                os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(agent.port)}
            body()
            code = 0
        except RankError:
            code = 9
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except BaseException:  # noqa: BLE001 - a fork must not go on as its parent
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    os.close(all_forked)
    os.close(forked)
    _STORES.append(agent)
    return processes


def codes(processes: list[int]) -> list[int]:
    """How they end."""
    return [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file; of the report all but `timing`."""
    found = {p.name: p.read_bytes() for p in sorted(folder.iterdir())}
    report = json.loads(found["flatquant_report.json"])
    report.pop("timing")
    return {**found, "flatquant_report.json": json.dumps(report, sort_keys=True).encode()}


def differing(a: Path, b: Path) -> list[str]:
    one, other = contents(a), contents(b)
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


class Trials:
    def __init__(self, model: str, text: str, work: Path) -> None:
        self.model, self.text, self.work = model, text, work

    def quantise(self, recipe: Recipe, output: Path, **options: Any) -> Callable[[], None]:
        def body() -> None:
            text = self.text if recipe.needs_data else None
            options.setdefault("verdict", False)
            with distributed.joined(CPU):
                result = api.quantize(self.model, recipe, text, output=output, device="cpu", **options)
                assert result.report["run"]
                assert result.model is not None

        return body

    def whole(self, name: str, recipe: Recipe, ranks: int, **options: Any) -> Path:
        output = self.work / f"{name} on {ranks}"
        if output.exists():
            return output
        found = codes(start(ranks, self.quantise(recipe, output, **options)))
        assert found == [0] * ranks, (name, ranks, found)
        return output

    def same_bytes(self, wanted: str) -> dict[str, list[str]]:
        """By mode, of those wanted, what differs from one rank's."""
        different: dict[str, list[str]] = {}
        modes: dict[str, tuple[Recipe, Mapping[str, Any]]] = {name: (r, {}) for name, r in BLOCK_WISE.items()}
        modes |= {"streamed": (FIT, {"stream": True}), "verdict": (recipes.rtn("w4a4kv4"), {"verdict": True})}
        for name in wanted.split(", "):
            recipe, options = modes[name]
            alone = self.whole(name, recipe, 1, **options)
            for ranks in (2, 3):
                different[f"{name}, {ranks}"] = differing(alone, self.whole(name, recipe, ranks, **options))
        return different

    def data_parallel(self) -> dict[str, list[float]]:
        """By mode and ranks, how far the loss of every step is from one rank's, relatively."""
        far: dict[str, list[float]] = {}
        for name, recipe in END_TO_END.items():
            alone = _fitted(self.whole(name, _undivided(recipe), 1))
            for ranks in (2, 3):
                found = _fitted(self.whole(name, recipe, ranks))
                pairs = zip(alone["losses"], found["losses"], strict=True)
                far[f"{name}, {ranks}"] = [abs(b - a) / a for a, b in pairs]
        return far

    def consumed(self) -> dict[str, float]:
        """How far weights that move in backward passes go from where one rank has them, as a share of their way.

        `3` is of three ranks, one of which has no window; `alone` of one rank that sees a half of every batch.
        """
        from tests.calibrate.test_consuming import Problem, batch

        file = self.work / "consumed.safetensors"

        def ends(ranks: int, windows: int = 2) -> Tensor:
            def body() -> None:
                with distributed.joined(CPU):
                    ours = distributed.share(2)
                    problem = Problem(share=len(ours) / 2 if ranks > 1 else None)
                    start = torch.cat([p.detach().float().flatten() for p in problem.weights])
                    for step in range(6):
                        parts = batch(step).chunk(2)
                        rows = [parts[i] for i in ours][:windows] or [parts[0]]
                        problem.optimiser.step(torch.cat(rows))
                    end = torch.cat([p.detach().float().flatten() for p in problem.weights])
                    if distributed.leads():
                        save_file({"way": end - start}, file)

            assert codes(start(ranks, body)) == [0] * ranks
            return load_file(file)["way"]

        whole = ends(1)
        found = {"2": ends(2), "3": ends(3), "alone": ends(1, windows=1)}
        return {name: float((way - whole).norm() / whole.norm()) for name, way in found.items()}

    def evaluated(self) -> list[dict[str, Any]]:
        """Perplexity of five windows and divergence from another model, on one, two and three ranks."""
        other, file = self.whole("rtn", BLOCK_WISE["rtn"], 1), self.work / "evaluation.json"

        def body() -> None:
            with distributed.joined(CPU):
                job = Evaluation(
                    str(other),
                    self.model,
                    device=CPU,
                    dtype=None,
                    batch_size=2,
                    save=False,
                    progress=lambda *_: None,
                    quiet=True,
                )
                job.perplexity(self.text, 16, 5)
                job.divergence(5, 16, 0)
                if distributed.leads():
                    file.write_text(json.dumps(job.result))

        found = []
        for ranks in (1, 2, 3):
            assert codes(start(ranks, body)) == [0] * ranks
            result = json.loads(file.read_text())
            found.append({**result["divergence"], **result["perplexity"][self.text]})
        return found

    def laddered(self) -> list[list[dict[str, Any]]]:
        """Rows of the ladder that one rank and two make, and those that two find made."""
        arguments = [self.model, "--tiny", "--device", "cpu", "--only-texts", "--texts", self.text]
        rungs = ["--methods", "rtn", "--schemes", "w4a4kv4", "w4a16", "w4g5a16"]  # groups of 5 are refused

        def body() -> None:
            os.dup2(2, 1)
            sys.argv = ["ladder", *arguments, *rungs, "--out", str(output)]
            ladder.main()

        found = []
        for ranks, output in ((1, self.work / "ladder 1"), (2, self.work / "ladder 2"), (2, self.work / "ladder 2")):
            assert codes(start(ranks, body)) == [0] * ranks
            (file,) = output.iterdir()
            found.append(json.loads(file.read_text())["samples"])
        return found

    def killed(self) -> dict[str, Any]:
        """Kill a rank at a random point, and resume with other numbers of ranks."""
        rng = random.Random(0)
        result: dict[str, Any] = {"hit": 0, "seconds": [], "left": [], "different": []}
        for trial, (name, ranks, again) in enumerate(
            [("fit", 2, 1), ("fit", 2, 3), ("fit", 3, 2), ("gptq", 2, 3), ("gptq", 3, 1), ("fit", 1, 2)]
        ):
            output, partial = self.work / f"trial {trial}", self.work / f"trial {trial}.partial"
            processes = start(ranks, self.quantise(BLOCK_WISE[name], output))
            victim, want = rng.randrange(ranks), rng.randint(2, 6)
            deadline = time.monotonic() + 60
            while len(_names(partial)) < want and not output.exists():
                assert time.monotonic() < deadline
                time.sleep(0.001)
            os.kill(processes[victim], signal.SIGKILL)
            before = time.monotonic()
            found = codes(processes)
            result["seconds"].append(time.monotonic() - before)
            result["hit"] += found[victim] == -signal.SIGKILL
            if found[victim] == -signal.SIGKILL:  # those that had not yet ended have said that they lost it
                result["left"] += [code for i, code in enumerate(found) if i != victim and code not in (0, 9)]
            found = codes(start(again, self.quantise(BLOCK_WISE[name], output, resume=True)))
            assert found == [0] * again, (trial, found)
            result["different"] += differing(self.whole(name, BLOCK_WISE[name], 1), output)
            result["left"] += [p.name for p in self.work.glob(f"{output.name}.*")]
        return result

    def end_to_end_resumed(self) -> dict[str, list[str]]:
        """What differs from end-to-end fits on two ranks if they are interrupted and go on."""
        return {name: self._resumed(name, 2) for name in ("end to end", "sharded")}

    def sharded_resumed(self) -> list[float]:
        """How far losses are from one rank's where two ranks divide weights, and three go on."""
        self._resumed("sharded", 3)
        alone = _fitted(self.whole("sharded", _undivided(END_TO_END["sharded"]), 1))
        found = _fitted(self.work / "interrupted sharded 3")
        return [abs(b - a) / a for a, b in zip(alone["losses"], found["losses"], strict=True)]

    def _resumed(self, name: str, again: int) -> list[str]:
        output, recipe = self.work / f"interrupted {name} {again}", END_TO_END[name]

        def body() -> None:
            end2end.SAVE_EVERY = 2

            def stop(stage: str, done: float, _: int) -> None:
                if stage == "end to end" and done >= 4:
                    os._exit(7)

            self.quantise(recipe, output, progress=stop)()

        found = codes(start(2, body))
        assert 7 in found, found
        assert (output.with_name(f"{output.name}.partial") / "end-to-end.safetensors").is_file()
        found = codes(start(again, self.quantise(recipe, output, resume=True)))
        assert found == [0] * again, found
        return differing(self.whole(name, recipe, 2), output)

    def sharded_undone(self) -> dict[str, Any]:
        """Fits whose rates make the model worse, on one rank and, with weights divided, on two: what the reports say,
        and what the folders differ in."""
        end = EndToEndSpec(steps=3, batch_size=2, weight_lr=0.5, lr=0.3, memory="sharded")
        recipe = dataclasses.replace(FIT, data=DataSpec(samples=8, seqlen=256), end_to_end=end)
        outputs = [self.whole("undone", made, ranks) for made, ranks in ((_undivided(recipe), 1), (recipe, 2))]
        return {"reports": [_fitted(output) for output in outputs], "different": differing(*outputs)}

    def sharded_parts(self) -> list[list[float]]:
        """Losses where blocks are computed again in the backward pass and batches are taken in parts: of one rank, and
        of two and three that divide weights. Two of three have a window that does not count."""
        from flatquant.calibrate.memory import Limits
        from flatquant.calibrate.pipeline import calibrate
        from tests.calibrate.test_memory import counted
        from tests.tiny_models import tiny_llama

        file = self.work / "parts.json"
        recipe = dataclasses.replace(END_TO_END["sharded"], fit=None)

        def body() -> None:
            model = tiny_llama()
            tokens = torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(0))
            with distributed.joined(CPU):
                own = recipe if distributed.size() > 1 else _undivided(recipe)
                roomy = counted(model, own, windows=1)
                layout = counted(model, own, windows=1, limits=Limits(host=roomy.host - 1))
                assert layout.recompute
                _, report = calibrate(model, own, tokens, device=CPU, dtype=torch.float32, layout=layout)
                assert report.end_to_end is not None
                if distributed.leads():
                    file.write_text(json.dumps(report.end_to_end.losses))

        found = []
        for ranks in (1, 2, 3):
            assert codes(start(ranks, body)) == [0] * ranks
            found.append(json.loads(file.read_text()))
        return found

    def sharded_memory(self) -> list[list[float]]:
        """Of each rank, the most bytes of tensors while weights are divided, their estimate, and that of whole ones."""
        from flatquant.calibrate.memory import Limits
        from flatquant.calibrate.pipeline import calibrate
        from tests.calibrate.test_memory import counted
        from tests.tensor_bytes import ResizedBytes
        from tests.tiny_models import tiny_llama

        end = EndToEndSpec(steps=1, batch_size=2, weight_lr=1e-4, memory="sharded")
        recipe = dataclasses.replace(FIT, data=DataSpec(samples=2, seqlen=32), fit=None, end_to_end=end)

        def body() -> None:
            model = tiny_llama(hidden=128, intermediate=352, layers=12)
            tokens = torch.randint(0, 64, (2, 32), generator=torch.Generator().manual_seed(0))
            with distributed.joined(CPU):
                roomy = counted(model, recipe)
                want = counted(model, recipe, limits=Limits(host=roomy.host - 1))
                assert want.recompute
                whole = counted(model, _undivided(recipe))
                whole = counted(model, _undivided(recipe), limits=Limits(host=whole.host - 1))
                assert whole.recompute
                with ResizedBytes() as tensors:
                    calibrate(model, recipe, tokens, device=CPU, dtype=torch.float32, layout=want)
                file = self.work / f"memory {distributed.rank()}.json"
                file.write_text(json.dumps([tensors.most, want.device, whole.device]))

        assert codes(start(2, body)) == [0, 0]
        return [json.loads((self.work / f"memory {rank}.json").read_text()) for rank in range(2)]

    def command(self, ranks: int, *arguments: str, patch: Callable[[], None] = lambda: None) -> tuple[list[int], str]:
        """The command line on so many ranks: exit codes, and what is written to stderr and stdout."""
        log = self.work / "log"

        def body() -> None:
            file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(file, 1)
            os.dup2(file, 2)
            distributed._GRACE = 0.5
            patch()
            sys.argv = ["flatquant", *arguments]
            cli.main()

        log.write_text("")
        return codes(start(ranks, body)), log.read_text()

    def quantise_command(self, output: Path) -> list[str]:
        options = ["--calibration", self.text, "--samples", "4", "--seqlen", "16", "--epochs", "1", "--quiet"]
        return ["quantize", self.model, "--output", str(output), "--device", "cpu", "--accept", *options]

    def compared(self) -> dict[str, Any]:
        """Comparisons by one rank, by two, and by two of which one fails, gone on with by three."""
        failed, rows = self.work / "failed", self.work / "failing comparison" / "rows"

        def patch(name: str) -> Callable[[], None]:
            def noted(bench: compare.Bench, method: str, scheme: str, written: str) -> dict[str, Any]:
                rank = os.environ.get("RANK", "0")
                with (self.work / f"{name}.rows").open("a") as file:
                    file.write(f"{rank} {method} {scheme}\n")
                if name == "fails" and rank == "1" and scheme == "w4a16":
                    failed.touch()
                    raise ValueError("a defect")
                while name == "fails" and rank == "0" and scheme != "w4a4kv4" and not failed.exists():
                    time.sleep(0.001)
                return row(bench, method, scheme, written)

            def patched() -> None:
                compare.Bench.row = noted  # type: ignore[assignment]

            return patched

        row, result = compare.Bench.row, {}
        for name, ranks, output in (
            ("one", 1, "compared by one"),
            ("two", 2, "compared by two"),
            ("fails", 2, rows.parent.name),
            ("goes on", 3, rows.parent.name),
        ):
            kept = {path: path.stat().st_mtime_ns for path in rows.glob("*.json")}
            found, said = self.command(ranks, *self.compare_command(self.work / output, ranks), patch=patch(name))
            result[name] = {
                "codes": found,
                "said": said,
                "ranks": sorted({line[0] for line in (self.work / f"{name}.rows").read_text().splitlines()}),
                "kept": sorted(path.name for path in kept),
                "again": [path.name for path, changed in kept.items() if path.stat().st_mtime_ns != changed],
                "left": [path.name for path in (self.work / output / "models").glob("*")],
            }
        with store.held(self.work / "held comparison"):
            found, said = self.command(2, *self.compare_command(self.work / "held comparison", 2))
        return {**result, "held": {"codes": found, "said": said}}

    def compare_command(self, output: Path, ranks: int) -> list[str]:
        rows = ["--methods", "rtn,gptq", "--schemes", "w4a4kv4,w4a16,w4g5a16"]  # groups of 5 are refused
        shapes = ["--samples", "2", "--seqlen", "16", "--windows", "3", "--window", "32"]
        texts = ["--calibration", self.text, "--perplexity", self.text, "--device", "cpu", "--devices", str(ranks)]
        return ["compare", self.model, "--output", str(output), *rows, *shapes, *texts, "--no-plot", "--json"]

    def failures(self) -> dict[str, tuple[list[int], str]]:
        """What the command line says of what goes wrong."""
        result: dict[str, tuple[list[int], str]] = {}

        def raises(error: Exception) -> Callable[[], None]:
            original = stage.fit_blocks

            def patched(*blocks: Any, **options: Any) -> list[Fitted]:
                if os.environ["RANK"] == "1":
                    raise error
                return original(*blocks, **options)

            def patch() -> None:
                stage.fit_blocks = patched  # type: ignore[assignment]

            return patch

        ranks, output = 2, self.work / "failing"
        arguments = self.quantise_command(output)
        result["quiet"] = self.command(ranks, *self.quantise_command(self.work / "quiet"))
        nan = raises(CalibrationError("block 1: the loss in float32 is not finite"))
        result["nan"] = self.command(ranks, *arguments, patch=nan)
        result["defect"] = self.command(ranks, *arguments, "--resume", patch=raises(ValueError("a defect")))
        result["mistake"] = self.command(ranks, *arguments, "--scheme", "w99")
        with store.held(self.work / "held.partial"):
            result["held"] = self.command(ranks, *self.quantise_command(self.work / "held"))
        return result


def _undivided(recipe: Recipe) -> Recipe:
    """The recipe whose ranks do not divide weights."""
    end = recipe.end_to_end
    assert end is not None
    if end.memory != "sharded":
        return recipe
    return dataclasses.replace(recipe, end_to_end=dataclasses.replace(end, memory="full"))


def _fitted(output: Path) -> dict[str, Any]:
    return json.loads((output / "flatquant_report.json").read_text())["end_to_end"]


def _names(folder: Path) -> list[str]:
    with contextlib.suppress(FileNotFoundError):
        return os.listdir(folder)
    return []


def main() -> None:
    model, text, folder = sys.argv[1:]
    trials = Trials(model, text, Path(folder))
    for part in map(str.strip, sys.stdin):
        name, _, wanted = part.partition("=")
        try:
            found = getattr(trials, name)(*filter(None, [wanted]))
            answer = {"part": part, "found": found}
        except Exception:  # noqa: BLE001 - other parts are still to come
            answer = {"part": part, "error": traceback.format_exc()}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    assert isinstance(sys.stdout, io.TextIOBase)
    main()
