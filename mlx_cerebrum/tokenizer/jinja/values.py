"""The values of a template and what can be done with them, each operation paid for.

A value is None, a boolean, an integer of 64 bits, a float, text, a list, tuple, dict or range,
Jinja's Undefined, or one of the classes here. Only a Namespace's attributes ever change. No
attribute of a Python object is looked up by a name from the template: all there are stand in
tables.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import jinja2.utils
from jinja2 import Undefined

from mlx_cerebrum.tokenizer.jinja import text as texts
from mlx_cerebrum.tokenizer.jinja.text import OBJECT, SCAN, Budget, LimitError

LARGEST = 2**63
MAX_RANGE = 100_000  # as Jinja's sandbox

# As tuples: isinstance is slower to look through a union.
NUMBER = (int, float)
_KEY = (str, int, float, type(None))
_NEST = (list, tuple, dict)
_ROW = (str, list, tuple, range)

NOTHING = object()  # an attribute that is not there

Members = Mapping[str, Callable[[Any], Any]]


class Object:
    """A value of a kind that Python's own types are not; `members` are all its attributes."""

    members: ClassVar[Members] = {}

    def attribute(self, name: str) -> Any:
        return self.members[name](self) if name in self.members else NOTHING

    def __repr__(self) -> str:
        return f"<{type(self).__name__}>"


class Function(Object):
    """What a template can call."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call = call


class Namespace(Object):
    """`namespace()`: the one thing with attributes to set."""

    def __init__(self, /, *args: Any, **kwargs: Any) -> None:
        self._attributes: dict[str, Any] = {}
        for name, value in dict(*args, **kwargs).items():
            self.set(name, value)

    def set(self, name: str, value: Any) -> None:
        if not isinstance(name, str) or name.startswith("_"):
            raise LimitError(f"a namespace can't have the attribute {name!r:.60}")
        self._attributes[name] = value

    def attribute(self, name: str) -> Any:
        return self._attributes.get(name, NOTHING)


class Stream(Object):
    """What some filters give: items to be read once, and true even if there are none."""

    def __init__(self, items: list[Any]) -> None:
        self._items = items

    def take(self) -> list[Any]:
        items, self._items = self._items, []
        return items


class Cycler(Object, jinja2.utils.Cycler):
    """`cycler(a, b)`: one after the other."""

    members: ClassVar[Members] = {
        "current": lambda cycler: cycler.current,
        "next": lambda cycler: Function(cycler.next),
        "reset": lambda cycler: Function(cycler.reset),
    }


def joiner(sep: Any = ", ") -> Function:
    """`joiner(", ")`: nothing the first time, then the separator."""
    calls = iter([""])
    return Function(lambda: next(calls, sep))


# ---- text of values, and their size


def weigh(budget: Budget, value: Any, indent: int = 0, depth: int = 1) -> None:
    """Pay for all that printing `value` would go through, shared parts as often as they occur."""
    budget.step()
    if isinstance(value, str):
        budget.letters(2 * len(value))
    elif isinstance(value, _NEST):
        inner = value.values() if isinstance(value, dict) else None
        budget.letters(((2 if inner is None else 4) + indent * depth) * (1 + len(value)))
        for each in value:
            weigh(budget, each, indent, depth + 1)
        for each in inner or ():
            weigh(budget, each, indent, depth + 1)
    else:
        budget.letters(32)


def text_of(budget: Budget, value: Any) -> str:
    """What `{{ value }}` prints."""
    if isinstance(value, str):
        return value
    if isinstance(value, _NEST):
        weigh(budget, value)
    return str(value)


def iterate(budget: Budget, value: Any) -> Sequence[Any]:
    """The items of a value; for text its characters, for a dict its keys."""
    if isinstance(value, Stream):
        value = value.take()
    elif isinstance(value, str):
        value = texts.characters(budget, value)
    elif isinstance(value, (dict, Undefined)):  # the latter is empty
        value = list(value)
    elif not isinstance(value, _ROW):
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
    if isinstance(value, (*_ROW, dict, Undefined)):
        return len(value)
    raise TypeError(f"{kind(value)} has no length")


def kind(value: Any) -> str:
    """The type in a message."""
    return "text" if isinstance(value, str) else type(value).__name__


# ---- comparing


def _both(sort: type, left: Any, right: Any) -> bool:
    return isinstance(left, sort) and isinstance(right, sort)


def equal(budget: Budget, left: Any, right: Any) -> bool:
    budget.step()
    if isinstance(left, str) and isinstance(right, str):
        budget.step(len(left) // SCAN)
    elif _both(dict, left, right):
        return len(left) == len(right) and all(
            key in right and equal(budget, value, right[key]) for key, value in left.items()
        )
    elif _both(list, left, right) or _both(tuple, left, right):
        return len(left) == len(right) and all(map(partial(equal, budget), left, right))
    return bool(left == right)


def contains(budget: Budget, whole: Any, item: Any) -> bool:
    if isinstance(whole, str):
        budget.scan(whole)
        return item in whole
    if isinstance(whole, dict):
        return not isinstance(item, Undefined) and key_of(budget, item) in whole
    return any(equal(budget, item, each) for each in iterate(budget, whole))


_ORDERS: dict[str, Callable[[Any, Any], Any]] = {
    "lt": operator.lt,
    "lteq": operator.le,
    "gt": operator.gt,
    "gteq": operator.ge,
}


def ordered(budget: Budget, order: str, left: Any, right: Any) -> bool:
    """left < right and so on; only of numbers, or of text."""
    if _both(str, left, right):
        budget.scan(left)
    else:
        _check_numbers("compare", left, right)
    return bool(_ORDERS[order](left, right))


def sort_keys(budget: Budget, keys: Sequence[Any], compares: int = 0) -> Sequence[Any]:
    """The keys, if sorting (or `compares` comparisons for each) can be paid for."""
    if keys and all(isinstance(key, tuple) for key in keys):
        for column in zip(*keys, strict=True):
            sort_keys(budget, column, compares)
        return keys
    if not any(all(isinstance(key, sort) for key in keys) for sort in (str, NUMBER)):
        raise TypeError("only numbers, or only text, can be put in order")
    longest = max((len(key) for key in keys if isinstance(key, str)), default=0)
    budget.step(len(keys) * (compares or len(keys).bit_length()) * (1 + longest // SCAN))
    return keys


def key_of(budget: Budget, value: Any) -> Any:
    """A value as a dict's key."""
    if isinstance(value, str):
        budget.scan(value)
    elif not isinstance(value, _KEY):
        raise TypeError(f"{kind(value)} can't be a key")
    return value


# ---- arithmetic


def _check_numbers(doing: str, left: Any, right: Any) -> None:
    for value in (left, right):
        if isinstance(value, Undefined):
            float(value)  # raises what is undefined
    if not (isinstance(left, NUMBER) and isinstance(right, NUMBER)):
        raise TypeError(f"can't {doing} {kind(left)} and {kind(right)}")


def _compute(operation: Callable[[Any, Any], Any], left: Any, right: Any) -> Any:
    _check_numbers("compute with", left, right)
    return bounded(operation(left, right))


def bounded(number: Any) -> Any:
    """The number, if it fits into 64 bits or is a float."""
    if isinstance(number, int) and abs(number) >= LARGEST:
        raise LimitError("a number out of bounds")
    return number


def add(budget: Budget, left: Any, right: Any) -> Any:
    if _both(str, left, right):
        return texts.join(budget, (left, right))
    if _both(list, left, right) or _both(tuple, left, right):
        budget.letters(8 * (len(left) + len(right)))
        return left + right
    return _compute(operator.add, left, right)


def _multiply(budget: Budget, left: Any, right: Any) -> Any:
    for whole, times in ((left, right), (right, left)):
        if isinstance(times, int) and isinstance(whole, str):
            return texts.repeat(budget, whole, times)
        if isinstance(times, int) and isinstance(whole, (list, tuple)):
            budget.letters(8 * len(whole) * max(0, times))
            return whole * times
    return _compute(operator.mul, left, right)


def _modulo(budget: Budget, left: Any, right: Any) -> Any:
    if isinstance(left, str):
        return texts.percent(budget, left, right, partial(text_of, budget))
    return remainder(left, right)


def remainder(left: Any, right: Any) -> Any:
    return _compute(operator.mod, left, right)


def _power(budget: Budget, left: Any, right: Any) -> Any:
    if _both(int, left, right) and right > 64 and abs(left) > 1:
        raise LimitError("a power out of bounds")
    return _compute(operator.pow, left, right)


OPERATORS: dict[str, Callable[[Budget, Any, Any], Any]] = {
    "+": add,
    "-": lambda _, left, right: _compute(operator.sub, left, right),
    "*": _multiply,
    "/": lambda _, left, right: _compute(operator.truediv, left, right),
    "//": lambda _, left, right: _compute(operator.floordiv, left, right),
    "%": _modulo,
    "**": _power,
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
    if isinstance(value, _ROW):
        if isinstance(key, slice):
            return cut(budget, value, key)
        if isinstance(key, int) and -len(value) <= key < len(value):
            if isinstance(value, str):
                return texts.part(budget, value, slice(key, key + 1 or None))
            found = value[key]
    elif isinstance(value, dict) and isinstance(key, _KEY):
        found = value.get(key_of(budget, key), NOTHING)
    if found is NOTHING and isinstance(key, str):
        found = _own_attribute(budget, value, key)
    elif isinstance(value, Undefined):
        value[key]  # raises what is undefined
    return _missing(value, key) if found is NOTHING else found


def cut(budget: Budget, value: Any, where: slice) -> Any:
    if isinstance(value, str):
        return texts.part(budget, value, where)
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
    for sort, methods in _METHODS.items():
        if isinstance(value, sort):
            return Function(partial(methods[name], budget, value)) if name in methods else NOTHING
    return NOTHING


def _joined(budget: Budget, sep: str, values: Any) -> str:
    parts = items_of(budget, values)
    for each in parts:
        if not isinstance(each, str):
            raise TypeError(f"can't join {kind(each)}")
    return texts.join(budget, parts, sep)


def _formatted(budget: Budget, text: str, /, *args: Any, **named: Any) -> str:
    return texts.braces(budget, text, args, named, partial(text_of, budget))


def _get(budget: Budget, value: dict[Any, Any], key: Any, default: Any = None) -> Any:
    return value.get(key_of(budget, key), default)


def _copied(read: Callable[[Any], Any]) -> Callable[[Budget, Any], Any]:
    def copied(budget: Budget, value: Any) -> Any:
        budget.letters(OBJECT * len(value))
        return read(value)

    return copied


def _count(budget: Budget, values: Sequence[Any], item: Any) -> int:
    return sum(equal(budget, each, item) for each in values)


def _index(budget: Budget, values: Sequence[Any], item: Any) -> int:
    for at, each in enumerate(values):
        if equal(budget, each, item):
            return at
    raise ValueError("the item is not in the list")


_METHODS: Mapping[type, Mapping[str, Callable[..., Any]]] = {
    str: texts.METHODS | {"join": _joined, "format": _formatted},
    dict: {
        "copy": _copied(dict),
        "get": _get,
        "items": _copied(lambda value: list(value.items())),
        "keys": _copied(list),
        "values": _copied(lambda value: list(value.values())),
    },
    list: {"copy": _copied(list), "count": _count, "index": _index},
    tuple: {"count": _count, "index": _index},
}
