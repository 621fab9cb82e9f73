"""Runs one chat template the way transformers 5.23 runs it, within bounds.

The source of the settings is transformers' `chat_template_utils`: blocks trimmed, `break` and
`continue`, a `generation` block that is transparent here, a `tojson` that keeps non-ASCII text and
key order, `raise_exception`, `strftime_now`, and guarded `dict` and `namespace`.
"""

import dataclasses
import datetime
import functools
import json
from collections.abc import Callable, Mapping
from typing import Any

import jinja2
from jinja2 import ext, nodes, runtime, utils
from jinja2.parser import Parser

from qwen_jax.errors import UserError
from qwen_jax.text.template_limits import (
    BUDGET,
    BoundedEnvironment,
    Budget,
    TemplateTooLongError,
    count_steps,
)

_NOW = " now"


@dataclasses.dataclass(frozen=True)
class Template:
    """A chat template as text.

    Attributes:
      source: the jinja2 text.
      name: the file (and field) it comes from, for messages to the user.
    """

    source: str
    name: str


class _Refusal(jinja2.TemplateError):
    """What a template says through raise_exception."""


class _GenerationBlock(ext.Extension):
    """`{% generation %}`: the text of the assistant, which training masks by and we just write."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A call block rather than a scope: names that are set inside must not leave it.
        return nodes.CallBlock(self.call_method("_write"), [], [], body).set_lineno(line)

    def _write(self, caller: Callable[[], str]) -> str:
        return caller()


class _TemplateDict:
    """`dict(...)` and `dict.fromkeys(...)` without the class and its other attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict:
        return dict.fromkeys(*args)


class _TemplateNamespace(utils.Namespace):
    """jinja2's namespace without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any):
        # `self` is not a parameter, so that a template may say namespace(self=...).
        self, values = args[0], dict(*args[1:], **kwargs)
        for name in values:
            _check_attribute(name)
        utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


def _check_attribute(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace may not hold {name!r}")


def _raise_exception(message: Any = "") -> None:
    raise _Refusal(str(message))


@jinja2.pass_context
def _strftime_now(context: runtime.Context, format: str) -> str:
    return context.parent[_NOW].strftime(format)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


@functools.cache
def environment() -> BoundedEnvironment:
    """The one environment; a rendering keeps all its state in its own context."""
    env = BoundedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, ext.loopcontrols]
    )
    env.add_filter("tojson", _tojson)
    env.globals["raise_exception"] = _raise_exception
    env.globals["strftime_now"] = _strftime_now
    env.globals["dict"] = _TemplateDict()
    env.globals["namespace"] = _TemplateNamespace
    return env


def parse(template: Template) -> nodes.Template:
    """The syntax tree of the template.

    Raises:
      UserError: the template isn't valid jinja2; names the file and the line.
    """
    try:
        return environment().parse(template.source)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(
            f"{template.name}: chat template has a syntax error at line {error.lineno}:"
            f" {_one_line(error.message)}; fix the template"
        ) from None
    except RecursionError:
        raise UserError(f"{template.name}: chat template is nested too deep") from None


def compile_tree(tree: nodes.Template, template: Template) -> jinja2.Template:
    """The program of a syntax tree from `parse`, which this changes.

    Raises:
      UserError: the template uses a filter or a test that doesn't exist, or nests too deep.
    """
    try:
        return environment().from_string(count_steps(tree))
    except Exception as error:
        raise UserError(
            f"{template.name}: chat template cannot be compiled ({_one_line(error)});"
            " fix the template"
        ) from None


def render(
    program: jinja2.Template,
    template: Template,
    variables: Mapping[str, Any],
    now: datetime.datetime | None = None,
) -> str:
    """The text that the template writes.

    Args:
      program: from `compile_tree`.
      template: where the program comes from, for messages.
      variables: what the template sees.
      now: what strftime_now calls now; the clock's time where None.

    Raises:
      UserError: the template refuses these variables, fails on them, or runs out of its budget.
    """
    now = now or datetime.datetime.now()
    try:
        return program.render({**variables, BUDGET: Budget(), _NOW: now})
    except _Refusal as error:
        raise UserError(
            f"{template.name}: chat template refuses these messages: {_one_line(error)}"
        ) from None
    except (TemplateTooLongError, MemoryError) as error:
        reason = _one_line(error) or "it needs too much memory"
        raise UserError(
            f"{template.name}: chat template was stopped because {reason};"
            " use a template without endless loops"
        ) from None
    except RecursionError:
        raise UserError(
            f"{template.name}: chat template was stopped because it calls itself without end;"
            " use a template without endless recursion"
        ) from None
    except Exception as error:
        # A template can fail in any way a program can; all of them are the input's fault.
        raise UserError(
            f"{template.name}: chat template fails on these messages:"
            f" {type(error).__name__}: {_one_line(error)}"
        ) from None


def _one_line(error: object) -> str:
    return " ".join(str(error).split())[:500]
