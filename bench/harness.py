"""Answer accuracy, through lm-evaluation-harness.

A task lets the model write an answer and compares it, or asks which of several given answers the
model finds likeliest: one too weak to write the right answer may still prefer it. Questions are put
as a chat user would, in the model's own template and with no examples (zero-shot). The result is a
score per question: what two models answer differently tells them apart.

The tasks beside this file need no network. Any other task of the harness can be named
(arc_challenge, gsm8k, minerva_math), and a directory of one's own tasks. Task files may
name Python, which is run: use those of people you trust.

The harness passes prompts as text. A control token of the template is one private character
there (plane 16 of Unicode), so that a question that spells `<s>` stays a question; text that
holds such a character itself is refused. Three differences from the harness's own `hf` model:

- A prompt that ends in a word ("AI:") leaves the space after it to the model, so a choice is
  scored with one.
- What ends an answer in a chat ends it here: with the built-in template, "\\nUser:" too.
- A BOS is never put before a text twice.
"""

import functools
import importlib.util
import logging
import random
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from bench.likelihood import Ids, log_probs, loss, with_targets
from bench.repetition import continuations
from mlx_cerebrum.decoding.decode import prefill
from mlx_cerebrum.decoding.prompt_cache import PromptCache
from mlx_cerebrum.errors import CerebrumError, RequestError
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.tokenizer.messages import check_messages
from mlx_cerebrum.tokenizer.tokenizer import Tokenizer
from mlx_cerebrum.tokenizer.vocabulary import AddedToken

TASKS = Path(__file__).parent / "tasks"
DEFAULT = ("cerebrum_arithmetic", "cerebrum_arithmetic_choice")
INSTALL = "pip install 'lm-eval[math]'"  # math: what minerva_math checks answers with
MAX_GEN_TOKS = 256  # where a task sets none: the harness's own default
BATCH = 64  # questions between two lines of progress
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_MARK = re.compile("([\U00100000-\U0010ffff])")

Scores = dict[str, dict[str, list[float]]]  # task -> metric -> one score per question
Say = Callable[[str], None]


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
    import lm_eval

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with redirect_stdout(sys.stderr):  # its progress; ours is for results
        loaded = _load(tuple(tasks), task_dir)
        for task in loaded.values():
            task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=0)
        random.seed(0)  # a task that shuffles: both models must see the same
        try:
            results = lm_eval.evaluate(
                cerebrum_lm(model, tokenizer, say),
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
            with suppress(TypeError, ValueError):  # of a pair that only sums make sense of
                score = float(sample[metric])
                found.setdefault(name, []).append(score)
    return found


def _load(tasks: tuple[str, ...], task_dir: Path | None) -> dict[str, Any]:
    """The harness's task objects by name, their questions loaded."""
    own = () if task_dir is None else (task_dir,)
    manager = _manager((TASKS, *own), everything=bool(tasks))
    tasks = tasks or (tuple(_manager(own).all_subtasks) if own else DEFAULT)
    if not tasks:
        raise RequestError(f"{task_dir} has no task of lm-evaluation-harness (*.yaml)")
    loaded: dict[str, Any] = {}
    for name in tasks:
        if name not in manager.task_index:
            raise RequestError(f"no task {name!r} in lm-evaluation-harness; `lm_eval ls tasks`")
        try:
            loaded |= manager.load([name])["tasks"]
        except Exception as error:  # no network, no such data set, a package it needs
            raise RequestError(f"task {name} can't be loaded: {_line(error)}") from error
    return loaded


@functools.cache
def _manager(folders: tuple[Path, ...], everything: bool = False) -> Any:
    """Reads all task files: the harness's own are 14,000 names and take ten seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=list(folders), include_defaults=everything)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


class Adapter:
    """What the harness asks of a model. `cerebrum_lm` makes it one of the harness's classes."""

    tokenizer_name = "mlx-cerebrum"

    def __init__(self, model: Model, tokenizer: Tokenizer, say: Say = print) -> None:
        super().__init__()  # of the harness's class, when there is one
        self._model, self._tokenizer, self._say = model, tokenizer, say
        self._prompts = PromptCache(model)
        self._max_length = model.config.max_position_embeddings
        self._marks: dict[str, AddedToken] = {}  # a private character -> its control token
        self._open: set[str] = set()  # rendered prompts after which the model writes a space

    # The prompt as text.

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The template's source, for the harness's records."""
        return self._tokenizer.format.source

    def apply_chat_template(
        self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as text. Without a generation prompt its last message goes on."""
        messages = check_messages(chat_history)
        for message in messages:
            _refuse_marks(message["content"])
        segments = self._tokenizer.render(messages, add_generation_prompt)
        text = "".join(map(self._spell, segments))
        if add_generation_prompt:
            if not text[-1:].isspace() and text[-1:] not in self._marks:
                self._open.add(text)
            return text
        begun: str = messages[-1]["content"].strip()
        before, found, _ = text.rpartition(begun)
        if not found:
            raise RequestError("the chat template does not show the beginning of an answer")
        return before + begun

    def _spell(self, segment: str | AddedToken) -> str:
        if isinstance(segment, str):
            return segment
        for mark, token in self._marks.items():
            if token == segment:
                return mark
        mark = chr(0x100000 + len(self._marks))
        self._marks[mark] = segment
        return mark

    def encode(self, text: str, add_bos: bool | None = None) -> Ids:
        """Ids of a rendered prompt or plain text. At most one BOS: none where the text has it."""
        parts = filter(None, _MARK.split(text))
        return self._tokenizer.encode_segments((self._marks.get(p, p) for p in parts), add_bos)

    def encode_pair(self, context: str, continuation: str) -> tuple[Ids, Ids]:
        """Ids of both, split where the tokens of the whole are; spaces go to the continuation.

        The context is a rendered prompt, never empty.
        """
        _refuse_marks(continuation)
        if context in self._open and not continuation[:1].isspace():
            continuation = f" {continuation}"
        stripped = context.rstrip()
        continuation = context[len(stripped) :] + continuation
        before = self.encode(stripped)
        return before, self.encode(stripped + continuation)[len(before) :]

    # The requests: objects of the harness; `args` holds what is asked.

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        return [self._score(*self.encode_pair(*request.args[:2])) for request in requests]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        raise RequestError("a task scores whole texts: python -m bench.perplexity does that")

    def _score(self, context: Ids, continuation: Ids) -> tuple[float, bool]:
        """The continuation's log-likelihood in nats, and whether greedy decoding writes it.

        What the context shares with the one before is not computed again.
        """
        if not continuation:
            return 0.0, True
        context = self._fitting(context, 1 + self._max_length - len(continuation))
        rest, cache = self._prompts.begin(context), self._prompts.cache
        prefill(self._model, mx.array(rest[:-1], dtype=mx.int32), cache)
        chunks = log_probs(self._model, [*rest[-1:], *continuation[:-1]], cache)
        found = [
            (-np.array(loss(chunk, targets)).sum(), mx.all(chunk.argmax(axis=-1) == targets).item())
            for chunk, targets in with_targets(chunks, continuation)
        ]
        self._prompts.end([*context, *continuation[:-1]])
        return float(sum(chance for chance, _ in found)), all(hit for _, hit in found)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Greedy answers. Raises RequestError for a task that wants samples or beams."""
        texts: list[str] = []
        for first in range(0, len(requests), BATCH):
            self._say(f"{first} of {len(requests)} questions answered")
            some = requests[first : first + BATCH]
            asked = [_settings(request.args[1]) for request in some]
            most = [length for length, _ in asked]
            whole = [self.encode(request.args[0]) for request in some]
            prompts = [
                self._fitting(ids, self._max_length - room)
                for ids, room in zip(whole, most, strict=True)
            ]
            written = continuations(self._model, self._tokenizer, prompts, most)
            for ids, (_, stop) in zip(written, asked, strict=True):
                text = self._tokenizer.decode(ids)
                ends = (text.find(end) for end in (*stop, *self._tokenizer.stop_strings))
                texts.append(text[: min((end for end in ends if end >= 0), default=None)])
        return texts

    def _fitting(self, ids: Ids, room: int) -> Ids:
        """The end of a prompt, where the model's positions are too few for all of it."""
        if room < 1:
            raise RequestError(
                f"a task asks for more than the model's {self._max_length} positions"
            )
        if len(ids) > room:
            self._say(f"the beginning of a prompt of {len(ids)} tokens is left out: {room} fit")
        return ids[-room:]


def cerebrum_lm(model: Model, tokenizer: Tokenizer, say: Say = print) -> Any:
    """An `lm_eval.api.model.LM` for the harness's own functions. Imports the harness."""
    from lm_eval.api.model import LM

    return type("CerebrumLM", (Adapter, LM), {})(model, tokenizer, say)


def _settings(arguments: Mapping[str, Any]) -> tuple[int, tuple[str, ...]]:
    """Most tokens to generate, and stop strings, of a generation request."""
    sampled = arguments.get("do_sample", float(arguments.get("temperature") or 0) > 0)
    if sampled or arguments.get("num_beams", 1) != 1:
        raise RequestError("a task asks for samples or beams; answers here are greedy only")
    lengths = [arguments[name] for name in _LENGTHS if arguments.get(name) is not None]
    stop = arguments.get("until") or ()
    stop = (stop,) if isinstance(stop, str) else tuple(filter(None, stop))
    return int(lengths[0] if lengths else MAX_GEN_TOKS), stop


def _refuse_marks(text: str) -> None:
    if found := _MARK.search(text):
        raise RequestError(f"a question holds U+{ord(found[0]):X}, which stands for a token here")
