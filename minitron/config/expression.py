"""Conditions over names and numbers, for the configuration: a tree of known nodes, never run as code."""

import ast
import itertools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence

from minitron.errors import ConfigError

_MAX_LENGTH = 400
"""Characters; keeps the tree shallow enough to walk."""

_ARITHMETIC: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_COMPARISONS: dict[type[ast.cmpop], Callable[[float, float], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}


class Condition:
    """A condition such as ``ffn_hidden_size <= 4 * hidden_size and num_layers % 2 == 0``.

    Known are numbers, the given names, ``+ - * / // %``, comparisons (chained too), ``and``, ``or``, ``not`` and
    parentheses; anything else is refused.

    Args:
        text: The condition.
        names: What it may name.
        key: Its place in the configuration, for messages.

    Raises:
        ConfigError: It cannot be read, names something else, or is a number rather than a condition.
    """

    def __init__(self, text: str, *, names: Sequence[str], key: str) -> None:
        self._where = f"{key}={text!r}"
        if len(text) > _MAX_LENGTH:
            raise ConfigError(f"{key} is {len(text)} characters long; use at most {_MAX_LENGTH}")
        try:
            self._tree = ast.parse(text.strip(), mode="eval").body
        except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
            reason = error.msg if isinstance(error, SyntaxError) else error
            raise ConfigError(
                f"{self._where} cannot be read ({reason}); write a condition such as hidden_size % 64 == 0"
            ) from None
        for node in _nodes(self._tree):
            self._check(node, names)
        if not _is_condition(self._tree):
            raise ConfigError(f"{self._where} is no condition; compare something, such as hidden_size % 64 == 0")

    @property
    def names(self) -> set[str]:
        """What the condition names."""
        return {node.id for node in ast.walk(self._tree) if isinstance(node, ast.Name)}

    def holds(self, values: Mapping[str, float]) -> bool:
        """Whether it is true.

        Args:
            values: The number behind every name.

        Raises:
            ConfigError: It divides by zero.
        """
        try:
            return bool(_value(self._tree, values))
        except ZeroDivisionError:
            raise ConfigError(f"{self._where} divides by zero for {dict(values)}") from None

    def _check(self, node: ast.AST, names: Sequence[str]) -> None:
        if isinstance(node, ast.Name) and node.id not in names:
            raise ConfigError(f"{self._where} names {node.id}; it may name {', '.join(names)}")
        known = (
            (isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC)
            or (isinstance(node, ast.Compare) and all(type(op) in _COMPARISONS for op in node.ops))
            or (isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Not))
            or (isinstance(node, ast.Constant) and type(node.value) in (int, float))
            or isinstance(node, ast.BoolOp | ast.Name)
        )
        if not known:
            raise ConfigError(
                f"{self._where} has {ast.unparse(node)!r}; only numbers, names, + - * / // %, comparisons, "
                "and, or, not are known"
            )


def _nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """The expressions of a tree, without operators and contexts."""
    return (node for node in ast.walk(tree) if isinstance(node, ast.expr))


def _is_condition(node: ast.AST) -> bool:
    """Whether it is true or false, rather than a number; both sides of ``and`` and ``or`` must be."""
    if isinstance(node, ast.BoolOp):
        return all(_is_condition(value) for value in node.values)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return _is_condition(node.operand)
    return isinstance(node, ast.Compare)


def _value(node: ast.AST, values: Mapping[str, float]) -> float:
    match node:
        case ast.Constant(value=int() | float() as number):
            return number
        case ast.Name(id=name):
            return values[name]
        case ast.BinOp(left=left, op=op, right=right):
            return _ARITHMETIC[type(op)](_value(left, values), _value(right, values))
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return not _value(operand, values)
        case ast.UnaryOp(operand=operand):
            return -_value(operand, values)
        case ast.BoolOp(op=ast.And(), values=parts):
            return all(_value(part, values) for part in parts)
        case ast.BoolOp(values=parts):
            return any(_value(part, values) for part in parts)
        case ast.Compare(left=first, ops=ops, comparators=rest):
            sides = [_value(side, values) for side in (first, *rest)]
            return all(_COMPARISONS[type(op)](*pair) for op, pair in zip(ops, itertools.pairwise(sides), strict=True))
    raise AssertionError(f"unchecked node {node}")
