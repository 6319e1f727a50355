"""``numina-finetune plan``: from the run's options to the report."""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from numina_finetune.checks import backend_faults, config_faults
from numina_finetune.config import RunConfig
from numina_finetune.data.sources import preflight, resolve_source, source_kind
from numina_finetune.errors import ConfigError, ExitCode, UserError
from numina_finetune.mesh import MeshShape, parse_mesh
from numina_finetune.model_defaults import default_mesh
from numina_finetune.plan.compilation import Candidate, Compiler, Fitted, Outcome, TpuCompiler, missing_packages
from numina_finetune.plan.geometry import geometry_of
from numina_finetune.plan.report import Plan, as_json, lines
from numina_finetune.plan.roofline import bound_of
from numina_finetune.plan.search import MOST_COMPILATIONS, Findings, Search
from numina_finetune.plan.training import Training, dataset_rows, hub_answers, region_faults, training_of
from numina_finetune.spot.prices import Prices, load_prices
from numina_finetune.tpu import Slice, parse_tpu
from numina_finetune.train.batch import plan_batch


@dataclass(frozen=True)
class Request:
    """What ``plan`` is asked besides the run itself."""

    tpu: str
    as_json: bool = False
    max_compilations: int | None = None
    """None = as many as the search may use."""
    prices: Path | None = None
    region: str | None = None


def run_plan(config: RunConfig, request: Request, faults: Sequence[str] = ()) -> ExitCode:
    """Print the plan; ``FAULTS_FOUND`` where the step does not fit.

    Args:
        faults: what is known to be wrong already.

    Raises:
        ConfigError: every fault that can be seen before the step is traced.
    """
    on_hub = any(source_kind(resolve_source(source).name) == "hub" for source in config.datasets)
    if on_hub and "HF_HUB_OFFLINE" not in os.environ and not hub_answers():
        # Read when the hub's libraries are imported, later: they would ask again and again, for a minute.
        os.environ["HF_HUB_OFFLINE"] = "1"
    tpu, mesh, geometry, prices = _checked(config, request, faults)
    candidate = _as_run(Candidate(config, mesh))
    budget = MOST_COMPILATIONS if request.max_compilations is None else request.max_compilations
    notes: list[str] = []
    with tempfile.TemporaryDirectory(prefix="numina-plan-") as folder:
        compiler = _telling(TpuCompiler(tpu, geometry, Path(folder)))
        findings = Search(compiler, tpu.chip.hbm_bytes, budget, allowed=_allowed).run(candidate, geometry)
    training = _training(config, candidate, findings, tpu, prices, request.region, notes)
    if mesh.dcn > 1:
        notes.append(
            "traffic between slices goes over the data-centre network, which is slower than the bound assumes of the "
            "interconnect"
        )
    for outcome in findings.outcomes[:1]:
        notes += outcome.costs.warnings if isinstance(outcome, Fitted) else []
    plan = Plan(config.model_name, tpu, candidate, findings, training, tuple(notes))
    if request.as_json:
        print(json.dumps(as_json(plan), indent=2))
    else:
        print("\n".join(lines(plan)))
    return ExitCode.DONE if plan.fits(findings.requested) else ExitCode.FAULTS_FOUND


def _checked(
    config: RunConfig, request: Request, known: Sequence[str]
) -> tuple[Slice, MeshShape, dict[str, Any], Prices]:
    """What the request says, once nothing in it is wrong."""
    faults = list(known)
    if not request.tpu:
        faults.append("--tpu is missing: name a slice, such as --tpu v5litepod-8")
    if request.max_compilations is not None and not 1 <= request.max_compilations <= MOST_COMPILATIONS:
        faults.append(f"--max-compilations {request.max_compilations} is out of range: use 1 to {MOST_COMPILATIONS}")
    missing = missing_packages()
    if missing:
        faults.append(f"plan needs {', '.join(missing)}: install with `pip install 'numina_finetune[plan]'`")
    # A plan needs no data and no place for its output.
    complete = replace(config, output_dir=config.output_dir or ".")
    faults += [fault for fault in config_faults(complete) if not fault.startswith("--dataset-name is missing")]
    faults += backend_faults(complete, "xla")
    if config.datasets:
        faults += preflight(config.datasets, config)
    tpu = _collect(faults, lambda: parse_tpu(request.tpu)) if request.tpu else None
    mesh = _collect(faults, lambda: _mesh(config.mesh, config.model_name, tpu)) if tpu else None
    geometry = _collect(faults, lambda: geometry_of(config)) if config.model_name else None
    prices = _collect(faults, lambda: load_prices(request.prices))
    if tpu and prices:
        faults += region_faults(tpu, prices, request.region)
    if mesh and geometry:
        faults += _tensor_faults(config, mesh, geometry)
    if mesh and not faults:
        _collect(faults, lambda: plan_batch(config, mesh.data_parallel_size, None))
    if faults:
        raise ConfigError(dict.fromkeys(faults))
    assert tpu and mesh and geometry and prices, "what is missing has been told"
    return tpu, mesh, geometry, prices


def _collect(faults: list[str], attempt: Callable[[], Any]) -> Any:
    try:
        return attempt()
    except UserError as error:
        faults += error.problems
        return None


def _mesh(text: str | None, model: str, tpu: Slice) -> MeshShape:
    """The mesh over all slices; ``dcn=2`` asks for two of them."""
    named = re.search(r"\bdcn\s*=\s*([1-9][0-9]*)", text or "")
    devices = tpu.chips * (int(named[1]) if named else 1)
    return parse_mesh(text or default_mesh(model, devices), devices)


def _tensor_faults(config: RunConfig, mesh: MeshShape, geometry: dict[str, Any]) -> list[str]:
    heads = int(geometry["num_key_value_heads"])
    if heads % mesh.tensor:
        return [
            f"--mesh {config.mesh!r}: tensor={mesh.tensor} does not divide the {heads} key-value heads of "
            f"{config.model_name}: use one that does"
        ]
    return []


def _as_run(candidate: Candidate) -> Candidate:
    """With the accumulation that the run would have."""
    batch = plan_batch(candidate.config, candidate.mesh.data_parallel_size, None)
    return replace(candidate, config=replace(candidate.config, gradient_accumulation_steps=batch.accumulation))


def _allowed(candidate: Candidate) -> Candidate | None:
    try:
        return _as_run(candidate)
    except ConfigError:  # no whole number of micro-batches makes the global batch
        return None


def _telling(compiler: Compiler) -> Compiler:
    """``compiler``, with a line for each compilation: one takes minutes."""

    def tell(candidate: Candidate) -> Outcome:
        print(f"compiling {candidate} …", file=sys.stderr, flush=True)
        return compiler(candidate)

    return tell


def _training(
    config: RunConfig,
    candidate: Candidate,
    findings: Findings,
    tpu: Slice,
    prices: Prices,
    region: str | None,
    notes: list[str],
) -> Training | None:
    """Hours and dollars of the run as it was asked for, where its dataset can be read."""
    fitted = findings.requested
    if not config.datasets or not isinstance(fitted, Fitted):
        return None
    try:
        rows = dataset_rows(config)
    except (OSError, ValueError, UserError) as error:  # what was compiled is told all the same
        reason = str(error).strip().partition("\n")[0]
        notes.append(f"hours and price are left out, for the dataset cannot be read here: {reason}")
        return None
    rows_a_step = candidate.tokens // config.max_seq_length
    return training_of(config, rows, rows_a_step, bound_of(fitted, tpu), tpu, candidate.mesh.devices, prices, region)
