"""What lies in a chip's memory when most of it is used, by kind, and the largest pieces with where they come from.

The compiler says how much, but not of what. Its program, though, stands in the order in which it runs: so what is alive
at each point can be followed, and the fullest point taken apart. What the compiler's own figure has beyond that
(alignment, fragmentation, its scratch space) is told as such.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from numina_finetune.plan.costs import COLLECTIVES
from numina_finetune.plan.hlo import Computation, Instruction, Program

KINDS = ("weights", "gradients", "optimizer", "saved activations", "logits", "collectives", "batch", "working memory")
"""Saved activations were made on the way forward and are used on the way back; collectives hold what travels, or has
arrived (gathered weights); working memory is all else."""
STACKED = ".["
"""In the name of an argument that holds all layers' weights: ``model.layers.[0::1].…``."""
_NO_MEMORY = frozenset(
    ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id")
)
_IN_PLACE = frozenset(
    ("while", "conditional", "call", "optimization-barrier", "copy-done", "async-done", "async-update")
)


@dataclass(frozen=True)
class Allocation:
    """One piece of memory at the fullest point."""

    bytes: float
    kind: str
    shape: str
    module: str
    """Of the model, ``backward `` before it where autograd made it; or the argument's own name."""
    operation: str


@dataclass(frozen=True)
class Memory:
    """A chip's memory at the fullest point of the program."""

    allocations: tuple[Allocation, ...]
    """Largest first."""

    @property
    def by_kind(self) -> dict[str, float]:
        found = Counter[str]()
        for one in self.allocations:
            found[one.kind] += one.bytes  # type: ignore[assignment]
        return {kind: float(found[kind]) for kind in KINDS}


@dataclass(frozen=True)
class Arguments:
    """What the program is given."""

    names: Sequence[str]
    kinds: Sequence[str]
    """weights, optimizer, batch or other."""
    shapes: Sequence[tuple[int, ...]] = ()
    """Of the arguments over all chips."""
    vocabulary: tuple[int, ...] = ()
    """Sizes that only a dimension of the vocabulary has: all of it, or a chip's part."""


def memory_of(program: Program, arguments: Arguments) -> Memory:
    """What is alive where the entry computation, its loops included, holds most."""
    entry = _Frame(program.entry, program, arguments, _step_of(program))
    given = [
        Allocation(
            sum(array.allocated for array in one.arrays),
            _argument_kind(arguments, number),
            one.shape,
            arguments.names[number] if number < len(arguments.names) else one.name,
            "argument",
        )
        for number, one in enumerate(program.entry.parameters)
    ]
    alive = [*given, *entry.fullest()]
    return Memory(tuple(sorted(alive, key=lambda one: one.bytes, reverse=True)))


def _step_of(program: Program) -> Computation:
    """Where the way forward turns into the way back: the entry, or the body of the loop over micro-batches."""
    step = program.entry
    while True:
        backward = [one for one in step if _has_backward_product(one, program)]
        body = program.computations.get(str(backward[0].called("body"))) if len(backward) == 1 else None
        if body is None:
            return step
        step = body


def _has_backward_product(one: Instruction, program: Program) -> bool:
    if one.opcode in ("dot", "convolution", "custom-call"):
        return one.module.startswith("backward ")
    names = (one.called("body"), one.called("calls"), one.called("to_apply"))
    called = [program.computations[name] for name in names if name in program.computations]
    return any(_has_backward_product(inner, program) for computation in called for inner in computation)


def _argument_kind(arguments: Arguments, number: int) -> str:
    kind = arguments.kinds[number] if number < len(arguments.kinds) else "other"
    return kind if kind in KINDS else "working memory"


class _Frame:
    """Liveness within one computation, what it is given left out."""

    def __init__(self, computation: Computation, program: Program, arguments: Arguments, step: Computation) -> None:
        self._computation, self._program, self._arguments, self._step = computation, program, arguments, step
        self._order = list(computation)
        self._position = {one.name: number for number, one in enumerate(self._order)}
        self._sources: dict[str, frozenset[str]] = {}
        for one in self._order:
            self._sources[one.name] = self._memory_of(one)
        self._last_use = self._last_uses()

    def fullest(self) -> list[Allocation]:
        """What is alive besides the parameters where most is."""
        ends: dict[int, list[str]] = defaultdict(list)
        for name, last in self._last_use.items():
            ends[last].append(name)
        alive: dict[str, float] = {}
        total, best, best_at = 0.0, -1.0, 0
        inner: dict[int, list[Allocation]] = {}
        snapshot: dict[str, float] = {}
        for number, one in enumerate(self._order):
            for name in self._own(one):
                alive[name] = self._size(name)
                total += alive[name]
            within = self._inside(one)
            here = total + sum(piece.bytes for piece in within)
            if here > best:
                best, best_at, snapshot = here, number, dict(alive)
                inner = {number: within}
            for name in ends[number]:
                total -= alive.pop(name, 0.0)
        pieces = [self._described(name, size) for name, size in snapshot.items() if size]
        return pieces + inner.get(best_at, [])

    def _memory_of(self, one: Instruction) -> frozenset[str]:
        """Names of the pieces of memory that a value lies in; its own name where it has a new one."""
        given = [self._sources.get(name, frozenset()) for name in one.operands]
        if one.opcode == "get-tuple-element":
            owner = self._computation.instructions.get(one.operands[0])
            index = one.tuple_index
            while owner is not None and owner.opcode in ("while", "optimization-barrier") and owner.operands:
                owner = self._computation.instructions.get(owner.operands[0])
            if owner is not None and owner.opcode == "tuple" and index is not None and index < len(owner.operands):
                return self._sources.get(owner.operands[index], frozenset())
            if owner is not None and len(owner.arrays) > 1:
                return frozenset({f"{owner.name}#{index}"}) if owner.opcode not in _NO_MEMORY else frozenset()
        if one.opcode in ("parameter", "constant"):
            return frozenset()
        if one.opcode in _NO_MEMORY or one.opcode in _IN_PLACE:
            return frozenset().union(*given) if given else frozenset()
        written = self._written_in_place(one)
        if written is not None:
            return given[written]
        if len(one.arrays) > 1:
            return frozenset(f"{one.name}#{index}" for index in range(len(one.arrays)))
        return frozenset({one.name})

    def _written_in_place(self, one: Instruction) -> int | None:
        """Number of the operand whose memory an update takes over."""
        updates = one.opcode == "dynamic-update-slice" or (
            one.opcode == "fusion" and "dynamic-update-slice" in one.name and len(one.arrays) == 1
        )
        if not updates:
            return None
        for number, name in enumerate(one.operands):
            operand = self._computation.instructions.get(name)
            if operand and operand.arrays and operand.arrays[0].dims == one.arrays[0].dims:
                return number
        return None

    def _own(self, one: Instruction) -> list[str]:
        return [name for name in self._sources[one.name] if name.partition("#")[0] == one.name]

    def _last_uses(self) -> dict[str, int]:
        last: dict[str, int] = {}
        for number, one in enumerate(self._order):
            for name in self._sources[one.name]:
                last[name] = max(last.get(name, 0), number)
            for operand in one.operands:
                for name in self._sources.get(operand, frozenset()):
                    last[name] = max(last.get(name, 0), number)
        root = self._computation.root
        for name in self._sources[root.name]:
            last[name] = len(self._order)  # a result outlives the computation
        return last

    def _size(self, name: str) -> float:
        owner, _, index = name.partition("#")
        made = self._computation.instructions[owner].arrays
        array = made[int(index or 0)] if made else None
        if array is None or not array.in_hbm:
            return 0.0
        return 0.0 if owner in self._into_given_memory else array.allocated

    @cached_property
    def _into_given_memory(self) -> frozenset[str]:
        """Who makes what lies where an older value lay: a loop's carried values, and what the step updates."""
        root = self._computation.root
        places: Iterable[int] = range(len(root.operands))
        if self._computation is self._program.entry:
            places = self._program.aliased_outputs
        if root.opcode != "tuple":
            return frozenset()
        return frozenset(
            source.partition("#")[0]
            for place in places
            if place < len(root.operands)
            for source in self._sources.get(root.operands[place], frozenset())
        )

    def _inside(self, one: Instruction) -> list[Allocation]:
        names = [one.called("body")] if one.opcode == "while" else one.branches if one.opcode == "conditional" else []
        if one.opcode == "call":
            names = [one.called("to_apply")]
        found: list[Allocation] = []
        for name in names:
            if name in self._program.computations:
                within = self._of(name).fullest()
                found = max(found, within, key=lambda pieces: sum(piece.bytes for piece in pieces))
        return found

    def _of(self, name: str) -> _Frame:
        """The frame of a computation that this one calls."""
        return _Frame(self._program.computations[name], self._program, self._arguments, self._step)

    def _described(self, name: str, size: float) -> Allocation:
        owner, _, index = name.partition("#")
        one = self._computation.instructions[owner]
        array = one.arrays[int(index or 0)]
        module = self._module(one) or self._module_of_rows(name)
        shape = f"{array.dtype}[{','.join(map(str, array.dims))}]"
        operation = re.sub(r"\.\d+$", "", one.op_name.rpartition("/")[2]) or one.opcode
        return Allocation(size, self._kind(name, one, array.dims, module), shape, module, operation)

    def _module(self, one: Instruction) -> str:
        """Its own, or that of the nearest value that it was made from."""
        seen, waiting = set[str](), [one]
        while waiting and len(seen) < 20:
            current = waiting.pop(0)
            if current.module:
                return current.module
            if current.name not in seen:
                seen.add(current.name)
                waiting += [found for name in current.operands if (found := self._computation.instructions.get(name))]
        return ""

    def _module_of_rows(self, name: str) -> str:
        """Who writes the rows of a stack that a loop fills."""
        for loop in self._order:
            if loop.opcode != "while" or not loop.operands:
                continue
            start = self._computation.instructions.get(loop.operands[0])
            places = start.operands if start is not None and start.opcode == "tuple" else ()
            for index, operand in enumerate(places):
                if name in self._sources.get(operand, frozenset()):
                    body = self._of(str(loop.called("body")))
                    root = body._computation.root
                    if root.opcode == "tuple":
                        return body._module(body._computation.instructions[root.operands[index]])
        return ""

    def _kind(self, name: str, one: Instruction, dims: tuple[int, ...], module: str) -> str:
        kinds = (one.opcode.removesuffix("-start").removesuffix("-done"), one.name.removeprefix("async-"))
        if any(kind.startswith(COLLECTIVES) for kind in kinds) or "AsyncCollective" in one.attributes:
            return "collectives"
        if self._is_copy_of_weight(one):
            return "weights"
        sizes = tuple(sorted(dim for dim in dims if dim > 1))
        if sizes in self._weight_sizes:
            return "gradients"
        if len(sizes) > 1 and any(rows in sizes for rows in self._arguments.vocabulary):
            return "logits"
        if self._computation is self._step and self._crosses_the_turn(name, one):
            return "saved activations"
        return "working memory"

    def _is_copy_of_weight(self, one: Instruction) -> bool:
        """Whether it is a weight in another type or order."""
        while one.opcode in ("convert", "copy", "bitcast", "reshape", "transpose", "copy-start", "copy-done") or (
            one.opcode == "fusion" and len(one.operands) == 1 and re.search("convert|copy", one.name)
        ):
            operand = self._computation.operand(one, 0)
            if operand is None:
                return False
            one = operand
        is_argument = one.opcode == "parameter" and self._computation is self._program.entry
        return is_argument and _argument_kind(self._arguments, int(one.arguments)) == "weights"

    def _crosses_the_turn(self, name: str, one: Instruction) -> bool:
        made = self._position[one.name]
        if not made < self._turn <= self._last_use[name]:
            return False
        # Zeros for gradients to come may be written long before the turn; what is saved is filled before it.
        is_filled = one.opcode != "broadcast" and "broadcast" not in one.name
        return is_filled or any(
            name in self._sources.get(operand, frozenset())
            for user in self._order[made + 1 : self._turn]
            for operand in user.operands
        )

    @cached_property
    def _turn(self) -> int:
        """Where the way back begins: its first product."""
        for number, one in enumerate(self._order):
            if _has_backward_product(one, self._program):
                return number
        return len(self._order)

    @cached_property
    def _weight_sizes(self) -> set[tuple[int, ...]]:
        """Sizes of weights, of a chip's part and over all chips, of one layer's too; gradients have the same.

        No stack of all layers' weights is ever whole on a chip, but what is saved of square layers has its size.
        """
        found: set[tuple[int, ...]] = set()
        for number, one in enumerate(self._program.entry.parameters):
            if _argument_kind(self._arguments, number) != "weights":
                continue
            own, whole = one.arrays[0].dims, self._arguments.shapes[number : number + 1]
            stacked = STACKED in self._arguments.names[number] if number < len(self._arguments.names) else False
            shapes = [own, own[1:], *(shape[1:] for shape in whole), *(() if stacked else whole)]
            found |= {tuple(sorted(dim for dim in shape if dim > 1)) for shape in shapes}
        return {sizes for sizes in found if len(sizes) > 1}
