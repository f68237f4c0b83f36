"""Conversations as files."""

import json
from pathlib import Path

import pytest

from mlx_cerebrum.conversation import read_messages, write_messages
from mlx_cerebrum.errors import RequestError

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
        ('[{"role": "user"}]', "exactly role and content"),
        ('[{"role": "tool", "content": ""}]', "role must be one of"),
    ],
)
def test_a_bad_file_is_one_line_with_its_name(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "talk.json"
    file.write_text(text)
    with pytest.raises(RequestError, match=said) as caught:
        read_messages(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_generate_reads_what_is_written(tmp_path: Path) -> None:
    from mlx_cerebrum.generate_args import parser, question

    file = tmp_path / "talk.json"
    write_messages(file, TALK[:2])
    assert question(parser().parse_args(["--messages", str(file)])) == TALK[:2]
    assert json.loads(file.read_text()) == TALK[:2]
