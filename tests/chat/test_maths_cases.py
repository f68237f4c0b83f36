"""Formulas in an answer, by the same cases on the terminal and on the page."""

import json
from pathlib import Path
from typing import Any

import pytest
from terminal import Terminal
from test_answers import every_piece_is_drawn, words
from test_chat_render import streamed

__all__ = ["every_piece_is_drawn"]
CASES = json.loads((Path(__file__).parents[1] / "maths_cases.json").read_text("utf-8"))


def test_there_are_enough_of_them() -> None:
    assert len(CASES) >= 60
    assert len({case["name"] for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case["name"]))
@pytest.mark.usefixtures("every_piece_is_drawn")
def test_on_the_terminal(case: dict[str, Any]) -> None:
    text, expected = case["text"], words(case["terminal"])
    assert words(streamed(text, Terminal(200, 100), len(text))) == expected
    assert words(streamed(text, Terminal(200, 100), 3)) == expected
