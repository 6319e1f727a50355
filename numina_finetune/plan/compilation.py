"""One compilation of the training step for a TPU, and what the compiler said of it."""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from numina_finetune import launch
from numina_finetune.config import RunConfig
from numina_finetune.errors import ConfigError
from numina_finetune.mesh import MeshShape
from numina_finetune.plan import compiler
from numina_finetune.plan.costs import Costs, costs_of
from numina_finetune.plan.hlo import module_of, parse
from numina_finetune.plan.memory import Allocation, Arguments, Memory, memory_of
from numina_finetune.tpu import Slice

MOST_DEVICES = 8
"""Virtual devices at hand while the step is traced; more than 127 break autograd, and eight start quickly."""
_UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"([0-9.]+)([KMGTB]?)"


@dataclass(frozen=True)
class Candidate:
    """A step that can be compiled."""

    config: RunConfig
    """``per_device_train_batch_size``, ``gradient_accumulation_steps``, ``remat`` and all else that the step reads."""
    mesh: MeshShape

    @property
    def batch(self) -> int:
        return self.config.per_device_train_batch_size

    @property
    def tokens(self) -> int:
        """Of one optimizer step, over all chips."""
        rows = self.batch * self.mesh.data_parallel_size * self.config.gradient_accumulation_steps
        return rows * self.config.max_seq_length

    def __str__(self) -> str:
        return f"batch {self.batch}, remat {self.config.remat}, mesh {self.mesh}"


@dataclass(frozen=True)
class Fitted:
    """The compiler took it, so that it fits."""

    candidate: Candidate
    peak_bytes: int
    """The compiler's peak, and the program itself."""
    allocated_bytes: int
    """Arguments + outputs − shared + temporaries + program. An older libtpu counts temporaries that share memory more
    than once: it accepts steps whose sum is over the limit."""
    sizes: Mapping[str, int]
    """argument, output, alias, temp, generated_code, peak: as the compiler gives them."""
    memory: Memory
    costs: Costs
    parameters: int
    active_parameters: int
    """Of which a token meets so many."""
    token_flops: float
    """Of one token's products, forward and backward: 6 a parameter that it meets, 4 a frozen one."""
    trace_seconds: float
    compile_seconds: float
    compile_cpu_seconds: float
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class TooLarge:
    """The compiler refused it: it does not fit."""

    candidate: Candidate
    peak_bytes: int
    limit_bytes: int
    largest: Sequence[Allocation]
    trace_seconds: float
    compile_seconds: float


Outcome = Fitted | TooLarge


class CompilationFailed(Exception):
    """The step could not be traced or compiled, for another reason than its size."""


class Compiler(Protocol):
    """What the search asks; a fake one in tests."""

    def __call__(self, candidate: Candidate) -> Outcome:
        """Compile it.

        Raises:
            ConfigError: the candidate or the machine cannot be used.
            CompilationFailed: the compiler refuses the candidate, and not for its size.
        """


@dataclass(frozen=True)
class Traced:
    """A step, ready for a compiler."""

    candidate: Candidate
    module: Path
    arguments: Sequence[Mapping[str, Any]]
    """``name``, ``kind``, ``shape``, ``dtype`` and ``sharding`` of each."""
    seconds: float


class TpuCompiler:
    """libtpu's compiler; tracing and compilation have processes of their own."""

    def __init__(self, tpu: Slice, geometry: Mapping[str, Any], folder: Path) -> None:
        """
        Args:
            folder: takes the modules and programs; the caller's to delete.
        """
        self._tpu, self._geometry, self._folder = tpu, geometry, folder
        self._count = 0

    def __call__(self, candidate: Candidate) -> Outcome:
        return self.compile(self.trace(candidate))

    def trace(self, candidate: Candidate) -> Traced:
        """Trace the step.

        Raises:
            ConfigError: an option cannot be had for this model and mesh.
        """
        self._count += 1
        base, mesh = self._folder / f"{self._count:02d}", candidate.mesh
        module, arguments = base.with_suffix(".mlir.gz"), base.with_suffix(".arguments.json")
        request = {
            "config": candidate.config.to_mapping(),
            "geometry": dict(self._geometry),
            "mesh": mesh.by_axis,
            "rows": candidate.batch * mesh.data_parallel_size,
            "module": str(module),
            "arguments": str(arguments),
        }
        environment = {
            **{name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "XLA_USE_BF16")},
            **{"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": str(min(mesh.devices, MOST_DEVICES))},
            **{"XLA_HLO_DEBUG": "1", "XLA_IR_DEBUG": "1"},  # operations keep their names
            **{"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3", "USE_TORCH_XLA": "true"},
        }
        self._run("trace", [sys.executable, "-m", "numina_finetune.xla.trace"], request, base, environment)
        told = json.loads(arguments.read_text(encoding="utf-8"))
        if "faults" in told:
            raise ConfigError(told["faults"])
        return Traced(candidate, module, told["arguments"], float(told["seconds"]))

    def compile(self, traced: Traced, python: str = sys.executable) -> Outcome:
        """Compile a traced step.

        Args:
            python: an interpreter that has jax and libtpu, of whatever version.

        Raises:
            ConfigError: another process holds libtpu.
            CompilationFailed: the compiler refuses the step, and not for its size.
        """
        candidate, base = traced.candidate, traced.module.with_suffix("").with_suffix("")
        result, hlo = base.with_suffix(".result.json"), base.with_suffix(".hlo.gz")
        request = {
            "module": str(traced.module),
            "topology": self._tpu.topology,
            "topology_options": self._tpu.topology_options(candidate.mesh.dcn),
            "devices": candidate.mesh.devices,
            "compiler_options": {},
            "hlo": str(hlo),
            "result": str(result),
        }
        environment = dict(os.environ) | compiler.SETTINGS
        if not launch.tpu_attached():
            # Nothing is driven here: several compilers may run beside one another.
            environment["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
        self._run("compile", [python, str(Path(compiler.__file__).resolve())], request, base, environment)
        told = json.loads(result.read_text(encoding="utf-8"))
        if not told["ok"]:
            return _refusal(traced, told, self._tpu)
        program = parse(gzip.decompress(hlo.read_bytes()).decode())
        sizes = told["memory"]
        total = sizes["argument"] + sizes["output"] - sizes["alias"] + sizes["temp"] + sizes["generated_code"]
        peak = sizes["peak"] + sizes["generated_code"] if sizes["peak"] else total
        parameters, active, token_flops = parameter_counts(traced.arguments, self._geometry)
        return Fitted(
            candidate,
            peak,
            total,
            sizes,
            memory_of(program, _described(traced.arguments, self._geometry, candidate.mesh)),
            costs_of(program),
            parameters,
            active,
            token_flops,
            traced.seconds,
            told["seconds"],
            told["cpu_seconds"],
            {name: told[name] for name in ("jax", "libtpu")},
        )

    def _run(
        self, what: str, command: list[str], request: Mapping[str, Any], base: Path, environment: dict[str, str]
    ) -> None:
        path = base.with_suffix(f".{what}.json")
        path.write_text(json.dumps(request), encoding="utf-8")
        ended = subprocess.run([*command, str(path)], env=environment, capture_output=True, text=True, check=False)
        if ended.returncode == 0:
            return
        said = (ended.stderr or ended.stdout).strip()
        lock = held_lock(said)
        if lock:
            raise ConfigError(lock)
        raise CompilationFailed(f"the {what} process ended with {ended.returncode}: {said[-2000:]}")


def missing_packages() -> list[str]:
    """What has to be installed before anything can be compiled."""
    return [name for name in ("torch_xla", "jax", "libtpu") if importlib.util.find_spec(name) is None]


def parameter_counts(arguments: Sequence[Mapping[str, Any]], geometry: Mapping[str, Any]) -> tuple[int, int, float]:
    """All parameters; those that one token meets, of the experts only those that it is sent to; and what it computes
    with these, forward and backward: see `Fitted.token_flops`."""
    total = active = flops = 0.0
    for argument in arguments:
        if argument["kind"] != "weights":
            continue
        count = 1.0
        for size in argument["shape"]:
            count *= size
        total += count
        if ".experts." in argument["name"]:
            count *= geometry["num_experts_per_tok"] / geometry["num_local_experts"]
        active += count
        flops += count * (4.0 if argument.get("frozen") else 6.0)
    return int(total), int(active), flops


def _described(arguments: Sequence[Mapping[str, Any]], geometry: Mapping[str, Any], mesh: MeshShape) -> Arguments:
    vocabulary = int(geometry["vocab_size"])
    return Arguments(
        [argument["name"] for argument in arguments],
        [argument["kind"] for argument in arguments],
        [tuple(argument["shape"]) for argument in arguments],
        tuple({vocabulary, -(-vocabulary // mesh.tensor)}),
    )


# --- what the compiler says where it fails ----------------------------------------------------------------------------


def _refusal(traced: Traced, result: Mapping[str, Any], tpu: Slice) -> TooLarge:
    """Raises CompilationFailed or ConfigError where it is not memory that is lacking."""
    message = str(result["error"])
    found = parse_out_of_memory(message)
    if found is not None:
        used, limit, largest = found
        return TooLarge(traced.candidate, used, limit, largest, traced.seconds, result["seconds"])
    lock = held_lock(message)
    if lock:
        raise ConfigError(lock)
    if result["kind"] in ("ModuleNotFoundError", "ImportError"):
        raise ConfigError(
            f"plan needs jax and libtpu ({message}): install them with `pip install 'numina_finetune[plan]'`"
        )
    what = f"{result['kind']}: {message[:4000]}"
    raise CompilationFailed(f"the compilation for {tpu.topology} failed, {traced.candidate}: {what}")


def parse_out_of_memory(message: str) -> tuple[int, int, list[Allocation]] | None:
    """Bytes used, the limit and the largest allocations of the compiler's refusal; None where it is another one."""
    single = re.search(
        r"Allocation \(size=(\d+)\) would exceed memory \(size=(\d+)\).*?shape = '(\w+\[[0-9,]*\])", message
    )
    if single is not None:  # one array alone is too large: the compiler stops at it
        allocation = Allocation(int(single[1]), "", single[3], "", "?")
        return int(single[1]), int(single[2]), [allocation]
    head = re.search(rf"Used {_SIZE} of {_SIZE} hbm", message)
    if head is None:
        return None
    total = re.search(rf"Total hbm usage >= {_SIZE}", message)
    used = _bytes(*(total or head).groups()[:2])
    reserved = re.search(rf"reserved\s+{_SIZE}", message)
    if total and reserved:
        used -= _bytes(*reserved.groups())  # is not in the limit either
    largest = []
    for entry in re.split(r"\n\s*\d+\. Size: ", message)[1:]:
        size, name = re.match(_SIZE, entry), re.search(r'op_name="([^"]*)"', entry)
        shape = re.search(r"Shape: (\w+\[[0-9,]*\])", entry)
        label = re.search(r"XLA label: (.*)", entry)
        if size is None:
            continue
        operation = name[1] if name else ""
        largest.append(
            Allocation(
                _bytes(*size.groups()),
                "",
                shape[1] if shape else "?",
                module_of(operation),
                re.sub(r"\.\d+$", "", operation.rpartition("/")[2]) or (label[1].partition(" ")[0] if label else "?"),
            )
        )
    return max(used, _bytes(*head.groups()[:2])), _bytes(*head.groups()[2:]), largest


def held_lock(message: str) -> str | None:
    """How to go on where another process holds libtpu; None where that is not the matter."""
    if (
        "libtpu_lockfile" not in message
        and "libtpu multi-process lockfile" not in message
        and ("already in use by process" not in message)
    ):
        return None
    holder = re.search(r"pid (\d+)", message)
    who = f"process {holder[1]}" if holder else "another process"
    return (
        f"the TPU library is held by {who}, which works on this machine's TPU: wait until it ends, or plan on "
        "a machine without a TPU; if no such process runs, its lock was left behind: delete /tmp/libtpu_lockfile"
    )


def _bytes(number: str, unit: str) -> int:
    return int(float(number) * _UNITS[unit])
