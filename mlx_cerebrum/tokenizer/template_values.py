"""The values of a template and what can be done with them, each operation paid for.

A value is None, a boolean, an integer of 64 bits, a float, text, a list, tuple, dict or range,
Jinja's Undefined, or one of the classes here. None is ever changed but a Namespace's
attributes. No attribute of a Python object is looked up by a template's name: what there is
stands in tables.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from jinja2 import Undefined

from mlx_cerebrum.tokenizer.template_text import (
    METHODS,
    OBJECT,
    SCAN,
    Budget,
    LimitError,
    braces,
    characters,
    join,
    part,
    percent,
    repeat,
)

LARGEST = 2**63
MAX_RANGE = 100_000  # as Jinja's sandbox


class Function:
    """What a template can call."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call = call

    def __repr__(self) -> str:
        return "<function>"


NOTHING = object()  # an attribute that is not there


class Object:
    """A value with attributes of its own."""

    def attribute(self, name: str) -> Any:
        return NOTHING


class Namespace(Object):
    """`namespace()`: the one thing with attributes to set."""

    def __init__(self, /, *args: Any, **kwargs: Any) -> None:
        self.attributes: dict[str, Any] = {}
        for name, value in dict(*args, **kwargs).items():
            self.set(name, value)

    def set(self, name: str, value: Any) -> None:
        if not isinstance(name, str) or name.startswith("_"):
            raise LimitError(f"a namespace can't have the attribute {name!r:.60}")
        self.attributes[name] = value

    def attribute(self, name: str) -> Any:
        return self.attributes.get(name, NOTHING)

    def __repr__(self) -> str:
        return "<Namespace>"


class Stream:
    """What some filters give: items to be read once, and true even if there are none."""

    def __init__(self, items: list[Any]) -> None:
        self._items = items

    def take(self) -> list[Any]:
        items, self._items = self._items, []
        return items

    def __repr__(self) -> str:
        return "<generator>"


class Cycler(Object):
    """`cycler(a, b)`: one after the other."""

    def __init__(self, *items: Any) -> None:
        if not items:
            raise ValueError("at least one item has to be given to a cycler")
        self._items, self._at = items, 0

    def attribute(self, name: str) -> Any:
        if name == "current":
            return self._items[self._at]
        methods = {"next": self._next, "reset": self._reset}
        return Function(methods[name]) if name in methods else NOTHING

    def _next(self) -> Any:
        current = self._items[self._at]
        self._at = (self._at + 1) % len(self._items)
        return current

    def _reset(self) -> None:
        self._at = 0


def joiner(sep: Any = ", ") -> Function:
    """`joiner(", ")`: nothing the first time, then the separator."""
    calls = iter([""])
    return Function(lambda: next(calls, sep))


# ---- text of values, and their size


def weigh(budget: Budget, value: Any, indent: int = 0, depth: int = 0) -> None:
    """Pay for all that printing `value` would go through, shared parts as often as they occur."""
    budget.step()
    if isinstance(value, str):
        budget.letters(2 * len(value))
    elif isinstance(value, list | tuple):
        budget.letters((2 + indent * (depth + 1)) * (1 + len(value)))
        for each in value:
            weigh(budget, each, indent, depth + 1)
    elif isinstance(value, dict):
        budget.letters((4 + indent * (depth + 1)) * (1 + len(value)))
        for key, each in value.items():
            weigh(budget, key, indent, depth + 1)
            weigh(budget, each, indent, depth + 1)
    else:
        budget.letters(32)


def text_of(budget: Budget, value: Any) -> str:
    """What `{{ value }}` prints."""
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple | dict):
        weigh(budget, value)
    return str(value)


def iterate(budget: Budget, value: Any) -> Sequence[Any]:
    """The items of a value; for text its characters, for a dict its keys."""
    if isinstance(value, Stream):
        value = value.take()
    elif isinstance(value, str):
        value = characters(budget, value)
    elif isinstance(value, dict | Undefined):  # the latter is empty
        value = list(value)
    elif not isinstance(value, list | tuple | range):
        raise TypeError(f"{kind(value)} is not iterable")
    budget.step(1 + len(value) // 8)
    items: Sequence[Any] = value
    return items


def items_of(budget: Budget, value: Any) -> list[Any]:
    """The items in a list of their own."""
    items = iterate(budget, value)
    budget.letters(8 * len(items))
    return list(items)


def length(value: Any) -> int:
    if isinstance(value, str | list | tuple | dict | range | Undefined):
        return len(value)
    raise TypeError(f"{kind(value)} has no length")


def kind(value: Any) -> str:
    """The type in a message."""
    return "text" if isinstance(value, str) else type(value).__name__


# ---- comparing


def equal(budget: Budget, left: Any, right: Any) -> bool:
    budget.step()
    if isinstance(left, str) and isinstance(right, str):
        budget.step(len(left) // SCAN)
        return left == right
    if isinstance(left, dict) and isinstance(right, dict):
        return len(left) == len(right) and all(
            key in right and equal(budget, value, right[key]) for key, value in left.items()
        )
    for sort in (list, tuple):
        if isinstance(left, sort) and isinstance(right, sort):
            return len(left) == len(right) and all(map(partial(equal, budget), left, right))
    if isinstance(left, range) and isinstance(right, range):
        return left == right
    if isinstance(left, list | tuple | dict | range) or isinstance(right, list | tuple | dict):
        return False
    return bool(left == right)


def contains(budget: Budget, whole: Any, item: Any) -> bool:
    if isinstance(whole, str):
        budget.scan(whole)
        return item in whole
    if isinstance(whole, dict):
        return not isinstance(item, Undefined) and key_of(budget, item) in whole
    return any(equal(budget, item, each) for each in iterate(budget, whole))


def ordered(budget: Budget, operator: str, left: Any, right: Any) -> bool:
    """left < right and so on; only of numbers, or of text."""
    if isinstance(left, str) and isinstance(right, str):
        budget.scan(left)
    elif isinstance(left, Undefined) or isinstance(right, Undefined):
        left < right  # noqa: B015  raises what is undefined
    elif not (isinstance(left, int | float) and isinstance(right, int | float)):
        raise TypeError(f"{kind(left)} and {kind(right)} have no order")
    sorts: dict[str, Callable[[], bool]] = {
        "lt": lambda: left < right,
        "lteq": lambda: left <= right,
        "gt": lambda: left > right,
        "gteq": lambda: left >= right,
    }
    return sorts[operator]()


def sort_keys(budget: Budget, keys: Sequence[Any], compares: int = 0) -> Sequence[Any]:
    """The keys, if sorting (or `compares` comparisons for each) can be paid for."""
    for sort in (str, (int, float)):
        if all(isinstance(key, sort) for key in keys):
            break
    else:
        if any(not isinstance(key, tuple) for key in keys):
            raise TypeError("only numbers, or only text, can be put in order")
        for column in zip(*keys, strict=True):
            sort_keys(budget, column, compares)
        return keys
    longest = max((len(key) for key in keys if isinstance(key, str)), default=0)
    budget.step(len(keys) * (compares or len(keys).bit_length()) * (1 + longest // SCAN))
    return keys


def key_of(budget: Budget, value: Any) -> Any:
    """A value as a dict's key."""
    if isinstance(value, str):
        budget.scan(value)
    elif not isinstance(value, int | float | None):
        raise TypeError(f"{kind(value)} can't be a key")
    return value


# ---- arithmetic


def add(budget: Budget, left: Any, right: Any) -> Any:
    if isinstance(left, str) and isinstance(right, str):
        return join(budget, (left, right))
    for sort in (list, tuple):
        if isinstance(left, sort) and isinstance(right, sort):
            budget.letters(8 * (len(left) + len(right)))
            return sort((*left, *right))
    return _number(left, right, lambda: left + right)


def multiply(budget: Budget, left: Any, right: Any) -> Any:
    for whole, times in ((left, right), (right, left)):
        if isinstance(times, int) and isinstance(whole, str):
            return repeat(budget, whole, times)
        if isinstance(times, int) and isinstance(whole, list | tuple):
            budget.letters(8 * len(whole) * max(0, times))
            return whole * times
    return _number(left, right, lambda: left * right)


def modulo(budget: Budget, left: Any, right: Any) -> Any:
    if isinstance(left, str):
        return percent(budget, left, right, partial(text_of, budget))
    return _number(left, right, lambda: left % right)


def power(budget: Budget, left: Any, right: Any) -> Any:
    if isinstance(left, int) and isinstance(right, int) and right > 64 and abs(left) > 1:
        raise LimitError("a power out of bounds")
    return _number(left, right, lambda: left**right)


def _number(left: Any, right: Any, operation: Callable[[], Any]) -> Any:
    for value in (left, right):
        if isinstance(value, Undefined):
            float(value)  # raises what is undefined
    if not (isinstance(left, int | float) and isinstance(right, int | float)):
        raise TypeError(f"can't compute with {kind(left)} and {kind(right)}")
    return bounded(operation())


def bounded(number: Any) -> Any:
    """The number, if it fits into 64 bits or is a float."""
    if isinstance(number, int) and abs(number) >= LARGEST:
        raise LimitError("a number out of bounds")
    return number


OPERATORS: dict[str, Callable[[Budget, Any, Any], Any]] = {
    "+": add,
    "-": lambda _, left, right: _number(left, right, lambda: left - right),
    "*": multiply,
    "/": lambda _, left, right: _number(left, right, lambda: left / right),
    "//": lambda _, left, right: _number(left, right, lambda: left // right),
    "%": modulo,
    "**": power,
}


# ---- attributes and items


def attribute(budget: Budget, value: Any, name: str) -> Any:
    """`value.name`: a method or attribute, else the item of that name."""
    found = _own_attribute(budget, value, name)
    if found is NOTHING and isinstance(value, dict):
        found = value.get(name, NOTHING)
    return _missing(value, name) if found is NOTHING else found


def item(budget: Budget, value: Any, key: Any) -> Any:
    """`value[key]`: the item, else the method or attribute of that name."""
    found = NOTHING
    if isinstance(value, str | list | tuple | range):
        if isinstance(key, slice):
            return cut(budget, value, key)
        if isinstance(key, int) and -len(value) <= key < len(value):
            if isinstance(value, str):
                return part(budget, value, slice(key, key + 1 or None))
            found = value[key]
    elif isinstance(value, dict) and isinstance(key, str | int | float | None):
        found = value.get(key_of(budget, key), NOTHING)
    if found is NOTHING and isinstance(key, str):
        found = _own_attribute(budget, value, key)
    elif isinstance(value, Undefined):
        value[key]  # raises what is undefined
    return _missing(value, key) if found is NOTHING else found


def cut(budget: Budget, value: Any, where: slice) -> Any:
    if isinstance(value, str):
        return part(budget, value, where)
    if not isinstance(value, range):
        budget.letters(8 * len(range(*where.indices(len(value)))))
    return value[where]


def _missing(value: Any, name: Any) -> Undefined:
    return Undefined(hint=f"{kind(value)} has no {name if isinstance(name, int) else repr(name)}")


def _own_attribute(budget: Budget, value: Any, name: str) -> Any:
    """A Function or attribute that values of this kind have, or NOTHING."""
    if isinstance(value, Undefined):
        return value.attribute  # raises what is undefined
    if isinstance(value, Object):
        return value.attribute(name)
    for sort, table in _TABLES:
        if isinstance(value, sort) and name in table:
            return Function(partial(table[name], budget, value))
    return NOTHING


def _joined(budget: Budget, sep: str, values: Any) -> str:
    parts = items_of(budget, values)
    for each in parts:
        if not isinstance(each, str):
            raise TypeError(f"can't join {kind(each)}")
    return join(budget, parts, sep)


def _formatted(budget: Budget, text: str, /, *args: Any, **named: Any) -> str:
    return braces(budget, text, args, named, partial(text_of, budget))


def _get(budget: Budget, value: dict[Any, Any], key: Any, default: Any = None) -> Any:
    return value.get(key_of(budget, key), default)


def _listed(
    read: Callable[[dict[Any, Any]], Iterable[Any]],
) -> Callable[[Budget, dict[Any, Any]], list[Any]]:
    def listed(budget: Budget, value: dict[Any, Any]) -> list[Any]:
        budget.letters(OBJECT * len(value))
        return list(read(value))

    return listed


def _copy(budget: Budget, value: Any) -> Any:
    budget.letters(OBJECT * len(value))
    return value.copy()


def _count(budget: Budget, values: Sequence[Any], item: Any) -> int:
    return sum(equal(budget, each, item) for each in values)


def _index(budget: Budget, values: Sequence[Any], item: Any) -> int:
    for at, each in enumerate(values):
        if equal(budget, each, item):
            return at
    raise ValueError("the item is not in the list")


_TABLES: list[tuple[Any, Mapping[str, Callable[..., Any]]]] = [
    (str, METHODS | {"join": _joined, "format": _formatted}),
    (
        dict,
        {
            "copy": _copy,
            "get": _get,
            "items": _listed(dict.items),
            "keys": _listed(dict.keys),
            "values": _listed(dict.values),
        },
    ),
    (list, {"copy": _copy, "count": _count, "index": _index}),
    (tuple, {"count": _count, "index": _index}),
]
