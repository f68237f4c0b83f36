"""A Jinja template, walked: Jinja parses it, and each node is evaluated here.

Jinja would compile the template to Python. Walking it instead is what lets every step be paid
for (see `Budget`), lets the template's own text be known from a person's (see `Text`), and
leaves nothing of a checkpoint to run.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import Undefined, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from mlx_cerebrum.tokenizer.template_filters import find
from mlx_cerebrum.tokenizer.template_text import OBJECT, Budget, LimitError, join, own
from mlx_cerebrum.tokenizer.template_values import (
    MAX_RANGE,
    NOTHING,
    OPERATORS,
    Cycler,
    Function,
    Namespace,
    Object,
    attribute,
    bounded,
    contains,
    equal,
    item,
    items_of,
    iterate,
    joiner,
    key_of,
    ordered,
    text_of,
)

LONGEST = 200_000  # characters of a template; those in use have at most some 30,000


class RefusalError(Exception):
    """The template called raise_exception."""


class _Generation(Extension):
    """`{% generation %}` marks answers for training; here its body is simply rendered."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


# With the settings of transformers.
_ENVIRONMENT = jinja2.Environment(
    trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
)


def parse(source: str) -> nodes.Template:
    """The template's tree, the text in it marked as its own."""
    if len(source) > LONGEST:
        raise LimitError(f"it is longer than {LONGEST:,} characters")
    tree = _ENVIRONMENT.parse(source)
    waiting: list[nodes.Node] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, nodes.Const):
            node.value = own(node.value) if isinstance(node.value, str) else bounded(node.value)
        elif isinstance(node, nodes.TemplateData):
            node.data = own(node.data)
        waiting += node.iter_child_nodes()
    return tree


class _BreakError(Exception):
    pass


class _ContinueError(Exception):
    pass


class Scope(dict[str, Any]):
    """Names and values, those of the scopes around it too."""

    def __init__(self, parent: "Scope | None" = None, values: Mapping[str, Any] | None = None):
        super().__init__(values or {})
        self.parent = parent

    def find(self, name: str) -> Any:
        scope: Scope | None = self
        while scope is not None:
            if name in scope:
                return scope[name]
            scope = scope.parent
        return Undefined(name=name)


class _Loop(Object):
    """What `loop` is within a for."""

    def __init__(self, budget: Budget, items: Sequence[Any], depth: int, again: Any) -> None:
        self._budget, self._items, self._depth, self._again = budget, items, depth, again
        self._changing: Any = NOTHING
        self.at = 0

    def attribute(self, name: str) -> Any:
        at, count = self.at, len(self._items)
        simple = {
            "index": at + 1,
            "index0": at,
            "revindex": count - at,
            "revindex0": count - at - 1,
            "first": at == 0,
            "last": at == count - 1,
            "length": count,
            "depth": self._depth + 1,
            "depth0": self._depth,
        }
        if name in simple:
            return simple[name]
        if name == "previtem":
            return self._items[at - 1] if at else Undefined("there is no previous item")
        if name == "nextitem":
            last = at == count - 1
            return Undefined("there is no next item") if last else self._items[at + 1]
        methods = {"cycle": self._cycle, "changed": self._changed}
        return Function(methods[name]) if name in methods else NOTHING

    def call(self, items: Any) -> Any:
        if self._again is None:
            raise TypeError("the loop must have the 'recursive' marker to be called recursively")
        return self._again(items, self._depth + 1)

    def _cycle(self, *items: Any) -> Any:
        if not items:
            raise TypeError("no items for cycling given")
        return items[self.at % len(items)]

    def _changed(self, *values: Any) -> bool:
        same = self._changing is not NOTHING and equal(self._budget, self._changing, values)
        self._changing = values
        return not same


class Run:
    """One rendering: `Run(budget, variables).render(tree)`."""

    def __init__(self, budget: Budget, variables: Mapping[str, Any]) -> None:
        self._budget = budget
        self._names_in: dict[int, set[str]] = {}  # of macros' bodies
        built_in: dict[str, Callable[..., Any]] = {
            "cycler": Cycler,
            "dict": self._dict,
            "joiner": joiner,
            "namespace": Namespace,
            "raise_exception": self._refuse,
            "range": _range,
            "strftime_now": _strftime_now,
        }
        functions = {name: Function(call) for name, call in built_in.items()}
        self._names = Scope(None, functions | {"self": Undefined(name="self")} | dict(variables))

    def render(self, tree: nodes.Template) -> str:
        return self._text(tree.body, Scope(self._names))

    # ---- statements

    def _text(self, body: Sequence[nodes.Node], scope: Scope) -> str:
        """What the statements print."""
        out: list[str] = []
        self._run(body, scope, out)
        return join(self._budget, out)

    def _run(self, body: Sequence[nodes.Node], scope: Scope, out: list[str]) -> None:
        for node in body:
            self._budget.step()
            statement = _STATEMENTS.get(type(node))
            if statement is None:
                name = type(node).__name__.lower()
                raise ValueError(f"'{name}' is not supported in a chat template")
            statement(self, node, scope, out)

    def _output(self, node: nodes.Output, scope: Scope, out: list[str]) -> None:
        for each in node.nodes:
            text = text_of(self._budget, self.value(each, scope))
            self._budget.letters(len(text))
            out.append(text)

    def _for(self, node: nodes.For, scope: Scope, out: list[str]) -> None:
        self._loop(node, scope, out, self.value(node.iter, scope), 0)

    def _loop(self, node: nodes.For, scope: Scope, out: list[str], values: Any, depth: int) -> None:
        items = iterate(self._budget, values)
        if node.test is not None:
            kept = []
            for each in items:
                inner = Scope(scope)
                self._assign(node.target, each, inner)
                if self.value(node.test, inner):
                    kept.append(each)
            items = kept

        def again(values: Any, depth: int) -> str:
            parts: list[str] = []
            self._loop(node, scope, parts, values, depth)
            return join(self._budget, parts)

        loop = _Loop(self._budget, items, depth, again if node.recursive else None)
        for loop.at, each in enumerate(items):
            self._budget.step()
            inner = Scope(scope, {"loop": loop})
            self._assign(node.target, each, inner)
            try:
                self._run(node.body, inner, out)
            except _ContinueError:
                continue
            except _BreakError:
                break
        if not items:
            self._run(node.else_, Scope(scope), out)

    def _if(self, node: nodes.If, scope: Scope, out: list[str]) -> None:
        for branch in (node, *node.elif_):
            if self.value(branch.test, scope):
                return self._run(branch.body, scope, out)
        return self._run(node.else_, scope, out)

    def _set(self, node: nodes.Assign, scope: Scope, out: list[str]) -> None:
        self._assign(node.target, self.value(node.node, scope), scope)

    def _set_block(self, node: nodes.AssignBlock, scope: Scope, out: list[str]) -> None:
        text = self._text(node.body, Scope(scope))
        if node.filter is not None:
            text = self.value(node.filter, Scope(scope, {"": text}))
        self._assign(node.target, text, scope)

    def _assign(self, target: nodes.Node, value: Any, scope: Scope) -> None:
        if isinstance(target, nodes.Name):
            scope[target.name] = value
        elif isinstance(target, nodes.NSRef):
            found = scope.find(target.name)
            if not isinstance(found, Namespace):
                raise TypeError("cannot assign attribute on non-namespace object")
            found.set(target.attr, value)
        else:
            assert isinstance(target, nodes.Tuple)
            values = iterate(self._budget, value)
            if len(values) != len(target.items):
                raise ValueError(f"{len(values)} values for {len(target.items)} names")
            for each, part in zip(target.items, values, strict=True):
                self._assign(each, part, scope)

    def _with(self, node: nodes.With, scope: Scope, out: list[str]) -> None:
        inner = Scope(scope)
        for target, value in zip(node.targets, node.values, strict=True):
            self._assign(target, self.value(value, scope), inner)
        self._run(node.body, inner, out)

    def _scope(self, node: nodes.Scope | nodes.Block, scope: Scope, out: list[str]) -> None:
        self._run(node.body, Scope(scope), out)

    def _filter_block(self, node: nodes.FilterBlock, scope: Scope, out: list[str]) -> None:
        text = self._text(node.body, Scope(scope))
        shown = self.value(node.filter, Scope(scope, {"": text}))
        out.append(text_of(self._budget, shown))

    def _macro(self, node: nodes.Macro, scope: Scope, out: list[str]) -> None:
        scope[node.name] = self._function(node, node.name, scope)

    def _call_block(self, node: nodes.CallBlock, scope: Scope, out: list[str]) -> None:
        caller = self._function(node, "caller", scope)
        args, named = self._arguments(node.call, scope)
        called = self._call(self.value(node.call.node, scope), args, named | {"caller": caller})
        out.append(text_of(self._budget, called))

    def _function(self, node: nodes.Macro | nodes.CallBlock, name: str, scope: Scope) -> Function:
        names = [arg.name for arg in node.args]
        body_names = self._names_in.get(id(node))
        if body_names is None:
            found = (name for each in node.body for name in each.find_all(nodes.Name))
            body_names = self._names_in[id(node)] = {name.name for name in found}

        def call(*args: Any, **named: Any) -> str:
            inner = Scope(scope)
            if "caller" not in names and "caller" in body_names:
                inner["caller"] = named.pop("caller", Undefined("No caller defined"))
            more = dict(named)
            first_default = len(names) - len(node.defaults)
            for at, each in enumerate(names):
                if at < len(args):
                    inner[each] = args[at]
                elif each in more:
                    inner[each] = more.pop(each)
                elif at >= first_default:
                    inner[each] = self.value(node.defaults[at - first_default], inner)
                else:
                    inner[each] = Undefined(f"parameter {each!r} was not provided", name=each)
            if more and "kwargs" not in body_names:
                raise TypeError(f"macro {name!r} takes no keyword argument {next(iter(more))!r}")
            if len(args) > len(names) and "varargs" not in body_names:
                raise TypeError(f"macro {name!r} takes not more than {len(names)} argument(s)")
            inner["kwargs"], inner["varargs"] = more, args[len(names) :]
            return self._text(node.body, inner)

        return Function(call)

    def _expression(self, node: nodes.ExprStmt, scope: Scope, out: list[str]) -> None:
        self.value(node.node, scope)

    def _break(self, node: nodes.Break, scope: Scope, out: list[str]) -> None:
        raise _BreakError

    def _continue(self, node: nodes.Continue, scope: Scope, out: list[str]) -> None:
        raise _ContinueError

    # ---- expressions

    def value(self, node: nodes.Node | None, scope: Scope) -> Any:
        self._budget.step()
        expression = _EXPRESSIONS.get(type(node))
        if expression is None:
            raise ValueError(f"'{type(node).__name__.lower()}' is not supported")
        return expression(self, node, scope)

    def _name(self, node: nodes.Name, scope: Scope) -> Any:
        return scope.find(node.name)

    def _const(self, node: nodes.Const, scope: Scope) -> Any:
        return node.value

    def _data(self, node: nodes.TemplateData, scope: Scope) -> Any:
        return node.data

    def _tuple(self, node: nodes.Tuple, scope: Scope) -> tuple[Any, ...]:
        return tuple(self.value(each, scope) for each in node.items)

    def _list(self, node: nodes.List, scope: Scope) -> list[Any]:
        return [self.value(each, scope) for each in node.items]

    def _dict_literal(self, node: nodes.Dict, scope: Scope) -> dict[Any, Any]:
        return {
            key_of(self._budget, self.value(pair.key, scope)): self.value(pair.value, scope)
            for pair in node.items
        }

    def _conditional(self, node: nodes.CondExpr, scope: Scope) -> Any:
        if self.value(node.test, scope):
            return self.value(node.expr1, scope)
        if node.expr2 is None:
            return Undefined("the inline if-expression evaluated to false and has no else")
        return self.value(node.expr2, scope)

    def _filter(self, node: nodes.Filter, scope: Scope) -> Any:
        value = scope.find("") if node.node is None else self.value(node.node, scope)
        args, named = self._arguments(node, scope)
        return find("filter", node.name)(self._budget, value, *args, **named)

    def _test(self, node: nodes.Test, scope: Scope) -> bool:
        args, named = self._arguments(node, scope)
        value = self.value(node.node, scope)
        return bool(find("test", node.name)(self._budget, value, *args, **named))

    def _called(self, node: nodes.Call, scope: Scope) -> Any:
        return self._call(self.value(node.node, scope), *self._arguments(node, scope))

    def _call(self, called: Any, args: list[Any], named: dict[str, Any]) -> Any:
        if isinstance(called, Undefined):
            called()  # raises what is undefined
        if not isinstance(called, Function | _Loop):
            raise TypeError(f"{type(called).__name__} can't be called")
        return called.call(*args, **named)

    def _arguments(
        self, node: nodes.Call | nodes.Filter | nodes.Test, scope: Scope
    ) -> tuple[list[Any], dict[str, Any]]:
        args = [self.value(each, scope) for each in node.args]
        if node.dyn_args is not None:
            args += items_of(self._budget, self.value(node.dyn_args, scope))
        named: dict[str, Any] = {
            str(pair.key): self.value(pair.value, scope) for pair in node.kwargs
        }
        if node.dyn_kwargs is not None:
            more = self.value(node.dyn_kwargs, scope)
            if not isinstance(more, dict) or not all(isinstance(key, str) for key in more):
                raise TypeError("** takes a dict whose keys are text")
            self._budget.step(len(more))
            named |= more
        return args, named

    def _item(self, node: nodes.Getitem, scope: Scope) -> Any:
        return item(self._budget, self.value(node.node, scope), self.value(node.arg, scope))

    def _attribute(self, node: nodes.Getattr, scope: Scope) -> Any:
        return attribute(self._budget, self.value(node.node, scope), node.attr)

    def _slice(self, node: nodes.Slice, scope: Scope) -> slice:
        ends = (node.start, node.stop, node.step)
        return slice(*(None if each is None else self.value(each, scope) for each in ends))

    def _concat(self, node: nodes.Concat, scope: Scope) -> str:
        budget = self._budget
        return join(budget, [text_of(budget, self.value(each, scope)) for each in node.nodes])

    def _compare(self, node: nodes.Compare, scope: Scope) -> bool:
        left, budget = self.value(node.expr, scope), self._budget
        for each in node.ops:
            right = self.value(each.expr, scope)
            if each.op in ("eq", "ne"):
                holds = equal(budget, left, right) is (each.op == "eq")
            elif each.op in ("in", "notin"):
                holds = contains(budget, right, left) is (each.op == "in")
            else:
                holds = ordered(budget, each.op, left, right)
            if not holds:
                return False
            left = right
        return True

    def _binary(self, node: nodes.BinExpr, scope: Scope) -> Any:
        left, right = self.value(node.left, scope), self.value(node.right, scope)
        return OPERATORS[node.operator](self._budget, left, right)

    def _and(self, node: nodes.And, scope: Scope) -> Any:
        return self.value(node.left, scope) and self.value(node.right, scope)

    def _or(self, node: nodes.Or, scope: Scope) -> Any:
        return self.value(node.left, scope) or self.value(node.right, scope)

    def _not(self, node: nodes.Not, scope: Scope) -> bool:
        return not self.value(node.node, scope)

    def _sign(self, node: nodes.UnaryExpr, scope: Scope) -> Any:
        return OPERATORS[node.operator](self._budget, 0, self.value(node.node, scope))

    # ---- functions

    def _dict(self, *args: Any, **named: Any) -> dict[Any, Any]:
        found: dict[Any, Any] = {}
        for given in args:
            if isinstance(given, dict):
                self._budget.letters(OBJECT * len(given))
                found |= given
                continue
            for pair in iterate(self._budget, given):
                key, value = iterate(self._budget, pair)
                found[key_of(self._budget, key)] = value
        return found | named

    def _refuse(self, message: Any) -> NoReturn:
        raise RefusalError(text_of(self._budget, message))


def _range(*bounds: int) -> range:
    found = range(*bounds)
    if max(map(abs, bounds)) >= 2**62 or len(found) > MAX_RANGE:
        raise LimitError(f"a range of more than {MAX_RANGE} items")
    return found


def _strftime_now(form: str) -> str:
    if len(form) > 200 or not re.fullmatch(r"(?:[^%]|%[-_0^#]?[A-Za-z%])*", form):
        raise ValueError(f"the date format {form!r:.60} is not supported")
    return datetime.now().strftime(form)


_STATEMENTS: dict[type, Callable[..., None]] = {
    nodes.Output: Run._output,
    nodes.For: Run._for,
    nodes.If: Run._if,
    nodes.Assign: Run._set,
    nodes.AssignBlock: Run._set_block,
    nodes.With: Run._with,
    nodes.Scope: Run._scope,
    nodes.Block: Run._scope,
    nodes.FilterBlock: Run._filter_block,
    nodes.Macro: Run._macro,
    nodes.CallBlock: Run._call_block,
    nodes.ExprStmt: Run._expression,
    nodes.Break: Run._break,
    nodes.Continue: Run._continue,
}
_EXPRESSIONS: dict[type, Callable[..., Any]] = {
    nodes.Name: Run._name,
    nodes.Const: Run._const,
    nodes.TemplateData: Run._data,
    nodes.Tuple: Run._tuple,
    nodes.List: Run._list,
    nodes.Dict: Run._dict_literal,
    nodes.CondExpr: Run._conditional,
    nodes.Filter: Run._filter,
    nodes.Test: Run._test,
    nodes.Call: Run._called,
    nodes.Getitem: Run._item,
    nodes.Getattr: Run._attribute,
    nodes.Slice: Run._slice,
    nodes.Concat: Run._concat,
    nodes.Compare: Run._compare,
    **dict.fromkeys(
        (nodes.Add, nodes.Sub, nodes.Mul, nodes.Div, nodes.FloorDiv, nodes.Mod, nodes.Pow),
        Run._binary,
    ),
    nodes.And: Run._and,
    nodes.Or: Run._or,
    nodes.Not: Run._not,
    nodes.Neg: Run._sign,
    nodes.Pos: Run._sign,
}
