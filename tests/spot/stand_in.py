"""A training that is as exact about stopping and resuming as the real one, in seconds and without a model.

``python stand_in.py RUN_FOLDER STEPS RANK``: each step mixes the step's number into a digest; checkpoints, attempts,
outcomes and exit codes are where and what the real training's are.
"""

from __future__ import annotations

import hashlib
import json
import signal
import sys
import time
from pathlib import Path
from types import FrameType

SAVE_EVERY = 10


def main(run: Path, steps: int, rank: int) -> int:
    asked: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        asked.append(number)

    signal.signal(signal.SIGTERM, remember)
    signal.signal(signal.SIGINT, remember)
    attempt = claim(run) if rank == 0 else 0
    step, digest = newest(run)
    print(f"begins after step {step}", flush=True)
    while step < steps:
        if asked:
            if rank == 0:
                save(run, step, digest, attempt)
            return finish(run, attempt, rank, "preempted" if asked[0] == signal.SIGTERM else "stopped", step)
        time.sleep(0.02)
        step += 1
        digest = hashlib.sha256(f"{digest}{step}".encode()).hexdigest()
        if step % 5 == 0:
            print(f"step {step}/{steps}  loss {1 / step:.4f}  lr", flush=True)
        if step % SAVE_EVERY == 0 and rank == 0:
            save(run, step, digest, attempt)
    if rank == 0:
        save(run, step, digest, attempt)
        (run / "model").mkdir(exist_ok=True)
        (run / "model" / "digest").write_text(digest)
    return finish(run, attempt, rank, "done", step)


def claim(run: Path) -> int:
    (run / "attempts").mkdir(parents=True, exist_ok=True)
    number = 1 + max((int(path.name) for path in (run / "attempts").iterdir()), default=0)
    (run / "attempts" / str(number)).mkdir()
    (run / "attempts" / str(number) / "started.json").write_text("{}")
    return number


def newest(run: Path) -> tuple[int, str]:
    markers = sorted(run.glob("checkpoints/*/*/COMMITTED"))
    if not markers:
        return 0, ""
    state = json.loads((markers[-1].parent / "state.json").read_text())
    return state["step"], state["digest"]


def save(run: Path, step: int, digest: str, attempt: int) -> None:
    folder = run / "checkpoints" / f"step-{step:08d}" / f"attempt-{attempt}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "state.json").write_text(json.dumps({"step": step, "digest": digest}))
    time.sleep(0.05)  # a kill in here leaves no checkpoint
    (folder / "COMMITTED").write_text("{}")


def finish(run: Path, attempt: int, rank: int, kind: str, step: int) -> int:
    if rank == 0:
        outcome = {"kind": kind, "step": step, "reason": kind, "host": "here"}
        temporary = run / "attempts" / str(attempt) / ".outcome"
        temporary.write_text(json.dumps(outcome))
        temporary.replace(run / "attempts" / str(attempt) / "outcome.json")
    return {"done": 0, "preempted": 42, "stopped": 130}[kind]


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
