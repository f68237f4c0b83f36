"""openai-agents."""

import asyncio
from collections.abc import Callable
from typing import Any

import clients_room
import openai
import pytest
from clients_room import ASKED, KEY, MODEL, City, client, weather

address = clients_room.address
agents = client("agents")


@pytest.fixture(params=["OpenAIResponsesModel", "OpenAIChatCompletionsModel"])
def run(address: str, request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Runs an agent made with these settings, and has read its stream if it has one."""
    agents.set_tracing_disabled(True)  # it goes to OpenAI

    async def run(stream: bool, **settings: Any) -> Any:
        async with openai.AsyncOpenAI(base_url=address, api_key=KEY) as client:
            model = getattr(agents, request.param)(model=MODEL, openai_client=client)
            agent = agents.Agent(name="Helper", model=model, **settings)
            if not stream:
                return await agents.Runner.run(agent, ASKED)
            result = agents.Runner.run_streamed(agent, ASKED)
            result.events = [event async for event in result.stream_events()]
            return result

    return lambda stream=False, **settings: asyncio.run(run(stream, **settings))


def test_a_streamed_answer_says_the_same(run: Callable[..., Any]) -> None:
    whole = run(instructions="Be brief.").final_output
    assert whole
    result = run(True, instructions="Be brief.")
    raw = [event.data for event in result.events if event.type == "raw_response_event"]
    assert "".join(e.delta for e in raw if e.type == "response.output_text.delta") == whole
    assert result.final_output == whole


def test_structured_output(run: Callable[..., Any]) -> None:
    assert isinstance(run(output_type=City).final_output, City)


def test_a_tool_is_called_and_its_result_read(run: Callable[..., Any]) -> None:
    required = agents.ModelSettings(tool_choice="required")  # not again, after a call
    result = run(tools=[agents.function_tool(weather)], model_settings=required)
    kinds = [item.type for item in result.new_items]
    assert kinds == ["tool_call_item", "tool_call_output_item", "message_output_item"]
    assert result.new_items[1].output.startswith("Rain in ")
