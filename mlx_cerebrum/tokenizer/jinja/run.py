"""A Jinja template, walked: Jinja parses it, and each node is evaluated here.

Jinja would compile the template to Python. Walking it instead is what lets every step be paid
for (see `Budget`), lets the template's own text be known from a person's (see `Text`), and
leaves nothing of a checkpoint to run.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from typing import Any, ClassVar, NoReturn

import jinja2
from jinja2 import Undefined, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from mlx_cerebrum.tokenizer.jinja import values
from mlx_cerebrum.tokenizer.jinja.filters import find
from mlx_cerebrum.tokenizer.jinja.text import OBJECT, Budget, LimitError, join, own
from mlx_cerebrum.tokenizer.jinja.values import NOTHING, Function, Members, Object, iterate, text_of

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
            text = isinstance(node.value, str)
            node.value = own(node.value) if text else values.bounded(node.value)
        elif isinstance(node, nodes.TemplateData):
            node.data = own(node.data)
        waiting += node.iter_child_nodes()
    return tree


def reason(error: Exception) -> str:
    """What Jinja, or a template at work, could not do: in one line."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return " ".join(str(error).split())[:300] or type(error).__name__


class Scope(dict[str, Any]):
    """Names and values, those of the scopes around it too."""

    def __init__(self, parent: "Scope | None" = None, names: Mapping[str, Any] | None = None):
        super().__init__(names or {})
        self.parent = parent

    def find(self, name: str) -> Any:
        scope: Scope | None = self
        while scope is not None:
            if name in scope:
                return scope[name]
            scope = scope.parent
        return Undefined(name=name)


class _LeaveError(Exception):
    """`{% break %}` or `{% continue %}`, on its way to the loop it stands in."""

    def __init__(self, node: nodes.Break | nodes.Continue) -> None:
        super().__init__(f"{type(node).__name__.lower()} outside a loop")
        self.breaks = isinstance(node, nodes.Break)


class Loop(Object):
    """What `loop` is within a for."""

    members: ClassVar[Members] = {
        "index": lambda loop: loop.at + 1,
        "index0": lambda loop: loop.at,
        "revindex": lambda loop: len(loop.items) - loop.at,
        "revindex0": lambda loop: len(loop.items) - loop.at - 1,
        "first": lambda loop: loop.at == 0,
        "last": lambda loop: loop.at == len(loop.items) - 1,
        "length": lambda loop: len(loop.items),
        "depth": lambda loop: loop.depth + 1,
        "depth0": lambda loop: loop.depth,
        "previtem": lambda loop: loop.beside(-1),
        "nextitem": lambda loop: loop.beside(1),
        "cycle": lambda loop: Function(loop.cycle),
        "changed": lambda loop: Function(loop.changed),
    }

    def __init__(self, budget: Budget, items: Sequence[Any], depth: int, again: Any) -> None:
        self.budget, self.items, self.depth, self.again = budget, items, depth, again
        self.changing: Any = NOTHING
        self.at = 0

    def call(self, items: Any) -> Any:
        if self.again is None:
            raise TypeError("the loop must have the 'recursive' marker to be called recursively")
        return self.again(items, self.depth + 1)

    def beside(self, step: int) -> Any:
        at = self.at + step
        return self.items[at] if 0 <= at < len(self.items) else Undefined("there is no such item")

    def cycle(self, *items: Any) -> Any:
        if not items:
            raise TypeError("no items for cycling given")
        return items[self.at % len(items)]

    def changed(self, *now: Any) -> bool:
        same = self.changing is not NOTHING and values.equal(self.budget, self.changing, now)
        self.changing = now
        return not same


class Run:
    """One rendering: `Run(budget, variables).render(tree)`."""

    def __init__(self, budget: Budget, variables: Mapping[str, Any]) -> None:
        self._budget = budget
        self._names_in: dict[int, set[str]] = {}  # of macros' bodies
        built_in: dict[str, Callable[..., Any]] = {
            "cycler": values.Cycler,
            "dict": self._dict,
            "joiner": values.joiner,
            "namespace": values.Namespace,
            "raise_exception": self._refuse,
            "range": _range,
            "strftime_now": _strftime_now,
        }
        functions = {name: Function(call) for name, call in built_in.items()}
        self._names = Scope(None, functions | {"self": Undefined(name="self")} | dict(variables))

    def render(self, tree: nodes.Template) -> str:
        return self.text(tree.body, Scope(self._names))

    # ---- statements

    def run(self, body: Sequence[nodes.Node], scope: Scope, out: list[str]) -> None:
        for node in body:
            self._budget.step()
            _STATEMENTS.get(type(node), _unsupported)(self, node, scope, out)

    def text(self, body: Sequence[nodes.Node], scope: Scope) -> str:
        """What the statements print."""
        out: list[str] = []
        self.run(body, scope, out)
        return join(self._budget, out)

    def filtered(self, node: nodes.AssignBlock | nodes.FilterBlock, scope: Scope) -> Any:
        """What a block prints, through its filter: that filters what is named "" in its scope."""
        text = self.text(node.body, Scope(scope))
        return text if node.filter is None else self.value(node.filter, Scope(scope, {"": text}))

    def output(self, node: nodes.Output, scope: Scope, out: list[str]) -> None:
        for each in node.nodes:
            text = text_of(self._budget, self.value(each, scope))
            self._budget.letters(len(text))
            out.append(text)

    def filter_block(self, node: nodes.FilterBlock, scope: Scope, out: list[str]) -> None:
        out.append(text_of(self._budget, self.filtered(node, scope)))

    def loop(self, node: nodes.For, scope: Scope, out: list[str], over: Any, depth: int) -> None:
        items = iterate(self._budget, over)
        if node.test is not None:
            kept = []
            for each in items:
                inner = Scope(scope)
                self.assign(node.target, each, inner)
                if self.value(node.test, inner):
                    kept.append(each)
            items = kept

        def again(over: Any, depth: int) -> str:
            parts: list[str] = []
            self.loop(node, scope, parts, over, depth)
            return join(self._budget, parts)

        loop = Loop(self._budget, items, depth, again if node.recursive else None)
        for loop.at, each in enumerate(items):
            self._budget.step()
            inner = Scope(scope, {"loop": loop})
            self.assign(node.target, each, inner)
            try:
                self.run(node.body, inner, out)
            except _LeaveError as left:
                if left.breaks:
                    break
        if not items:
            self.run(node.else_, Scope(scope), out)

    def leave(self, node: nodes.Break | nodes.Continue, scope: Scope, out: list[str]) -> None:
        raise _LeaveError(node)

    def choose(self, node: nodes.If, scope: Scope, out: list[str]) -> None:
        for branch in (node, *node.elif_):
            if self.value(branch.test, scope):
                return self.run(branch.body, scope, out)
        return self.run(node.else_, scope, out)

    def assign(self, target: nodes.Node, value: Any, scope: Scope) -> None:
        if isinstance(target, nodes.Name):
            scope[target.name] = value
        elif isinstance(target, nodes.NSRef):
            found = scope.find(target.name)
            if not isinstance(found, values.Namespace):
                raise TypeError("cannot assign attribute on non-namespace object")
            found.set(target.attr, value)
        else:
            assert isinstance(target, nodes.Tuple)  # there is nothing else to assign to
            items = iterate(self._budget, value)
            if len(items) != len(target.items):
                raise ValueError(f"{len(items)} values for {len(target.items)} names")
            for part, each in zip(target.items, items, strict=True):
                self.assign(part, each, scope)

    def within(self, node: nodes.With, scope: Scope, out: list[str]) -> None:
        inner = Scope(scope)
        for target, value in zip(node.targets, node.values, strict=True):
            self.assign(target, self.value(value, scope), inner)
        self.run(node.body, inner, out)

    def macro(self, node: nodes.Macro, scope: Scope, out: list[str]) -> None:
        scope[node.name] = self.function(node, node.name, scope)

    def call_block(self, node: nodes.CallBlock, scope: Scope, out: list[str]) -> None:
        caller = self.function(node, "caller", scope)
        out.append(text_of(self._budget, self.call(node.call, scope, caller=caller)))

    def function(self, node: nodes.Macro | nodes.CallBlock, name: str, scope: Scope) -> Function:
        names = [arg.name for arg in node.args]
        first_default = len(names) - len(node.defaults)
        used = self._names_in.get(id(node))
        if used is None:
            found = (name for each in node.body for name in each.find_all(nodes.Name))
            used = self._names_in[id(node)] = {name.name for name in found}

        def call(*args: Any, **named: Any) -> str:
            inner = Scope(scope)
            if "caller" not in names and "caller" in used:
                inner["caller"] = named.pop("caller", Undefined("No caller defined"))
            for at, each in enumerate(names):
                if at < len(args):
                    inner[each] = args[at]
                elif each in named:
                    inner[each] = named.pop(each)
                elif at >= first_default:
                    inner[each] = self.value(node.defaults[at - first_default], inner)
                else:
                    inner[each] = Undefined(f"parameter {each!r} was not provided", name=each)
            if named and "kwargs" not in used:
                raise TypeError(f"macro {name!r} takes no keyword argument {next(iter(named))!r}")
            if len(args) > len(names) and "varargs" not in used:
                raise TypeError(f"macro {name!r} takes not more than {len(names)} argument(s)")
            inner["kwargs"], inner["varargs"] = named, args[len(names) :]
            return self.text(node.body, inner)

        return Function(call)

    # ---- expressions

    def value(self, node: nodes.Node, scope: Scope) -> Any:
        self._budget.step()
        return _EXPRESSIONS.get(type(node), _unsupported)(self, node, scope)

    def listed(self, items: Sequence[nodes.Node], scope: Scope) -> list[Any]:
        return [self.value(each, scope) for each in items]

    def dict_literal(self, node: nodes.Dict, scope: Scope) -> dict[Any, Any]:
        return {
            values.key_of(self._budget, self.value(pair.key, scope)): self.value(pair.value, scope)
            for pair in node.items
        }

    def conditional(self, node: nodes.CondExpr, scope: Scope) -> Any:
        if self.value(node.test, scope):
            return self.value(node.expr1, scope)
        if node.expr2 is None:
            return Undefined("the inline if-expression evaluated to false and has no else")
        return self.value(node.expr2, scope)

    def filter(self, node: nodes.Filter, scope: Scope) -> Any:
        value = scope.find("") if node.node is None else self.value(node.node, scope)
        args, named = self.arguments(node, scope)
        return find("filter", node.name)(self._budget, value, *args, **named)

    def test(self, node: nodes.Test, scope: Scope) -> bool:
        value = self.value(node.node, scope)
        args, named = self.arguments(node, scope)
        return bool(find("test", node.name)(self._budget, value, *args, **named))

    def call(self, node: nodes.Call, scope: Scope, **more: Any) -> Any:
        called = self.value(node.node, scope)
        args, named = self.arguments(node, scope)
        if isinstance(called, Undefined):
            called()  # raises what is undefined
        if not isinstance(called, Function | Loop):
            raise TypeError(f"{type(called).__name__} can't be called")
        return called.call(*args, **(named | more))

    def arguments(
        self, node: nodes.Call | nodes.Filter | nodes.Test, scope: Scope
    ) -> tuple[list[Any], dict[str, Any]]:
        args = [self.value(each, scope) for each in node.args]
        if node.dyn_args is not None:
            args += values.items_of(self._budget, self.value(node.dyn_args, scope))
        named = {str(pair.key): self.value(pair.value, scope) for pair in node.kwargs}
        if node.dyn_kwargs is not None:
            more = self.value(node.dyn_kwargs, scope)
            if not isinstance(more, dict) or not all(isinstance(key, str) for key in more):
                raise TypeError("** takes a dict whose keys are text")
            self._budget.step(len(more))
            named |= more
        return args, named

    def compare(self, node: nodes.Compare, scope: Scope) -> bool:
        left, budget = self.value(node.expr, scope), self._budget
        for each in node.ops:
            right = self.value(each.expr, scope)
            if each.op in ("eq", "ne"):
                holds = values.equal(budget, left, right) is (each.op == "eq")
            elif each.op in ("in", "notin"):
                holds = values.contains(budget, right, left) is (each.op == "in")
            else:
                holds = values.ordered(budget, each.op, left, right)
            if not holds:
                return False
            left = right
        return True

    def binary(self, node: nodes.BinExpr, scope: Scope) -> Any:
        left, right = self.value(node.left, scope), self.value(node.right, scope)
        return values.OPERATORS[node.operator](self._budget, left, right)

    def sign(self, node: nodes.UnaryExpr, scope: Scope) -> Any:
        return values.OPERATORS[node.operator](self._budget, 0, self.value(node.node, scope))

    def item(self, node: nodes.Getitem, scope: Scope) -> Any:
        whole, key = self.value(node.node, scope), self.value(node.arg, scope)
        return values.item(self._budget, whole, key)

    def attribute(self, node: nodes.Getattr, scope: Scope) -> Any:
        return values.attribute(self._budget, self.value(node.node, scope), node.attr)

    def slice(self, node: nodes.Slice, scope: Scope) -> slice:
        ends = (node.start, node.stop, node.step)
        return slice(*(None if each is None else self.value(each, scope) for each in ends))

    def concat(self, node: nodes.Concat, scope: Scope) -> str:
        shown = [text_of(self._budget, each) for each in self.listed(node.nodes, scope)]
        return join(self._budget, shown)

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
                found[values.key_of(self._budget, key)] = value
        return found | named

    def _refuse(self, message: Any) -> NoReturn:
        raise RefusalError(text_of(self._budget, message))


def _range(*bounds: int) -> range:
    found = range(*bounds)
    if max(map(abs, bounds)) >= 2**62 or len(found) > values.MAX_RANGE:
        raise LimitError(f"a range of more than {values.MAX_RANGE} items")
    return found


def _strftime_now(form: str) -> str:
    if len(form) > 200 or not re.fullmatch(r"(?:[^%]|%[-_0^#]?[A-Za-z%])*", form):
        raise ValueError(f"the date format {form!r:.60} is not supported")
    return (_moment.get() or datetime.now()).strftime(form)


_moment: ContextVar[datetime | None] = ContextVar("_moment", default=None)


@contextmanager
def dated(moment: datetime) -> Iterator[None]:
    """Inside, this is what templates are told for the time: what they write is the same any day."""
    before = _moment.set(moment)
    try:
        yield
    finally:
        _moment.reset(before)


def _unsupported(run: Run, node: nodes.Node, *_: Any) -> NoReturn:
    raise ValueError(f"'{type(node).__name__.lower()}' is not supported in a chat template")


# What each kind of node does.
_STATEMENTS: dict[type, Callable[[Run, Any, Scope, list[str]], None]] = {
    nodes.Output: Run.output,
    nodes.For: lambda run, node, scope, out: run.loop(
        node, scope, out, run.value(node.iter, scope), 0
    ),
    nodes.If: Run.choose,
    nodes.Assign: lambda run, node, scope, out: run.assign(
        node.target, run.value(node.node, scope), scope
    ),
    nodes.AssignBlock: lambda run, node, scope, out: run.assign(
        node.target, run.filtered(node, scope), scope
    ),
    nodes.With: Run.within,
    nodes.Scope: lambda run, node, scope, out: run.run(node.body, Scope(scope), out),
    nodes.Block: lambda run, node, scope, out: run.run(node.body, Scope(scope), out),
    nodes.FilterBlock: Run.filter_block,
    nodes.Macro: Run.macro,
    nodes.CallBlock: Run.call_block,
    nodes.Break: Run.leave,
    nodes.Continue: Run.leave,
}
_EXPRESSIONS: dict[type, Callable[[Run, Any, Scope], Any]] = {
    nodes.Name: lambda run, node, scope: scope.find(node.name),
    nodes.Const: lambda run, node, scope: node.value,
    nodes.TemplateData: lambda run, node, scope: node.data,
    nodes.Tuple: lambda run, node, scope: tuple(run.listed(node.items, scope)),
    nodes.List: lambda run, node, scope: run.listed(node.items, scope),
    nodes.Dict: Run.dict_literal,
    nodes.CondExpr: Run.conditional,
    nodes.Filter: Run.filter,
    nodes.Test: Run.test,
    nodes.Call: Run.call,
    nodes.Getitem: Run.item,
    nodes.Getattr: Run.attribute,
    nodes.Slice: Run.slice,
    nodes.Concat: Run.concat,
    nodes.Compare: Run.compare,
    **dict.fromkeys(
        (nodes.Add, nodes.Sub, nodes.Mul, nodes.Div, nodes.FloorDiv, nodes.Mod, nodes.Pow),
        Run.binary,
    ),
    nodes.And: lambda run, node, scope: (
        run.value(node.left, scope) and run.value(node.right, scope)
    ),
    nodes.Or: lambda run, node, scope: run.value(node.left, scope) or run.value(node.right, scope),
    nodes.Not: lambda run, node, scope: not run.value(node.node, scope),
    nodes.Neg: Run.sign,
    nodes.Pos: Run.sign,
}
