"""YAML read strictly: every value keeps its place, and nothing is guessed or dropped.

PyYAML's own loader keeps the last of two equal keys, turns `010` into 8 and forgets line
numbers. Here the node tree is walked instead, and each complaint is one line that starts
with `FILE:LINE: path.to.value:`.
"""

import re
import unicodedata
from collections.abc import Iterable

import yaml

from mlx_cerebrum.errors import PlanError

MAX_CHARACTERS = 256 * 1024  # a thousand slices take a quarter of it
_MAX_NODES = 100_000  # after aliases are expanded

_TAG = "tag:yaml.org,2002:"
_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,17}")
_NUMBER = re.compile(r"[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")
_FLOAT32_MAX = 3.4028234663852886e38  # scales are applied in float32


def parse(text: str, where: str) -> "Item":
    """The root of a YAML document. `where` names it in every message.

    Raises PlanError for text that is not exactly one well-formed document.
    """
    where = printable(where)
    if len(text) > MAX_CHARACTERS:
        raise PlanError(f"{where}: longer than {MAX_CHARACTERS} characters; this is not a plan")
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        problem = printable(error.problem or error.context or "cannot be read")
        raise PlanError(f"{where}{line}: not valid YAML: {problem}{_hint(problem)}") from None
    except yaml.reader.ReaderError as error:
        number = text.count("\n", 0, error.position) + 1
        raise PlanError(
            f"{where}:{number}: not text: control character {error.character!r}"
        ) from None
    except RecursionError:
        raise PlanError(f"{where}: nested too deeply; this is not a plan") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # e.g. the escape "\U00110000"
        raise PlanError(f"{where}: not valid YAML: {printable(str(error))}") from None
    if root is None:
        raise PlanError(f"{where}: empty; a plan needs merge_method and slices")
    item = Item(root, where)
    if _expanded_size(root, {}) > _MAX_NODES:
        raise item.error("YAML aliases expand without bound; write the values out")
    return item


def _hint(problem: str) -> str:
    lost = "'-'" in problem or "mapping values are not allowed" in problem
    return "; check the indentation, which copying from a web page loses" if lost else ""


def _expanded_size(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Nodes below and including `node`, each alias counted as a copy of what it names."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in sizes:
        sizes[id(node)] = _MAX_NODES + 1  # what an alias to an enclosing node counts as
        inner: Iterable[yaml.Node] = (
            (part for pair in node.value for part in pair)
            if isinstance(node, yaml.MappingNode)
            else node.value
        )
        sizes[id(node)] = 1 + sum(_expanded_size(part, sizes) for part in inner)
    return sizes[id(node)]


def printable(text: str, limit: int = 200) -> str:
    """Text fit for one line of a message: control characters become `?`, the end is cut."""
    shown = "".join("?" if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") else c for c in text)
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."


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
    def is_null(self) -> bool:
        return self._is_scalar("null")

    @property
    def is_sequence(self) -> bool:
        return isinstance(self.node, yaml.SequenceNode) and self.node.tag == _TAG + "seq"

    @property
    def is_mapping(self) -> bool:
        return isinstance(self.node, yaml.MappingNode) and self.node.tag == _TAG + "map"

    @property
    def is_text(self) -> bool:
        return self._is_scalar("str")

    def _is_scalar(self, kind: str) -> bool:
        return isinstance(self.node, yaml.ScalarNode) and self.node.tag == _TAG + kind

    def shown(self) -> str:
        """The value as a message quotes it."""
        if self.is_null:
            return "nothing"
        if isinstance(self.node, yaml.ScalarNode):
            quoted = repr(self.node.value) if self.node.style or self.is_text else self.node.value
            return printable(quoted, 80)
        if not (self.is_sequence or self.is_mapping):
            return f"one tagged {printable(repr(self.node.tag), 80)}"
        return "a list" if self.is_sequence else "a mapping"

    def mapping(self, *known: str) -> dict[str, "Item"]:
        """The entries of a mapping that may hold the `known` keys, those that are null left out."""
        if not self.is_mapping:
            raise self.error(f"must be a mapping, not {self.shown()}{self._emptied()}")
        entries: dict[str, Item] = {}
        for key_node, value_node in self.node.value:
            line = key_node.start_mark.line + 1
            key = Item(key_node, self.where, self.path, line)
            if not key.is_text or key_node.value not in known:
                raise key.error(f"unknown key {key.shown()}; known here: {', '.join(known)}")
            name: str = key_node.value
            path = f"{self.path}.{name}" if self.path else name
            if name in entries:
                first = entries[name].line
                raise Item(key_node, self.where, path, line).error(
                    f"given twice, first on line {first}"
                )
            entries[name] = Item(value_node, self.where, path, line)
        return {name: item for name, item in entries.items() if not item.is_null}

    def require(self, entries: dict[str, "Item"], key: str) -> "Item":
        """The entry `key` of this mapping's `entries`, which must be there and not null."""
        if key in entries:
            return entries[key]
        raise self.error(f"{key} is missing{self._emptied()}")

    def sequence(self) -> list["Item"]:
        """The elements of a list that is not empty."""
        if not self.is_sequence:
            raise self.error(f"must be a list, not {self.shown()}{self._emptied()}")
        if not self.node.value:
            raise self.error("must not be an empty list")
        return [
            Item(node, self.where, f"{self.path}[{index}]")
            for index, node in enumerate(self.node.value)
        ]

    def text(self) -> str:
        value = self.node.value if self.is_text else ""
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
        if abs(value) > _FLOAT32_MAX:
            raise self.error(f"must be a finite number in float32, not {self.shown()}")
        return value

    def _is_plain(self, pattern: re.Pattern[str]) -> bool:
        scalar = isinstance(self.node, yaml.ScalarNode) and self.node.style is None
        return scalar and pattern.fullmatch(self.node.value) is not None

    def _emptied(self) -> str:
        """A hint for the usual cause of a key with nothing under it."""
        return "; check the indentation" if self.is_null or self.node.value == [] else ""
