"""Whether two LaTeX answers are mathematically the same: ``math-verify``, where it can do no harm.

A model's answer may be anything, ``10^{10^{10}}`` included, and sympy works on it for as long as it takes.
math-verify's own limit is a signal to the main thread, which not every caller is; so a worker process parses and
compares, with a limit on its processor time and memory. A pair that it dies over counts as different.
"""

from __future__ import annotations

import atexit
import json
import subprocess
import sys
import threading
from pathlib import Path

_WORKER = Path(__file__).with_name("latex_worker.py")


class LatexComparison:
    """One worker process, started by the first question; questions of several threads wait for one another."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def equivalent(self, gold: str, predicted: str) -> bool:
        """Whether math-verify takes ``predicted`` for ``gold``; the order counts.

        Raises:
            RuntimeError: the worker cannot be started.
        """
        with self._lock:
            answer = self._ask(json.dumps([gold, predicted]))
        return answer == "true\n"

    def close(self) -> None:
        """End the worker."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def _ask(self, question: str) -> str:
        process = self._running()
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(question + "\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        if not answer:  # it reached a limit
            self.close()
        return answer

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            self.close()
            # -P: this folder's modules are not to be found under the standard library's names.
            command = [sys.executable, "-P", str(_WORKER)]
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                process.kill()
                raise RuntimeError(f"the comparison of LaTeX answers could not be started (exit {process.wait()})")
            self._process = process
        return self._process


_comparison = LatexComparison()
atexit.register(_comparison.close)


def equivalent(gold: str, predicted: str) -> bool:
    """Whether two LaTeX answers are the same to math-verify; see :class:`LatexComparison`."""
    return _comparison.equivalent(gold, predicted)
