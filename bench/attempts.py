"""Engines measured together, where any one may fail and the others go on."""

import contextlib
import gc
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import mlx.core as mx

from bench.engines import Loaded, Run
from bench.report import rounds
from bench.suite import Effort
from mlx_cerebrum import cli
from mlx_cerebrum.errors import CerebrumError
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.model.memory import require

Load = Callable[[Model | None], Loaded]  # given ours, to compare weights with


@dataclass
class Attempt:
    """An engine that may fail at any point without taking the others along."""

    weights: Callable[[], tuple[int, Load]]  # writes them: what loading takes, and how to
    exact: bool = True  # the weights that ours computes with
    nbytes: int = 0
    load: Load | None = None
    engine: Loaded | None = None
    runs: list[Run] = field(default_factory=list)
    failure: str | None = None

    def prepare(self) -> None:
        with self._guarded():
            self.nbytes, self.load = self.weights()

    def start(self, ours: Model | None, prompt: Sequence[int], tokens: int) -> None:
        if self.load is not None:
            with self._guarded():
                require(self.nbytes, "loading it", "measure it on a machine with more memory")
                self.engine = self.load(ours)
                self.engine.generate(prompt, tokens)  # to warm up: not counted

    def run(self, prompt: Sequence[int], tokens: int) -> None:
        if self.engine is not None and self.failure is None:
            with self._guarded():
                self.runs.append(self.engine.generate(prompt, tokens))

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a peer may raise anything
            self.failure = one_line(error)


def one_line(error: Exception) -> str:
    text = cli.describe(error)
    return text if isinstance(error, CerebrumError) else f"{type(error).__name__}: {text:.200}"


def in_turns(
    attempts: Mapping[str, Attempt], prompt: Sequence[int], effort: Effort, ours: Model | None
) -> None:
    """Load and warm up every engine, run all of them in every round, let go of them."""
    for attempt in attempts.values():
        attempt.start(ours, prompt, effort.tokens)
    runs = {name: partial(one.run, prompt, effort.tokens) for name, one in attempts.items()}
    rounds(runs, effort.rounds, seconds=effort.seconds, warm=False)
    for attempt in attempts.values():
        if attempt.engine is not None:
            del attempt.engine.generate  # and with it the model


def forget() -> None:
    """Give freed memory back."""
    gc.collect()
    mx.clear_cache()
    torch: Any = sys.modules.get("torch")  # its own pool, where it has one on the GPU
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif torch is not None and torch.backends.mps.is_available():
        torch.mps.empty_cache()
