"""Answer accuracy, through lm-evaluation-harness.

A task of the harness asks every question in one of two ways. It lets the model write an
answer and compares it, or it asks which of several given answers the model finds likeliest:
a model too weak to write the right answer may still prefer it. Questions are put as a chat
user would, in the model's own template and with no examples (zero-shot). The result is a
score per question, not only their mean: two models answer the same questions, and what they
answer differently tells them apart.

The tasks beside this file need no network. Any other task of the harness can be named
(arc_challenge, gsm8k, minerva_math), and a directory of one's own tasks. Task files may
name Python, which is run: use those of people you trust.
"""

import functools
import importlib.util
import io
import logging
import random
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from bench.harness_model import Say, cerebrum_lm
from mlx_cerebrum.errors import CerebrumError, RequestError
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.tokenizer.tokenizer import Tokenizer

TASKS = Path(__file__).parent / "tasks"
DEFAULT = ("cerebrum_arithmetic", "cerebrum_arithmetic_choice")
INSTALL = "pip install 'lm-eval[math]'"  # math: what minerva_math checks answers with

Scores = dict[str, dict[str, list[float]]]  # task -> metric -> one score per question


def installed() -> bool:
    return importlib.util.find_spec("lm_eval") is not None


def evaluate(
    model: Model,
    tokenizer: Tokenizer,
    tasks: Sequence[str] = (),
    task_dir: Path | None = None,
    limit: int | None = None,
    say: Say = print,
) -> Scores:
    """Every question's score by task and metric, in the task's order; groups by their tasks.

    tasks: names the harness knows, or that `task_dir` (task files, and Python they name) adds;
        if empty, all tasks of `task_dir`, or without one those beside this file.
    limit: the first so many questions of each task.

    A metric whose scores are not numbers is left out. Raises RequestError, one line that names
    the task, where one is unknown or its questions can't be had.
    """
    if not installed():
        raise RequestError(f"lm-evaluation-harness is not installed: {INSTALL}")
    loud = _through(say)
    with _quiet():
        loaded = _load(tuple(tasks), task_dir, loud)
        import lm_eval

        for task in loaded.values():
            task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=0)
        random.seed(0)
        try:
            results = lm_eval.evaluate(
                cerebrum_lm(model, tokenizer, loud),
                {"tasks": loaded},
                limit=limit,
                bootstrap_iters=0,
                apply_chat_template=True,
                fewshot_as_multiturn=True,
            )
        except CerebrumError:
            raise
        except Exception as error:  # tasks are code of many authors
            names = ", ".join(loaded)
            raise RequestError(f"lm-evaluation-harness fails on {names}: {_line(error)}") from error
    return {task: _scores(samples) for task, samples in results["samples"].items()}


def _scores(samples: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """A task's scores by metric, with the filter's name where it has filters."""
    found: dict[str, list[float]] = {}
    for sample in sorted(samples, key=lambda sample: int(sample["doc_id"])):
        for metric in sample["metrics"]:
            name = metric if sample["filter"] == "none" else f"{metric}, {sample['filter']}"
            try:
                found.setdefault(name, []).append(float(sample[metric]))
            except (TypeError, ValueError):  # a pair, say, that only sums of make sense of
                found.setdefault(name, [])
    most = max(map(len, found.values()), default=0)
    return {name: scores for name, scores in found.items() if scores and len(scores) == most}


def _load(tasks: tuple[str, ...], task_dir: Path | None, say: Say) -> dict[str, Any]:
    """The harness's task objects by name, their questions loaded."""
    if task_dir is not None and not task_dir.is_dir():
        raise RequestError(f"{task_dir} is not a directory of task files")
    folders = (TASKS,) if task_dir is None else (TASKS, task_dir)
    manager = _manager(folders)
    if not tasks and task_dir is not None:
        tasks = tuple(_manager((task_dir,)).all_subtasks)
        if not tasks:
            raise RequestError(f"{task_dir} has no task of lm-evaluation-harness (*.yaml)")
    loaded: dict[str, Any] = {}
    for name in tasks or DEFAULT:
        known = manager if name in manager.task_index else _manager(folders, everything=True)
        if name not in known.task_index:
            raise RequestError(f"no task {name!r} in lm-evaluation-harness; `lm_eval ls tasks`")
        if known is not manager:
            say(f"loading {name}; the first time its questions come from the Hugging Face hub")
        try:
            loaded |= known.load([name])["tasks"]
        except Exception as error:  # no network, no such data set, a package it needs
            raise RequestError(
                f"task {name} can't be loaded: {_line(error)}; the tasks that come with the"
                " bench need nothing more"
            ) from error
    return loaded


@functools.cache
def _manager(folders: tuple[Path, ...], everything: bool = False) -> Any:
    """Reads all task files: the harness's own are 14,000 names and take ten seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=list(folders), include_defaults=everything)


def _through(say: Say) -> Say:
    """`say` on the streams of now, whatever they are redirected to later."""
    out, err = sys.stdout, sys.stderr

    def loud(line: str) -> None:
        with redirect_stdout(out), redirect_stderr(err):
            say(line)

    return loud


@contextmanager
def _quiet() -> Iterator[None]:
    """No log lines, progress bars or warnings: what goes wrong is raised."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            redirect_stdout(io.StringIO()),
            redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
