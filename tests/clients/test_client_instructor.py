"""instructor."""

from typing import Any

import clients_room
import openai
import pytest
from clients_room import KEY, MODEL, City, client

address = clients_room.address
instructor = client("instructor")
HI = [{"role": "user", "content": "A city"}]


@pytest.mark.parametrize("mode", ["TOOLS", "JSON_SCHEMA", "RESPONSES_TOOLS"])
def test_an_answer_is_parsed(address: str, mode: str) -> None:
    ours = openai.OpenAI(base_url=address, api_key=KEY)
    asked: Any = instructor.from_openai(ours, mode=getattr(instructor.Mode, mode))
    found = asked.chat.completions.create(model=MODEL, messages=HI, response_model=City)
    assert isinstance(found, City)


def test_the_default_mode(address: str) -> None:
    asked = instructor.from_provider(f"openai/{MODEL}", base_url=address, api_key=KEY)
    assert isinstance(asked.create(messages=HI, response_model=City), City)
    *_, last = asked.create_partial(messages=HI, response_model=City)
    assert last.name is not None
