"""Valid inputs made invalid: changes that know JSON's structure, and changes of mere bytes."""

import copy
import json
from random import Random
from typing import Any


class Raw(str):
    """JSON text to be written as it stands."""


_NUMBERS = (0, -1, 1, 2, 3, 7, 255, 2**31, 2**32, 2**53, 2**63, 2**64, -(2**63), 10**12, 10**30)
_FLOATS = (0.0, -0.0, 0.5, 4.0, 1e-320, 1e38, 3.5e38, 1e299, -1e300, float("nan"), float("inf"))
TEXTS = (
    *(
        "",
        " ",
        "\0",
        "\n",
        "\x1b]52;c;AAAA\x07",
        "\u202e",
        "\u2581",
        "\ufeff",
        "\U0010ffff",
        "é" * 50,
    ),
    *(
        "../../etc/passwd",
        "/dev/null",
        "a/b",
        "con\\nul",
        "%s%n",
        "{0.__class__}",
        "{{ 1 }}",
        "~",
        ".",
    ),
    *("<s>", "</s>", "<unk>", "<0x41>", "<|im_start|>", "true", "null", "nan", "1e999", "9" * 400),
)
_SHAPES: tuple[Any, ...] = (
    [],
    {},
    [[]],
    [None],
    [0, 1],
    {"": None},
    {"content": 7},
    [{}],
    {"a": []},
)
_TEXT_OF_JSON = (
    *("9" * 101, "9" * 5000, "-" + "9" * 5000, "1e999", "-1e999", "NaN", "Infinity", "1.0"),
    *('"\\ud800"', '"\\udc00x"', '"\\u0000"', "01", "", ",", "'a'", "tru", "[,]", '{"a":1,"a":2}'),
)


def value(random: Random) -> Any:
    """A value that few fields of any file may have."""
    kind = random.randrange(10)
    if kind < 3:
        return random.choice(_NUMBERS)
    if kind == 3:
        return random.choice(_FLOATS)
    if kind == 4:
        return random.choice(TEXTS)
    if kind == 5:
        return copy.deepcopy(random.choice(_SHAPES))
    if kind == 6:
        return random.choice((None, True, False))
    if kind == 7:
        return Raw(random.choice(_TEXT_OF_JSON))
    if kind == 8:
        depth = random.choice((2, 40, 70, 900, 50_000))
        opening, closing = random.choice((("[", "]"), ('{"a":', "}")))
        return Raw(opening * depth + "1" + closing * random.choice((depth, depth, depth - 1)))
    return random.choice(
        ("x" * 20_000, [0] * 5000, [[1, 2]] * 2000, {str(i): i for i in range(2000)})
    )


def mutated_json(seed: Any, random: Random) -> bytes:
    """The seed's JSON text with one to four changes of its values, and at times of its bytes."""
    root = [copy.deepcopy(seed)]
    for _ in range(random.choice((1, 1, 1, 2, 2, 4))):
        places = _places(root)
        if len(places) > 5000:  # copies of copies
            break
        parent, key = random.choice(places)
        change = random.randrange(8)
        if change < 4:
            parent[key] = value(random)
        elif change == 4:
            other, place = random.choice(places)
            parent[key] = copy.deepcopy(other[place])
        elif change == 5 and parent is not root:
            del parent[key]
        elif change == 6 and isinstance(parent, dict):
            parent[random.choice((*TEXTS, *map(str, parent)))] = parent[key]
        elif change == 7 and isinstance(parent, dict):
            twice = Raw(f"{dumped(parent[key])},{json.dumps(key)}:{dumped(value(random))}")
            parent[key] = twice
    data = dumped(root[0]).encode("utf-8", "surrogatepass")
    return mutated_bytes(data, random) if random.random() < 0.2 else data


def _places(root: list[Any]) -> list[tuple[Any, Any]]:
    """Every value below `root`, as its container and the key or index in that."""
    found: list[tuple[Any, Any]] = []
    todo: list[Any] = [root]
    while todo:
        container = todo.pop()
        keys = container if isinstance(container, dict) else range(len(container))
        for key in keys:
            found.append((container, key))
            if isinstance(container[key], dict | list):
                todo.append(container[key])
    return found


def dumped(node: Any) -> str:
    """JSON, with `Raw` text in its place."""
    if isinstance(node, Raw):
        return str(node)
    if isinstance(node, dict):
        return "{" + ",".join(f"{json.dumps(k)}:{dumped(v)}" for k, v in node.items()) + "}"
    if isinstance(node, list):
        return "[" + ",".join(map(dumped, node)) + "]"
    return json.dumps(node)


def mutated_bytes(data: bytes, random: Random, other: bytes = b"") -> bytes:
    """One to eight flips, cuts, repeats, insertions and splices."""
    out = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 3, 8))):
        at, change = random.randrange(len(out) + 1), random.randrange(8)
        length = random.choice((1, 1, 2, 4, 8, 64, 1024))
        if change < 2 and at < len(out):
            out[at] ^= 1 << random.randrange(8)
        elif change == 2 and at < len(out):
            out[at] = random.choice((0, 1, 0x7F, 0x80, 0xFF, 0x22, 0x5B, 0x7B))
        elif change == 3:
            out[at : at + length] = b""
        elif change == 4:
            out[at:at] = out[at : at + length] * random.choice((1, 2, 50))
        elif change == 5:
            out[at:at] = random.randbytes(length)
        elif change == 6:
            size = random.choice((4, 8))
            number = random.choice((0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1))
            out[at : at + size] = (number % 2 ** (8 * size)).to_bytes(size, "little")
        elif change == 7:
            source = other or bytes(out)
            begin = random.randrange(len(source) + 1)
            out[at:] = source[begin:] if random.random() < 0.5 else b""
    return bytes(out)


def mutated_text(text: str, random: Random, words: tuple[str, ...]) -> bytes:
    """Lines and words of a text moved about, lost, repeated and replaced by `words`."""
    lines = text.split("\n")
    for _ in range(random.choice((1, 1, 2, 3, 6))):
        at, other = random.randrange(len(lines)), random.randrange(len(lines))
        change = random.randrange(8)
        if change == 0:
            lines.insert(at, lines[other])
        elif change == 1 and len(lines) > 1:
            del lines[at]
        elif change == 2:
            lines[at], lines[other] = lines[other], lines[at]
        elif change == 3:
            lines[at] = " " * random.choice((0, 1, 2, 4, 300)) + lines[at].lstrip()
        elif change == 4:
            lines.insert(at, random.choice(words))
        else:
            parts = lines[at].split(" ")
            place = random.randrange(len(parts))
            parts[place] = parts[place][: random.choice((0, 0, 2))] + random.choice(words)
            lines[at] = " ".join(parts)
    data = "\n".join(lines).encode("utf-8", "surrogatepass")
    return mutated_bytes(data, random) if random.random() < 0.2 else data
