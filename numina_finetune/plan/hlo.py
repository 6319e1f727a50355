"""The compiler's optimised program, read from its text."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

BYTES = {
    "pred": 1.0,
    **{f"{sign}{bits}": bits / 8 for sign in "su" for bits in (2, 4, 8, 16, 32, 64)},
    **{"bf16": 2.0, "f16": 2.0, "f32": 4.0, "f64": 8.0, "c64": 8.0},
    **{f"f8{kind}": 1.0 for kind in ("e4m3fn", "e5m2", "e4m3", "e4m3b11fnuz", "e5m2fnuz", "e4m3fnuz", "e3m4")},
}
"""Of one element; types without data (tokens) are not here."""
_ARRAY = re.compile(rf"\b({'|'.join(sorted(BYTES, key=len, reverse=True))})\[([0-9,]*)\](\{{[^}}]*\}})?")
_TILE = re.compile(r"T\(([0-9,*]+)\)")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-<>]+) = ")
_OPERAND = re.compile(r"%([\w.\-<>]+)")
_MODULE = re.compile(r"module=([^;]*);")


@dataclass(frozen=True)
class Array:
    """Shape, type and place of one array."""

    dtype: str
    dims: tuple[int, ...]
    layout: str = ""

    @property
    def bytes(self) -> float:
        """Without what the layout adds."""
        return BYTES[self.dtype] * math.prod(self.dims)

    @property
    def allocated(self) -> float:
        """Bytes of memory: the last two dimensions of the layout are rounded up to whole tiles."""
        tile = _TILE.search(self.layout)
        order = re.match(r"\{([0-9,]*)", self.layout)
        if not tile or not order or not order[1] or "*" in tile[1]:
            return self.bytes
        sizes = [self.dims[int(dim)] for dim in reversed(order[1].split(","))]
        for place, multiple in enumerate(reversed(tile[1].split(",")), start=1):
            if place <= len(sizes):
                sizes[-place] = math.ceil(sizes[-place] / int(multiple)) * int(multiple)
        return BYTES[self.dtype] * math.prod(sizes)

    @property
    def in_hbm(self) -> bool:
        """Whether it lies in the chip's main memory: S(1) and above are memories on the core."""
        return "S(" not in self.layout


@dataclass(frozen=True, eq=False)
class Instruction:
    name: str
    is_root: bool
    shape: str
    opcode: str
    operands: tuple[str, ...]
    arguments: str
    """What stands in the parentheses."""
    attributes: str

    @cached_property
    def arrays(self) -> tuple[Array, ...]:
        return arrays(self.shape)

    @property
    def bytes(self) -> float:
        return sum(array.bytes for array in self.arrays)

    @cached_property
    def op_name(self) -> str:
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @property
    def module(self) -> str:
        """Name of the module that asked for it, ``backward `` before it where it is a gradient's; "" = none."""
        return module_of(self.op_name)

    @property
    def is_async_end(self) -> bool:
        return self.opcode.endswith("-done")

    def called(self, role: str) -> str | None:
        """The computation that it names as ``role``: calls, body, condition, to_apply."""
        found = re.search(rf"\b{role}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else None

    @property
    def branches(self) -> list[str]:
        """Computations of a conditional."""
        several = re.search(r"branch_computations=\{([^}]*)\}", self.attributes)
        if several:
            return _OPERAND.findall(several[1])
        return [name for role in ("true_computation", "false_computation") if (name := self.called(role))]

    @property
    def tuple_index(self) -> int | None:
        found = re.search(r"\bindex=(\d+)", self.attributes) if self.opcode == "get-tuple-element" else None
        return int(found[1]) if found else None


@dataclass
class Computation:
    """A function of the program; its instructions stand in the order in which they run."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions.values())

    @cached_property
    def root(self) -> Instruction:
        return next(one for one in self if one.is_root)

    @cached_property
    def parameters(self) -> list[Instruction]:
        """In the order of their numbers."""
        found = [one for one in self if one.opcode == "parameter"]
        return sorted(found, key=lambda one: int(one.arguments))

    def operand(self, one: Instruction, number: int) -> Instruction | None:
        return self.instructions.get(one.operands[number]) if number < len(one.operands) else None


@dataclass(frozen=True)
class Program:
    computations: dict[str, Computation]
    entry: Computation
    header: str

    @cached_property
    def aliased_outputs(self) -> dict[int, int]:
        """Number of an output to that of the parameter whose memory it takes."""
        return {int(out): int(into) for out, into in re.findall(r"\{(\d+)\}: \((\d+), \{\}", self.header)}


def arrays(shape: str) -> tuple[Array, ...]:
    """All arrays in the text of a shape, of a tuple too."""
    return tuple(
        Array(dtype, tuple(int(dim) for dim in dims.split(",") if dim), layout or "")
        for dtype, dims, layout in _ARRAY.findall(shape)
    )


def module_of(op_name: str) -> str:
    """The module in an operation's ``op_name``; the innermost where several stand there."""
    found = _MODULE.findall(op_name)
    return found[-1] if found else ""


def parse(text: str) -> Program:
    """The program of an HLO text.

    Raises:
        ValueError: the text has no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry: Computation | None = None
    current: Computation | None = None
    pending = ""
    header = text.partition("\n")[0]
    for line in text.splitlines():
        begins = _COMPUTATION.match(line) if line and not line[0].isspace() else None
        if begins:
            current = computations[begins[2]] = Computation(begins[2])
            entry = current if begins[1] else entry
            continue
        if current is None:
            continue
        if line.rstrip() == "}":
            _add(current, pending)
            current, pending = None, ""
        elif _INSTRUCTION.match(line):
            _add(current, pending)
            pending = line
        elif pending:  # a constant's or a kernel's text may go on over several lines
            pending += " " + line.strip()
    if entry is None:
        raise ValueError("the text is no HLO module: it has no ENTRY computation")
    return Program(computations, entry, header)


def _add(computation: Computation, line: str) -> None:
    found = _INSTRUCTION.match(line)
    if not found:
        return
    rest = line[found.end() :]
    end = _shape_end(rest)
    shape, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    arguments = rest[opening + 1 : closing]
    computation.instructions[found[2]] = Instruction(
        found[2],
        bool(found[1]),
        shape,
        rest[:opening],
        tuple(_OPERAND.findall(arguments)),
        arguments,
        rest[closing + 1 :],
    )


def _shape_end(text: str) -> int:
    if text.startswith("("):
        return _closing(text, 0) + 1
    depth = 0
    for position, sign in enumerate(text):
        if sign in "{[(":
            depth += 1
        elif sign in "}])":
            depth -= 1
        elif sign == " " and depth == 0:
            return position
    return len(text)


def _closing(text: str, opening: int) -> int:
    """Position of the bracket that closes the one at ``opening``."""
    depth = 0
    for position in range(opening, len(text)):
        if text[position] in "([{":
            depth += 1
        elif text[position] in ")]}":
            depth -= 1
            if depth == 0:
                return position
    return len(text) - 1
