"""JSON from files, read strictly; every reader here uses this one.

Python's own reader keeps the last of two equal keys, runs out of stack in deep nesting, and
makes whole numbers too long to print or to turn into floats. What passes here can be walked,
printed and written again. NaN and Infinity pass, since transformers writes them, and a number
of more than MAX_DIGITS digits becomes a float: whoever uses a number checks its type and range.
"""

import json
import re
from pathlib import Path
from typing import Any

from mlx_cerebrum.errors import CerebrumError
from mlx_cerebrum.files.foreign import stand_in

# The largest tokenizer.json of a public model has 32 MiB, and half a million merges.
MAX_BYTES = 33 << 20
MAX_PARTS = 2_000_000  # lists and objects: each takes up to 100 times its text
MAX_DEPTH = 64
MAX_DIGITS = 100  # `model_max_length` has 31
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_object(path: Path, error: type[CerebrumError]) -> dict[str, Any]:
    """The JSON object a file holds. Raises `error`, one line with the file, otherwise."""
    value = read(path, error)
    if not isinstance(value, dict):
        raise error(f"{path} holds a {type(value).__name__}, not a JSON object")
    return value


def read(path: Path, error: type[CerebrumError]) -> Any:
    """The JSON value a file holds. Raises `error`, one line with the file, otherwise."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise error(f"{path} does not exist") from None
    except OSError as failure:
        raise error(f"{path} can't be read: {failure.strerror or failure}") from None
    if problem := stand_in(path, data):
        raise error(problem)
    return parse(data, str(path), error)


def parse(data: bytes | str, where: str, error: type[CerebrumError]) -> Any:
    """The value of a JSON text. Raises `error`, one line that begins with `where`, for what
    isn't JSON, is too large or deep, names a key twice, or holds half a character."""
    if len(data) > MAX_BYTES:
        raise error(
            f"{where} is larger than {MAX_BYTES >> 20} MiB: it is damaged, or something else"
        )
    try:
        text = data if isinstance(data, str) else data.decode("utf-8-sig")
        if text.count("[") + text.count("{") > MAX_PARTS:
            raise error(f"{where} has more than {MAX_PARTS} lists and objects: damaged")
        value = json.loads(text, object_pairs_hook=_once, parse_int=_number)
        _check_depth(value)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise error(f"{where} is not valid JSON: it is nested over {MAX_DEPTH} deep") from None
    except UnicodeEncodeError:
        raise error(f"{where} is not valid JSON: it holds half a surrogate pair") from None
    except UnicodeDecodeError as problem:
        raise error(f"{where} is not UTF-8: byte {problem.start} is no character") from None
    except json.JSONDecodeError as problem:
        raise error(f"{where} is not valid JSON: {problem}") from None
    except ValueError as problem:
        raise error(f"{where} {problem}") from None
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        for name, _ in pairs:
            if found.pop(name, found) is found:  # gone already
                raise ValueError(f"names {name!r:.80} twice")
    return found


def _number(digits: str) -> int | float:
    return int(digits) if len(digits) <= MAX_DIGITS else float(digits)


def _check_depth(value: Any) -> None:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if type(outer) is dict else outer)
            if type(inner) is dict or type(inner) is list
        ]
    if level:
        raise RecursionError
