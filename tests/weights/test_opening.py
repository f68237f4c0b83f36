"""How often a command reads headers and config, and what is refused before weights are read."""

import io
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf_files
import pytest
from conftest import MakeCheckpoint

import mlx_cerebrum
from mlx_cerebrum import demo as demo_command
from mlx_cerebrum.chat.__main__ import main as chat
from mlx_cerebrum.errors import CerebrumError, ConfigError, MemoryBudgetError, PlanError
from mlx_cerebrum.generate import main as generate
from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.server.__main__ import main as serve
from mlx_cerebrum.server.listening import Server
from mlx_cerebrum.weights import safetensors_file
from mlx_cerebrum.weights.gguf_file import GGUFFile
from mlx_cerebrum.weights.opening import ModelSpec, open_model
from mlx_cerebrum.weights.views import load_views

COMMANDS: dict[str, Callable[[str], object]] = {
    "load": mlx_cerebrum.load,
    "generate": lambda model: generate(
        ["--model", model, "--prompt", "a", "--max-tokens", "1", "--template", "cerebrum"]
    ),
    "chat": lambda model: chat(["--model", model, "--template", "cerebrum", "--plain"]),
    "server": lambda model: serve(["--model", model, "--template", "cerebrum", "--port", "0"]),
    "demo": lambda _: demo_command.main(["--prompt", "a", "--max-tokens", "1"]),
}


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """What is counted from here on: each header that is parsed, each config that is built."""
    counts: Counter[str] = Counter()

    def counting(owner: object, name: str, what: str) -> None:
        original = getattr(owner, name)

        def counted(*args: object) -> object:
            counts[what] += 1
            return original(*args)

        monkeypatch.setattr(owner, name, counted)

    counting(safetensors_file, "read_whole_header", "headers")
    counting(GGUFFile, "_open_one", "headers")
    counting(ModelConfig, "from_dict", "configs")
    return counts


@pytest.mark.parametrize("kind", ["safetensors", "gguf"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_reads_each_header_once(
    command: str,
    kind: str,
    checkpoint: MakeCheckpoint,
    plan_file: Callable[..., Path],
    tmp_path: Path,
    reads: Counter[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if kind == "gguf":
        model = gguf_files.write(tmp_path / "model.gguf", "Q8_0", gguf_files.Geometry(layers=8))
    else:
        model = checkpoint(shards=2)
    monkeypatch.setattr("mlx_cerebrum.weights.hub.demo_path", lambda: model)
    monkeypatch.setattr(demo_command, "PLAN", str(plan_file()))
    monkeypatch.setattr("sys.stdin", io.StringIO("/quit\n"))
    monkeypatch.setattr(Server, "run", lambda *_, **__: None)
    assert COMMANDS[command](str(model)) == 0 or command == "load"
    assert reads == {"headers": 2 if kind == "safetensors" else 1, "configs": 1}


@pytest.mark.parametrize(
    ("asked", "error", "said"),
    [
        ({"q_bits": 7}, ConfigError, "7 bits a weight"),
        ({"q_bits": 4, "q_group_size": 48}, ConfigError, "group size of 48"),
        ({"dtype": "float8"}, ConfigError, "dtype 'float8' is not auto"),
        ({"window": -1}, ConfigError, "window -1 is negative"),
        ({"plan": "no-such-plan"}, PlanError, "no-such-plan"),
        ({"plan": "cerebrum-12.25b"}, PlanError, "8 blocks"),
        ({"revision": "main"}, CerebrumError, "--revision is for hub ids"),
        ({"template": "no-such-template"}, CerebrumError, "no-such-template"),
    ],
)
def test_what_can_be_refused_is_refused_before_weights_are_read(
    asked: dict[str, Any],
    error: type[CerebrumError],
    said: str,
    checkpoint: MakeCheckpoint,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mlx_cerebrum.weights.opening.load_model", None)
    with pytest.raises(error, match=said):
        mlx_cerebrum.load(checkpoint(), **asked)


def test_a_tokenizer_of_another_model_is_refused_before_weights_are_read(
    checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx_cerebrum.weights.opening.load_model", None)
    with pytest.raises(ConfigError, match="the tokenizer has 259 tokens, the model 200"):
        mlx_cerebrum.load(checkpoint(vocab_size=200))
    with pytest.raises(ConfigError, match="the tokenizer has 259 tokens"):
        load_views(open_model(ModelSpec(checkpoint("again", vocab_size=200))))


def test_memory_is_asked_for_before_weights_are_read(
    checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_model(ModelSpec(checkpoint()))
    needed = opened.storage.nbytes + opened.storage.transient
    loaded: list[object] = []
    monkeypatch.setattr(
        "mlx_cerebrum.weights.opening.load_model", lambda *given: loaded.append(given)
    )
    monkeypatch.setattr("mlx_cerebrum.model.memory.available_bytes", lambda: needed / 0.95 + 1)
    opened.load()
    assert len(loaded) == 1
    monkeypatch.setattr("mlx_cerebrum.model.memory.available_bytes", lambda: needed / 0.95 - 1)
    with pytest.raises(MemoryBudgetError, match=r"loading source needs .* --q-bits 8 \("):
        opened.load()
    assert len(loaded) == 1
