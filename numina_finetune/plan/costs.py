"""What one run of an optimised program costs a chip: products, collectives, kernels, and the compiler's own cycles.

The compiler's cost analysis counts a loop's body once; here everything is multiplied by the turns of the loops that it
stands in.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass, field

from numina_finetune.plan.hlo import Computation, Instruction, Program

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
    "collective-broadcast",
)
_SAME_VALUE = ("copy", "bitcast", "convert", "reshape", "copy-start", "copy-done")
AS_NEEDED = "numina_as_needed"
"""In the name of a loop over what unbalanced routing sends too much; see `numina_finetune.xla.expert_kernel`."""
_UNREAL_CYCLES = 1e15
"""What the compiler writes where it has no estimate."""


@dataclass
class Costs:
    """Of one chip, loops multiplied in."""

    matmul_flops: float = 0.0
    """In the program's own products; kernels are opaque to it."""
    kernel_flops: float = 0.0
    """As the kernels' authors state them; 0 for a kernel that states none."""
    collective_count: Counter[str] = field(default_factory=Counter)
    collective_bytes: Counter[str] = field(default_factory=Counter)
    """By kind: gathers count what comes out, all others what goes in."""
    cycles: float = 0.0
    """The compiler's estimates, which leave out kernels and collectives."""
    kernels: Counter[str] = field(default_factory=Counter)
    module_flops: Counter[str] = field(default_factory=Counter)
    hbm_bytes: float = 0.0
    """What instructions read and write in main memory, each operand once."""
    warnings: list[str] = field(default_factory=list)

    @property
    def total_collective_bytes(self) -> float:
        return float(sum(self.collective_bytes.values()))


def costs_of(program: Program) -> Costs:
    """The costs of one run of ``program``."""
    walk = _Walk(program)
    walk.visit(program.entry, 1, "", in_fusion=False)
    return walk.costs


class _Walk:
    def __init__(self, program: Program) -> None:
        self._program = program
        self._seen: set[tuple[str, ...]] = set()
        self.costs = Costs()

    def visit(self, computation: Computation, times: float, place: str, *, in_fusion: bool) -> None:
        for one in computation:
            self._count(one, computation, times, place, in_fusion=in_fusion)
            if one.opcode == "while":
                body = one.called("body")
                turns = trip_count(one, computation, self._program)
                if turns is None and AS_NEEDED in one.attributes:
                    self.costs.warnings.append(
                        f"{one.module or one.name}: as with balanced routing, in which its loop never turns"
                    )
                    continue
                if turns is None:
                    self.costs.warnings.append(
                        f"how often the loop {one.name} turns is not in the program: counted once"
                    )
                self.visit(
                    self._program.computations[str(body)], times * (turns or 1), f"{place}/{one.name}", in_fusion=False
                )
            elif one.opcode == "conditional":
                self.costs.warnings.append(f"all branches of {one.name} are counted")
                for branch in one.branches:
                    within = f"{place}/{one.name}/{branch}"
                    self.visit(self._program.computations[branch], times, within, in_fusion=False)
            elif one.opcode in ("fusion", "call", "async-start"):
                name = one.called("calls") or one.called("to_apply")
                if name in self._program.computations:
                    inside = in_fusion or one.opcode == "fusion"
                    self.visit(self._program.computations[str(name)], times, place, in_fusion=inside)

    def _count(self, one: Instruction, computation: Computation, times: float, place: str, *, in_fusion: bool) -> None:
        costs = self.costs
        if one.opcode in ("dot", "convolution"):
            flops = times * (_dot_flops if one.opcode == "dot" else _convolution_flops)(one, computation)
            costs.matmul_flops += flops
            costs.module_flops[one.module] += flops  # type: ignore[assignment]
        kind = one.opcode.removesuffix("-start")
        if kind in COLLECTIVES and self._first_sight(one, computation, place, in_fusion=in_fusion):
            costs.collective_count[kind] += times  # type: ignore[assignment]
            costs.collective_bytes[kind] += times * _moved(one, kind, computation)  # type: ignore[assignment]
        if one.opcode == "custom-call" and "tpu_custom_call" in one.attributes:
            costs.kernels[re.sub(r"[.\d]+$", "", one.name)] += times  # type: ignore[assignment]
            stated = re.search(r'"cost_estimate":\{"flops":"?(-?\d+)', one.attributes)
            costs.kernel_flops += times * max(0.0, float(stated[1])) if stated else 0.0
        if in_fusion:
            return
        cycles = re.search(r'"estimated_cycles":"?(\d+)', one.attributes)
        if cycles and float(cycles[1]) < _UNREAL_CYCLES:
            costs.cycles += times * float(cycles[1])
        if one.opcode in ("fusion", "dot", "convolution", "custom-call", "copy", "copy-start", "sort", "reduce"):
            costs.hbm_bytes += times * _traffic(one, computation, self._program)

    def _first_sight(self, one: Instruction, computation: Computation, place: str, *, in_fusion: bool) -> bool:
        """False for a collective that overlaps with other work and stands in each of its parts again."""
        channel = re.search(r"channel_id=(\d+)", one.attributes)
        chain = re.search(r'chain_id="(\d+)"', one.attributes)
        key: tuple[str, ...] = (place, computation.name, one.name)
        if in_fusion and channel and chain:
            key = (place, one.opcode, channel[1], chain[1])
        new = key not in self._seen
        self._seen.add(key)
        return new


def _moved(one: Instruction, kind: str, computation: Computation) -> float:
    """Bytes of a collective: what a chip holds of it."""
    given = sum(operand.bytes for name in one.operands if (operand := computation.instructions.get(name)))
    if kind == "all-gather":
        return one.bytes - (given if one.opcode.endswith("-start") else 0.0)
    return given


def _traffic(one: Instruction, computation: Computation, program: Program) -> float:
    """Bytes that an instruction must read and write in main memory: of a stack, only the rows that it touches."""
    given = [computation.instructions.get(name) for name in one.operands]
    if one.opcode == "copy-start":
        moved = [*(given[0].arrays[:1] if given and given[0] else ()), *one.arrays[:1]]
        return sum(array.bytes for array in moved if array.in_hbm)
    inner = program.computations.get(one.called("calls") or "") if one.opcode == "fusion" else None
    read = 0.0
    for number, operand in enumerate(given):
        for array in operand.arrays if operand else ():
            if array.in_hbm:
                parameter = inner.parameters[number] if inner and number < len(inner.parameters) else None
                touched = _rows_touched(parameter, inner) if parameter and inner else None
                read += array.bytes if touched is None else min(touched, array.bytes)
    written = 0.0
    results = _results(inner) if inner else []
    for number, array in enumerate(one.arrays):
        update = results[number] if number < len(results) else None
        rows = _update_bytes(update, inner) if update and inner else None
        written += 0.0 if not array.in_hbm else array.bytes if rows is None else rows
    return read + written


def _results(computation: Computation) -> list[Instruction | None]:
    root = computation.root
    if root.opcode != "tuple":
        return [root]
    return [computation.instructions.get(name) for name in root.operands]


def _update_bytes(one: Instruction, computation: Computation) -> float | None:
    """Of the rows that an update writes; None where it is another operation."""
    current: Instruction | None = one
    while current is not None and current.opcode in ("bitcast", "reshape"):
        current = computation.operand(current, 0)
    if current is None or current.opcode != "dynamic-update-slice":
        return None
    rows = computation.operand(current, 1)
    return rows.bytes if rows else None


def _rows_touched(parameter: Instruction, computation: Computation) -> float | None:
    """Bytes of an argument that a fusion reads; None where it reads all of it."""
    touched, waiting = 0.0, [parameter.name]
    while waiting:
        name = waiting.pop()
        for user in computation:
            if name not in user.operands:
                continue
            if user.opcode in ("bitcast", "reshape"):
                waiting.append(user.name)
            elif user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == name:
                touched += user.bytes
            elif user.opcode != "dynamic-update-slice" or user.operands[0] != name:
                return None
    return touched


def _dot_flops(one: Instruction, computation: Computation) -> float:
    left = computation.operand(one, 0)
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.attributes)
    if left is None or contracted is None:
        return 0.0
    inner = math.prod(left.arrays[0].dims[int(dim)] for dim in contracted[1].split(",") if dim)
    return 2.0 * math.prod(one.arrays[0].dims) * inner


def _convolution_flops(one: Instruction, computation: Computation) -> float:
    """The TPU's compiler writes matrix products as convolutions, sometimes over a padded or dilated window."""
    left, right = computation.operand(one, 0), computation.operand(one, 1)
    labels = re.search(r"dim_labels=([\w?]+)_([\w?]+)->([\w?]+)", one.attributes)
    if left is None or right is None or labels is None:
        return 0.0
    given, kernel, made = left.arrays[0].dims, right.arrays[0].dims, one.arrays[0].dims
    window = re.search(r"window=\{([^}]*)\}", one.attributes)
    options = dict(entry.split("=") for entry in window[1].split()) if window else {}
    groups = re.search(r"feature_group_count=(\d+)", one.attributes)
    batches = re.search(r"batch_group_count=(\d+)", one.attributes)
    products = 1
    for dim in range(sum(label.isdigit() for label in labels[3])):
        label = str(dim)
        products *= _window_products(
            given[labels[1].index(label)], made[labels[3].index(label)], _Window.of(options, dim, kernel, labels[2])
        )
    features = given[labels[1].index("f")] // (int(groups[1]) if groups else 1)
    rows = given[labels[1].index("b")] // (int(batches[1]) if batches else 1)
    return 2.0 * features * made[labels[3].index("f")] * rows * products


@dataclass(frozen=True)
class _Window:
    """One spatial dimension of a convolution's window."""

    size: int
    stride: int
    padding: int
    given_dilation: int
    window_dilation: int

    @staticmethod
    def of(options: dict[str, str], dim: int, kernel: tuple[int, ...], labels: str) -> _Window:
        def value(name: str, otherwise: int) -> int:
            return int(options[name].split("x")[dim].split("_")[0]) if name in options else otherwise

        return _Window(
            value("size", kernel[labels.index(str(dim))] if "size" not in options else 1),
            value("stride", 1),
            value("pad", 0),
            value("lhs_dilate", 1),
            value("rhs_dilate", 1),
        )


def _window_products(given: int, made: int, window: _Window) -> int:
    """Pairs of an output position and a place in the window at which there is input, not padding."""
    found = 0
    for place in range(window.size):
        # position = output · stride − padding + place · dilation, in the dilated input
        shift = place * window.window_dilation - window.padding
        if window.given_dilation == 1:
            low = max(0, -(shift // window.stride))
            high = min(made - 1, (given - 1 - shift) // window.stride)
            found += max(0, high - low + 1)
        else:
            positions = (output * window.stride + shift for output in range(made))
            found += sum(
                position % window.given_dilation == 0 and 0 <= position // window.given_dilation < given
                for position in positions
            )
    return found


# --- how often a loop turns -----------------------------------------------------------------------------------------


def trip_count(loop: Instruction, computation: Computation, program: Program) -> int | None:
    """Turns of a ``while``: what the compiler notes, or what its counter and limit say; None = not to be seen."""
    noted = re.search(r'known_trip_count"?:\s*\{"?n"?:"?(\d+)', loop.attributes)
    if noted:
        return int(noted[1])
    condition = program.computations[str(loop.called("condition"))]
    compared = _comparison(condition, program)
    if compared is None:
        return _wide_limit(condition)
    left, right, direction = compared
    start = computation.operand(loop, 0)
    values = start if start is not None and start.opcode == "tuple" else None
    limits = [_limit(side, values, computation) for side in (left, right)]
    counters = [side if isinstance(side, int) else None for side in (left[1], right[1])]
    # The counter stands on the left of <, or on the right of >.
    order = (0, 1) if direction in ("LT", "LE") else (1, 0)
    limit, counter = limits[order[1]], counters[order[0]]
    if limit is None:
        return None
    first = limits[order[0]] if counter is not None else 0
    body = program.computations[str(loop.called("body"))]
    step = _step(counter, body) if counter is not None else 1
    turns = math.ceil((limit - (first or 0)) / step) + (1 if direction in ("LE", "GE") else 0)
    return max(turns, 0)


def _wide_limit(condition: Computation) -> int | None:
    """The limit of a 64-bit counter from 0, which the TPU holds as two words: ``high < 0 or high == 0 and low < n``."""
    limits = [
        value
        for one in condition
        if one.opcode == "compare" and "direction=LT" in one.attributes
        for name in one.operands
        if (value := _constant(name, condition)) is not None and value > 0
    ]
    return limits[0] if condition.root.opcode == "or" and len(limits) == 1 else None


_Side = tuple[int | None, int | None]
"""A constant's value, or the place in the loop's tuple."""


def _comparison(condition: Computation, program: Program) -> tuple[_Side, _Side, str] | None:
    root, scope, names = condition.root, condition, {}
    if root.opcode == "fusion":
        inner = program.computations[str(root.called("calls"))]
        names = {parameter.name: root.operands[number] for number, parameter in enumerate(inner.parameters)}
        root, scope = inner.root, inner
    direction = re.search(r"direction=(\w+)", root.attributes)
    if root.opcode != "compare" or direction is None or len(root.operands) != 2:
        return None
    sides: list[_Side] = []
    for name in root.operands:
        own = _constant(name, scope)
        if own is None and name in names:
            own = _constant(names[name], condition)
        sides.append((own, _tuple_index(names.get(name, name), condition)))
    return sides[0], sides[1], direction[1]


def _limit(side: _Side, start: Instruction | None, computation: Computation) -> int | None:
    """A constant, or what the loop's tuple begins with at that place."""
    constant, index = side
    if constant is not None or start is None or index is None or index >= len(start.operands):
        return constant
    return _constant(start.operands[index], computation)


def _step(index: int, body: Computation) -> int:
    if body.root.opcode != "tuple":
        return 1
    next_value = body.instructions.get(body.root.operands[index])
    while next_value is not None and next_value.opcode in _SAME_VALUE:
        next_value = body.operand(next_value, 0)
    if next_value is None or next_value.opcode != "add":
        return 1
    steps = [value for name in next_value.operands if (value := _constant(name, body)) is not None]
    return steps[0] if steps and steps[0] > 0 else 1


def _constant(name: str, computation: Computation) -> int | None:
    one = computation.instructions.get(name)
    while one is not None and one.opcode in _SAME_VALUE:
        one = computation.operand(one, 0)
    if one is None or one.opcode != "constant":
        return None
    found = re.match(r"\s*(-?\d+)\s*$", one.arguments)
    return int(found[1]) if found else None


def _tuple_index(name: str, computation: Computation) -> int | None:
    one = computation.instructions.get(name)
    while one is not None and one.opcode in _SAME_VALUE:
        one = computation.operand(one, 0)
    return one.tuple_index if one is not None else None
