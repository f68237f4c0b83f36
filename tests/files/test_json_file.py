"""JSON as files bring it: read strictly, in bounded time and memory, refused in one line."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from mlx_cerebrum.errors import CerebrumError, CheckpointError, ConfigError
from mlx_cerebrum.files import json_file
from mlx_cerebrum.model.config import read_json
from mlx_cerebrum.tokenizer.conversation import read_messages
from mlx_cerebrum.tokenizer.tokenizer import Tokenizer
from mlx_cerebrum.weights.safetensors_file import read_header


def deep(count: int) -> str:
    return "[" * count + "]" * count


def parse(text: bytes | str) -> Any:
    return json_file.parse(text, "x.json", ConfigError)


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        '{"a": [1, -2.5, true, null, "\\ud83d\\ude00\\\\ud800"]}',
        '{"model_max_length": 1000000000000000019884624838656}',
        '[{"a": 1}, {"a": 2}]',
        deep(json_file.MAX_DEPTH),
        "Infinity",
    ],
)
def test_ordinary_json_is_what_python_reads(text: str) -> None:
    assert parse(text) == parse(text.encode()) == json.loads(text)


def test_a_byte_order_mark_is_no_part_of_it() -> None:
    assert parse("{}".encode("utf-8-sig")) == {}


HOSTILE = {
    "nested": (deep(json_file.MAX_DEPTH + 1), "nested over 64 deep"),
    "nested past Python's stack": (deep(100_000), "nested over 64 deep"),
    "objects nested": ('{"a":' * 500 + "1" + "}" * 500, "nested over 64 deep"),
    "many lists": ("[" + "[]," * json_file.MAX_PARTS + "[]]", "more than 2000000 lists"),
    "large": (" " * json_file.MAX_BYTES + "{}", "larger than 33 MiB"),
    "a key twice": ('{"a": {"b": 1, "c": 2, "b": 1}}', "names 'b' twice"),
    "half a pair": (r'["\ud800"]', "half a surrogate pair"),
    "half a pair in a key": (r'{"\uDFFF": 1}', "half a surrogate pair"),
    "cut": ('{"a": ', "not valid JSON: Expecting value: line 1 column 7"),
    "nothing": ("", "not valid JSON"),
    "not UTF-8": (b'{"a": "\xff"}', "not UTF-8: byte 7"),
}


@pytest.mark.parametrize(("text", "says"), HOSTILE.values(), ids=HOSTILE)
def test_what_can_do_harm_is_refused(text: bytes | str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        parse(text)
    assert str(caught.value).startswith("x.json")
    assert "\n" not in str(caught.value)


def test_numbers_are_printable_and_fit_a_float() -> None:
    """A whole number no float can hold is one of the floats: infinite."""
    for digits in (5, 100, 101, 308, 309, 4000, 5000):
        (value,) = parse(f"[-{'9' * digits}]")
        assert float(value) <= -1e4
        assert str(value * 10)


@pytest.mark.timeout(60)
def test_the_last_of_many_names_is_there_twice() -> None:
    """Looked for in one pass: 2 million pairs of names would take a quadratic search hours."""
    names = ",".join(f'"a{i}":1' for i in range(200_000))
    started = time.process_time()
    with pytest.raises(ConfigError, match="names 'z' twice"):
        parse(f'{{{names},"z":1,"z":2}}')
    assert time.process_time() - started < 10


@pytest.mark.parametrize("text", [deep(900), deep(100_000), '{"a": 1, "a": 1}', r'{"\ud800": 1}'])
@pytest.mark.parametrize("where", ["config", "tokenizer", "tokens map", "header", "talk"])
def test_every_reader_reads_it_so(tmp_path: Path, where: str, text: str) -> None:
    file = tmp_path / "file"
    if where == "header":
        file.write_bytes(len(text).to_bytes(8, "little") + text.encode())
    elif where == "tokenizer":
        (file := tmp_path / "tokenizer.json").write_text(text)
    elif where == "tokens map":
        (file := tmp_path / "special_tokens_map.json").write_text(text)
    else:
        file.write_text(text)
    with pytest.raises(CerebrumError, match=r"nested|twice|surrogate") as caught:
        {
            "config": lambda: read_json(file),
            "tokenizer": lambda: Tokenizer.from_directory(tmp_path),
            "tokens map": lambda: Tokenizer.from_directory(tmp_path),
            "header": lambda: read_header(file),
            "talk": lambda: read_messages(file),
        }[where]()
    assert str(caught.value).startswith(str(file))


def test_a_message_is_short_whatever_it_quotes() -> None:
    message = str(CheckpointError(f"a.safetensors: {'x' * 1_000_000} is missing"))
    assert len(message) < 1100
    assert message.startswith("a.safetensors: xx")
    assert message.endswith("xx is missing")
