"""What runs on a worker: start a job detached, watch it, tell how it stands, stop it, clear what it left.

This file is copied to each worker as it is and run by the system's Python, so it imports nothing but the standard
library and keeps to Python 3.10. Every command prints one line that begins with ``NUMINA``, JSON after it.

    worker.py start NAME             run {NAME}.json's command, in a process group of its own; once per name
    worker.py status NAME ACK TOKEN  how it stands, and the log that follows what the call with TOKEN = ACK gave
    worker.py stop NAME SIGNAL       send the job's main process a signal, such as INT; KILL goes to all its processes
    worker.py clean                  end every process of this run on this worker; remove a stale TPU lock file

A job NAME lives in ``{folder of this file}/jobs/NAME/``: ``log``, ``heartbeat`` and, at its end, ``exit_code``.
``{NAME}.json`` holds ``argv``, ``environment``, and the name of a file with further variables that nobody else may
read (``secrets``, lines KEY=VALUE).
"""

import base64
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HOME = Path(__file__).resolve().parent
MARK = "NUMINA_SPOT_HOME"
"""Environment variable that every process of this run on this worker has, with the value of ``HOME``."""
LOG_BYTES = 128 * 1024
"""Of log in one status."""
BEAT = float(os.environ.get("NUMINA_SPOT_BEAT", "5"))
"""Seconds between two heartbeats."""
LOCK_FILE = Path(os.environ.get("NUMINA_SPOT_TPU_LOCK", "/tmp/libtpu_lockfile"))
STEP = re.compile(rb"\bstep (\d+)/(\d+)\s+loss ([-+.\deEnaif]+)")
"""What the training logs of a step: its number, that of the last one, and the loss."""
ANSWERED = re.compile(rb"^ *\d+/\d+ problems,", re.MULTILINE)
"""What an evaluation logs; it is as good a sign of life as a step."""


def start(name: str) -> dict[str, Any]:
    """Start the job, unless it was started before."""
    job = HOME / "jobs" / name
    (HOME / "jobs").mkdir(exist_ok=True)
    try:
        job.mkdir()
    except FileExistsError:
        return status(name)
    spec = json.loads((HOME / (name + ".json")).read_text(encoding="utf-8"))
    environment = {**os.environ, **spec["environment"], **_secrets(spec.get("secrets")), MARK: str(HOME)}
    sys.stdout.flush()
    if os.fork() == 0:
        _watch(job, spec["argv"], environment)
    deadline = time.time() + 30
    while not (job / "pid").exists() and not (job / "exit_code").exists() and time.time() < deadline:
        time.sleep(0.02)
    return status(name)


def status(name: str, acknowledged: str = "", token: str = "") -> dict[str, Any]:
    """How the job stands, and more of its log.

    Ages are in seconds; ``step_age`` is that of the newest step, or of the start before there is one.

    Args:
        acknowledged: the token of the last call whose log was stored; what any other call gave is given again.
        token: of this call; "" asks for no log.
    """
    job = HOME / "jobs" / name
    if not job.is_dir():
        return {"known": False}
    now = time.time()
    offset, log = 0, b""
    if token:
        sent = json.loads(_text(job / "sent") or "{}")
        offset = sent.get("end", 0) if acknowledged and acknowledged == sent.get("token") else sent.get("begin", 0)
        log = _read_from(job / "log", offset)
        _write(job / "sent", json.dumps({"begin": offset, "end": offset + len(log), "token": token}))
    beat = json.loads(_text(job / "heartbeat") or "{}")
    code = _text(job / "exit_code")
    pid = _pid(job)
    return {
        "known": True,
        "exit_code": int(code) if code else None,
        "alive": pid is not None and _is_ours(pid),
        "step": beat.get("step"),
        "total_steps": beat.get("total_steps"),
        "loss": beat.get("loss"),
        "beat_age": now - beat.get("time", job.stat().st_mtime),
        "step_age": now - beat.get("step_time", job.stat().st_mtime),
        "seconds_to_first_step": beat.get("first_step"),
        "offset": offset,
        "log": base64.b64encode(log).decode(),
    }


def stop(name: str, kind: str) -> dict[str, Any]:
    """Send the signal ``SIG{kind}``; a job that has ended is left alone.

    Other signals than KILL are sent once only: to a training, the second one means to stop without saving.
    """
    job = HOME / "jobs" / name
    pid = _pid(job)
    if pid is not None and _is_ours(pid):
        if kind == "KILL":
            os.killpg(pid, signal.SIGKILL)
        elif not (job / "asked").exists():
            _write(job / "asked", kind)
            os.kill(pid, getattr(signal, "SIG" + kind))
    return status(name)


def clean() -> dict[str, Any]:
    """End what is left of this run here, so that the devices are free; TERM first, KILL after ten seconds."""
    ended = 0
    for number, patience in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 20.0)):
        found = _ours()
        ended += len(found) if number == signal.SIGTERM else 0
        for pid in found:
            _kill(pid, number)
        deadline = time.time() + patience
        while _ours() and time.time() < deadline:
            time.sleep(0.1)
    left = len(_ours())
    removed = False
    if not left and LOCK_FILE.exists():
        try:
            LOCK_FILE.unlink()
            removed = True
        except OSError:
            removed = False
    return {"ended": ended, "left": left, "lock_file_removed": removed}


def _watch(job: Path, argv: list[str], environment: dict[str, str]) -> None:
    """Run the job and note how it goes; never returns. This process belongs to no ssh session any more."""
    os.setsid()
    if os.fork() != 0:
        os._exit(0)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    began = time.time()
    with (job / "log").open("ab") as log:
        try:
            process = subprocess.Popen(
                argv, cwd=str(HOME), env=environment, stdin=null, stdout=log, stderr=log, preexec_fn=_own_group
            )
        except OSError as error:
            log.write(f"cannot start {argv[0]}: {error}\n".encode())
            log.flush()
            _write(job / "exit_code", "127")
            os._exit(0)
    _write(job / "pid", str(process.pid))
    beat: dict[str, Any] = {"time": began, "step_time": began}
    seen = 0
    while True:
        try:
            code: int | None = process.wait(timeout=BEAT)
        except subprocess.TimeoutExpired:
            code = None
        fresh = _read_from(job / "log", seen, 1 << 22)
        whole = fresh.rfind(b"\n") + 1
        seen += whole
        beat["time"] = time.time()
        for found in STEP.finditer(fresh[:whole]):
            if int(found[1]) != beat.get("step"):
                beat["step_time"] = beat["time"]
                beat.setdefault("first_step", beat["time"] - began)
            beat.update(step=int(found[1]), total_steps=int(found[2]), loss=float(found[3]))
        if ANSWERED.search(fresh[:whole]):
            beat["step_time"] = beat["time"]
        _write(job / "heartbeat", json.dumps(beat))
        if code is not None:
            # As a shell gives it: a signal is 128 and its number.
            _write(job / "exit_code", str(code if code >= 0 else 128 - code))
            os._exit(0)


def _own_group() -> None:
    """In the child: a session of its own, and the signals as a shell in the foreground would leave them."""
    os.setsid()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def _ours() -> list[int]:
    """Every process of this run on this worker, watchers of earlier jobs included, but not this one."""
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return [pid for pid in pids if pid != os.getpid() and _is_ours(pid)]


def _is_ours(pid: int) -> bool:
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state not in ("Z", "X") and f"{MARK}={HOME}".encode() in environment


def _kill(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _secrets(name: str | None) -> dict[str, str]:
    if not name:
        return {}
    path = HOME / name
    path.chmod(0o600)
    lines = path.read_text(encoding="utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line)


def _pid(job: Path) -> int | None:
    text = _text(job / "pid")
    return int(text) if text else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return ""


def _read_from(path: Path, offset: int, limit: int = LOG_BYTES) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(limit)
    except FileNotFoundError:
        return b""


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def main(arguments: list[str]) -> None:
    verb, rest = arguments[0], arguments[1:]
    if verb == "start":
        answer = start(rest[0])
    elif verb == "status":
        answer = status(rest[0], rest[1], rest[2])
    elif verb == "stop":
        answer = stop(rest[0], rest[1])
    elif verb == "clean":
        answer = clean()
    else:
        sys.exit(__doc__)
    print("NUMINA " + json.dumps({"host": socket.gethostname(), **answer}))


if __name__ == "__main__":
    main(sys.argv[1:])
