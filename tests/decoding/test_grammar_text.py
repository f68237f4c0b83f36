"""Schemas are looked through in a time that their length bounds."""

import json
from typing import Any

import pytest

from mlx_cerebrum.decoding import grammar_text
from mlx_cerebrum.decoding.grammar_text import Ask, Written


def test_alternatives_are_each_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"n{i}" for i in range(20)]
    options = [
        {"type": "object", "required": [*names, "kind"], "properties": {"kind": {"const": i}}}
        for i in range(30)
    ]
    looked, values = list[str](), grammar_text._values

    def counted(schema: Any, name: str) -> set[str]:
        looked.append(name)
        return values(schema, name)

    monkeypatch.setattr(grammar_text, "_values", counted)
    written = Written(Ask("json_schema", json.dumps({"oneOf": options})))
    assert "anyOf" in written.text  # they are told apart
    assert len(looked) == len(options) * (len(names) + 1)
