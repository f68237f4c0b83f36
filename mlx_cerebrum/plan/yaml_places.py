"""YAML read strictly: every value keeps its place, and nothing is guessed or dropped.

PyYAML's own loader keeps the last of two equal keys, turns `010` into 8 and forgets line
numbers. Here the node tree is walked instead, and each complaint is one line that starts
with `FILE:LINE: path.to.value:`.
"""

import re
import unicodedata
from collections.abc import Iterator

import yaml

from mlx_cerebrum.errors import PlanError
from mlx_cerebrum.model.config import FLOAT32_MAX
from mlx_cerebrum.text import one_line

MAX_CHARACTERS = 256 * 1024  # a thousand slices take a quarter of it
_MAX_NODES = 100_000  # after aliases are expanded

_TAG = "tag:yaml.org,2002:"
_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,17}")
_NUMBER = re.compile(r"[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")

# Keys that stand only below the top: at the left margin, their indentation was lost.
_NESTED = (
    *("sources", "layer_range", "model", "path", "revision", "lora", "default"),
    *("scale", "filter", "value", "source", "tokens", "pad_to_multiple_of"),
)
_KEYS = (*_NESTED, "slices", "models", "parameters", "base_model")  # misplaced where not known
_AT_MARGIN = re.compile(rf"^({'|'.join(_NESTED)})\s*:|^-\s+(layer_range|filter)\s*:", re.MULTILINE)
_LOOKS_LIKE_SPACE = re.compile(r"^ *([^\S \r\n])", re.MULTILINE)
# What looks like a space, or like nothing, and is neither.
_NO_SPACE = re.compile(r"(?![ \t\r\n])\s|[\u200B-\u200D\u2060\uFEFF]")
_LOST = "; check the indentation and line breaks, which copying from a web page loses"


def documents(text: str, where: str) -> list[tuple["Item", str]]:
    """The root and the text of each YAML document that is not empty.

    Raises PlanError where there is none, and for what is not well-formed.
    """
    if len(text) > MAX_CHARACTERS:
        raise PlanError(f"{where}: longer than {MAX_CHARACTERS} characters; this is not a plan")
    try:
        found = list(_compose(text, where))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        problem = one_line(error.problem or error.context or "cannot be read", 200)
        raise PlanError(f"{where}{line}: not valid YAML: {problem}{_hint(problem, text)}") from None
    except yaml.reader.ReaderError as error:
        place = f"{where}:{_line(text, error.position)}"
        raise PlanError(f"{place}: not text: control character {error.character!r}") from None
    except RecursionError:
        raise PlanError(f"{where}: nested too deeply; this is not a plan") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # e.g. the escape "\U00110000"
        raise PlanError(f"{where}: not valid YAML: {one_line(str(error))}") from None
    if not found:
        hint = _LOST if "merge_method" in text else ""  # all of it behind one #
        raise PlanError(f"{where}: empty; a plan needs merge_method and slices{hint}")
    return found


def _compose(text: str, where: str) -> Iterator[tuple["Item", str]]:
    """The root and the text of each document, those that hold nothing left out."""
    loader = yaml.SafeLoader(text)
    try:
        start = 0
        while loader.check_node():
            root = loader.get_node()
            assert root is not None  # check_node said that there is one
            end = loader.peek_event().start_mark.index  # of the next document, or the stream's
            if root.tag != _TAG + "null" or root.value:  # an empty text is a null of no characters
                item = Item(root, where)
                if _expanded_size(root, {}) > _MAX_NODES:
                    raise item.error("YAML aliases expand without bound; write the values out")
                for mapping in _mappings(root, where):
                    loader.flatten_mapping(mapping)  # merge keys (`<<`) mean what PyYAML says
                yield item, text[start:end]
            start = end
    finally:
        loader.dispose()


def _mappings(root: yaml.Node, where: str) -> list[yaml.MappingNode]:
    """Every mapping of a document. Raises PlanError for one that gives a key twice."""
    found: list[yaml.MappingNode] = []
    waiting, seen = [(root, "")], set()
    while waiting:
        node, path = waiting.pop()
        if id(node) in seen or isinstance(node, yaml.ScalarNode):
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting += reversed([(part, f"{path}[{i}]") for i, part in enumerate(node.value)])
            continue
        assert isinstance(node, yaml.MappingNode)
        found.append(node)
        inner, lines = [], dict[str, int]()
        for key, value in node.value:
            name = one_line(str(key.value), 80)
            here, line = f"{path}.{name}" if path else name, key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and key.tag != _TAG + "merge":
                if (first := lines.get(key.value)) is not None:
                    raise PlanError(f"{where}:{line}: {here}: given twice, first on line {first}")
                lines[key.value] = line
            inner.append((value, here))
        waiting += reversed(inner)
    return found


def _hint(problem: str, text: str) -> str:
    """What to do about text that copying has changed: its spaces, its indentation, a fence."""
    if odd := _LOOKS_LIKE_SPACE.search(text):
        return f"; line {_line(text, odd.start(1))} {_look_alike(odd)}"
    if odd := _NO_SPACE.search(text):
        return f"; U+{ord(odd[0]):04X} on line {_line(text, odd.start())} is no space"
    if fence := re.search(r"^```.*$", text, re.MULTILINE):
        return f"; take only what lies between the lines {fence[0]!r:.20} and '```'"
    lost = re.search("<block end>|(mapping values|sequence entries) are not allowed", problem)
    return _LOST if lost or _AT_MARGIN.search(text) else ""


def _line(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1


def _look_alike(odd: re.Match[str]) -> str:
    name = "a tab" if odd[1] == "\t" else f"U+{ord(odd[1]):04X}"
    return f"is indented with {name}: use spaces"


def _expanded_size(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Nodes below and including `node`, each alias counted as a copy of what it names."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in sizes:
        sizes[id(node)] = _MAX_NODES + 1  # what an alias to an enclosing node counts as
        sizes[id(node)] = 1 + sum(_expanded_size(part, sizes) for part in _inner(node))
    return sizes[id(node)]


def _reached(nodes: list[yaml.Node]) -> set[int]:
    """The nodes that these hold, themselves included, by identity."""
    found, waiting = set[int](), list(nodes)
    while waiting:
        node = waiting.pop()
        if id(node) not in found:
            found.add(id(node))
            waiting += _inner(node)
    return found


def _inner(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return [] if isinstance(node, yaml.ScalarNode) else list(node.value)


class Item:
    """One YAML value and where it stands. Every reader raises PlanError with that place."""

    def __init__(self, node: yaml.Node, where: str, path: str = "", line: int = 0) -> None:
        self.node = node
        self.where = where
        self.path = path
        self.line = line or node.start_mark.line + 1

    @property
    def place(self) -> str:
        return f"{self.where}:{self.line}" + (f": {self.path}" if self.path else "")

    def error(self, text: str) -> PlanError:
        return PlanError(f"{self.place}: {text}")

    @property
    def kind(self) -> str:
        """YAML's word for its type: map, seq, str, null, int; "odd" for a map tagged as a list."""
        scalar, tag = isinstance(self.node, yaml.ScalarNode), self.node.tag.removeprefix(_TAG)
        shape = "map" if isinstance(self.node, yaml.MappingNode) else "seq"
        return str(tag) if (tag not in ("map", "seq") if scalar else tag == shape) else "odd"

    def shown(self) -> str:
        """The value as a message quotes it."""
        if isinstance(self.node, yaml.ScalarNode) and self.kind != "null":
            quoted = self.kind == "str" or self.node.style
            return one_line(repr(self.node.value) if quoted else self.node.value, 80)
        tag = one_line(repr(self.node.tag), 80)
        names = {"null": "nothing", "seq": "a list", "map": "a mapping"}
        return names.get(self.kind, f"one tagged {tag}")

    def mapping(self, *known: str) -> dict[str, "Item"]:
        """The entries of a mapping that may hold the `known` keys, those that are null left out."""
        if self.kind != "map":
            raise self.error(f"must be a mapping, not {self.shown()}{self._emptied()}")
        entries: dict[str, Item] = {}
        # At the top, a key nobody knows may hold what aliases under the known ones name.
        used = _reached([v for k, v in self.node.value if k.value in known and not self.path])
        for key_node, value_node in self.node.value:
            line = key_node.start_mark.line + 1
            key = Item(key_node, self.where, self.path, line)
            if key.kind != "str" or key_node.value not in known:
                if not used.isdisjoint(_reached([value_node])):
                    continue
                hint = _LOST if key_node.value in _KEYS else ""
                if key.kind == "str" and (odd := _LOOKS_LIKE_SPACE.match(key_node.value)):
                    hint = f"; it {_look_alike(odd)}"
                listed = ", ".join(known)
                raise key.error(f"unknown key {key.shown()}; known here: {listed}{hint}")
            name: str = key_node.value
            path = f"{self.path}.{name}" if self.path else name
            entries[name] = Item(value_node, self.where, path, line)
        return {name: item for name, item in entries.items() if item.kind != "null"}

    def require(self, entries: dict[str, "Item"], key: str) -> "Item":
        """The entry `key` of this mapping's `entries`, which must be there and not null."""
        if key in entries:
            return entries[key]
        empty = any(node.value == key for node, _ in self.node.value)
        raise self.error(f"{key} is {'empty' + _LOST if empty else 'missing' + self._emptied()}")

    def sequence(self) -> list["Item"]:
        """The elements of a list that is not empty."""
        if self.kind != "seq":
            raise self.error(f"must be a list, not {self.shown()}{self._emptied()}")
        if not self.node.value:
            raise self.error("must not be an empty list")
        return [
            Item(node, self.where, f"{self.path}[{index}]")
            for index, node in enumerate(self.node.value)
        ]

    def text(self) -> str:
        value = self.node.value if self.kind == "str" else ""
        if not value:
            raise self.error(f"must be text, not {self.shown()}")
        if any(unicodedata.category(c) in ("Cc", "Cs") for c in value):
            raise self.error(f"must not hold control characters: {self.shown()}")
        return str(value)

    def integer(self) -> int:
        """A whole number in plain decimal; YAML's octal, hexadecimal and base 60 are refused."""
        if not self._is_plain(_INTEGER):
            raise self.error(f"must be a whole number, not {self.shown()}")
        return int(self.node.value)

    def number(self) -> float:
        """A finite decimal number, float32's largest at most. `1e-1` is one, quoted text is not."""
        if not self._is_plain(_NUMBER):
            raise self.error(f"must be a finite number, not {self.shown()}")
        value = float(self.node.value)
        if abs(value) > FLOAT32_MAX:  # scales are applied in float32
            raise self.error(f"must be a finite number in float32, not {self.shown()}")
        return value

    def _is_plain(self, pattern: re.Pattern[str]) -> bool:
        scalar = isinstance(self.node, yaml.ScalarNode) and self.node.style is None
        return scalar and pattern.fullmatch(self.node.value) is not None

    def _emptied(self) -> str:
        """A hint for the usual cause of a key with nothing under it."""
        return "; check the indentation" if self.kind == "null" or self.node.value == [] else ""
