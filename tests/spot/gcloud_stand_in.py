"""A gcloud whose machines are folders: ``python gcloud_stand_in.py FOLDER ARGUMENTS…``.

``FOLDER/machines/NAME/`` holds ``state`` (of the queued resource) and ``home``, the one worker's disk. A new one has
the state in ``FOLDER/begin``, and its node the one in ``FOLDER/node``. One that is deleted goes at once, unless
``FOLDER/slow-delete`` exists. Every command line is added to ``FOLDER/calls.jsonl``.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path


def main(folder: Path, arguments: list[str]) -> int:
    words = [word for word in arguments if not word.startswith("--")]
    options = dict(word.removeprefix("--").partition("=")[::2] for word in arguments if word.startswith("--"))
    with (folder / "calls.jsonl").open("a", encoding="utf-8") as calls:
        calls.write(json.dumps(arguments) + "\n")
    if words[:2] == ["storage", "buckets"]:
        return answer({"location": "US"})
    noun, verb, *names = words[2:]
    if noun == "queued-resources" and verb == "list":
        return answer([queued(machine) for machine in sorted((folder / "machines").iterdir())])
    machine = folder / "machines" / (names[0] if verb != "scp" else names[-1].partition(":")[0])
    if verb == "create":
        return create(folder, machine)
    if not machine.is_dir():
        return refuse(f"NOT_FOUND: Resource '{machine.name}' was not found")
    if verb == "delete":
        (machine / "state").write_text("DELETING")
        if not (folder / "slow-delete").exists():
            shutil.rmtree(machine)
        return 0
    if noun == "queued-resources":
        return answer(queued(machine))
    if (machine / "state").read_text() != "ACTIVE":
        return refuse(f"NOT_FOUND: Resource '{machine.name}' was not found")
    if verb == "describe":
        node = (folder / "node").read_text()
        return answer({"state": node, "health": "HEALTHY", "networkEndpoints": [{"ipAddress": "10.0.0.2"}]})
    if verb == "scp":
        for name in names[:-1]:
            shutil.copy(name, machine / "home" / names[-1].partition(":")[2])
        return 0
    environment = {**os.environ, "HOME": str(machine / "home"), "TMPDIR": str(machine / "home")}
    with Path(options["output-directory"], "0.log").open("w", encoding="utf-8") as output:
        command = ["bash", "-c", options["command"]]
        return subprocess.run(command, cwd=machine / "home", env=environment, stdout=output, check=False).returncode


def create(folder: Path, machine: Path) -> int:
    if machine.is_dir():
        return refuse(f"ALREADY_EXISTS: Resource '{machine.name}' already exists")
    shutil.copytree(folder / "image", machine / "home", symlinks=True)
    (machine / "state").write_text((folder / "begin").read_text())
    return answer({})


def queued(machine: Path) -> dict[str, object]:
    state = (machine / "state").read_text()
    return {"name": f"projects/p/locations/z/queuedResources/{machine.name}", "state": {"state": state}}


def answer(value: object) -> int:
    print(json.dumps(value))
    return 0


def refuse(text: str) -> int:
    print(f"ERROR: (gcloud) {text}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
