"""Conversations as files."""

import io
import json
from pathlib import Path

import pytest

from mlx_cerebrum.errors import RequestError
from mlx_cerebrum.generate import parser, question
from mlx_cerebrum.tokenizer.conversation import read_messages, write_messages

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "héllo \u2028 \U0001f600"},
    {"role": "assistant", "content": "Hi."},
]


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    write_messages(file, TALK)
    assert read_messages(file) == TALK
    assert [p.name for p in tmp_path.iterdir()] == ["talk.json"]


def test_an_older_file_survives_a_failed_write(tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    write_messages(file, TALK)
    with pytest.raises(UnicodeEncodeError):  # a lone surrogate has no UTF-8
        write_messages(file, [{"role": "user", "content": "\ud800"}])
    assert read_messages(file) == TALK
    assert [p.name for p in tmp_path.iterdir()] == ["talk.json"]


def test_more_text_than_any_context_holds_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it is tokenized: that would take gigabytes."""
    file, says = tmp_path / "talk.json", "2,000,001 characters are more than any context holds"
    write_messages(file, [{"role": "user", "content": "x" * 1_000_001}] * 2)
    with pytest.raises(RequestError, match=r"talk\.json: 2,000,002 characters are more"):
        read_messages(file)
    write_messages(file, [{"role": "user", "content": "x"}] * 20_001)
    with pytest.raises(RequestError, match="20,001 messages are more than 20,000"):
        read_messages(file)
    for flags in (["--raw"], []):
        monkeypatch.setattr("sys.stdin", io.StringIO("x" * 2_000_001))
        with pytest.raises(RequestError, match=says):
            question(parser().parse_args(["--prompt", "-", *flags]))


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="nowhere is not a directory; make it first"):
        write_messages(tmp_path / "nowhere/talk.json", TALK)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ('{"role": "user"}', "must hold a list of messages, not a dict"),
        ("[]", "at least one"),
        ('[{"role": "user"}]', r"messages\[0\]\.content: must be a string or a list"),
        ('[{"role": "robot", "content": ""}]', r"messages\[0\]\.role: must be one of"),
    ],
)
def test_a_bad_file_is_one_line_with_its_name(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "talk.json"
    file.write_text(text)
    with pytest.raises(RequestError, match=said) as caught:
        read_messages(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_only_files_are_written(tmp_path: Path) -> None:
    for path in (Path("/dev/null"), tmp_path):
        with pytest.raises(RequestError, match="is no file; give another name"):
            write_messages(path, TALK)


def test_a_link_stays_one(tmp_path: Path) -> None:
    link, file = tmp_path / "link.json", tmp_path / "far" / "talk.json"
    file.parent.mkdir()
    link.symlink_to(file)
    write_messages(link, TALK)
    assert link.is_symlink()
    assert read_messages(file) == TALK


def test_as_long_a_name_as_files_may_have(tmp_path: Path) -> None:
    file = tmp_path / ("n" * 255)
    write_messages(file, TALK)
    assert read_messages(file) == TALK


def test_a_byte_order_mark_is_no_error(tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    file.write_text(json.dumps(TALK), encoding="utf-8-sig")
    assert read_messages(file) == TALK


def asked(file: Path, *flags: str) -> object:
    return question(parser().parse_args(["--messages", str(file), *flags]))


def test_generate_reads_what_is_written(tmp_path: Path) -> None:
    """A question is answered, an answer continued unless another question is asked."""
    file = tmp_path / "talk.json"
    for messages in (TALK, TALK[:1], TALK[:2]):
        write_messages(file, messages)
        assert asked(file) == messages
    with pytest.raises(RequestError, match="ends with a question: no --prompt too"):
        asked(file, "--prompt", "And?")
    for messages in (TALK, TALK[:1]):
        write_messages(file, messages)
        following = [*messages, {"role": "user", "content": "And?"}]
        assert asked(file, "--prompt", "And?") == following


def test_other_programs_files_are_read(tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    theirs = [
        {"role": "developer", "content": [{"type": "text", "text": "Be brief."}], "weight": 1},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "x", "tool_call_id": "a"},
    ]
    file.write_text(json.dumps(theirs))
    assert read_messages(file) == [
        {"role": "system", "content": "Be brief."},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "x", "tool_call_id": "a"},
    ]
    with pytest.raises(RequestError, match="ends with a question: no --prompt too"):
        asked(file, "--prompt", "And?")
