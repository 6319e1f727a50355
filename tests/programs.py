"""Modules run as programs, in processes that are forked from one that has imported what takes longest.

Importing torch and what torch_xla and transformers take from it costs seconds of every process, which is most of a tiny
training. Nothing of this package, and nothing that decides by the environment which devices it takes (accelerate,
torch_xla), is imported before the fork.
"""

from __future__ import annotations

import atexit
import json
import multiprocessing.process
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PRELOADED = (
    *("torch", "torch._dynamo", "torch._functorch.aot_autograd", "torch._inductor.lowering", "torch.export"),
    *("torch._inductor.fx_passes.post_grad", "torch.distributed.fsdp", "scipy.optimize", "sympy", "pandas", "pyarrow"),
)

_forks: Any = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(list(PRELOADED))


class Program:
    """``python -m module arguments`` in the checkout, with this environment; used as a ``subprocess.Popen``.

    Args:
        together: what it writes to stderr comes with stdout.
    """

    def __init__(self, module: str, *arguments: str, env: Mapping[str, str], together: bool = True) -> None:
        self.args = [module, *arguments]
        self._written = tempfile.TemporaryDirectory()
        names = ("out", "out" if together else "err")
        self._out, self._err = (Path(self._written.name, name) for name in names)
        # Ended with the tests, should they end first.
        self._process = _forks.Process(
            target=_enter, args=(module, arguments, dict(env), str(self._out), str(self._err)), daemon=True
        )
        self._process.start()
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        """Its exit code, or minus the signal that ended it; None while it runs."""
        code: int | None = self._process.exitcode
        return code

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def wait(self) -> None:
        self._process.join()

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it wrote, when it has ended.

        Raises:
            subprocess.TimeoutExpired: it runs still.
        """
        self._process.join(timeout)
        out, err = (path.read_text(encoding="utf-8", errors="replace") for path in (self._out, self._err))
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0, out, err)
        return out, "" if self._out == self._err else err


def run_module(
    module: str, *arguments: str, env: Mapping[str, str], timeout: float = 600, together: bool = False
) -> subprocess.CompletedProcess[str]:
    """As :class:`Program`, and waited for.

    Raises:
        subprocess.TimeoutExpired: it was killed after ``timeout`` seconds.
    """
    program = Program(module, *arguments, env=env, together=together)
    try:
        out, err = program.communicate(timeout)
    finally:
        program.kill()
    return subprocess.CompletedProcess(program.args, program.returncode or 0, out, err)


def torchrun(processes: int) -> list[str]:
    """What stands before a module's name to start so many processes of it, over gloo."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m"]


def run_in_processes(count: int, module: str, *arguments: str, env: Mapping[str, str]) -> str:
    """The module under ``torchrun`` to its end, which has to be a good one; what all of them wrote."""
    result = subprocess.run(
        [*torchrun(count), module, *arguments],
        env={**env, "ACCELERATE_USE_CPU": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def tell(found: Any, folder: Path) -> None:
    """What this process found, in a file of its own: lines of several on one output may run into one another."""
    (folder / f"told-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(found), encoding="utf-8")


def told(folder: Path, processes: int = 1) -> list[Any]:
    """What each of so many processes found."""
    return [json.loads((folder / f"told-{rank}.json").read_text("utf-8")) for rank in range(processes)]


def _enter(module: str, arguments: tuple[str, ...], env: dict[str, str], out: str, err: str) -> None:
    """Become the program, and end as an interpreter ends."""
    multiprocessing.process.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    os.environ.clear()
    os.environ.update(env)
    os.chdir(ROOT)
    tempfile.tempdir = None  # goes by the environment, which is another now
    for path, number in ((os.devnull, 0), (out, 1), (err, 2)):
        opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(opened, number)
        os.close(opened)
    sys.argv = [module, *arguments]
    code: Any = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    if isinstance(code, str):
        print(code, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))
