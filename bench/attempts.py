"""Engines measured together, where any one may fail and the others go on."""

import gc
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx

from bench.engines import Loaded, Run
from bench.report import rounds
from mlx_cerebrum import cli
from mlx_cerebrum.errors import CerebrumError
from mlx_cerebrum.model.forward import Model


@dataclass(frozen=True)
class Source:
    """A peer's weights, ready to be loaded: what loading takes, and how."""

    nbytes: int
    open: Callable[[Model | None], Loaded]  # given ours, to compare weights with
    exact: bool = True  # the weights that ours computes with


@dataclass
class Attempt:
    """An engine that may fail at any point without taking the others along."""

    open: Callable[[], Loaded]
    prompt: list[int]
    tokens: int
    exact: bool = True
    engine: Loaded | None = None
    failure: str | None = None
    runs: list[Run] = field(default_factory=list)

    def start(self) -> None:
        def start() -> None:
            self.engine = self.open()
            self.engine.generate(self.prompt, self.tokens)  # to warm up: not counted

        self._guarded(start)

    def __call__(self) -> None:
        def run() -> None:
            assert self.engine is not None
            self.runs.append(self.engine.generate(self.prompt, self.tokens))

        self._guarded(run)

    def _guarded(self, step: Callable[[], None]) -> None:
        if self.failure is None:
            try:
                step()
            except Exception as error:  # a peer may raise anything
                self.failure = one_line(error)


def one_line(error: Exception) -> str:
    text = cli.describe(error)
    return text if isinstance(error, CerebrumError) else f"{type(error).__name__}: {text:.200}"


def in_turns(attempts: dict[str, Attempt], count: int, seconds: float) -> None:
    """Warm up every engine, then run all of them in every round."""
    for attempt in attempts.values():
        attempt.start()
    rounds(attempts, count, seconds=seconds, warm=False)


def one_by_one(
    attempts: dict[str, Attempt], count: int, seconds: float, release: Callable[[], None]
) -> None:
    """Where they don't fit side by side: each is gone before the next is loaded.

    `release` lets go of weights that others than the attempts hold.
    """
    for name, attempt in attempts.items():
        attempt.start()
        rounds({name: attempt}, count, seconds=seconds, warm=False)
        if attempt.engine is not None:
            attempt.engine = replace(attempt.engine, generate=_gone)
        release()
        forget()


def _gone(prompt: Sequence[int], max_tokens: int) -> Run:
    raise CerebrumError("it is not loaded any more")


def forget() -> None:
    """Give freed memory back."""
    gc.collect()
    mx.clear_cache()
    torch: Any = sys.modules.get("torch")  # its own pool, where it has one on the GPU
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif torch is not None and torch.backends.mps.is_available():
        torch.mps.empty_cache()
