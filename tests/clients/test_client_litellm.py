"""litellm."""

import os
from typing import Any

import clients_room
import pytest
from clients_room import ASKED, KEY, MODEL, City, client

# Otherwise it looks for prices in the net when it is imported.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

# Said of its own types, when they are first used.
pytestmark = pytest.mark.filterwarnings("ignore:Items? .*`ReadOnly` qualifier:UserWarning")
address = clients_room.address
litellm = client("litellm")
HI = [{"role": "user", "content": ASKED}]


@pytest.fixture
def asked(address: str) -> dict[str, Any]:
    return {"model": f"openai/{MODEL}", "api_base": address, "api_key": KEY}


def test_a_streamed_answer_says_the_same(asked: dict[str, Any]) -> None:
    whole = litellm.completion(**asked, messages=HI).choices[0].message.content
    assert whole
    chunks = litellm.completion(**asked, messages=HI, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole


def test_an_answer_of_a_given_form(asked: dict[str, Any]) -> None:
    answer = litellm.completion(**asked, messages=HI, response_format=City)
    assert City.model_validate_json(answer.choices[0].message.content)


def test_a_tool_is_called(asked: dict[str, Any]) -> None:
    function = {"name": "fill_in", "parameters": City.model_json_schema()}
    tools = [{"type": "function", "function": function}]
    answer = litellm.completion(**asked, messages=HI, tools=tools, tool_choice="required")
    (call,) = answer.choices[0].message.tool_calls
    assert City.model_validate_json(call.function.arguments)


def test_other_endpoints(asked: dict[str, Any]) -> None:
    assert litellm.text_completion(**asked, prompt="Once", max_tokens=8).choices[0].text
    assert litellm.responses(**asked, input=ASKED).output[0].content[0].text
