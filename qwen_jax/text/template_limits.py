"""Bounds on what a chat template may do, since it comes with a checkpoint and is not to be trusted.

A template is a program. The sandbox keeps it from reading files; it does not keep it from looping
for ever or from building a string of ten gigabytes. Every way in which jinja2 repeats or
multiplies something is therefore counted against a budget: loop steps, calls, filters, operators
and the text they make. The count does not depend on the machine, so the same messages always pass
or always fail. Each single step is bounded by the size of the longest string, so a template that
builds a huge string within the budget and then scans it in each loop step is slow, not endless.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jinja2
from jinja2 import nodes, runtime, sandbox, visitor

MAX_STEPS = 1_000_000
MAX_STRING = 50_000_000
MAX_CHARACTERS = 2_000_000_000
_MAX_BITS = 10_000
_LONG_WIDTH = re.compile(r"\d{8,}")
_WIDTH_METHODS = {"center", "ljust", "rjust", "zfill", "expandtabs"}
_WIDTH_FILTERS = {"center", "indent", "truncate", "wordwrap", "batch", "slice", "round", "tojson"}
_WRITES_ANY_VALUE = {"tojson", "string", "pprint", "join", "format", "urlencode", "xmlattr"}
_CONSTANT_TIME = {"length", "count", "first", "last", "default", "d", "attr"}

# No template can name a variable or filter with a space in it.
BUDGET = " budget"
_COUNTED = " counted"
_JOINED = " joined"


class TemplateTooLongError(Exception):
    """The template has used up its budget."""


@dataclasses.dataclass
class Budget:
    """What one rendering may still do.

    Attributes:
      steps: loop steps, calls and filters left.
      characters: characters of intermediate and final text left.
    """

    steps: int = MAX_STEPS
    characters: int = MAX_CHARACTERS

    def step(self, count: int = 1) -> None:
        """Takes `count` steps off."""
        self.steps -= count
        if self.steps < 0:
            raise TemplateTooLongError(f"it needs more than {MAX_STEPS} steps")

    def text(self, length: int) -> None:
        """Takes a string of `length` characters off."""
        self.characters -= length
        if length > MAX_STRING or self.characters < 0:
            raise TemplateTooLongError("it writes too much text")

    def value(self, value: Any) -> None:
        """Takes off what it costs to write `value`, counting a list as often as it is held."""
        pending = [value]
        while pending:
            item = pending.pop()
            if isinstance(item, str):
                self.text(len(item))
            elif isinstance(item, Mapping):
                self.step(1 + len(item))
                pending += [*item.keys(), *item.values()]
            elif isinstance(item, list | tuple):
                self.step(1 + len(item))
                pending += item


class _Counted:
    """An iterable whose steps are counted, with the length of what it wraps where that has one."""

    def __init__(self, budget: Budget, iterable: Iterable):
        self._budget, self._iterable = budget, iterable

    def __iter__(self) -> Iterator:
        for item in self._iterable:
            self._budget.step()
            yield item

    def __len__(self) -> int:
        return len(self._iterable)


class _CountingTransformer(visitor.NodeTransformer):
    """Puts a counting filter around what each loop runs over and what each `~` joins."""

    def visit_For(self, node: nodes.For) -> nodes.For:  # noqa: N802
        self.generic_visit(node)
        node.iter = _filtered(_COUNTED, node.iter)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:  # noqa: N802
        self.generic_visit(node)
        return _filtered(_JOINED, nodes.List(node.nodes, lineno=node.lineno))


def count_steps(template: nodes.Template) -> nodes.Template:
    """The parsed template with counters in it, for a `BoundedEnvironment`."""
    return _CountingTransformer().visit(template)


def _filtered(name: str, node: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class BoundedEnvironment(sandbox.ImmutableSandboxedEnvironment):
    """jinja2's immutable sandbox with everything that multiplies counted.

    A rendering must be given a `Budget` as its variable named `BUDGET`.
    """

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self, **options: Any):
        super().__init__(finalize=_counted_output, **options)
        self.concat = _bounded_concat
        self.filters = {name: _bounded(name, kept) for name, kept in self.filters.items()}
        self.filters[_COUNTED] = _counted_loop
        self.filters[_JOINED] = _counted_join
        # It invents text of any length, and no chat needs that.
        del self.globals["lipsum"]

    def add_filter(self, name: str, function: Callable) -> None:
        """Adds a filter, bounded like those of jinja2."""
        self.filters[name] = _bounded(name, function)

    def call(self, context: runtime.Context, function: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: D102
        budget = context.parent[BUDGET]
        budget.step()
        if isinstance(function, runtime.LoopContext) and args:
            args = (_Counted(budget, args[0]), *args[1:])
        receiver = getattr(getattr(function, "__wrapped__", function), "__self__", None)
        if isinstance(receiver, str):
            _check_string_method(budget, receiver, function.__name__, args, kwargs)
        result = super().call(context, function, *args, **kwargs)
        if isinstance(result, str):
            budget.text(len(result))
        return result

    def call_binop(self, context: runtime.Context, operator: str, left: Any, right: Any) -> Any:  # noqa: D102
        budget = context.parent[BUDGET]
        if operator == "*":
            _check_product(budget, left, right)
        elif operator == "**":
            bits = max(1, left.bit_length()) if isinstance(left, int) else 0
            if bits and isinstance(right, int) and bits * abs(right) > _MAX_BITS:
                raise TemplateTooLongError("it computes a number of thousands of digits")
        elif operator == "%" and isinstance(left, str):
            _check_format(budget, left, right)
        elif isinstance(left, list | tuple) and isinstance(right, list | tuple):
            budget.step(1 + (len(left) + len(right)) // 16)
        result = super().call_binop(context, operator, left, right)
        if isinstance(result, str):
            budget.text(len(result))
        return result


def _check_product(budget: Budget, left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        if left.bit_length() + right.bit_length() > _MAX_BITS:
            raise TemplateTooLongError("it computes a number of thousands of digits")
        return
    sequence, count = (right, left) if isinstance(left, int) else (left, right)
    if not isinstance(count, int):
        return
    if isinstance(sequence, str):
        budget.text(len(sequence) * max(count, 0))
    elif isinstance(sequence, list | tuple):
        budget.step(len(sequence) * max(count, 0))


def _check_format(budget: Budget, form: str, values: Any) -> None:
    """Refuses "%999999999d", "{:>999999999}" and widths that come from the values."""
    if _LONG_WIDTH.search(form):
        raise TemplateTooLongError("it formats text with a huge width")
    if "*" in form or re.search(r":[^{}]*\{", form):
        items = values.values() if isinstance(values, Mapping) else values
        _check_widths(items if isinstance(items, Iterable) else (items,))
    budget.value(values)


def _check_widths(values: Iterable) -> None:
    if any(isinstance(value, int) and value > MAX_STRING for value in values):
        raise TemplateTooLongError("it formats text with a huge width")


def _check_string_method(
    budget: Budget, text: str, method: str, args: tuple, kwargs: Mapping
) -> None:
    values = (*args, *kwargs.values())
    if method in _WIDTH_METHODS:
        _check_widths(values)
    elif method == "replace" and len(args) >= 2 and all(isinstance(a, str) for a in args[:2]):
        budget.text(len(text) + text.count(args[0]) * len(args[1]))
    elif method == "join" and args and isinstance(args[0], list | tuple):
        budget.value(args[0])
        budget.text(len(text) * len(args[0]))
    elif method in ("format", "format_map"):
        _check_format(budget, text, values)


def _bounded(name: str, function: Callable) -> Callable:
    """The filter `function` under a budget, called with what it asks jinja2 to pass."""
    passed = getattr(getattr(function, "jinja_pass_arg", None), "name", None)

    @jinja2.pass_context
    def bounded(context: runtime.Context, *args: Any, **kwargs: Any) -> Any:
        budget = context.parent[BUDGET]
        value, options = args[0] if args else None, (*args[1:], *kwargs.values())
        size = len(value) if isinstance(value, list | tuple | Mapping | range) else 0
        budget.step(1 if name in _CONSTANT_TIME else 1 + size // 16)
        if name in _WIDTH_FILTERS:
            _check_widths(options)
        if name in _WRITES_ANY_VALUE:
            budget.value(value)
        if name == "format" and isinstance(value, str):
            _check_format(budget, value, args[1:] or kwargs)
        if name == "join" and isinstance(value, list | tuple):
            budget.text(len(value) * sum(len(o) for o in options if isinstance(o, str)))
        if name == "replace" and len(options) >= 2 and isinstance(value, str):
            budget.text(len(value) + value.count(str(options[0])) * len(str(options[1])))
        first = {
            "context": (context,),
            "eval_context": (context.eval_ctx,),
            "environment": (context.environment,),
        }.get(passed, ())
        result = function(*first, *args, **kwargs)
        if isinstance(result, str):
            budget.text(len(result))
        return result

    return bounded


@jinja2.pass_context
def _counted_loop(context: runtime.Context, iterable: Any) -> _Counted:
    return _Counted(context.parent[BUDGET], iterable)


@jinja2.pass_context
def _counted_join(context: runtime.Context, values: list) -> str:
    context.parent[BUDGET].value(values)
    join = runtime.markup_join if context.eval_ctx.autoescape else runtime.str_join
    return join(values)


@jinja2.pass_context
def _counted_output(context: runtime.Context, value: Any) -> Any:
    context.parent[BUDGET].value(value)
    return value


def _bounded_concat(pieces: Iterable[str]) -> str:
    kept, length = [], 0
    for piece in pieces:
        kept.append(piece)
        length += len(piece)
        if length > MAX_STRING:
            raise TemplateTooLongError("it writes too much text")
    return "".join(kept)
