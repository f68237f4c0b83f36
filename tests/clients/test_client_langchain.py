"""langchain-openai."""

from typing import Any

import clients_room
import pytest
from clients_room import ASKED, KEY, MODEL, City, client, weather

# Its copies of the openai package's answers are of another type than pydantic expects.
pytestmark = pytest.mark.filterwarnings("ignore:Pydantic serializer warnings:UserWarning")
address = clients_room.address
langchain_openai = client("langchain_openai")
messages = client("langchain_core.messages")


@pytest.fixture(scope="module")
def model(address: str) -> Any:
    return langchain_openai.ChatOpenAI(base_url=address, api_key=KEY, model=MODEL, temperature=0)


def test_a_streamed_answer_says_the_same(model: Any) -> None:
    whole = model.invoke(ASKED)
    assert whole.content
    assert whole.usage_metadata["output_tokens"] > 0
    assert "".join(chunk.content for chunk in model.stream(ASKED)) == whole.content


def test_messages_of_every_kind(model: Any) -> None:
    talk = [
        messages.SystemMessage("Be brief."),
        messages.HumanMessage("Hi"),
        messages.SystemMessage("Be kind."),
        messages.HumanMessage("Who"),
        messages.HumanMessage("are you?"),
        messages.AIMessage("I am"),
    ]
    brief = model.bind(max_tokens=4)
    assert brief.invoke(talk).content
    assert brief.invoke(talk[-1:]).content


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(model: Any, method: str) -> None:
    structured = model.with_structured_output(City, method=method)
    found = structured.invoke("A city")
    assert isinstance(found, City)
    assert list(structured.stream("A city"))[-1] == found


def test_tools(model: Any) -> None:
    assert model.bind_tools([weather]).invoke(ASKED).content
    asked = [messages.HumanMessage(ASKED)]
    called = model.bind_tools([weather], tool_choice="weather").invoke(asked)
    (call,) = called.tool_calls
    assert call["name"] == "weather"
    assert set(call["args"]) == {"city"}
    done = messages.ToolMessage("Rain", tool_call_id=call["id"])
    assert model.bind_tools([weather]).invoke([*asked, called, done]).content


def test_responses(address: str, model: Any) -> None:
    newer = langchain_openai.ChatOpenAI(
        base_url=address, api_key=KEY, model=MODEL, use_responses_api=True
    )
    whole = newer.invoke(ASKED)
    assert whole.text == model.invoke(ASKED).content
    assert "".join(chunk.text for chunk in newer.stream(ASKED)) == whole.text
    assert isinstance(newer.with_structured_output(City).invoke("A city"), City)
