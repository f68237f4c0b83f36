"""Chat templates: the prompt's exact text."""

import pytest

from mlx_cerebrum.errors import RequestError
from mlx_cerebrum.tokenizer.chat_formats import CEREBRUM_TEMPLATE, DEFAULT_SYSTEM
from mlx_cerebrum.tokenizer.template import ChatTemplate, strip_eos
from mlx_cerebrum.tokenizer.vocabulary import AddedToken

BOS, EOS = AddedToken(1, "<s>"), AddedToken(2, "</s>")
CONTROLS = {token.content: token for token in (BOS, EOS)}
VARIABLES = {"bos_token": "<s>", "eos_token": "</s>"}


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def chat(source: str) -> ChatTemplate:
    return ChatTemplate(source, CONTROLS, VARIABLES)


def test_one_turn_is_the_card_s_prompt() -> None:
    prompt = chat(CEREBRUM_TEMPLATE).render([user(" How many legs? ")])
    assert prompt == [BOS, f"{DEFAULT_SYSTEM}\nUser: How many legs?\nAI:"]


def test_later_turns_carry_no_second_bos_and_no_eos() -> None:
    messages = [{"role": "system", "content": "Be brief."}, user("a"), assistant(" b "), user("c")]
    prompt = chat(CEREBRUM_TEMPLATE).render(messages)
    assert prompt == [BOS, "Be brief.\nUser: a\nAI: b\nUser: c\nAI:"]
    stored = chat(CEREBRUM_TEMPLATE).render(messages[:3], add_generation_prompt=False)
    assert stored == [BOS, "Be brief.\nUser: a\nAI: b\n"]


def test_the_built_in_template_refuses_two_users_in_a_row() -> None:
    with pytest.raises(RequestError, match="roles must alternate"):
        chat(CEREBRUM_TEMPLATE).render([user("a"), user("b")])


def test_a_longer_name_wins() -> None:
    controls = {"<a>": AddedToken(1, "<a>"), "<a>b": AddedToken(2, "<a>b")}
    assert ChatTemplate("<a>b<a>", controls, {}).render([user("")]) == [
        controls["<a>b"],
        controls["<a>"],
    ]


def test_what_transformers_templates_rely_on() -> None:
    source = (
        "{% for m in messages %}\n  {% if m.content == 'no' %}{% continue %}{% endif %}\n"
        "{% generation %}{{ m|tojson }}{% endgeneration %}\n{% endfor %}"
        "{{ strftime_now('%Y') | length }}{{ tools is none }}{{ undefined_name }}"
    )
    prompt = chat(source).render([user("no"), user("<é>")])
    assert prompt == ['{"role": "user", "content": "<é>"}4True']


def test_what_the_template_refuses_is_the_request_s_fault() -> None:
    with pytest.raises(RequestError, match=r"refuses these messages: no way$"):
        chat("{{ raise_exception('no\nway') }}").render([user("x")])


@pytest.mark.parametrize(
    ("stored", "kept"),
    [
        ("done</s>", "done"),
        ("done</s></s> \n", "done"),
        ("done </s>", "done "),
        ("a</s>b", "a</s>b"),
        ("x<|end|></s>", "x"),
        (" spaces stay ", " spaces stay "),
        ("</s>", ""),
    ],
)
def test_eos_at_the_end_of_an_answer_is_stripped(stored: str, kept: str) -> None:
    assert strip_eos(stored, ["</s>", "<|end|>", ""]) == kept
