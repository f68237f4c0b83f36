"""bench.rehearsal on a tiny geometry: that a conversation fits where one request does."""

import gc
from pathlib import Path

import mlx.core as mx
import pytest
from conftest import slow

from bench import rehearsal
from bench.random_model import GEOMETRIES
from mlx_cerebrum.errors import CerebrumError
from mlx_cerebrum.server.job_bytes import jobs_bytes
from mlx_cerebrum.server.jobs import Job
from mlx_cerebrum.weights.opening import ModelSpec, Opened, open_model

# Heads as wide as Metal has a fused kernel for, and a small window: a second or two.
GEOMETRY = GEOMETRIES["small"] | {"num_attention_heads": 4, "num_key_value_heads": 1}
GEOMETRY |= {"head_dim": 64, "num_hidden_layers": 32, "sliding_window": 256, "vocab_size": 512}
TURNS = ((300, 10), (340, 10))


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    path = tmp_path_factory.mktemp("rehearsal") / "m"
    rehearsal.write(path, GEOMETRY)
    with rehearsal.metal(10**9):
        return open_model(ModelSpec(path))


class Laid:
    dtype = mx.bfloat16

    def __init__(self, opened: Opened) -> None:
        self.config = opened.config


@slow
def test_a_conversation_fits_where_one_request_does(opened: Opened, demo: Path) -> None:
    assert (opened.config.num_positions, opened.config.num_hidden_layers) == (56, 32)
    job = Job("m", (1,) * TURNS[-1][0], TURNS[-1][1])
    with rehearsal.metal(10**9):
        needed = jobs_bytes({"m": Laid(opened)}, [job], 512, None, "ngram")
    found = rehearsal.converse(opened.checkpoint.path, TURNS, found_room(opened, needed))
    first, second = found["turns"]
    assert found["generation_tokens"] == 20
    assert (first["cached"], second["cached"]) == (0, 309)
    assert second["predicted"] == needed
    # The CPU's norms and rotations make more than Metal's kernels: much, beside so small a cache.
    assert 0.5 * needed < first["taken"] < 1.2 * needed
    assert second["taken"] < 1.2 * needed  # the entries it goes on from are not there twice


@slow
def test_what_does_not_fit_is_said(opened: Opened, demo: Path) -> None:
    with pytest.raises(CerebrumError, match="needs"):
        rehearsal.converse(opened.checkpoint.path, TURNS, found_room(opened, 1_000_000))


def found_room(opened: Opened, needed: int) -> int:
    """What Metal must allow for a request of so many bytes."""
    gc.collect()
    return int((opened.storage.nbytes + needed / 0.95) * 1.01) + mx.get_active_memory()
