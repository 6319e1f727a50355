"""The TPU's compiler, run on a machine without a TPU: ``python compiler.py REQUEST.json``.

A program of its own that needs jax and libtpu and nothing of this package, so that another version of the two, in
another environment, can compile the same module.
"""

from __future__ import annotations

import gzip
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

SETTINGS = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",  # no metadata server is asked what this machine is
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}


def main(request_path: str) -> None:
    """Compile what the request names, and write ``result`` (JSON) and ``hlo``."""
    request = json.loads(Path(request_path).read_text(encoding="utf-8"))
    os.environ.update(SETTINGS)
    started = time.monotonic()
    result: dict[str, Any] = {}
    try:
        compiled = _compile(request)
        result = {"ok": True, "memory": _memory(compiled), **_versions()}
        hlo = compiled.hlo_modules()[0].to_string()
        Path(request["hlo"]).write_bytes(gzip.compress(hlo.encode()))
    except Exception as error:  # whatever the compiler says is this program's result
        result = {"ok": False, "error": str(error), "kind": type(error).__name__}
    result["seconds"] = time.monotonic() - started
    result["cpu_seconds"] = time.process_time()  # the compiler's work, however busy the machine
    Path(request["result"]).write_text(json.dumps(result), encoding="utf-8")


def _compile(request: dict[str, Any]) -> Any:
    import numpy as np
    from jax._src import compiler
    from jax._src.interpreters import mlir as jax_mlir
    from jax.experimental import topologies
    from jaxlib import _jax
    from jaxlib.mlir import ir

    topology = topologies.get_topology_desc(
        platform="tpu", topology_name=request["topology"], **request["topology_options"]
    )
    devices = topology.devices
    if len(devices) != request["devices"]:
        raise RuntimeError(f"{request['topology']} has {len(devices)} devices for the compiler")
    options = compiler.get_compile_options(
        num_replicas=1,
        num_partitions=len(devices),
        device_assignment=np.array([[device.id for device in devices]]),
        env_options_overrides=request["compiler_options"],
    )
    build = options.executable_build_options
    build.use_spmd_partitioning = True
    build.use_shardy_partitioner = False  # the module carries GSPMD annotations
    build.allow_spmd_sharding_propagation_to_output = [True]
    with jax_mlir.make_ir_context(), ir.Location.unknown():
        module = ir.Module.parse(gzip.decompress(Path(request["module"]).read_bytes()))
        return compiler.backend_compile_and_load(
            devices[0].client, module, _jax.DeviceList(tuple(devices)), options, []
        )


def _memory(compiled: Any) -> dict[str, int]:
    stats = compiled.get_compiled_memory_stats()
    names = ("argument", "output", "alias", "temp", "generated_code")
    sizes = {name: int(getattr(stats, f"{name}_size_in_bytes")) for name in names}
    return sizes | {"peak": int(getattr(stats, "peak_memory_in_bytes", 0))}


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("jax", "libtpu")}


if __name__ == "__main__":
    main(sys.argv[1])
