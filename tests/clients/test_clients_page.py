"""docs/clients.md: every example in Python, JavaScript and shell is run on the served demo."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import clients_room
import pytest
import yaml
from clients_room import needs
from test_client_node import environment, with_modules

address = clients_room.address
PAGE = (Path(__file__).parents[2] / "docs" / "clients.md").read_text(encoding="utf-8")
WRITTEN = "http://127.0.0.1:8080/v1"
FENCE = re.compile(r"^( *)```(\w+)\n(.*?)^ *```$", re.M | re.S)
BLOCKS = [
    (kind, re.sub(f"^{indent}", "", text, flags=re.M)) for indent, kind, text in FENCE.findall(PAGE)
]
RUN = [(kind, text) for kind, text in BLOCKS if kind in ("python", "js", "sh")]


def test_there_are_blocks_of_each_kind() -> None:
    assert {kind for kind, _ in BLOCKS} == {"python", "js", "sh", "text", "yaml", "json"}
    assert len(RUN) >= 10


@pytest.mark.parametrize(("kind", "text"), RUN, ids=[text.split("\n")[0] for _, text in RUN])
def test_examples_run(address: str, kind: str, text: str, tmp_path: Path) -> None:
    assert WRITTEN in text
    text = text.replace(WRITTEN, address)
    if kind == "js":
        script = with_modules(tmp_path / "node") / "example.mjs"
        script.write_text(text)
        words = ["node", str(script)]
    else:
        words = ["bash", "-ec", text] if kind == "sh" else [sys.executable, "-c", text]
    done = subprocess.run(
        words, capture_output=True, text=True, cwd=tmp_path, env=environment() | ours(tmp_path)
    )
    if kind == "python" and "ModuleNotFoundError" in done.stderr:
        needs(done.stderr.splitlines()[-1] + "; run: make test-clients")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def ours(folder: Path) -> dict[str, str]:
    """So that nothing is asked of the net, or kept in this user's folders."""
    return {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "LLM_USER_PATH": str(folder),
        "LLM_LOAD_PLUGINS": "",
    }


def test_settings_can_be_read() -> None:
    for kind, text in BLOCKS:
        if kind in ("yaml", "json"):
            assert WRITTEN in str((yaml.safe_load if kind == "yaml" else json.loads)(text))
