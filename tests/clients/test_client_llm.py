"""llm, the command."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import clients_room
import pytest
from clients_room import ASKED, MODEL, City, client

address = clients_room.address
client("llm")


@pytest.fixture
def ask(address: str, tmp_path: Path) -> Callable[..., str]:
    model: dict[str, str | bool] = {"model_id": MODEL, "model_name": MODEL, "api_base": address}
    model |= {"supports_schema": True, "supports_tools": True}
    # YAML holds JSON.
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps([model]))

    def ask(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "llm", "-m", MODEL, *words],
            capture_output=True,
            text=True,
            env=os.environ | {"LLM_USER_PATH": str(tmp_path), "LLM_LOAD_PLUGINS": ""},
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return ask


def test_a_streamed_answer_says_the_same(ask: Callable[..., str]) -> None:
    whole = ask("--no-stream", ASKED)
    assert whole
    assert ask("-s", "", ASKED) == whole


def test_a_schema(ask: Callable[..., str]) -> None:
    schema = json.dumps(City.model_json_schema())
    assert City.model_validate_json(ask("--schema", schema, "A city"))


def test_a_conversation_goes_on(ask: Callable[..., str]) -> None:
    ask(ASKED)
    assert ask("-c", "-s", "Be brief.", "Again: " + ASKED)
    assert ask("-T", "llm_time", ASKED)
