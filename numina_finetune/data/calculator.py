"""GSM8K's calculator annotations as tool calls, and back, byte for byte.

An answer of https://github.com/openai/grade-school-math writes each calculation as the text that a calculator
replaces while the model writes: ``48/2 = <<48/2=24>>24 clips``. Here ``<<48/2=24>>`` becomes a call of the tool
``calculator`` with the expression ``48/2``, and the answer ``24`` of the tool. The text before it is the content of
the turn that calls; the text after it, which repeats the result, goes on in the next turn.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

from numina_finetune.data.conversation import Message
from numina_finetune.data.rounds import call_round, rebuilt
from numina_finetune.errors import DataError

CALCULATOR = "calculator"

CALCULATOR_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": CALCULATOR,
        "description": (
            "Works out one arithmetic expression and returns its value. It knows decimal numbers, + - * /, // (whole "
            "part of a quotient), % after a number (per cent) and parentheses."
        ),
        "parameters": {
            "type": "object",
            "properties": {"expression": {"type": "string", "description": "The expression, such as (48+24)/2."}},
            "required": ["expression"],
            "additionalProperties": False,
        },
    },
}
"""The tool that the calls name, as OpenAI's API defines tools."""

MAX_EXPRESSION = 200
"""Characters: far above any calculation in words problems, and too few to nest beyond what Python can parse."""

_ANNOTATION = re.compile(r"<<([^<>]*)>>")
_EXPRESSION = re.compile(r"[0-9.,+\-*/()% ]+")
_OPERATIONS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: lambda left, right: Fraction(left // right),
}


def without_annotations(answer: str) -> str:
    """The answer as a person reads it."""
    return _ANNOTATION.sub("", answer)


def to_messages(answer: str) -> list[Message]:
    """The answer as assistant and tool messages; one assistant message where it has no annotation.

    Raises:
        DataError: annotations that are no arithmetic, or whose result is not the expression's value, all at once.
    """
    texts = _ANNOTATION.split(answer)
    annotations = texts[1::2]
    if faults := [fault for number, text in enumerate(annotations, 1) if (fault := _fault(number, text))]:
        raise DataError(faults)
    messages: list[Message] = []
    for number, (before, annotation) in enumerate(zip(texts[::2], annotations, strict=False), 1):
        expression, _, result = annotation.rpartition("=")
        messages += call_round(number, before or None, CALCULATOR, {"expression": expression}, result)
    return [*messages, {"role": "assistant", "content": texts[-1]}]


def from_messages(messages: Sequence[Message]) -> str:
    """The annotated answer that :func:`to_messages` made these assistant and tool messages of.

    Raises:
        DataError: they are not of its kind.
    """
    return rebuilt(messages, CALCULATOR, lambda prose, call, result: f"{prose or ''}<<{call['expression']}={result}>>")


def evaluate(expression: str) -> Fraction:
    """The expression's exact value: decimals, + - * / // and parentheses; ``20%`` is 20/100, ``1,000`` is 1000.

    Raises:
        DataError: it is no such expression, or divides by zero.
    """
    if len(expression) > MAX_EXPRESSION or not _EXPRESSION.fullmatch(expression):
        raise DataError(
            f"{expression[:MAX_EXPRESSION]!r} is no arithmetic expression: use numbers and + - * / // % ( )"
        )
    source = re.sub(r"(?<=\d),(?=\d{3})", "", expression.strip())
    source = re.sub(r"(\d+\.?\d*|\.\d+) *%(?! *[\d.(])", r"(\1/100)", source)  # before a number % would be a remainder
    source = re.sub(r"(?<![\d.])0+(?=\d)", "", source)  # Python takes no 05
    try:
        return _value(ast.parse(source, mode="eval").body)
    except (SyntaxError, ValueError) as error:
        raise DataError(f"{expression!r} is no arithmetic expression: use numbers and + - * / // % ( )") from error
    except ZeroDivisionError as error:
        raise DataError(f"{expression!r} divides by zero: mend the expression") from error


def _value(node: ast.expr) -> Fraction:
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        return _OPERATIONS[type(node.op)](_value(node.left), _value(node.right))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = _value(node.operand)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return Fraction(str(node.value))  # the decimal as it is written, not the nearest binary fraction
    raise ValueError(f"{type(node).__name__} is not arithmetic")


def _fault(number: int, annotation: str) -> str | None:
    """What is wrong with an annotation; None where its result is its value, or that rounded to the result's digits."""
    expression, equals, result = annotation.rpartition("=")
    place = f"annotation {number}, {'<<' + annotation + '>>'!r}"
    if not equals:
        return f"{place}: has no result: write it as <<expression=result>>, or use another --gsm8k-style"
    try:
        value, given = evaluate(expression), evaluate(result)
    except DataError as error:
        return f"{place}: {error}, or use another --gsm8k-style"
    last_digit = Fraction(1, 10 ** len(result.strip().partition(".")[2]))
    if abs(value - given) > last_digit / 2:
        return f"{place}: the result is {float(value):g}: mend the row, or use another --gsm8k-style"
    return None
