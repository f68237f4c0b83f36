"""Weights at rest: released when there is nothing to do, loaded again for the next request."""

import json
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import mlx.core as mx
import numpy as np
import psutil
import pytest
from conftest import MakeCheckpoint, slow, write_checkpoint
from server_room import WAIT, started
from test_engine import Client, job
from tiny import tiny_config, tiny_shapes

from mlx_cerebrum import device
from mlx_cerebrum.server.engine import BatchEngine
from mlx_cerebrum.server.holding import Source
from mlx_cerebrum.server.jobs import Job, Loading
from mlx_cerebrum.weights.opening import ModelSpec, open_model
from mlx_cerebrum.weights.views import load_views

GB = 1e9


def until(what: Callable[[], Any], seconds: float = WAIT) -> None:
    ends = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < ends
        time.sleep(0.01)


@pytest.fixture
def path(checkpoint: MakeCheckpoint) -> Path:
    return checkpoint(max_position_embeddings=4096)


@contextmanager
def engine_for(path: Path, after: float | None, **options: Any) -> Iterator[BatchEngine]:
    opened = open_model(ModelSpec(path))
    models, tokenizer = load_views(opened)
    more = {"source": Source.of(opened), "unload_after": after, "cache_bytes": 10**8, **options}
    engine = BatchEngine(models, tokenizer, max_batch=4, max_queue=8, **more)
    del models
    try:
        yield engine
    finally:
        engine.close(0)


def asked(seed: int = 0, length: int = 40, most: int = 8, **more: Any) -> Job:
    return job(length, most, seed, model="source", **more)


@slow
def test_released_and_there_again(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with engine_for(path, 0.1) as engine:
        first = Client(engine, asked()).done()
        assert engine.stats().cache_bytes > 0
        until(lambda: engine.stats().at_rest)
        stats = engine.stats()
        assert (stats.loaded, stats.weights_bytes, stats.cache_bytes) == (0, 0, 0)
        assert engine.names == ("source",)
        again = Client(engine, asked()).done()
        assert again.text() == first.text()
        assert any(isinstance(event, Loading) for event in again.events)
        assert again.pieces()[-1].cached_tokens == 0  # what was kept is gone, and computed again
        stats = engine.stats()
        assert (stats.loads, stats.rests >= 1, stats.loaded) == (1, True, 1)


@slow
def test_weights_are_wired_while_they_are_held(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wired = [0]

    def set_wired_limit(nbytes: int) -> int:
        wired.append(nbytes)
        return wired[-2]

    monkeypatch.setattr(device, "backend", lambda: "metal")
    size = {"max_recommended_working_set_size": 10**9}
    monkeypatch.setattr(mx, "device_info", lambda *_: size)
    monkeypatch.setattr(mx, "set_wired_limit", set_wired_limit)
    monkeypatch.setattr("mlx_cerebrum.model.limits._NEAR", 0.0)
    # A server of other tests may be within limits of its own.
    monkeypatch.setattr("mlx_cerebrum.model.limits._may_wire", None)
    with engine_for(path, 0.1) as engine:
        held = max(wired)  # it may rest already
        assert engine.stats().weights_bytes <= held < 10**9
        until(lambda: engine.stats().at_rest and wired[-1] == 0)
        Client(engine, asked()).done()
        assert held in wired[3:]
    assert wired[-1] == 0
    wired[:] = [0]
    with engine_for(path, None, wiring=False):
        assert set(wired) == {0}


def test_work_keeps_it_from_resting(path: Path) -> None:
    with engine_for(path, 0.05) as engine:
        held = Client(engine, asked(most=50), hold=True).started()
        time.sleep(0.2)
        assert engine.stats().rests == 0
        held.go_on.set()
        held.done()
        assert held.failed is None


@slow
def test_answers_of_one_step_are_work_too(path: Path) -> None:
    with engine_for(path, 0.4) as engine:
        ends = time.monotonic() + 1.0
        while time.monotonic() < ends:
            Client(engine, asked(length=1, most=1)).done()
            time.sleep(0.02)
        assert engine.stats().rests == 0


def test_never_by_default(path: Path) -> None:
    with engine_for(path, None) as engine:
        Client(engine, asked()).done()
        time.sleep(0.2)
        assert engine.stats().at_rest == 0


@pytest.mark.long
def test_requests_that_come_while_it_is_being_released(path: Path) -> None:
    """Many rests, each met by requests at about the same time: all are answered alike."""
    with engine_for(path, 0.001) as engine:
        expected = Client(engine, asked()).done().text()
        for pause in np.linspace(0, 0.02, 9):
            time.sleep(float(pause))
            both = [Client(engine, asked()) for _ in range(2)]
            assert [client.done().text() for client in both] == [expected] * 2
        assert engine.stats().rests > 1


@slow
def test_a_view_of_it_is_there_again_too(path: Path, tmp_path: Path) -> None:
    plan = tmp_path / "turned.yml"
    layers = "- sources:\n  - {model: source, layer_range: "
    plan.write_text(f"merge_method: passthrough\nslices:\n{layers}[0, 6]}}\n{layers}[4, 8]}}\n")
    opened = open_model(ModelSpec(path))
    models, tokenizer = load_views(opened, [str(plan)])
    names = list(models)
    engine = BatchEngine(models, tokenizer, source=Source.of(opened), unload_after=0.05)
    del models
    try:
        texts = [Client(engine, job(20, 8, model=name)).done().text() for name in names]
        until(lambda: engine.stats().at_rest)
        assert [Client(engine, job(20, 8, model=name)).done().text() for name in names] == texts
    finally:
        engine.close(0)


def test_all_who_wait_go_away_while_it_loads(path: Path) -> None:
    """It goes on loading: who went away for want of patience asks again."""
    with engine_for(path, 0.1) as engine:
        until(lambda: engine.stats().at_rest)
        client = Client(engine, asked())
        client.cancel()
        until(lambda: engine.stats().at_rest == 0 or not engine.stats().queued)
        assert Client(engine, asked(1)).done().failed is None
        assert not client.pieces()


@slow
def test_a_model_that_was_removed_meanwhile(path: Path, tmp_path: Path) -> None:
    with engine_for(path, 0.05) as engine:
        text = Client(engine, asked()).done().text()
        until(lambda: engine.stats().at_rest)
        moved = path.rename(tmp_path / "elsewhere")
        clients = [Client(engine, asked(seed)).done() for seed in range(2)]
        for client in clients:
            assert client.failed is not None
            assert client.failed.startswith("source can't be loaded: its files are gone")
            assert str(tmp_path) not in client.failed
        moved.rename(path)
        assert Client(engine, asked()).done().text() == text


def test_a_model_that_is_another_now(path: Path, checkpoint: MakeCheckpoint) -> None:
    with engine_for(path, 0.05) as engine:
        until(lambda: engine.stats().at_rest)
        other = checkpoint("other", max_position_embeddings=4096)
        shutil.rmtree(path)
        other.rename(path)
        assert "others than those" in str(Client(engine, asked()).done().failed)


def test_closed_at_rest_and_while_it_loads(path: Path) -> None:
    with engine_for(path, 0.02) as engine:
        until(lambda: engine.stats().at_rest)
    with engine_for(path, 0.02) as engine:
        until(lambda: engine.stats().at_rest)
        client = Client(engine, asked(most=3000))
    assert client.failed is not None


@slow
def test_memory_that_others_took_meanwhile(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with engine_for(path, 0.05) as engine:
        until(lambda: engine.stats().at_rest)
        monkeypatch.setattr("mlx_cerebrum.server.engine.available_bytes", lambda: 1000)
        client = Client(engine, asked())
        # What is known to be too much is refused at once; what turns out to be, when it would load.
        assert "needs" in str(client.done().failed)
        monkeypatch.undo()
        assert Client(engine, asked()).done().failed is None


@slow
def test_memory_pressure_empties_what_is_kept(
    path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with engine_for(path, None) as engine:
        short = False
        monkeypatch.setattr(engine._pressure, "_short", lambda: short)
        monkeypatch.setattr("mlx_cerebrum.machine.pressure.LOOK", 0.0)
        monkeypatch.setattr("mlx_cerebrum.machine.pressure.CALM", 0.2)
        monkeypatch.setattr("mlx_cerebrum.server.engine._LOOK", 0.02)
        text = Client(engine, asked()).done().text()
        until(lambda: engine.stats().cache_bytes)
        Client(engine, asked()).done()
        short = True
        until(lambda: engine.stats().short_of_memory)  # also while nothing is asked
        assert engine.stats().cache_bytes == 0
        for _ in range(2):
            assert Client(engine, asked()).done().text() == text
            assert engine.stats().cache_bytes == 0
        short = False
        until(lambda: not engine.stats().short_of_memory)
        Client(engine, asked()).done()
        until(lambda: engine.stats().cache_bytes)
        assert engine.stats().reliefs == 1
    time.sleep(0.1)  # the log has a thread of its own
    said = capfd.readouterr().err
    assert len(re.findall("memory is short: .* are given up", said)) == 1


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of 0.45 GB, which a CPU holds in twice as much: far above the bound."""
    config = tiny_config(
        hidden_size=2048,
        intermediate_size=4096,
        num_hidden_layers=6,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=128,
        vocab_size=260,
        max_position_embeddings=4096,
        torch_dtype="float16",
    )
    some = (0.01 * np.random.default_rng(1).standard_normal(100_003)).astype(np.float16)
    shapes = tiny_shapes(config)
    weights: dict[str, Any] = {name: np.resize(some, shape) for name, shape in shapes.items()}
    return write_checkpoint(tmp_path_factory.mktemp("large") / "source", config, weights)


@slow
def test_a_process_at_rest_is_small(large: Path) -> None:
    size = (large / "model.safetensors").stat().st_size
    assert size > 0.4 * GB
    with started(large, "--unload-after", "1s") as (url, process):
        held = psutil.Process(process.pid)
        body = {"prompt": "Hello there", "max_tokens": 2}
        with httpx.Client(base_url=url, timeout=120.0) as client:

            def text(**more: Any) -> str:
                done = client.post("/v1/completions", json=body | more)
                assert done.status_code == 200, done.text
                found: str = done.json()["choices"][0]["text"]
                return found

            first = text()
            if device.backend() == "cpu":  # a GPU's buffers are not counted everywhere
                assert held.memory_info().rss > 2 * size
            until(lambda: "cerebrum_checkpoints_at_rest 1.0" in client.get("/metrics").text, 30)
            time.sleep(0.2)
            assert held.memory_info().rss < 0.4 * GB
            assert client.get("/health").json() == {"status": "ok"}
            assert client.get("/v1/models").json()["data"][0]["id"] == "source"
            # It is loaded again: the stream says so, and others are answered meanwhile.
            streamed: list[str] = []

            def stream() -> None:
                asked = body | {"stream": True}
                with client.stream("POST", "/v1/completions", json=asked) as answer:
                    streamed.extend(answer.iter_lines())

            thread = threading.Thread(target=stream)
            thread.start()
            while thread.is_alive():
                assert client.get("/health").status_code == 200
                time.sleep(0.05)
            assert any(re.fullmatch(r": loading \d+/\d+", line) for line in streamed)
            pieces = [json.loads(line[6:]) for line in streamed if line.startswith("data: {")]
            assert "".join(piece["choices"][0]["text"] for piece in pieces) == first
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
        log = process.stderr.read()
        assert "source: at rest, " in log
        assert re.search(r"^source: loading \d\.\d+ GB$", log, re.MULTILINE)
        assert "Hello there" not in log
        assert str(large) not in log
