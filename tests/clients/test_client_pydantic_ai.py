"""pydantic-ai."""

import asyncio
from collections.abc import Callable
from typing import Any

import clients_room
import pytest
from clients_room import ASKED, KEY, MODEL, City, client, weather

address = clients_room.address
pydantic_ai = client("pydantic_ai")
models = client("pydantic_ai.models.openai")
providers = client("pydantic_ai.providers.openai")


@pytest.fixture(params=["OpenAIChatModel", "OpenAIResponsesModel"])
def run(address: str, request: pytest.FixtureRequest) -> Callable[..., Any]:
    """What an agent with these settings answers, whole or as a stream, joined again."""

    async def run(stream: bool, history: Any, **settings: Any) -> Any:
        provider = providers.OpenAIProvider(base_url=address, api_key=KEY)
        async with provider.client:
            model = getattr(models, request.param)(MODEL, provider=provider)
            agent = pydantic_ai.Agent(model, **settings)
            if not stream:
                return await agent.run(ASKED, message_history=history)
            async with agent.run_stream(ASKED) as result:
                return "".join([text async for text in result.stream_text(delta=True)])

    return lambda stream=False, history=None, **settings: asyncio.run(
        run(stream, history, **settings)
    )


def test_a_streamed_answer_says_the_same(run: Callable[..., Any]) -> None:
    said: dict[str, Any] = {"system_prompt": ("Be brief.", "Be kind."), "instructions": "Be true."}
    whole = run(**said)
    assert whole.output
    assert run(stream=True, **said) == whole.output
    assert run(history=whole.all_messages(), **said).output


@pytest.mark.parametrize("mode", ["ToolOutput", "NativeOutput"])
def test_structured_output(run: Callable[..., Any], mode: str) -> None:
    assert isinstance(run(output_type=getattr(pydantic_ai, mode)(City)).output, City)


def test_a_tool_need_not_be_called(run: Callable[..., Any]) -> None:
    assert run(tools=[weather]).output
