"""Whatever a checkpoint's template says, it ends soon, in little memory and in one line."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import slow
from hostile_templates import TEMPLATES

from mlx_cerebrum.errors import TokenizerError
from mlx_cerebrum.tokenizer import template
from mlx_cerebrum.tokenizer.jinja.text import Budget, LimitError
from mlx_cerebrum.tokenizer.template import ChatTemplate

ROOT = Path(__file__).parents[2]
QUESTION = [{"role": "user", "content": "x"}]


@pytest.mark.long
def test_hostile_templates_end_soon_in_little_memory_and_one_line() -> None:
    """With a twentieth of the steps: each then takes a twentieth of what it may, or is unpaid."""
    headroom, steps = 400_000_000, template.STEPS // 20
    command = [sys.executable, "-m", "hostile_templates", str(headroom), str(steps)]
    paths = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    run = subprocess.run(
        command, env=os.environ | paths, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found, added = json.loads(run.stdout)
    assert added < headroom
    assert len(found) == len(TEMPLATES) > 150
    for source, (seconds, error) in zip(TEMPLATES, found, strict=True):
        assert seconds < 5, source[:200]
        assert error is None or ("\n" not in error and len(error) < 400), source[:200]
        assert "MemoryError" not in str(error), source[:200]
    assert sum(error is not None for _, error in found) > 140


def test_an_endless_template_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the clock, where its steps are slow."""
    monkeypatch.setattr(template, "SECONDS", 0.2)
    monkeypatch.setattr(template, "STEPS", 10**9)
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    started = time.monotonic()
    with pytest.raises(TokenizerError, match=r"ran for more than 0\.2 seconds"):
        ChatTemplate(loops, {}, {}).render(QUESTION)
    assert time.monotonic() - started < 5


@slow
def test_a_long_conversation_may_take_more() -> None:
    """More steps and letters for more messages, and for longer ones."""
    source = "{% for m in messages %}{{ m.content|trim|trim|trim|trim }}{% endfor %}"
    many = [{"role": "user", "content": "word " * 20} for _ in range(20_000)]
    assert len(str(ChatTemplate(source, {}, {}).render(many)[0])) == 20_000 * 99
    one = [{"role": "user", "content": "word " * 2_000_000}]
    assert len(str(ChatTemplate(source, {}, {}).render(one)[0])) == 9_999_999


def test_a_budget_is_spent() -> None:
    budget = Budget(10, 100, 1.0)
    budget.step(9)
    with pytest.raises(LimitError, match="steps"):
        budget.step(2)
    budget = Budget(10, 100, 1.0)
    budget.letters(100)
    with pytest.raises(LimitError, match="text"):
        budget.letters(1)
