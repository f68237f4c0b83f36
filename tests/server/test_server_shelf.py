"""/shelf: what could be answered with, and having one more model while others are answered."""

import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import mlx.core as mx
import pytest
import shelf_room
from conftest import slow, write_checkpoint
from hub_stand_in import Hub
from server_room import WAIT, Running
from tiny import tiny_config, tiny_weights

from convert import pull
from mlx_cerebrum.flags import model_spec
from mlx_cerebrum.machine.awake import Awake
from mlx_cerebrum.server import __main__ as command
from mlx_cerebrum.server.engine import BatchEngine
from mlx_cerebrum.server.holding import Source
from mlx_cerebrum.weights.opening import ModelSpec, open_model

repository, hub = shelf_room.repository, shelf_room.hub  # fixtures
SMALL = {"num_hidden_layers": 4, "vocab_size": 260, "max_position_embeddings": 100_000}
ORDER = [0, 1, 2, 1, 2, 3]


def put(shelf: Path, name: str, seed: int, **changes: Any) -> Path:
    config = tiny_config(**(SMALL | changes))
    return write_checkpoint(shelf / name, config, tiny_weights(config, seed))


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`one`; `deep`, the same blocks in another order; `other`, and one that is no model."""
    folder = tmp_path / "models"
    put(folder, "one-16bit", 3)
    put(folder, "other-16bit", 4, num_hidden_layers=6)
    deep = folder / "deep-16bit"
    shutil.copytree(folder / "one-16bit", deep)
    (deep / "model.safetensors").unlink()
    os.link(folder / "one-16bit" / "model.safetensors", deep / "model.safetensors")
    config = json.loads((deep / "config.json").read_text())
    config |= {"model_type": "cerebrum", "layer_map": ORDER, "format_version": 1}
    (deep / "config.json").write_text(json.dumps(config))
    (folder / "bad-16bit").mkdir()
    (folder / "bad-16bit" / "config.json").write_text("{}")
    monkeypatch.setenv("MLX_CEREBRUM_MODELS", str(folder))
    return folder


@contextmanager
def serving(model: str, *flags: str, **more: Any) -> Iterator[Running]:
    """The server as its command starts it."""
    args = command.parser().parse_args([model, "--quiet", "--template", "cerebrum", *flags])
    settings = command.settings_of(args)
    engine = command._loaded(args, model_spec(args), None, settings)
    running = Running(command._service(engine, settings), grace=0.0, **more)
    try:
        yield running
    finally:
        running.stop()


def engine_of(server: Running) -> BatchEngine:
    engine = server.service.engine
    assert isinstance(engine, BatchEngine)
    return engine


def rows(server: Running) -> dict[str, dict[str, Any]]:
    return {
        row["id"]: row for row in server.client.get("/shelf").raise_for_status().json()["models"]
    }


def load(server: Running, name: str) -> httpx.Response:
    return server.client.post("/shelf/load", json={"id": name})


def until(server: Running, name: str, state: str = "loaded") -> dict[str, Any]:
    ends = time.monotonic() + WAIT
    while (row := rows(server)[name])["state"] != state:
        assert time.monotonic() < ends, row
        time.sleep(0.01)
    return row


def answer(server: Running, model: str, **more: Any) -> str:
    body = {"model": model, "prompt": "Hello", "max_tokens": 12, **more}
    done = server.client.post("/v1/completions", json=body)
    assert done.status_code == 200, done.text
    text: str = done.json()["choices"][0]["text"]
    return text


def test_what_is_listed(shelf: Path) -> None:
    with serving("one") as server:
        whole = server.client.get("/shelf").json()
        found = rows(server)
        assert set(found) == {"one:16bit", "deep:16bit", "other:16bit", "bad:16bit"}
        one = found["one:16bit"]
        assert one["bytes"] == sum(f.stat().st_size for f in (shelf / "one-16bit").iterdir())
        expected: dict[str, Any] = {
            "bits": 16,
            "blocks": 4,
            "positions": 4,
            "plan": None,
            "window": 12,
        }
        expected |= {"state": "loaded", "model": "one", "why_not": None, "loading": None}
        assert one.items() >= expected.items()
        deep = found["deep:16bit"]
        assert (deep["positions"], deep["plan"], deep["state"]) == (6, "custom", "on the shelf")
        bad = found["bad:16bit"]
        assert bad["blocks"] is None
        assert "bad:16bit" in bad["why_not"] or "config.json" in bad["why_not"]
        assert "GB of memory" in whole["machine"]
        assert whole["memory"]["total"] > whole["memory"]["free"] > 0
        assert str(shelf.parent) not in json.dumps(whole)


@slow
def test_a_further_model_is_answered_with(shelf: Path) -> None:
    with serving("other") as server:
        alone = answer(server, "other")
    with serving("one") as server:
        own = answer(server, "one")
        row = load(server, "other:16bit").raise_for_status().json()
        assert row["state"] == "loading"
        assert row["loading"]["total"] > 0
        assert load(server, "other:16bit").status_code == 200  # it is on its way: nothing happens
        assert until(server, "other:16bit")["model"] == "other:16bit"
        assert answer(server, "other:16bit") == alone
        assert answer(server, "one") == own
        ids = [card["id"] for card in server.client.get("/v1/models").json()["data"]]
        assert ids == ["one", "other:16bit"]
        assert server.client.get("/v1/models/other:16bit").json()["cerebrum"]["blocks"] == 6
        assert load(server, "other:16bit").json()["state"] == "loaded"
        both: list[str] = []
        asking = [
            threading.Thread(target=lambda m=model: both.append(answer(server, m, max_tokens=50)))
            for model in ("one", "other:16bit", "one", "other:16bit")
        ]
        for thread in asking:
            thread.start()
        for thread in asking:
            thread.join(WAIT)
        assert sorted(text[:3] for text in both) == sorted(2 * [own[:3]] + 2 * [alone[:3]])


@slow
def test_the_same_blocks_in_another_order_take_no_memory(shelf: Path) -> None:
    with serving("deep") as server:
        alone = answer(server, "deep")
    with serving("one") as server:
        engine = engine_of(server)
        held = engine.stats().weights_bytes
        load(server, "deep:16bit").raise_for_status()
        until(server, "deep:16bit")
        assert answer(server, "deep:16bit") == alone
        assert engine.stats().weights_bytes == held
        assert len(engine.holdings) == 1
        assert answer(server, "one:16bit") == answer(server, "one")  # the shelf's name for it


@slow
def test_others_are_answered_while_a_model_loads(shelf: Path) -> None:
    """Tokens come between two matrices, about as much time for them as for the matrices."""
    put(shelf, "large-16bit", 5, hidden_size=512, intermediate_size=1024, num_hidden_layers=8)
    with serving("one") as server:
        body = {"model": "one", "prompt": "Hi", "max_tokens": 50_000, "stream": True}
        with server.client.stream("POST", "/v1/completions", json=body) as stream:
            lines = stream.iter_lines()
            for _ in range(20):
                next(lines)
            load(server, "large:16bit").raise_for_status()
            came, ends = [], time.monotonic() + WAIT
            while rows(server)["large:16bit"]["state"] != "loaded":
                next(lines)
                came.append(time.monotonic())
                assert came[-1] < ends
            assert len(came) > 3


@pytest.mark.parametrize("name", ["nothing", "one-16bit", "/etc", "../models/one-16bit", ""])
@slow
def test_only_names_of_the_shelf(shelf: Path, name: str) -> None:
    with serving("one") as server:
        refused = load(server, name)
        assert refused.status_code == 404
        assert refused.json()["error"]["code"] == "model_not_found"
        assert load(server, str(shelf / "other-16bit")).status_code == 404
        assert server.client.post("/shelf/load", json={}).status_code == 400
        assert len(engine_of(server).names) == 1


def test_what_does_not_fit_is_refused_with_what_would(
    shelf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving("one") as server:
        needed = {}
        for name in ("other", "deep"):
            opened = open_model(ModelSpec(shelf / f"{name}-16bit"))
            needed[name] = Source.of(opened).needed
        monkeypatch.setattr(BatchEngine, "room", needed["other"] - 1)
        row = rows(server)["other:16bit"]
        assert row["why_not"].startswith("other:16bit needs ")
        assert rows(server)["deep:16bit"]["why_not"] is None
        refused = load(server, "other:16bit")
        assert refused.status_code == 409
        message = refused.json()["error"]["message"]
        assert "are free; deep:16bit would fit" in message
        assert message.endswith("; with --unload-after 15m idle models make room")
        damaged = load(server, "bad:16bit").json()["error"]
        assert damaged["code"] == "cannot_load"
        assert "would fit" not in damaged["message"]
        assert answer(server, "one")


@slow
def test_weights_that_turn_out_damaged(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving("one") as server:
        real = mx.load

        def fails(path: str, *more: Any) -> Any:
            if "other" in path:
                raise RuntimeError(f"can't read {path}")
            return real(path, *more)

        monkeypatch.setattr(mx, "load", fails)
        load(server, "other:16bit").raise_for_status()
        row = until(server, "other:16bit", "on the shelf")
        assert "can't read" in row["why_not"]
        assert str(shelf) not in row["why_not"]
        assert answer(server, "one")
        monkeypatch.undo()
        monkeypatch.setenv("MLX_CEREBRUM_MODELS", str(shelf))
        monkeypatch.setattr("mlx_cerebrum.server.menu.REMEMBERED", 0.0)
        assert rows(server)["other:16bit"]["why_not"] is None
        load(server, "other:16bit").raise_for_status()
        until(server, "other:16bit")


def test_a_shelf_asks_for_the_key_too(shelf: Path) -> None:
    with serving("one", "--api-key", "sesame") as server:
        assert server.client.get("/shelf").status_code == 401
        assert load(server, "other:16bit").status_code == 401
        key = {"Authorization": "Bearer sesame"}
        assert server.client.get("/shelf", headers=key).status_code == 200
        foreign = key | {"Origin": "https://example.org"}
        body = {"id": "other:16bit"}
        refused = server.client.post("/shelf/load", json=body, headers=foreign)
        assert refused.status_code == 403


def test_closing_while_a_model_loads(shelf: Path) -> None:
    put(shelf, "large-16bit", 5, hidden_size=512, intermediate_size=1024, num_hidden_layers=8)
    with serving("one") as server:
        load(server, "large:16bit").raise_for_status()
    assert not engine_of(server)._thread.is_alive()


@slow
def test_two_loads_come_one_after_the_other(shelf: Path) -> None:
    put(shelf, "third-16bit", 6, num_hidden_layers=5)
    with serving("one") as server:
        for name in ("other:16bit", "third:16bit", "deep:16bit"):
            assert load(server, name).json()["state"] in ("loading", "loaded")
        for name in ("other:16bit", "third:16bit", "deep:16bit"):
            until(server, name)
            assert answer(server, name)
        assert len(engine_of(server).holdings) == 3


def test_what_is_asked_for_and_not_loaded(shelf: Path) -> None:
    with serving("one") as server:
        body = {"model": "other:16bit", "prompt": "Hi", "max_tokens": 2}
        refused = server.client.post("/v1/completions", json=body)
        assert refused.status_code == 404
        assert "POST /shelf/load" in refused.json()["error"]["message"]
        assert server.client.get("/v1/models/other:16bit").status_code == 404


@slow
def test_a_model_that_went_away_while_it_rested(shelf: Path) -> None:
    with serving("one", "--unload-after", "0.05s") as server:
        assert answer(server, "one")
        until(server, "one:16bit", "at rest")
        (shelf / "one-16bit").rename(shelf / ".gone")
        body = {"model": "one", "prompt": "Hi", "max_tokens": 2}
        refused = server.client.post("/v1/completions", json=body)
        assert refused.status_code == 503
        assert refused.headers["retry-after"]
        wanted = "one can't be loaded: its files are gone"
        assert refused.json()["error"]["message"] == wanted
        streamed = server.client.post("/v1/completions", json=body | {"stream": True}).text
        assert wanted in streamed
        (shelf / ".gone").rename(shelf / "one-16bit")
        assert answer(server, "one")


@slow
def test_idle_weights_make_room_for_those_that_are_asked_for(
    shelf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where weights may rest, two models that fit only one by one take turns."""
    with serving("one", "--unload-after", "1h") as server:
        engine = engine_of(server)
        most = engine.stats().weights_bytes + 8_000_000

        def available() -> int:
            stats = engine.stats()
            held = stats.weights_bytes + stats.cache_bytes
            return most - held if stats.loaded < 2 else 0

        first = answer(server, "one")
        monkeypatch.setattr("mlx_cerebrum.server.engine.available_bytes", available)
        monkeypatch.setattr("mlx_cerebrum.server.engine.HEADROOM", 1.0)
        source = engine.holdings[0].source
        assert source is not None
        monkeypatch.setattr(Source, "needed", most - source.storage.nbytes // 2)
        load(server, "other:16bit").raise_for_status()
        assert until(server, "other:16bit")
        assert rows(server)["one:16bit"]["state"] == "at rest"
        other = answer(server, "other:16bit")
        assert answer(server, "one") == first
        assert rows(server)["other:16bit"]["state"] == "at rest"
        assert answer(server, "other:16bit") == other
        # An answer that may be shorter is not cut for memory that the other gives back.
        one_bytes, other_bytes = (h.source.storage.nbytes for h in engine.holdings if h.source)
        most = one_bytes + other_bytes - 1
        monkeypatch.setattr(Source, "needed", most)
        body = {"model": "one", "prompt": "Hello", "ignore_eos": True}
        done = server.client.post("/v1/completions", json=body).raise_for_status().json()
        assert done["usage"]["completion_tokens"] > 10


def test_the_machine_is_kept_awake_while_there_is_work(
    shelf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[bool] = []

    class Noted(Awake):
        @property
        def held(self) -> bool:
            return bool(held) and held[-1]

        def hold(self) -> None:
            if not self.held:
                held.append(True)

        def settle(self) -> None:
            self.release()

        def release(self) -> None:
            if self.held:
                held.append(False)

    monkeypatch.setattr("mlx_cerebrum.server.engine.Awake", Noted)
    with serving("one") as server:
        assert answer(server, "one")
        assert held[0] is True
        ends = time.monotonic() + WAIT
        while held[-1]:
            assert time.monotonic() < ends
            time.sleep(0.01)
        answer(server, "one")
    assert held[-1] is False


@slow
def test_what_pull_makes_of_one_source_is_one_set_of_weights(hub: Hub) -> None:
    """The 12.25B and the 7B are the same blocks: both are there as soon as one is."""
    for name in ("cerebrum-12.25b", "cerebrum-7b"):
        assert pull.main([name, "--bits", "4", "--yes", "--quiet"]) == 0
    with serving("cerebrum-12.25b:4bit") as server:
        found = rows(server)
        for name, positions in (("cerebrum-12.25b", 56), ("cerebrum-7b", 32)):
            row = found[f"{name}:4bit"]
            expected = {"state": "loaded", "positions": positions, "plan": name, "bits": 4}
            assert row.items() >= expected.items()
            assert answer(server, f"{name}:4bit") == answer(server, row["model"])


@slow
def test_a_model_that_was_replaced_on_the_shelf(shelf: Path) -> None:
    """The one that is loaded goes on under its name; the new one is not taken for it."""
    with serving("one") as server:
        load(server, "other:16bit").raise_for_status()
        until(server, "other:16bit")
        before = answer(server, "other:16bit")
        shutil.rmtree(shelf / "other-16bit")
        put(shelf, "other-16bit", 9, num_hidden_layers=6)
        row = rows(server)["other:16bit"]
        assert row["state"] == "on the shelf"
        assert row["why_not"].endswith("from other files; start the server anew")
        assert load(server, "other:16bit").status_code == 409
        assert answer(server, "other:16bit") == before
