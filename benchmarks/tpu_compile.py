"""Our training step and MaxText's, compiled for the same TPUs by the same compiler, without a TPU.

    python benchmarks/tpu_compile.py [--case NAME ...] [--output results.json] [--only-pinned]

Needs the extra `plan`. Each case is traced once and compiled twice: by the libtpu that this package pins, and by the
version that MaxText's figures in maxtext_aot.json were made with, in an environment of its own that is made on the
first run (uv; Python 3.12 or newer, --python names one that uv does not find). A case takes minutes.

Columns: the compiler's peak memory, and arguments + outputs − shared + temporaries + program (which an older libtpu
reports higher than what it places), in GB = 1e9 bytes; matrix products in TFLOP (those of kernels as these state them,
which attention's do not), and over 6·N·tokens; what collectives move in GB; the compiler's estimated cycles in ms,
which leave out kernels and collectives. All are of one chip and one step, loops multiplied in. --only-pinned leaves
the second environment out.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numina_finetune import launch
from numina_finetune.config import RunConfig
from numina_finetune.errors import ConfigError
from numina_finetune.files import user_cache
from numina_finetune.mesh import parse_mesh
from numina_finetune.model_defaults import default_mesh
from numina_finetune.plan.compilation import Candidate, Fitted, Outcome, TpuCompiler
from numina_finetune.plan.geometry import geometry_of
from numina_finetune.plan.roofline import model_flops
from numina_finetune.tpu import Slice, parse_tpu

BASELINE = Path(__file__).with_name("maxtext_aot.json")


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    name: str
    model: str
    tpu: str
    batch: int
    length: int
    peer: str | None
    """The baseline's own name of the case; None = MaxText's figures are not at hand."""


CASES = (
    Case("qwen3-0.6b-v5e8-b1", "Qwen/Qwen3-0.6B", "v5litepod-8", 1, 1024, "q06_v5e8_pdb1_s1024"),
    Case("qwen3-0.6b-v5e8-b8", "Qwen/Qwen3-0.6B", "v5litepod-8", 8, 1024, "q06_v5e8_pdb8_s1024"),
    Case("qwen3-8b-v5e16-2048", "Qwen/Qwen3-8B", "v5litepod-16", 1, 2048, "q8_v5e16_s2048_pdb1"),
    Case("qwen3-8b-v5e16-4096", "Qwen/Qwen3-8B", "v5litepod-16", 1, 4096, "q8_v5e16_s4096_pdb1"),
    Case("llama-3-8b-v6e16", "meta-llama/Meta-Llama-3-8B", "v6e-16", 1, 4096, None),
    Case("gpt-oss-20b-v5p128", "openai/gpt-oss-20b", "v5p-128", 1, 4096, "oss20_v5p128_s4096_pdb1"),
    Case("gpt-oss-120b-v5p128", "openai/gpt-oss-120b", "v5p-128", 1, 4096, "oss120_v5p128_s4096_pdb1"),
)


@dataclass(frozen=True)
class Figures:
    """What the table shows of a compiled step; None = not known."""

    compiled_by: str
    peak_gb: float
    allocated_gb: float | None
    matmul_tflops: float | None
    useful_tflops: float | None
    """6·N·tokens, counted one way for both: the baseline's own leaves out a table of embeddings that is not tied."""
    collective_gb: float | None
    cycles_ms: float | None
    compile_seconds: float | None

    def row(self, case: str) -> str:
        ratio = self.matmul_tflops / self.useful_tflops if self.matmul_tflops and self.useful_tflops else None
        cells = [self.peak_gb, self.allocated_gb, self.matmul_tflops, ratio, self.collective_gb, self.cycles_ms]
        return f"| {case:20} | {self.compiled_by:30} | " + " | ".join(map(_cell, cells)) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=[case.name for case in CASES], help="all if not given")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    parser.add_argument("--only-pinned", action="store_true")
    parser.add_argument("--python", default="3.12", help="for the second environment: a version, or an interpreter")
    arguments = parser.parse_args()
    launch.prepare_environment("native")  # this process needs no device
    baseline = json.loads(BASELINE.read_text(encoding="utf-8"))
    pythons = [sys.executable]
    if not arguments.only_pinned:
        pythons.append(peer_environment(baseline["versions"], arguments.python))
    print(f"| {'case':20} | {'step, compiler':30} | peak | sum | TFLOP | /6N·tokens | collectives | cycles ms |")
    print("|---|---|---|---|---|---|---|---|")
    results: dict[str, list[dict[str, Any]]] = {}
    for case in CASES:
        if arguments.case and case.name not in arguments.case:
            continue
        rows = ours(case, pythons)
        useful = next((row.useful_tflops for row in rows if row.useful_tflops), None)
        rows += theirs(case, baseline, useful)
        results[case.name] = [vars(row) for row in rows]
        for row in rows:
            print(row.row(case.name), flush=True)
        if arguments.output:
            arguments.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def ours(case: Case, pythons: list[str]) -> list[Figures]:
    """The case traced once, and compiled by each interpreter's libtpu."""
    config = RunConfig(model_name=case.model, per_device_train_batch_size=case.batch, max_seq_length=case.length)
    try:
        geometry = geometry_of(config)
    except ConfigError as error:
        print(f"{case.name}: {error}", file=sys.stderr)
        return []
    tpu = parse_tpu(case.tpu)
    with tempfile.TemporaryDirectory() as folder:
        compiler = TpuCompiler(tpu, geometry, Path(folder))
        mesh = parse_mesh(default_mesh(case.model, tpu.chips), tpu.chips)
        traced = compiler.trace(Candidate(config, mesh))
        return [figures(compiler.compile(traced, python), tpu) for python in pythons]


def figures(outcome: Outcome, tpu: Slice) -> Figures:
    """The table's figures of one compilation."""
    if not isinstance(outcome, Fitted):
        return Figures("ours, refused: does not fit", outcome.peak_bytes / 1e9, *[None] * 5, outcome.compile_seconds)
    costs = outcome.costs
    return Figures(
        f"ours, libtpu {outcome.versions['libtpu']}",
        outcome.sizes["peak"] / 1e9,
        outcome.allocated_bytes / 1e9,
        (costs.matmul_flops + costs.kernel_flops) / 1e12,
        model_flops(outcome) / 1e12,
        costs.total_collective_bytes / 1e9,
        1e3 * costs.cycles / tpu.chip.clock_hz,
        outcome.compile_seconds,
    )


def theirs(case: Case, baseline: Mapping[str, Any], useful_tflops: float | None) -> list[Figures]:
    """MaxText's figures for the case."""
    for row in baseline["cases"]:
        if row["case"] == case.peer:
            return [
                Figures(
                    f"MaxText, libtpu {baseline['versions']['libtpu']}",
                    row["peak_gb"],
                    None,
                    row["matmul_flops_per_chip"] / 1e12,
                    useful_tflops,
                    row["collective_gb"],
                    row["compiler_estimated_cycles_ms"],
                    None,
                )
            ]
    return []


def peer_environment(versions: Mapping[str, str], python: str) -> str:
    """The interpreter of an environment with these versions, which is made where there is none yet."""
    folder = user_cache() / "tpu-compilers" / "-".join(f"{name}-{version}" for name, version in versions.items())
    interpreter, complete = folder / "bin" / "python", folder / "complete"
    if not complete.is_file():
        uv = shutil.which("uv") or shutil.which("uv", path=str(Path(sys.executable).parent))
        if uv is None:
            sys.exit("uv is neither on the PATH nor in this environment: install it, or give --only-pinned")
        subprocess.run([uv, "venv", "--no-project", "--clear", "--python", python, str(folder)], check=True)
        pins = [f"{name}=={version}" for name, version in versions.items()]
        subprocess.run([uv, "pip", "install", "--python", str(interpreter), *pins], check=True)
        complete.touch()
    return str(interpreter)


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


if __name__ == "__main__":
    main()
