"""A conversation made fit for a chat template: rendered as it is, else with the least mended.

Programs send what many templates refuse: system messages anywhere, one role twice in a row, the
assistant first, tools. Worse than to refuse is to mislabel: `'User: ' if role == 'user' else
'AI: '` makes a later system message the assistant's. So a template is asked: a conversation of a
few words shows what it does with a role in a place.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import groupby
from typing import Any

from mlx_cerebrum.errors import CerebrumError, RequestError
from mlx_cerebrum.files import json_file
from mlx_cerebrum.tokenizer.jinja.text import Budget
from mlx_cerebrum.tokenizer.messages import Message, ends_with_answer
from mlx_cerebrum.tokenizer.template import ChatTemplate, Segment

Messages = Sequence[Message]

# ---- what a conversation can be turned into


def tools_as_text(messages: Messages) -> list[Message]:
    """Tool calls as the JSON that the assistant wrote, results as a user's text."""
    names: dict[str, str] = {}
    talk: list[Message] = []
    for message in messages:
        content = message["content"]
        if message["role"] == "tool":
            name = message.get("name") or names.get(message.get("tool_call_id", ""))
            content = f"Result of {name}: {content}" if name else f"Result: {content}"
            talk.append({"role": "user", "content": content})
            continue
        calls = message.get("tool_calls", ())
        for call in calls:
            names[call.get("id", "")] = call["function"]["name"]
        lines = (json.dumps(_function(call), ensure_ascii=False) for call in calls)
        talk.append({"role": message["role"], "content": "\n".join(_some(content, *lines))})
    return talk


def systems_merged(messages: Messages) -> list[Message]:
    """All system messages as one, at the beginning."""
    systems = [message for message in messages if message["role"] == "system"]
    rest = [message for message in messages if message["role"] != "system"]
    return [_joined(systems), *rest] if systems else rest


def turns_joined(messages: Messages) -> list[Message]:
    """Neighbours of one role as one turn, but for calls of tools and their results."""
    talk: list[Message] = []
    for (_, plain), turns in groupby(messages, _sort):
        neighbours = list(turns)
        talk += [_joined(neighbours)] if plain else neighbours
    return talk


def _sort(message: Message) -> tuple[str, bool]:
    return message["role"], message["role"] != "tool" and "tool_calls" not in message


def question_first(messages: Messages) -> list[Message]:
    """With an empty user's turn before an assistant's that nothing was said before.

    Such a template has only ever shown the model answers to questions. An empty one says nothing
    that the user did not, and the greeting stays the assistant's.
    """
    first = next((at for at, each in enumerate(messages) if each["role"] != "system"), 0)
    if messages[first]["role"] != "assistant":
        return list(messages)
    return [*messages[:first], {"role": "user", "content": ""}, *messages[first:]]


def system_as_user(messages: Messages) -> list[Message]:
    """A leading system message at the head of the first turn, or as a turn of its own where that
    is not the user's: what comes first stays first."""
    if messages[0]["role"] != "system":
        return list(messages)
    system, rest = {**messages[0], "role": "user"}, list(messages[1:])
    if rest and rest[0]["role"] == "user":
        return [_joined([system, rest[0]]), *rest[1:]]
    return [system, *rest]


def in_turns(messages: Messages) -> list[Message]:
    """A system message or none, then the user and the assistant in turn, the user first."""
    return question_first(turns_joined(systems_merged(tools_as_text(messages))))


def _joined(messages: Messages) -> Message:
    contents = _some(*(message["content"] for message in messages))
    return {"role": messages[0]["role"], "content": "\n\n".join(contents)}


def _some(*texts: str) -> list[str]:
    return [text for text in texts if text]


def _function(call: Mapping[str, Any]) -> dict[str, Any]:
    """{name, arguments}, these as an object if they are one."""
    name, arguments = call["function"]["name"], call["function"]["arguments"]
    found: Any = {}
    if arguments.strip():
        try:
            found = json_file.parse(arguments, "arguments", RequestError)
        except RequestError:
            found = arguments
    return {"name": name, "arguments": found if isinstance(found, dict) else arguments}


def _with_objects(message: Message) -> Message:
    """With its calls' arguments as objects, which Hugging Face's templates expect."""
    if "tool_calls" not in message:
        return message
    calls = [{**call, "function": _function(call)} for call in message["tool_calls"]]
    return {**message, "tool_calls": calls}


# ---- what a template takes

_ALL = 5  # facts there are; together they may cost a rendering
# Where a later system message may stand; after the last of these comes the user again.
_PLACES = (("user",), ("user", "assistant"), ("system",))
_CALL = {
    "id": "zqidzqidz",  # nine letters, as Mistral's want
    "type": "function",
    "function": {"name": "zqname", "arguments": {"zqkey": "zqvalue"}},
}


class Taken:
    """What one template takes, found out when it is first asked."""

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template

    @cached_property
    def system(self) -> bool:
        """Whether a first system message before a question is shown."""
        return self._shows("system", "user")

    @cached_property
    def system_alone(self) -> bool:
        """Whether a system message is shown that nothing follows."""
        return self._shows("system")

    @cached_property
    def system_before_answer(self) -> bool:
        """Whether a first system message is shown where the conversation ends with an answer:
        some templates write it beside a last question only."""
        return self._shows("system", "user", "assistant")

    @cached_property
    def later_system(self) -> bool:
        """Whether a system message that is not first is shown as one, where it is not refused.

        It is not if it looks like the same turn of a user or the assistant, unless those look
        alike too: then the template has no labels, and none is wrong. Nor is it if a text is lost.
        """
        budget, taken = self._budget(), False
        for before in _PLACES:
            shown = self._says(budget, *before, "system", "user")
            if shown is None:
                continue
            others = {self._says(budget, *before, role, "user") for role in ("user", "assistant")}
            dropped = any(_word(at) not in shown for at in range(len(before) + 2))
            if dropped or (shown in others and len(others) > 1):
                return False
            taken = True
        return taken and self.system  # one that is refused first has no label later either

    @cached_property
    def tools(self) -> bool:
        """Whether calls of tools and their results are shown."""
        if not self._template.takes_tools:
            return False
        shown = self._text(
            self._budget(),
            [
                {"role": "user", "content": _word(0)},
                {"role": "assistant", "content": "", "tool_calls": [_CALL]},
                {"role": "tool", "content": _word(2), "tool_call_id": _CALL["id"]},
            ],
        )
        return shown is not None and all(
            word in shown for word in ("zqname", "zqkey", "zqvalue", _word(2))
        )

    def _shows(self, *roles: str) -> bool:
        shown = self._says(self._budget(), *roles)
        return shown is not None and _word(0) in shown

    def _says(self, budget: Budget, *roles: str) -> str | None:
        talk = [{"role": role, "content": _word(at)} for at, role in enumerate(roles)]
        return self._text(budget, talk)

    def _text(self, budget: Budget, messages: Messages) -> str | None:
        """None where the template refuses or fails."""
        try:
            return self._template.text(messages, budget=budget)
        except CerebrumError:
            return None

    def _budget(self) -> Budget:
        return self._template.budget([], share=_ALL)


def _word(at: int) -> str:
    return f"zq{at}zq"


# ---- the two together

_CHANGES: tuple[Callable[[Messages], list[Message]], ...] = (
    systems_merged,
    turns_joined,
    question_first,
    system_as_user,
)


def attempts(messages: Messages, taken: Taken) -> Iterator[list[Message]]:
    """The conversation as it is, but for what the template is known not to take; then with more
    and more changed."""
    if any(message["role"] == "tool" or "tool_calls" in message for message in messages):
        if taken.tools:
            yield from _attempts(list(map(_with_objects, messages)), taken)
        messages = tools_as_text(messages)
    yield from _attempts(messages, taken)


def _attempts(messages: Messages, taken: Taken) -> Iterator[list[Message]]:
    talk = list(messages)
    if any(message["role"] == "system" for message in talk[1:]) and not taken.later_system:
        talk = systems_merged(talk)
    if talk[0]["role"] == "system":
        if not taken.system or (ends_with_answer(talk) and not taken.system_before_answer):
            talk = system_as_user(talk)
        elif {message["role"] for message in talk} == {"system"} and not taken.system_alone:
            talk.append({"role": "user", "content": ""})
    yield talk
    for change in _CHANGES:
        changed = change(talk)
        if changed != talk:
            talk = changed
            yield talk


class FittedTemplate:
    """A chat template that takes any conversation which can be made fit for it."""

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template
        self._taken = Taken(template)

    @property
    def takes_tools(self) -> bool:
        """Whether the template looks at the tools it is given."""
        return self._template.takes_tools

    def render(
        self,
        messages: Messages,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[Segment]:
        """The prompt as text and control tokens in turn, of checked messages.

        continue_final_message: end where the content of the last message does, which must be the
            assistant's. If it is empty, an answer is asked for instead.
        Raises RequestError where the template refuses the conversation whatever is mended,
        TokenizerError where the template itself fails.
        """
        mark = ""
        if continue_final_message:
            if not ends_with_answer(messages):
                raise RequestError(
                    f"messages[{len(messages) - 1}]: only an assistant's text can be continued"
                )
            last = messages[-1]
            messages = messages[:-1]
            add_generation_prompt = not last["content"]
            if not messages and not last["content"]:
                raise RequestError("messages hold nothing to answer or to continue")
            if last["content"]:
                mark = self._template.unused([*messages, last])
                messages = [*messages, {**last, "content": last["content"] + mark}]
        budget = self._template.budget(messages, tools or ())
        problem: CerebrumError | None = None
        for talk in attempts(messages, self._taken):
            try:
                text = self._template.text(talk, add_generation_prompt, tools, budget)
            except CerebrumError as error:
                problem = problem or error  # what is wrong with the conversation as it was given
            else:
                return self._template.segments(text, mark)
        assert problem is not None  # there is at least one attempt
        raise problem
