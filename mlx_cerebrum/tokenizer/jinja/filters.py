"""The filters and tests of a template: Jinja's, but for those no prompt needs."""

import json
import re
from collections.abc import Callable
from typing import Any

from jinja2 import Undefined
from jinja2.filters import do_batch, do_float, do_int, do_round, do_title, sync_do_slice

from mlx_cerebrum.tokenizer.jinja import text as texts
from mlx_cerebrum.tokenizer.jinja import values
from mlx_cerebrum.tokenizer.jinja.text import METHODS, OBJECT, Budget, LimitError
from mlx_cerebrum.tokenizer.jinja.values import (
    NUMBER,
    Function,
    Stream,
    items_of,
    iterate,
    kind,
    text_of,
)

_LETTERS = 100  # in a number, at most
_INDENT = 32  # of tojson, at most


# ---- of text


def _replace(budget: Budget, value: str, old: Any, new: Any, count: int | None = None) -> str:
    old, new = text_of(budget, old), text_of(budget, new)
    return texts.replace(budget, value, old, new, -1 if count is None else count)


def _title(budget: Budget, value: str) -> str:
    budget.letters(OBJECT * len(value))  # the words
    return texts.changed(budget, value, do_title)


def _indent(
    budget: Budget, value: str, width: Any = 4, first: bool = False, blank: bool = False
) -> str:
    margin = texts.repeat(budget, " ", width) if isinstance(width, int) else width
    lines = texts.splitlines(budget, texts.join(budget, (value, texts.own("\n"))))
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


def _format(budget: Budget, value: str, *args: Any, **named: Any) -> str:
    if args and named:
        raise ValueError("format takes values in order or by name, not both")
    return texts.percent(budget, value, named or args, lambda each: text_of(budget, each))


def _wordcount(budget: Budget, value: str) -> int:
    budget.letters(OBJECT * len(value))
    return len(re.findall(r"\w+", value))


# ---- of one value


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
    values.weigh(budget, value, len(margin) + len(between))
    style = {"ensure_ascii": ensure_ascii, "indent": indent, "separators": separators}
    written = json.dumps(value, sort_keys=sort_keys, **style)
    budget.letters(len(written))
    return written


def _default(budget: Budget, value: Any, default: Any = "", boolean: bool = False) -> Any:
    return default if isinstance(value, Undefined) or (boolean and not value) else value


def _int(budget: Budget, value: Any, default: Any = 0, base: int = 10) -> Any:
    return default if _is_long(value) else values.bounded(do_int(value, default, base))


def _float(budget: Budget, value: Any, default: Any = 0.0) -> Any:
    return default if _is_long(value) else do_float(value, default)


def _is_long(value: Any) -> bool:
    return isinstance(value, str) and len(value) > _LETTERS


def _number(value: Any) -> Any:
    if not isinstance(value, NUMBER):
        raise TypeError(f"{kind(value)} is not a number")
    return value


def _round(budget: Budget, value: Any, precision: int = 0, method: Any = "common") -> Any:
    if abs(_number(precision)) > _LETTERS:
        raise LimitError("a precision out of bounds")
    return values.bounded(do_round(_number(value), precision, method))


def _reverse(budget: Budget, value: Any) -> Any:
    backwards = slice(None, None, -1)
    if isinstance(value, str):
        return texts.part(budget, value, backwards)
    return Stream(values.cut(budget, items_of(budget, value), backwards))


# ---- of many: an attribute is a path such as "function.name"


def _part(budget: Budget, value: Any, path: Any, default: Any = None) -> Any:
    budget.step()
    for name in str(path).split(".") if path is not None else ():
        key = int(name) if name.isdecimal() and len(name) < 9 else name
        value = values.item(budget, value, key)
        if default is not None and isinstance(value, Undefined):
            value = default
    return value


def _key(budget: Budget, value: Any, path: Any, case_sensitive: bool) -> Any:
    found = _part(budget, value, path)
    if isinstance(found, str) and not case_sensitive:
        return METHODS["lower"](budget, found)
    return found


def _end(at: int, which: str) -> Callable[[Budget, Any], Any]:
    def end(budget: Budget, value: Any) -> Any:
        items = iterate(budget, value)
        return items[at] if items else Undefined(f"No {which} item, sequence was empty.")

    return end


def _items(budget: Budget, value: Any) -> Stream:
    none = isinstance(value, Undefined)
    return Stream([] if none else values.attribute(budget, value, "items").call())


def _join(budget: Budget, value: Any, sep: Any = "", attribute: Any = None) -> str:
    parts = [_part(budget, each, attribute) for each in iterate(budget, value)]
    return texts.join(budget, [text_of(budget, p) for p in parts], text_of(budget, sep))


def _batch(budget: Budget, value: Any, linecount: int, fill_with: Any = None) -> Stream:
    items = items_of(budget, value)
    if linecount < 1:
        raise ValueError("batch takes a count of 1 or more")
    budget.letters(8 * len(items) + OBJECT * (1 + len(items) // linecount))
    if fill_with is not None:
        budget.letters(8 * (linecount - 1))
    return Stream(list(do_batch(items, linecount, fill_with)))


def _slice(budget: Budget, value: Any, slices: int, fill_with: Any = None) -> Stream:
    items = items_of(budget, value)
    budget.letters(8 * len(items) + OBJECT * max(0, slices))
    return Stream(list(sync_do_slice(items, slices, fill_with)))


def _sort(
    budget: Budget,
    value: Any,
    reverse: bool = False,
    case_sensitive: bool = False,
    attribute: Any = None,
) -> list[Any]:
    items = items_of(budget, value)
    paths = attribute.split(",") if isinstance(attribute, str) else [attribute]
    keys = [tuple([_key(budget, each, p, case_sensitive) for p in paths]) for each in items]
    values.sort_keys(budget, keys)
    order = sorted(range(len(items)), key=keys.__getitem__, reverse=reverse)
    return [items[at] for at in order]


def _dictsort(
    budget: Budget,
    value: Any,
    case_sensitive: bool = False,
    by: str = "key",
    reverse: bool = False,
) -> list[Any]:
    pairs = values.attribute(budget, value, "items").call()
    return _sort(budget, pairs, reverse, case_sensitive, {"key": 0, "value": 1}[by])


def _extreme(pick: Callable[..., Any]) -> Callable[..., Any]:
    def extreme(
        budget: Budget, value: Any, case_sensitive: bool = False, attribute: Any = None
    ) -> Any:
        items = items_of(budget, value)
        if not items:
            return Undefined("No aggregated item, sequence was empty.")
        keys = [_key(budget, each, attribute, case_sensitive) for each in items]
        values.sort_keys(budget, keys, compares=1)
        return items[pick(range(len(items)), key=keys.__getitem__)]

    return extreme


def _unique(
    budget: Budget, value: Any, case_sensitive: bool = False, attribute: Any = None
) -> Stream:
    found: dict[Any, Any] = {}
    for each in iterate(budget, value):
        key = _key(budget, each, attribute, case_sensitive)
        key = values.key_of(budget, None if isinstance(key, Undefined) else key)
        found.setdefault(key, each)
    return Stream(list(found.values()))


def _groupby(
    budget: Budget, value: Any, attribute: Any, default: Any = None, case_sensitive: bool = False
) -> list[Any]:
    groups: list[tuple[Any, list[Any]]] = []
    last: Any = None
    for each in _sort(budget, value, False, case_sensitive, attribute):
        key = _key(budget, each, attribute, case_sensitive)
        if not groups or not values.equal(budget, key, last):
            groups.append((_part(budget, each, attribute, default), []))
            budget.letters(2 * OBJECT)
        groups[-1][1].append(each)
        last = key
    return groups


def _sum(budget: Budget, value: Any, attribute: Any = None, start: Any = 0) -> Any:
    total = start
    for each in iterate(budget, value):
        total = values.add(budget, total, _part(budget, each, attribute))
    return total


def _map(budget: Budget, value: Any, *args: Any, **named: Any) -> Stream:
    items = iterate(budget, value or ())
    if args:
        change = find("filter", args[0])
        return Stream([_paid(budget, change, each, *args[1:], **named) for each in items])
    if "attribute" not in named or named.keys() - {"attribute", "default"}:
        raise ValueError("map takes a filter, or an attribute and a default")
    return Stream([_part(budget, e, named["attribute"], named.get("default")) for e in items])


def _selecting(wanted: bool, by_attribute: bool = False) -> Callable[..., Any]:
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


def _paid(budget: Budget, call: Callable[..., Any], /, *args: Any, **named: Any) -> Any:
    budget.step()
    return call(budget, *args, **named)


# ---- by name


def _on_text(change: Callable[..., Any]) -> Callable[..., Any]:
    return lambda budget, value, *args, **named: change(
        budget, text_of(budget, value), *args, **named
    )


_OF_TEXT: dict[str, Callable[..., Any]] = {
    "capitalize": METHODS["capitalize"],
    "center": lambda budget, value, width=80: texts.center(budget, value, width),
    **dict.fromkeys(("e", "escape", "forceescape"), texts.escaped),
    "format": _format,
    "indent": _indent,
    "lower": METHODS["lower"],
    "replace": _replace,
    "safe": lambda _, value: value,
    "title": _title,
    "trim": texts.strip,
    "truncate": _truncate,
    "upper": METHODS["upper"],
    "wordcount": _wordcount,
}

FILTERS: dict[str, Callable[..., Any]] = {
    **{name: _on_text(change) for name, change in _OF_TEXT.items()},
    "abs": lambda _, value: abs(_number(value)),
    "attr": lambda budget, value, name: values.attribute(budget, value, text_of(budget, name)),
    "batch": _batch,
    **dict.fromkeys(("count", "length"), lambda _, value: values.length(value)),
    **dict.fromkeys(("d", "default"), _default),
    "dictsort": _dictsort,
    "first": _end(0, "first"),
    "float": _float,
    "groupby": _groupby,
    "int": _int,
    "items": _items,
    "join": _join,
    "last": _end(-1, "last"),
    "list": items_of,
    "map": _map,
    "max": _extreme(max),
    "min": _extreme(min),
    "reject": _selecting(False),
    "rejectattr": _selecting(False, by_attribute=True),
    "reverse": _reverse,
    "round": _round,
    "select": _selecting(True),
    "selectattr": _selecting(True, by_attribute=True),
    "slice": _slice,
    "sort": _sort,
    "string": text_of,
    "sum": _sum,
    "tojson": _tojson,
    "unique": _unique,
}


def _is(*kinds: type) -> Callable[[Budget, Any], bool]:
    return lambda _, value: isinstance(value, kinds)


def _order(order: str) -> Callable[[Budget, Any, Any], bool]:
    return lambda budget, left, right: values.ordered(budget, order, left, right)


_SEQUENCES = (str, list, tuple, dict, range, Undefined)

TESTS: dict[str, Callable[..., Any]] = {
    "boolean": _is(bool),
    "callable": _is(Function),
    "defined": lambda _, value: not isinstance(value, Undefined),
    "divisibleby": lambda _, value, by: values.remainder(value, by) == 0,
    "escaped": lambda _, value: False,
    "even": lambda _, value: values.remainder(value, 2) == 0,
    "false": lambda _, value: value is False,
    "filter": lambda _, value: value in FILTERS,
    "float": _is(float),
    "in": lambda budget, value, whole: values.contains(budget, whole, value),
    "integer": lambda _, value: isinstance(value, int) and not isinstance(value, bool),
    "iterable": _is(*_SEQUENCES, Stream),
    "lower": _on_text(METHODS["islower"]),
    "mapping": _is(dict),
    "none": lambda _, value: value is None,
    "number": _is(*NUMBER),
    "odd": lambda _, value: values.remainder(value, 2) == 1,
    "sameas": lambda budget, value, other: (
        value is other or (isinstance(value, str) and values.equal(budget, value, other))
    ),
    "sequence": _is(*_SEQUENCES),
    "string": _is(str),
    "test": lambda _, value: value in TESTS,
    "true": lambda _, value: value is True,
    "undefined": _is(Undefined),
    "upper": _on_text(METHODS["isupper"]),
    **dict.fromkeys(("==", "eq", "equalto"), values.equal),
    **dict.fromkeys(("!=", "ne"), lambda budget, *two: not values.equal(budget, *two)),
    **dict.fromkeys(("<", "lt", "lessthan"), _order("lt")),
    **dict.fromkeys(("<=", "le"), _order("lteq")),
    **dict.fromkeys((">", "gt", "greaterthan"), _order("gt")),
    **dict.fromkeys((">=", "ge"), _order("gteq")),
}


def find(sort: str, name: Any) -> Callable[..., Any]:
    """The filter or test of that name."""
    table = FILTERS if sort == "filter" else TESTS
    if not isinstance(name, str) or name not in table:
        raise ValueError(f"no {sort} named {name!r:.60}")
    return table[name]
