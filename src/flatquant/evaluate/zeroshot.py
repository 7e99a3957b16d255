"""Zero-shot tasks, through EleutherAI's lm-evaluation-harness: its prompts, its scoring, its metrics.

Questions come from the hub, or from `zeroshot/*.jsonl` in the folder that FLATQUANT_DATA names: then the harness's own
description of a task is kept and only told to read that file. Tasks run one by one, so that a run can be stopped and
gone on with. The score of a task is its length-normalised accuracy where it has one, as the papers report.

https://github.com/EleutherAI/lm-evaluation-harness
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flatquant.errors import DataError, FlatQuantError, one_line

TASKS = ("lambada_openai", "hellaswag", "piqa", "winogrande", "arc_easy", "arc_challenge")

# The files have the hub's field names, but for ARC's answers.
_ARC = {"doc_to_target": "gold", "doc_to_choice": "choices"}
_LOCAL: dict[str, tuple[str, dict[str, str]]] = {  # the split that is scored, and what reads differently
    "lambada_openai": ("test", {}),
    "hellaswag": ("validation", {}),
    "piqa": ("validation", {}),
    "winogrande": ("validation", {}),
    "arc_easy": ("test", _ARC),
    "arc_challenge": ("test", _ARC),
}


def zero_shot(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str] = TASKS,
    *,
    limit: int | None = None,
    batch_size: int | None = None,
    done: Mapping[str, Any] | None = None,
    keep: Callable[[str, dict[str, Any]], None] | None = None,
    quiet: bool = True,
) -> dict[str, dict[str, Any]]:
    """Scores of a model on tasks.

    Args:
        tasks: names of the harness; `TASKS` can be read from local files.
        limit: questions of each task; all of them if None.
        batch_size: questions at a time; None finds the largest that fits the memory.
        done: results of an earlier run, which are taken as they are where their `limit` is the same.
        keep: called with each task and its result as soon as it is there.
        quiet: no progress bars.

    Returns:
        Per task `metric`, `value` and its standard error `stderr`, `acc` (without length normalisation), `samples`,
        `limit`.

    Raises:
        FlatQuantError: the harness is not installed, or does not know a task.
        DataError: a task's questions cannot be read.
    """
    harness = _harness()
    results: dict[str, dict[str, Any]] = {}
    runner: Any = None
    with tempfile.TemporaryDirectory() as folder, _manners(quiet):
        manager = _manager(harness, tasks)
        for task in tasks:
            if task not in manager.all_subtasks:
                raise FlatQuantError(f"unknown task {task!r}; tested: {', '.join(TASKS)}")
        for task in tasks:
            earlier = (done or {}).get(task)
            if earlier is not None and earlier.get("limit") == limit:
                results[task] = dict(earlier)
                continue
            if runner is None:
                runner = harness["models"].HFLM(
                    pretrained=model, tokenizer=tokenizer, batch_size=batch_size or "auto", max_batch_size=512
                )
            results[task] = _run(harness, runner, manager, task, Path(folder), limit)
            if keep is not None:
                keep(task, results[task])
    return results


def _run(harness: Mapping[str, Any], runner: Any, manager: Any, task: str, folder: Path, limit: int | None) -> Any:
    try:
        found = harness["lm_eval"].simple_evaluate(
            runner,
            tasks=[_described(manager, task, folder)],
            limit=limit,
            bootstrap_iters=0,
            task_manager=manager,
            log_samples=False,
        )
    except (OSError, ValueError, ConnectionError) as error:
        raise DataError(
            f"cannot read the questions of {task} ({one_line(error)}); set FLATQUANT_DATA to a folder with "
            f"zeroshot/{task}.jsonl"
        ) from error
    return _summary(found["results"][task], found["n-samples"][task]["effective"], limit)


def _manager(harness: Mapping[str, Any], tasks: Sequence[str]) -> Any:
    """The harness's index of tasks; only of the folders that matter, where they are known: the whole takes long."""
    if not set(tasks) <= set(TASKS):
        return harness["tasks"].TaskManager()
    home = Path(harness["tasks"].__file__).parent
    folders = sorted({task.split("_")[0] for task in tasks})
    return harness["tasks"].TaskManager(include_path=[str(home / name) for name in folders], include_defaults=False)


def _described(manager: Any, task: str, folder: Path) -> str:
    """The task's name, or a description that reads a local file where there is one."""
    root = os.environ.get("FLATQUANT_DATA")
    file = Path(root or "", "zeroshot", f"{task}.jsonl").resolve()
    if not root or task not in _LOCAL or not file.is_file():
        return task
    split, changes = _LOCAL[task]
    description = {
        "include": str(manager.task_index[task].yaml_path),
        "task": task,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(file)}},
        "training_split": None,
        "validation_split": None,
        "test_split": None,
        f"{split}_split": split,
        **changes,
    }
    path = folder / f"{task}.yaml"
    path.write_text(json.dumps(description))  # JSON is YAML
    return str(path)


def _summary(scores: Mapping[str, Any], samples: int, limit: int | None) -> dict[str, Any]:
    metric = "acc_norm" if "acc_norm,none" in scores else "acc"
    value = float(scores[f"{metric},none"])
    return {
        "metric": metric,
        "value": value,
        "stderr": math.sqrt(value * (1 - value) / max(samples - 1, 1)),  # of a mean of zeros and ones
        "acc": float(scores["acc,none"]),
        "samples": samples,
        "limit": limit,
    }


def _harness() -> dict[str, Any]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            names = {"lm_eval": "lm_eval", "tasks": "lm_eval.tasks", "models": "lm_eval.models.huggingface"}
            return {name: importlib.import_module(path) for name, path in names.items()}
    except ImportError as error:
        raise FlatQuantError(
            f"tasks need lm-evaluation-harness ({error}): pip install lm-eval accelerate, or flatquant[tasks]"
        ) from error


@contextlib.contextmanager
def _manners(quiet: bool):
    """Its warnings are about itself; its bars are many."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        if quiet:
            null = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stderr(null))
        yield
