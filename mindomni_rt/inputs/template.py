"""Chat templates, rendered as transformers renders them, with limits.

A template is somebody's program. It runs in jinja2's immutable sandbox, in which every loop, call and operator is
replaced by one that counts: a template that would run for minutes or fill memory ends in an error by name. Filters and
methods whose result may be much larger than what they are given are not available, or check the size first.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from types import GeneratorType
from typing import Any

from ..errors import BadCheckpointError

MOST_SOURCE = 2**18  # characters of the template itself; Qwen's longest has 5,000
MOST_SIZE = 2**20  # characters of one value, with all that it holds
MOST_OUTPUT = 2**22
MOST_STEPS = 50_000
MOST_SECONDS = 5.0
# fmt: off
_FILTERS = frozenset((
    "abs", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "int", "items", "last",
    "length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "reverse", "safe", "select", "selectattr",
    "sort", "string", "sum", "title", "trim", "unique", "upper",
))
_STRING_METHODS = frozenset((
    "capitalize", "casefold", "count", "endswith", "find", "index", "isalnum", "isalpha", "isascii", "isdecimal",
    "isdigit", "islower", "isnumeric", "isspace", "istitle", "isupper", "lower", "lstrip", "partition", "removeprefix",
    "removesuffix", "rfind", "rindex", "rpartition", "rsplit", "rstrip", "split", "splitlines", "startswith", "strip",
    "swapcase", "title", "upper",
))
# fmt: on
_METHODS: dict[type, frozenset[str]] = {
    str: _STRING_METHODS,
    dict: frozenset(("get", "items", "keys", "values")),
    list: frozenset(("count", "index")),
    tuple: frozenset(("count", "index")),
}
_DATA = (str, bytes, int, float, complex, list, tuple, dict, set, frozenset, range, type)


class TooMuch(Exception):
    """A template went over a limit."""


class Budget:
    """What one rendering may still use."""

    def __init__(self) -> None:
        self.steps, self.output = MOST_STEPS, MOST_OUTPUT
        self.end = time.monotonic() + MOST_SECONDS

    def step(self, output: int = 0) -> None:
        """Counts one turn of a loop, one call or one operator, and characters of output."""
        self.steps -= 1
        self.output -= output
        if self.steps < 0:
            raise TooMuch(f"more than {MOST_STEPS} steps")
        if self.output < 0:
            raise TooMuch(f"more than {MOST_OUTPUT} characters of text")
        if time.monotonic() > self.end:
            raise TooMuch(f"more than {MOST_SECONDS:g} seconds")


def bounded(value: Any) -> Any:
    """The value, if it and all that it holds is small."""
    if isinstance(value, str):
        if len(value) > MOST_SIZE:
            raise TooMuch(f"a text of more than {MOST_SIZE} characters")
        return value
    room, stack = MOST_SIZE, [value]
    while stack:
        item = stack.pop()
        room -= len(item) + 8 if isinstance(item, str) else 8
        if isinstance(item, int) and not isinstance(item, bool):
            room -= item.bit_length() // 3
        elif isinstance(item, dict):
            stack += [*item.keys(), *item.values()]
        elif isinstance(item, (list, tuple, set)):
            stack += item
        if room < 0 or len(stack) > MOST_SIZE:
            raise TooMuch(f"a value of more than {MOST_SIZE} characters")
    return value


class Template:
    """A compiled chat template. Raises BadCheckpointError if it does not parse or asks for what is not available."""

    def __init__(self, source: str, where: str) -> None:
        from jinja2 import TemplateError

        self.where = where
        if len(source) > MOST_SOURCE:
            raise BadCheckpointError(
                f"{where}: chat template of {len(source)} characters; expected {MOST_SOURCE} at most"
            )
        try:
            self._environment = _environment()
            self._template = self._environment.compiled(source)
        except (TemplateError, RecursionError, SyntaxError, ValueError, TooMuch) as error:
            reason = "nested too deep" if isinstance(error, RecursionError) else error
            raise BadCheckpointError(f"{where}: chat template does not parse: {reason}") from error

    def render(self, messages: Sequence[Mapping[str, Any]], special: Mapping[str, Any]) -> str:
        """The text of a chat with the generation prompt appended. special: bos_token, eos_token, … by name."""
        self._environment.budget = Budget()
        context = {"tools": None, "documents": None, **special}
        try:
            text = self._template.render(messages=list(messages), add_generation_prompt=True, **context)
            return str(bounded(text))
        except TooMuch as error:
            raise BadCheckpointError(f"{self.where}: chat template stopped: {error}") from error
        except RecursionError as error:
            raise BadCheckpointError(f"{self.where}: chat template stopped: it calls itself too deep") from error
        except Exception as error:  # a template may divide by zero, or pass anything to a filter
            raise BadCheckpointError(f"{self.where}: chat template failed: {error}") from error


def _environment() -> Any:
    """jinja2 is imported here, not on import of the package."""
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.visitor import NodeTransformer

    class Generation(Extension):
        """{% generation %} marks what an assistant wrote, for training; here it is its content."""

        tags = {"generation"}  # noqa: RUF012 jinja2 declares it so

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    class Counted(NodeTransformer):
        """Wraps what may be large or long: loops count their turns, other results are bounded."""

        def __init__(self, constant: int) -> None:
            self.constant = constant  # characters of fixed text that one call of a macro may write

        def generic_visit(self, node: Any, *args: Any, **kwargs: Any) -> Any:
            if isinstance(node, (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends, nodes.Block)):
                raise jinja2.TemplateSyntaxError("it includes another template; there is only one", node.lineno)
            node = super().generic_visit(node, *args, **kwargs)
            for field in ("call", "filter"):  # what these statements apply must stay a plain call or filter
                inner = getattr(node, field, None) if isinstance(node, nodes.Stmt) else None
                if isinstance(inner, nodes.Call) and isinstance(inner.node, nodes.EnvironmentAttribute):
                    setattr(node, field, inner.args[0])
            if isinstance(node, nodes.For):
                text = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
                node.iter = self.wrap("counting", node.iter, nodes.Const(text))
            elif isinstance(node, nodes.Concat):
                return self.wrap("joined", *node.nodes)
            elif isinstance(node, nodes.Call):
                return self.wrap("bounded", node, nodes.Const(self.constant))
            elif isinstance(node, (nodes.BinExpr, nodes.Dict, nodes.List, nodes.Tuple, nodes.Filter)):
                plain = getattr(node, "ctx", "load") == "load" and getattr(node, "node", node) is not None
                return self.wrap("bounded", node) if plain else node
            return node

        @staticmethod
        def wrap(name: str, *arguments: Any) -> Any:
            # An attribute of the environment: a template has no way to name or replace it.
            line = arguments[0].lineno
            return nodes.Call(nodes.EnvironmentAttribute(name), list(arguments), [], None, None, lineno=line)

    class Environment(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(["+", "-", "*", "/", "//", "%", "**"])
        budget = Budget()

        def compiled(self, source: str) -> Any:
            tree = self.parse(source)
            macros = (data for macro in tree.find_all(nodes.Macro) for data in macro.find_all(nodes.TemplateData))
            tree = Counted(sum(len(data.data) for data in macros)).visit(tree)
            return jinja2.Template.from_code(self, self.compile(tree), self.make_globals(None), None)

        def bounded(self, value: Any, output: int = 0) -> Any:
            self.budget.step(output)
            # A lazy chain of filters would do all its work in one step.
            return bounded(list(self.counting(value, 0)) if isinstance(value, GeneratorType) else value)

        def counting(self, values: Iterable[Any], output: int) -> Any:
            return _Counting(values, self.budget, output)

        def joined(self, *values: Any) -> str:
            self.budget.step()
            return _join(values)

        def shown(self, value: Any) -> Any:
            value = bounded(value)
            text = value if isinstance(value, (str, jinja2.Undefined)) else str(value)
            self.budget.step(len(str(text)))
            return text

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            _check_operands(operator, left, right)
            return super().call_binop(context, operator, left, right)

        def call(self, context: Any, target: Any, /, *arguments: Any, **keywords: Any) -> Any:
            owner, name = getattr(target, "__self__", None), getattr(target, "__name__", "")
            if isinstance(owner, str) and name in ("replace", "join"):
                return (_replace if name == "replace" else _join_method)(owner, *arguments, **keywords)
            known = next((names for kind, names in _METHODS.items() if isinstance(owner, kind)), frozenset())
            if name in ("format", "format_map") or (isinstance(owner, _DATA) and name not in known):
                raise jinja2.exceptions.SecurityError(f"method {name} is not available in a chat template")
            return super().call(context, target, *arguments, **keywords)

    def raise_exception(message: Any) -> None:
        raise jinja2.TemplateError(str(message))

    environment = Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        optimized=False,  # the optimizer would compute constants before any limit holds
        extensions=[Generation, "jinja2.ext.loopcontrols"],
    )
    environment.finalize = environment.shown
    available = environment.filters
    environment.filters = {name: available[name] for name in _FILTERS}
    environment.filters |= {"tojson": _tojson, "replace": _replace, "join": _join, "indent": _indent, "round": _round}
    del environment.globals["lipsum"]
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": _strftime_now}
    return environment


class _Counting:
    """An iterable whose turns are counted."""

    def __init__(self, values: Iterable[Any], budget: Budget, output: int) -> None:
        self._values, self._budget, self._cost = values, budget, output

    def __iter__(self) -> Iterator[Any]:
        for value in self._values:
            self._budget.step(self._cost)
            yield value

    def __len__(self) -> int:
        return len(self._values)  # type: ignore[arg-type]


def _check_operands(operator: str, left: Any, right: Any) -> None:
    if operator == "**":
        if not all(isinstance(x, (int, float)) and abs(x) <= 64 for x in (left, right)):
            raise TooMuch("a power of large numbers")
    elif operator == "%" and isinstance(left, str):
        raise TooMuch("% formatting, which may pad without limit; use ~")
    elif operator == "*":
        sizes = [len(x) if hasattr(x, "__len__") else None for x in (left, right)]
        if any(n is not None for n in sizes):
            count = math.prod(n if n is not None else max(0, int(x)) for n, x in zip(sizes, (left, right), strict=True))
            if count > MOST_SIZE:
                raise TooMuch(f"a value of more than {MOST_SIZE} characters")


def _replace(text: Any, old: Any, new: Any, count: int | None = None) -> str:
    text, old, new = str(text), str(old), str(new)
    if (text.count(old) + 1) * len(new) > MOST_SIZE:
        raise TooMuch(f"a text of more than {MOST_SIZE} characters")
    return text.replace(old, new, -1 if count is None else count)


def _join(values: Any, separator: Any = "", attribute: Any = None) -> str:
    parts, room = [], MOST_SIZE
    for value in values:
        item = value if attribute is None else value[attribute]
        parts.append(str(bounded(item)))
        room -= len(parts[-1]) + len(str(separator))
        if room < 0:
            raise TooMuch(f"a text of more than {MOST_SIZE} characters")
    return str(separator).join(parts)


def _join_method(separator: str, values: Any) -> str:
    return _join(values, separator)


def _indent(text: Any, width: Any = 4, first: bool = False, blank: bool = False) -> str:
    step = " " * width if isinstance(width, int) and width <= 64 else str(width)[:64]
    lines = str(text).splitlines(keepends=True)
    if len(lines) * len(step) > MOST_SIZE:
        raise TooMuch(f"a text of more than {MOST_SIZE} characters")
    plain = [(i == 0 and not first) or (not blank and not line.strip()) for i, line in enumerate(lines)]
    return "".join(line if as_it_is else step + line for line, as_it_is in zip(lines, plain, strict=True))


def _round(value: Any, precision: int = 0, method: str = "common") -> float:
    if method != "common" or not -20 <= precision <= 20:
        raise ValueError("round: expected method common and a precision from -20 to 20")
    return round(float(value), precision)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    if indent is not None and not (isinstance(indent, int) and indent <= 16):
        raise ValueError("tojson: expected an indent of at most 16")
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    if indent is None:
        return encoder.encode(value)
    return _join(encoder.iterencode(value))  # piece by piece: deep nesting makes long lines


def _strftime_now(form: str) -> str:
    if len(form) > 64:
        raise ValueError("strftime_now: expected a format of at most 64 characters")
    return datetime.now().strftime(form)
