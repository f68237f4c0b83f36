"""Node's packages: openai, and ai with its providers."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import clients_room
import pytest
from clients_room import ASKED, MODEL, City, needs

address = clients_room.address
SCRIPTS = Path(__file__).parent / "node"
MODULES = Path(sys.prefix) / "node_modules"


@pytest.fixture
def run(address: str, tmp_path: Path) -> Callable[[str], dict[str, Any]]:
    """What a script tells, by name."""

    def run(name: str) -> dict[str, Any]:
        folder = with_modules(tmp_path / "node")
        for script in SCRIPTS.glob("*.mjs"):
            shutil.copy(script, folder)
        words = ["node", str(folder / name), address, MODEL, ASKED]
        done = subprocess.run(words, capture_output=True, text=True, env=environment())
        assert done.returncode == 0, done.stderr
        return dict(json.loads(line) for line in done.stdout.splitlines())

    return run


def environment() -> dict[str, str]:
    """Node's. A BLAS that was loaded for Python is none of its business."""
    return {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}


def with_modules(folder: Path) -> Path:
    """The folder, made, in which Node finds the packages."""
    if not shutil.which("node") or not MODULES.exists():
        needs("Node and its packages are not here; run: make test-clients")
    folder.mkdir()
    (folder / "node_modules").symlink_to(MODULES)
    return folder


def test_openai(run: Callable[[str], dict[str, Any]]) -> None:
    told = run("openai.mjs")
    assert told["whole"]
    assert told["streamed"] == told["response"] == told["response streamed"] == told["whole"]
    assert City.model_validate(told["parsed"])
    assert City.model_validate(told["response parsed"])
    assert told["called"]["name"] == "weather"
    assert set(json.loads(told["called"]["arguments"])) == {"city"}
    assert MODEL in told["models"]


def test_ai(run: Callable[[str], dict[str, Any]]) -> None:
    told = run("ai.mjs")
    for kind in ("responses", "chat", "compatible"):
        assert told[f"{kind} whole"]
        assert told[f"{kind} streamed"] == told[f"{kind} whole"]
        found = City.model_validate(told[f"{kind} object"])
        assert City.model_validate(told[f"{kind} output"]) == found
        assert City.model_validate(told[f"{kind} object streamed"]) == found
        assert told[f"{kind} called"]["toolName"] == "weather"
        assert set(told[f"{kind} called"]["input"]) == {"city"}
