"""The command lines that gcloud gets, and what is made of its answers; a recording stands in for the program."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import stat
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from numina_finetune.spot.cloud import (
    AlreadyExists,
    CloudError,
    Health,
    InvalidRequest,
    Machine,
    NotFound,
    PermissionDenied,
    Provision,
    QueuedState,
    QuotaExceeded,
    StockOut,
    Transient,
)
from numina_finetune.spot.gcloud import Gcloud, Limits
from numina_finetune.spot.gcloud_errors import typed

ONE = Machine("nf-run-0a1b2c3d-1", "us-east5-b", "v6e-8")
FOUR = Machine("nf-run-0a1b2c3d-2", "us-east5-b", "v5litepod-16", slices=4)
PLACE = "--zone=us-east5-b --project=my-project"

PROGRAM = """#!{python}
import json, pathlib, sys, time
here = pathlib.Path(__file__).parent
with (here / "calls.jsonl").open("a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
answers = json.loads((here / "answers.json").read_text())
answer = answers.pop(0) if answers else {{}}
(here / "answers.json").write_text(json.dumps(answers))
time.sleep(answer.get("seconds", 0))
folder = next((a.split("=", 1)[1] for a in sys.argv if a.startswith("--output-directory=")), None)
for name, text in answer.get("files", {{}}).items():
    (pathlib.Path(folder) / name).write_text(text)
print(answer["json"] if isinstance(answer.get("json"), str) else json.dumps(answer.get("json", {{}})))
print(answer.get("error", ""), file=sys.stderr)
sys.exit(answer.get("code", 1 if answer.get("error") else 0))
"""


class Recording:
    """An executable that plays back answers and keeps the command lines."""

    def __init__(self, folder: Path) -> None:
        self.path, self._folder = folder / "gcloud", folder
        self.path.write_text(PROGRAM.format(python=sys.executable))
        self.path.chmod(self.path.stat().st_mode | stat.S_IXUSR)
        self.answer()

    def answer(self, *answers: dict[str, Any]) -> None:
        (self._folder / "answers.json").write_text(json.dumps(answers))

    @property
    def calls(self) -> Sequence[str]:
        lines = (self._folder / "calls.jsonl").read_text().splitlines()
        return [shlex.join(json.loads(line)) for line in lines]


@pytest.fixture
def recording(tmp_path: Path) -> Recording:
    return Recording(tmp_path)


@pytest.fixture
def cloud(recording: Recording, monkeypatch: pytest.MonkeyPatch) -> Gcloud:
    monkeypatch.setenv("PATH", f"{recording.path.parent}{os.pathsep}{os.environ['PATH']}")
    return Gcloud("my-project", limits=Limits(pause=0.01, read=5, change=5, connect=5))


def test_one_slice_is_asked_for_by_node_id(cloud: Gcloud, recording: Recording) -> None:
    cloud.create(ONE)
    assert recording.calls == [
        f"compute tpus queued-resources create nf-run-0a1b2c3d-1 --node-id=nf-run-0a1b2c3d-1 {PLACE} "
        "--accelerator-type=v6e-8 --runtime-version=v2-alpha-tpuv6e --spot --async --quiet --format=json"
    ]


def test_several_slices_are_asked_for_by_count_and_prefix(recording: Recording) -> None:
    provision = Provision(
        runtime_version="tpu-ubuntu2204-base",
        network="vpc",
        subnetwork="sub",
        internal_ips=True,
        service_account="trainer@my-project.iam.gserviceaccount.com",
        labels={"run": "a", "by": "numina-finetune"},
    )
    Gcloud("my-project", provision, executable=str(recording.path)).create(FOUR)
    assert recording.calls == [
        "compute tpus queued-resources create nf-run-0a1b2c3d-2 --node-count=4 --node-prefix=nf-run-0a1b2c3d-2 "
        f"{PLACE} "
        "--accelerator-type=v5litepod-16 --runtime-version=tpu-ubuntu2204-base --spot --network=vpc --subnetwork=sub "
        "--internal-ips --service-account=trainer@my-project.iam.gserviceaccount.com "
        "--labels=by=numina-finetune,run=a --async --quiet --format=json"
    ]
    assert FOUR.nodes == tuple(f"nf-run-0a1b2c3d-2-{index}" for index in range(4))


def test_the_other_command_lines(cloud: Gcloud, recording: Recording) -> None:
    recording.answer(
        {"json": {"name": "projects/p/locations/z/queuedResources/q", "state": {"state": "ACTIVE"}}},
        {"json": {"state": "READY", "health": "HEALTHY", "networkEndpoints": [{"ipAddress": "10.0.0.2"}]}},
        {"json": []},
        {},
        {"files": {"0.log": "a"}},
        {},
        {"json": {"location": "US-EAST5"}},
    )
    cloud.describe(ONE)
    cloud.describe_node(ONE.name, ONE.zone)
    cloud.list(ONE.zone)
    cloud.delete(ONE)
    cloud.run(ONE.name, ONE.zone, "python3 numina/run/worker.py status train-1 - 1")
    cloud.copy(ONE.name, ONE.zone, [Path("/a/worker.py"), Path("/a/job.json")], "numina/run")
    cloud.bucket_location("my-bucket")
    calls = [call.rpartition(" --output-directory=")[0] or call for call in recording.calls]
    assert calls == [
        f"compute tpus queued-resources describe {ONE.name} --zone=us-east5-b --project=my-project --format=json",
        f"compute tpus tpu-vm describe {ONE.name} --zone=us-east5-b --project=my-project --format=json",
        f"compute tpus queued-resources list {PLACE} --format=json",
        f"compute tpus queued-resources delete {ONE.name} {PLACE} --force --async --quiet",
        f"compute tpus tpu-vm ssh {ONE.name} {PLACE} --worker=all --strict-host-key-checking=no --quiet "
        "'--command=python3 numina/run/worker.py status train-1 - 1'",
        f"compute tpus tpu-vm scp /a/worker.py /a/job.json {ONE.name}:numina/run/ {PLACE} --worker=all "
        "--strict-host-key-checking=no --quiet",
        "storage buckets describe gs://my-bucket --project=my-project --format=json",
    ]
    assert cloud.delete_command(ONE) == f"gcloud {calls[3]}"


@pytest.mark.skipif(not shutil.which("gcloud"), reason="gcloud is not installed: its parser is the judge here")
def test_the_real_gcloud_understands_every_command_line(tmp_path: Path) -> None:
    """Without an account it parses its arguments, and then says that there is none."""
    provision = Provision(network="n", subnetwork="s", internal_ips=True, service_account="a@b.c", labels={"run": "x"})
    cloud = Gcloud("my-project", provision)
    lines = [
        cloud.create_arguments(ONE),
        cloud.create_arguments(FOUR),
        shlex.split(cloud.delete_command(ONE))[1:],
        cloud.run_arguments(ONE.name, ONE.zone, "echo a b", str(tmp_path)),
        cloud.copy_arguments(ONE.name, ONE.zone, [Path(__file__)], "numina/run"),
        cloud.describe_arguments(ONE),
        cloud.node_arguments(ONE.name, ONE.zone),
        cloud.list_arguments(ONE.zone),
        shlex.split("storage buckets describe gs://b --project=my-project --format=json"),
    ]
    environment = {**os.environ, "CLOUDSDK_CONFIG": str(tmp_path), "CLOUDSDK_CORE_CHECK_GCE_METADATA": "false"}
    for line in [*lines, [*lines[0], "--no-such-option"]]:
        done = subprocess.run(["gcloud", *line], env=environment, capture_output=True, text=True, check=False)
        understood = "do not currently have an active account" in done.stderr
        assert understood == ("--no-such-option" not in line), done.stderr
    assert isinstance(typed(done.stderr), InvalidRequest)


def test_answers_become_plain_states(cloud: Gcloud, recording: Recording) -> None:
    failed = {"state": {"state": "FAILED", "failedData": {"error": {"code": 8, "message": "no more capacity"}}}}
    recording.answer(
        {"json": {"name": "projects/p/locations/z/queuedResources/q", **failed}},
        {"json": {"name": "q", "state": {"state": "SOMETHING_NEW"}}},
        {"json": {"state": "READY", "health": "UNHEALTHY_MAINTENANCE", "networkEndpoints": [{"ipAddress": "1"}] * 4}},
    )
    queued = cloud.describe(ONE)
    assert (queued.name, queued.state, queued.error) == ("q", QueuedState.FAILED, "no more capacity")
    assert cloud.describe(ONE).state == QueuedState.UNKNOWN
    node = cloud.describe_node("n", "z")
    assert (node.state, node.health, len(node.addresses)) == ("READY", Health.UNHEALTHY, 4)


def test_a_read_is_repeated_after_a_passing_fault_and_a_change_is_not(cloud: Gcloud, recording: Recording) -> None:
    busy = {"error": "ERROR: (gcloud) UNAVAILABLE: The service is currently unavailable."}
    recording.answer(busy, busy, {"json": []})
    assert cloud.list("us-east5-b") == []
    recording.answer(busy)
    with pytest.raises(Transient):
        cloud.create(ONE)
    assert sum("create" in call for call in recording.calls) == 1
    assert sum("list" in call for call in recording.calls) == 3


def test_a_call_that_takes_too_long_is_given_up(recording: Recording) -> None:
    cloud = Gcloud("p", executable=str(recording.path), limits=Limits(change=0.5))
    recording.answer({"seconds": 30})
    with pytest.raises(Transient, match=r"took more than 0\.5 s"):
        cloud.create(ONE)


def test_the_workers_that_answered_are_heard_though_others_failed(cloud: Gcloud, recording: Recording) -> None:
    ssh = "ERROR: (gcloud.compute.tpus.tpu-vm.ssh) [/usr/bin/ssh] exited with return code [255]."
    recording.answer({"files": {"0.log": "from 0\n", "2.log": "from 2\n"}, "error": ssh})
    assert cloud.run("n", "z", "true") == {0: "from 0\n", 2: "from 2\n"}
    recording.answer({"error": ssh})
    with pytest.raises(Transient):
        cloud.run("n", "z", "true")


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (StockOut, '{"code": 8, "message": "There is no more capacity in the zone \\"us-east5-b\\"; you can try"}'),
        (StockOut, "Insufficient reserved capacity. Contact customer support to increase your reservation."),
        (
            QuotaExceeded,
            "Quota 'TPUV5sPreemptibleLitepodServingPerProjectPerZoneForTPUAPI' exhausted. Limit 4 in zone z",
        ),
        (QuotaExceeded, "Quota limit 'TPUV6EPreemptiblePerProjectPerZoneForTPUAPI' has been exceeded. Limit: 32 in z"),
        (Transient, "RESOURCE_EXHAUSTED: Quota exceeded for quota metric 'Requests' and limit 'Requests per minute'"),
        (PermissionDenied, "ERROR: (gcloud) You do not currently have an active account selected."),
        (
            PermissionDenied,
            "PERMISSION_DENIED: Permission 'tpu.nodes.create' denied on 'projects/p/locations/z/nodes/n'",
        ),
        (PermissionDenied, "ERROR: There was a problem refreshing your current auth tokens: Reauthentication failed."),
        (InvalidRequest, "PERMISSION_DENIED: Permission denied on 'locations/us-central2-b' (or it may not exist)."),
        (
            InvalidRequest,
            "INVALID_ARGUMENT: Cloud TPU received a bad request. the accelerator v6e-4 was not found in zone z",
        ),
        (NotFound, "NOT_FOUND: Resource 'projects/p/locations/z/queuedResources/q' was not found"),
        (NotFound, 'This TPU has terminal state "PREEMPTED", so it cannot be used anymore.'),
        (AlreadyExists, "ALREADY_EXISTS: Resource 'projects/p/locations/z/queuedResources/q' already exists"),
        (Transient, 'This TPU has state "REPAIRING", so it cannot be currently connected to.'),
        (Transient, "ssh: connect to host 34.162.99.201 port 22: Connection timed out"),
        (Transient, "something nobody has seen before"),
    ],
)
def test_error_texts_become_types(kind: type[CloudError], text: str) -> None:
    assert type(typed(text)) is kind


def test_an_uninstalled_gcloud_is_a_fault_that_no_retry_mends() -> None:
    with pytest.raises(InvalidRequest, match="is not installed"):
        Gcloud("p", executable="no-such-gcloud").create(ONE)
