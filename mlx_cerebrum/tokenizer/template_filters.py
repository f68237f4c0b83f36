"""The filters and tests of a template: Jinja's, but for those no prompt needs."""

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from jinja2 import Undefined

from mlx_cerebrum.tokenizer import template_text as texts
from mlx_cerebrum.tokenizer.template_text import METHODS, SCAN, Budget, LimitError
from mlx_cerebrum.tokenizer.template_values import (
    OPERATORS,
    Function,
    Stream,
    add,
    attribute,
    bounded,
    contains,
    cut,
    equal,
    item,
    items_of,
    iterate,
    kind,
    length,
    ordered,
    sort_keys,
    text_of,
    weigh,
)

_LETTERS = 100  # in a number, at most
_INDENT = 32  # of tojson, at most


def _on_text(change: Callable[..., Any]) -> Callable[..., Any]:
    return lambda budget, value, *args, **named: change(
        budget, text_of(budget, value), *args, **named
    )


def _replace(budget: Budget, value: str, old: Any, new: Any, count: int | None = None) -> str:
    old, new = text_of(budget, old), text_of(budget, new)
    return texts.replace(budget, value, old, new, -1 if count is None else count)


def _title(budget: Budget, value: str) -> str:
    def title(text: str) -> str:
        words = re.split(r"([-\s({\[<]+)", text)
        return "".join(word[0].upper() + word[1:].lower() for word in words if word)

    budget.letters(texts.OBJECT * len(value))  # the words
    return texts.changed(budget, value, title)


def _indent(
    budget: Budget, value: str, width: Any = 4, first: bool = False, blank: bool = False
) -> str:
    margin = texts.repeat(budget, " ", width) if isinstance(width, int) else width
    lines = METHODS["splitlines"](budget, texts.join(budget, (value, texts.own("\n"))))
    lines = [
        texts.join(budget, (margin, line)) if at and (blank or line) else line
        for at, line in enumerate(lines)
    ]
    whole = texts.join(budget, lines, texts.own("\n"))
    return texts.join(budget, (margin, whole)) if first else whole


def _truncate(
    budget: Budget,
    value: str,
    length: int = 255,
    killwords: bool = False,
    end: str = "...",
    leeway: int = 5,
) -> str:
    if length < len(end) or leeway < 0:
        raise ValueError("truncate: the length must be the end's or more, the leeway 0 or more")
    if len(value) <= length + leeway:
        return value
    kept = texts.part(budget, value, slice(length - len(end)))
    if not killwords:
        kept = METHODS["rsplit"](budget, kept, " ", 1)[0]
    return texts.join(budget, (kept, end))


def _join(budget: Budget, value: Any, sep: Any = "", attribute: Any = None) -> str:
    parts = [_part(budget, each, attribute) for each in iterate(budget, value)]
    return texts.join(budget, [text_of(budget, p) for p in parts], text_of(budget, sep))


def _format(budget: Budget, value: str, *args: Any, **named: Any) -> str:
    if args and named:
        raise ValueError("format takes values in order or by name, not both")
    return texts.percent(budget, value, named or args, lambda each: text_of(budget, each))


def _tojson(
    budget: Budget,
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    # As transformers has it: Jinja's own escapes <, > and &, which a prompt must not.
    margin = " " * min(indent, _INDENT + 1) if isinstance(indent, int) else indent or ""
    between = "".join(separators or ())
    if len(margin) > _INDENT or len(between) > _INDENT:
        raise LimitError(f"an indent of more than {_INDENT}")
    weigh(budget, value, len(margin) + len(between))
    written = json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
    budget.letters(len(written))
    return written


def _default(budget: Budget, value: Any, default: Any = "", boolean: bool = False) -> Any:
    return default if isinstance(value, Undefined) or (boolean and not value) else value


def _int(budget: Budget, value: Any, default: Any = 0, base: int = 10) -> Any:
    try:
        if not isinstance(value, str):
            return bounded(int(value))
        if len(value) > _LETTERS:
            return default
        return bounded(int(value, base))
    except (TypeError, ValueError):
        try:
            return bounded(int(float(value)))
        except (TypeError, ValueError, OverflowError):
            return default


def _float(budget: Budget, value: Any, default: Any = 0.0) -> Any:
    try:
        return default if isinstance(value, str) and len(value) > _LETTERS else float(value)
    except (TypeError, ValueError):
        return default


def _round(budget: Budget, value: Any, precision: int = 0, method: str = "common") -> Any:
    if not isinstance(value, int | float) or not isinstance(precision, int):
        raise TypeError("only numbers can be rounded")
    if abs(precision) > _LETTERS:
        raise LimitError("a precision out of bounds")
    if method == "common":
        return bounded(round(value, precision))
    import math

    ways: dict[str, Callable[[float], int]] = {"ceil": math.ceil, "floor": math.floor}
    return ways[method](value * (10**precision)) / (10**precision)


def _abs(budget: Budget, value: Any) -> Any:
    if not isinstance(value, int | float):
        raise TypeError(f"{kind(value)} is not a number")
    return abs(value)


def _first(budget: Budget, value: Any) -> Any:
    items = iterate(budget, value)
    return items[0] if items else Undefined("No first item, sequence was empty.")


def _last(budget: Budget, value: Any) -> Any:
    items = iterate(budget, value)
    return items[-1] if items else Undefined("No last item, sequence was empty.")


def _reverse(budget: Budget, value: Any) -> Any:
    if isinstance(value, str):
        return texts.part(budget, value, slice(None, None, -1))
    return Stream(cut(budget, items_of(budget, value), slice(None, None, -1)))


def _items(budget: Budget, value: Any) -> Stream:
    if isinstance(value, Undefined):
        return Stream([])
    if not isinstance(value, dict):
        raise TypeError("Can only get item pairs from a mapping.")
    budget.letters(texts.OBJECT * len(value))
    return Stream(list(value.items()))


def _batch(budget: Budget, value: Any, linecount: int, fill_with: Any = None) -> Stream:
    items = items_of(budget, value)
    if linecount < 1:
        raise ValueError("batch takes a count of 1 or more")
    budget.letters(texts.OBJECT * (1 + len(items) // linecount))
    batches = [
        cut(budget, items, slice(at, at + linecount)) for at in range(0, len(items), linecount)
    ]
    if batches and fill_with is not None:
        missing = linecount - len(batches[-1])
        budget.letters(8 * missing)
        batches[-1] += [fill_with] * missing
    return Stream(batches)


def _slice(budget: Budget, value: Any, slices: int, fill_with: Any = None) -> Stream:
    items = items_of(budget, value)
    budget.letters(texts.OBJECT * max(0, slices))
    size, more = divmod(len(items), slices)
    found, at = list[list[Any]](), 0
    for index in range(slices):
        end = at + size + (index < more)
        found.append(cut(budget, items, slice(at, end)))
        at = end
        if fill_with is not None and index >= more:
            found[-1].append(fill_with)
    return Stream(found)


# ---- of many: an attribute is a path such as "function.name"


def _part(budget: Budget, value: Any, path: Any, default: Any = None) -> Any:
    budget.step()
    for name in str(path).split(".") if path is not None else ():
        value = item(budget, value, int(name) if name.isdecimal() and len(name) < 9 else name)
        if default is not None and isinstance(value, Undefined):
            value = default
    return value


def _key(budget: Budget, value: Any, path: Any, case_sensitive: bool) -> Any:
    found = _part(budget, value, path)
    if isinstance(found, str) and not case_sensitive:
        return METHODS["lower"](budget, found)
    return found


def _sort(
    budget: Budget,
    value: Any,
    reverse: bool = False,
    case_sensitive: bool = False,
    attribute: Any = None,
) -> list[Any]:
    items = items_of(budget, value)
    paths = attribute.split(",") if isinstance(attribute, str) else [attribute]
    keys = [
        tuple(_key(budget, each, path, case_sensitive) for path in paths)
        if len(paths) > 1
        else _key(budget, each, paths[0], case_sensitive)
        for each in items
    ]
    sort_keys(budget, keys)
    order = sorted(range(len(items)), key=keys.__getitem__, reverse=reverse)
    return [items[at] for at in order]


def _dictsort(
    budget: Budget,
    value: Any,
    case_sensitive: bool = False,
    by: str = "key",
    reverse: bool = False,
) -> list[Any]:
    pairs = _items(budget, value).take() if value else list(value.items())
    return _sort(budget, pairs, reverse, case_sensitive, {"key": 0, "value": 1}[by])


def _extreme(pick: Callable[..., Any]) -> Callable[..., Any]:
    def extreme(
        budget: Budget, value: Any, case_sensitive: bool = False, attribute: Any = None
    ) -> Any:
        items = items_of(budget, value)
        if not items:
            return Undefined("No aggregated item, sequence was empty.")
        keys = sort_keys(budget, [_key(budget, i, attribute, case_sensitive) for i in items], 1)
        return items[pick(range(len(items)), key=keys.__getitem__)]

    return extreme


def _unique(
    budget: Budget, value: Any, case_sensitive: bool = False, attribute: Any = None
) -> Stream:
    found: dict[Any, Any] = {}
    for each in iterate(budget, value):
        key = _key(budget, each, attribute, case_sensitive)
        key = None if isinstance(key, Undefined) else key
        if not isinstance(key, str | int | float | None):
            raise TypeError(f"unique can't tell {kind(key)} apart")
        budget.step(1 + (len(key) // SCAN if isinstance(key, str) else 0))
        found.setdefault(key, each)
    return Stream(list(found.values()))


def _groupby(
    budget: Budget, value: Any, attribute: Any, default: Any = None, case_sensitive: bool = False
) -> list[Any]:
    groups: list[tuple[Any, list[Any]]] = []
    last: Any = None
    for each in _sort(budget, value, False, case_sensitive, attribute):
        key = _key(budget, each, attribute, case_sensitive)
        if not groups or not equal(budget, key, last):
            groups.append((_part(budget, each, attribute, default), []))
            budget.letters(2 * texts.OBJECT)
        groups[-1][1].append(each)
        last = key
    return groups


def _sum(budget: Budget, value: Any, attribute: Any = None, start: Any = 0) -> Any:
    total = start
    for each in iterate(budget, value):
        total = add(budget, total, _part(budget, each, attribute))
    return total


def _map(budget: Budget, value: Any, *args: Any, **named: Any) -> Stream:
    items = iterate(budget, value or ())
    if not args and "attribute" in named:
        path, default = named.pop("attribute"), named.pop("default", None)
        if named:
            raise ValueError("map: an argument it does not know")
        return Stream([_part(budget, each, path, default) for each in items])
    if not args:
        raise ValueError("map requires a filter argument")
    change = find("filter", args[0])
    return Stream([_paid(budget, change, each, *args[1:], **named) for each in items])


def _paid(budget: Budget, call: Callable[..., Any], /, *args: Any, **named: Any) -> Any:
    budget.step()
    return call(budget, *args, **named)


def _selected(wanted: bool, by_attribute: bool) -> Callable[..., Any]:
    def select(budget: Budget, value: Any, *args: Any, **named: Any) -> Stream:
        rest = list(args)
        path = rest.pop(0) if by_attribute else None
        test = find("test", rest.pop(0)) if rest else lambda _, each: bool(each)
        return Stream(
            [
                each
                for each in iterate(budget, value or ())
                if bool(_paid(budget, test, _part(budget, each, path), *rest, **named)) is wanted
            ]
        )

    return select


def _wordcount(budget: Budget, value: str) -> int:
    budget.letters(texts.OBJECT * len(value))
    return len(re.findall(r"\w+", value))


FILTERS: dict[str, Callable[..., Any]] = {
    "abs": _abs,
    "attr": lambda budget, value, name: attribute(budget, value, text_of(budget, name)),
    "batch": _batch,
    "capitalize": _on_text(METHODS["capitalize"]),
    "center": _on_text(lambda budget, value, width=80: texts.center(budget, value, width)),
    "count": lambda _, value: length(value),
    "d": _default,
    "default": _default,
    "dictsort": _dictsort,
    "e": _on_text(texts.escaped),
    "escape": _on_text(texts.escaped),
    "first": _first,
    "float": _float,
    "forceescape": _on_text(texts.escaped),
    "format": _on_text(_format),
    "groupby": _groupby,
    "indent": _on_text(_indent),
    "int": _int,
    "items": _items,
    "join": _join,
    "last": _last,
    "length": lambda _, value: length(value),
    "list": items_of,
    "lower": _on_text(METHODS["lower"]),
    "map": _map,
    "max": _extreme(max),
    "min": _extreme(min),
    "reject": _selected(False, False),
    "rejectattr": _selected(False, True),
    "replace": _on_text(_replace),
    "reverse": _reverse,
    "round": _round,
    "safe": _on_text(lambda _, value: value),
    "select": _selected(True, False),
    "selectattr": _selected(True, True),
    "slice": _slice,
    "sort": _sort,
    "string": text_of,
    "sum": _sum,
    "title": _on_text(_title),
    "tojson": _tojson,
    "trim": _on_text(texts.strip),
    "truncate": _on_text(_truncate),
    "unique": _unique,
    "upper": _on_text(METHODS["upper"]),
    "wordcount": _on_text(_wordcount),
}


def _order(operator: str) -> Callable[[Budget, Any, Any], bool]:
    return lambda budget, left, right: ordered(budget, operator, left, right)


def _is(*kinds: type) -> Callable[[Budget, Any], bool]:
    return lambda _, value: isinstance(value, kinds)


def _remainder(budget: Budget, value: Any, by: Any) -> Any:
    if isinstance(value, str):
        raise TypeError("text is not a number")
    return OPERATORS["%"](budget, value, by)


_SEQUENCES = (str, list, tuple, dict, range)
_EQUAL, _LESS, _MORE = equal, _order("lt"), _order("gt")

TESTS: dict[str, Callable[..., Any]] = {
    "boolean": _is(bool),
    "callable": _is(Function),
    "defined": lambda _, value: not isinstance(value, Undefined),
    "divisibleby": lambda budget, value, by: _remainder(budget, value, by) == 0,
    "escaped": lambda _, value: False,
    "even": lambda budget, value: _remainder(budget, value, 2) == 0,
    "false": lambda _, value: value is False,
    "filter": lambda _, value: value in FILTERS,
    "float": _is(float),
    "in": lambda budget, value, whole: contains(budget, whole, value),
    "integer": lambda _, value: isinstance(value, int) and not isinstance(value, bool),
    "iterable": _is(*_SEQUENCES, Undefined, Stream),
    "lower": lambda budget, value: METHODS["islower"](budget, text_of(budget, value)),
    "mapping": _is(dict),
    "none": lambda _, value: value is None,
    "number": _is(int, float),
    "odd": lambda budget, value: _remainder(budget, value, 2) == 1,
    "sameas": lambda budget, value, other: (
        value is other or (isinstance(value, str) and equal(budget, value, other))
    ),
    "sequence": _is(*_SEQUENCES, Undefined),
    "string": _is(str),
    "test": lambda _, value: value in TESTS,
    "true": lambda _, value: value is True,
    "undefined": _is(Undefined),
    "upper": lambda budget, value: METHODS["isupper"](budget, text_of(budget, value)),
    "==": _EQUAL,
    "eq": _EQUAL,
    "equalto": _EQUAL,
    "!=": lambda budget, left, right: not equal(budget, left, right),
    "ne": lambda budget, left, right: not equal(budget, left, right),
    "<": _LESS,
    "lt": _LESS,
    "lessthan": _LESS,
    "<=": _order("lteq"),
    "le": _order("lteq"),
    ">": _MORE,
    "gt": _MORE,
    "greaterthan": _MORE,
    ">=": _order("gteq"),
    "ge": _order("gteq"),
}


def find(sort: str, name: Any) -> Callable[..., Any]:
    """The filter or test of that name."""
    table: dict[str, Callable[..., Any]] = FILTERS if sort == "filter" else TESTS
    if not isinstance(name, str) or name not in table:
        raise ValueError(f"no {sort} named {name!r:.60}")
    return table[name]


__all__: Sequence[str] = ("FILTERS", "TESTS", "find")
