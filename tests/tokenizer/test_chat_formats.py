"""The formats for models without a template: their text, their ends, and which one is taken."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeCheckpoint
from jinja_reference import VARIABLES, jinja

from mlx_cerebrum.errors import TokenizerError
from mlx_cerebrum.tokenizer.chat_formats import (
    BUILT_IN,
    DEFAULT_SYSTEM,
    ChatFormat,
    assumed_format,
    for_tokens,
    own_format,
    read_format,
)
from mlx_cerebrum.tokenizer.template import ChatTemplate

USER, ANSWER, AGAIN = (
    {"role": "user", "content": "How many legs?"},
    {"role": "assistant", "content": " Four.\n"},
    {"role": "user", "content": "Why?"},
)
SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [SYSTEM, USER, ANSWER, AGAIN]
TOKENS = for_tokens(BUILT_IN["mistral"], lambda text: text == "[INST]")
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately"
    " completes the request."
)

# As their authors show them: one question, and a conversation with a system text.
GOLDEN = {
    "chatml": (
        "<|im_start|>user\nHow many legs?<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHow many legs?<|im_end|>\n"
        "<|im_start|>assistant\n Four.\n<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n"
        "<|im_start|>assistant\n",
    ),
    "llama-2": (
        "<s>[INST] How many legs? [/INST]",
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHow many legs? [/INST] Four. </s>"
        "<s>[INST] Why? [/INST]",
    ),
    "mistral": (
        "<s>[INST] How many legs? [/INST]",
        "<s>[INST] Be brief.\n\nHow many legs? [/INST] Four.</s>[INST] Why? [/INST]",
    ),
    "mistral, [INST] a token": (
        "<s>[INST] How many legs?[/INST]",
        "<s>[INST] How many legs?[/INST] Four.</s>[INST] Be brief.\n\nWhy?[/INST]",
    ),
    "alpaca": (
        f"<s>{ALPACA}\n\n### Instruction:\nHow many legs?\n\n### Response:",
        "<s>Be brief.\n\n### Instruction:\nHow many legs?\n\n### Response:\nFour.</s>\n\n"
        "### Instruction:\nWhy?\n\n### Response:",
    ),
    "zephyr": (
        "<|user|>\nHow many legs?</s>\n<|assistant|>\n",
        "<|system|>\nBe brief.</s>\n<|user|>\nHow many legs?</s>\n<|assistant|>\n Four.\n</s>\n"
        "<|user|>\nWhy?</s>\n<|assistant|>\n",
    ),
    "cerebrum": (
        f"<s>{DEFAULT_SYSTEM}\nUser: How many legs?\nAI:",
        "<s>Be brief.\nUser: How many legs?\nAI: Four.\nUser: Why?\nAI:",
    ),
    "plain": ("How many legs?", "Be brief.\n\nHow many legs?\n\n Four.\n\n\nWhy?"),
}
FORMATS = BUILT_IN | {"mistral, [INST] a token": TOKENS}


@pytest.mark.parametrize("name", FORMATS)
def test_the_text_of_each_format(name: str) -> None:
    template = ChatTemplate(FORMATS[name].source, {}, VARIABLES)
    for messages, expected in zip(([USER], TURNS), GOLDEN[name], strict=True):
        assert "".join(map(str, template.render(messages))) == expected
        assert jinja(FORMATS[name].source, messages) == expected  # saved, others read the same


@pytest.mark.parametrize("name", FORMATS)
def test_an_answer_without_a_question_to_follow(name: str) -> None:
    """Without a generation prompt nothing of the next turn is there."""
    template = ChatTemplate(FORMATS[name].source, {}, VARIABLES)
    stored = "".join(map(str, template.render(TURNS[:3], False)))
    following = "".join(map(str, template.render(TURNS)))
    assert following.startswith(stored) or name == "mistral, [INST] a token"
    assert "Four." in stored[-30:]


def test_ends() -> None:
    ends = {name: found.ends for name, found in BUILT_IN.items()}
    assert ends == {
        "chatml": ("<|im_end|>",),
        "llama-2": ("[INST]",),
        "mistral": ("[INST]",),
        "alpaca": ("\n### Instruction:",),
        "zephyr": ("<|user|>",),
        "cerebrum": ("\nUser:",),
        "plain": (),
    }
    assert own_format(BUILT_IN["alpaca"].source) == BUILT_IN["alpaca"]
    assert own_format("{{ messages }}") == ChatFormat("{{ messages }}")


def test_what_is_assumed_of_a_vocabulary() -> None:
    def assumed(*tokens: str) -> ChatFormat:
        return assumed_format(tokens.__contains__)

    assert assumed("<|im_start|>", "<|im_end|>", "[INST]").built_in == "chatml"
    assert assumed("[INST]", "[/INST]", "</s>").built_in == "mistral"
    assert assumed("<|im_start|>", "</s>").built_in == "plain"
    assert assumed().assumed == "plain is assumed, which only continues the text"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{% if %}", r"bad.jinja, line 1 is not a chat template: Expected an expression"),
        ("a\n{{ b", r"bad.jinja, line 2 is not a chat template: unexpected end of template"),
        ("x" * 300_000, "is not a chat template: it is longer than 200,000"),
        ("x" * 900_000, "is too long"),
        (b"\xff", "is not UTF-8"),
        ("{{ 1" + "0" * 30 + " }}", "is not a chat template: a number out of bounds"),
        ("{{ " + "(" * 9000 + " }}", "is not a chat template: "),
        ("", "bad.jinja is not a chat template: it never looks at 'messages'"),
        ("Hi {% for m in mesages %}{{ m.messages }}{% endfor %}", "never looks at 'messages'"),
    ],
)
def test_a_file_that_is_no_template(tmp_path: Path, content: str | bytes, problem: str) -> None:
    path = tmp_path / "bad.jinja"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(TokenizerError, match=problem) as caught:
        read_format(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["vicuna", "", ".", "/dev/zero", "a\0b", "no/such.jinja"])
def test_a_name_that_is_none(name: str) -> None:
    problem = "neither a chat template's file nor one of chatml, ll|cannot be read"
    with pytest.raises(TokenizerError, match=problem):
        read_format(name)


# ---- which one a checkpoint gets


def loaded(path: Path, **more: Any) -> Any:
    from mlx_cerebrum.weights.opening import load_tokenizer, open_checkpoint

    return load_tokenizer(open_checkpoint(path), **more)


def edit(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))


def test_only_a_cerebrum_gets_cerebrum_s(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    path = checkpoint()
    assert loaded(path).format.built_in == "plain"
    assert loaded(path, chosen=BUILT_IN["zephyr"]).format.built_in == "zephyr"
    chain = {"source": "x", "from": {"source": "AetherResearch/Cerebrum-1.0-7b", "from": None}}
    for changes in ({"provenance": chain}, {"_name_or_path": "AetherResearch/Cerebrum-1.0-7b"}):
        edit(path, provenance=None, _name_or_path=None)
        assert loaded(path).format.built_in == "plain"
        edit(path, **changes)
        assert loaded(path).format.built_in == "cerebrum"
        assert loaded(path).format.assumed is None
        assert loaded(path).stop_strings == ("\nUser:",)
    edit(path, provenance={"source": "/cerebrum/mistral-7b", "from": 3}, _name_or_path=["cerebrum"])
    assert loaded(path).format.built_in == "plain"
    for named in ("Cerebrum-12.25b-4bit", "models--AetherResearch--Cerebrum-1.0-7b/snapshots/a1"):
        (tmp_path / "of" / named).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "of" / named).symlink_to(path.resolve())
        assert loaded(tmp_path / "of" / named).format.built_in == "cerebrum"


def test_a_checkpoint_s_own_template_comes_first(checkpoint: MakeCheckpoint) -> None:
    path = checkpoint()
    edit(path, _name_or_path="cerebrum")
    (path / "chat_template.jinja").write_text("own")
    assert loaded(path).format == ChatFormat("own")
    assert loaded(path, chosen=BUILT_IN["chatml"]).format.built_in == "chatml"
