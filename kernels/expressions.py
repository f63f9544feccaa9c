"""Launch sizes as plain data: integer expressions of the axes of a node's inputs.

An engine without Python evaluates them at run time, TensorRT from its own symbolic dimensions; tests and readers
evaluate them with numbers. As JSON an expression is a number, {"dim": [input, axis]}, {"mul": [a, b]} or
{"cdiv": [a, b]}.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Dim:
    """Size of an axis of an input."""

    name: str
    axis: int


@dataclass(frozen=True)
class Mul:
    """Product of two expressions."""

    left: Expr
    right: Expr


@dataclass(frozen=True)
class CeilDiv:
    """Quotient of two expressions, rounded up."""

    left: Expr
    right: Expr


Expr = int | Dim | Mul | CeilDiv


def build(expression: Expr, dim: Callable[[str, int], Any], cdiv: Callable[[Any, Any], Any]) -> Any:
    """The expression over any numbers that multiply: dim(input, axis) gives an axis, cdiv divides rounding up."""
    if isinstance(expression, int):
        return expression
    if isinstance(expression, Dim):
        return dim(expression.name, expression.axis)
    left, right = (build(side, dim, cdiv) for side in (expression.left, expression.right))
    return left * right if isinstance(expression, Mul) else cdiv(left, right)


def evaluate(expression: Expr, shapes: Mapping[str, Sequence[int]]) -> int:
    """The expression for given shapes of the inputs."""
    return int(build(expression, lambda name, axis: shapes[name][axis], lambda a, b: -(-a // b)))


def to_data(expression: Expr) -> Any:
    """JSON-able form."""
    if isinstance(expression, int):
        return expression
    if isinstance(expression, Dim):
        return {"dim": [expression.name, expression.axis]}
    key = "mul" if isinstance(expression, Mul) else "cdiv"
    return {key: [to_data(expression.left), to_data(expression.right)]}


def from_data(data: Any) -> Expr:
    """The expression of a JSON-able form. Raises ValueError for anything else."""
    if isinstance(data, int) and not isinstance(data, bool):
        return data
    if isinstance(data, Mapping) and len(data) == 1:
        ((key, value),) = data.items()
        if key == "dim" and isinstance(value, Sequence) and len(value) == 2:
            return Dim(str(value[0]), int(value[1]))
        if key in ("mul", "cdiv") and isinstance(value, Sequence) and len(value) == 2:
            left, right = (from_data(side) for side in value)
            return Mul(left, right) if key == "mul" else CeilDiv(left, right)
    raise ValueError(f"launch expression {data!r}: expected a number, or one of dim, mul, cdiv with two operands")
