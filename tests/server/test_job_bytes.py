"""What jobs are predicted to take: by the arithmetic at full size, and on a Mac of 8 GB."""

from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import pytest

from bench.memory import full_size
from bench.memory_limit import MAC_8GB
from mlx_cerebrum import device
from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.model.memory import HEADROOM, Workload
from mlx_cerebrum.server.job_bytes import jobs_bytes
from mlx_cerebrum.server.jobs import Job


@dataclass(frozen=True)
class Laid:
    config: ModelConfig
    dtype: mx.Dtype = mx.bfloat16


OPENED = full_size("folded", 4)
LARGE = OPENED.config
SMALL = replace(LARGE, layer_map=tuple(range(LARGE.num_hidden_layers)))
MODELS = {"12.25b": Laid(LARGE), "7b": Laid(SMALL), "again": Laid(LARGE)}
STEP = 512  # tokens of a prompt that Metal reads at once
# What the engine has for all jobs on such a Mac, once the weights are there.
BUDGET = int((MAC_8GB - OPENED.storage.nbytes) * HEADROOM)


@pytest.fixture(autouse=True)
def metal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "backend", lambda: "metal")


def job(prompt: int, most: int, model: str = "12.25b", **more: Any) -> Job:
    return Job(model, (5,) * prompt, most, **more)


def needed(*jobs: Job, kv_bits: int | None = None, draft: str = "ngram") -> int:
    return jobs_bytes(MODELS, jobs, STEP, kv_bits, draft)


@pytest.mark.parametrize("draft", ["none", "ngram", "auto"])
@pytest.mark.parametrize(("prompt", "most"), [(2048, 512), (3584, 512), (8192, 1024), (30_000, 99)])
def test_one_request_of_any_length_fits_8_gb(prompt: int, most: int, draft: str) -> None:
    """Also one that fills the window of 4096 tokens, which bounds those beyond it."""
    assert OPENED.storage.nbytes == pytest.approx(4.07e9, rel=0.01)
    assert needed(job(prompt, most), draft=draft) <= BUDGET


def test_both_models_answer_one_question_on_8_gb() -> None:
    both = job(1024, 512), job(1024, 512, "7b")
    assert needed(*both) <= BUDGET
    assert needed(job(2048, 1024), job(2048, 1024, "7b"), kv_bits=8) <= BUDGET


@pytest.mark.parametrize(("prompt", "most"), [(1, 1), (100, 20), (2048, 512), (9000, 512)])
@pytest.mark.parametrize("kv_bits", [None, 8])
def test_alone_it_takes_what_generate_takes(prompt: int, most: int, kv_bits: int | None) -> None:
    alone = Workload(LARGE, 2, prompt, most, STEP, kv_bits).bytes
    room_to_grow = 256 * Workload(LARGE, 2, 1, 1, STEP, kv_bits).entry_bytes
    logits = 6 * LARGE.vocab_size * 4
    assert needed(job(prompt, most), kv_bits=kv_bits, draft="none") == alone + room_to_grow + logits


def test_more_tokens_never_take_less() -> None:
    for prompt in (1, 300, 2048, 5000):
        sizes = [needed(job(prompt, most)) for most in range(1, 3000, 97)]
        assert sizes == sorted(sizes)


def test_in_company_it_may_be_there_twice() -> None:
    one, other = job(2048, 512), job(2048, 512, "again")  # the same order by another name
    caches = Workload(LARGE, 2, 2048, 512, STEP).cache_bytes
    assert needed(one, other) >= 3 * caches
    by_itself = job(2048, 512, "7b")  # another order shares no caches
    assert needed(one, by_itself) < 1.1 * (needed(one) + needed(by_itself))
    assert needed(job(2048, 512, n=2)) == needed(one, job(2048, 512))


def test_what_is_certain_to_come_is_computed_at_once_too() -> None:
    held = job(20, 9, grammar=object())
    assert needed(held, draft="none") > needed(job(20, 9), draft="none")
    assert needed(held) == needed(job(20, 9))


def test_nothing_takes_nothing() -> None:
    assert needed() == 0
