"""Which process of several is the first one, and where the processes of each step meet."""

from __future__ import annotations

import pytest

from numina_finetune import launch
from tests.metadata_server import metadata_server

NUMBERED = ("RANK", "MEGASCALE_SLICE_ID", "CLOUD_TPU_TASK_ID", "TPU_WORKER_ID")


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in NUMBERED:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("variables", "first"),
    [
        ({}, True),
        ({"RANK": "0"}, True),
        ({"RANK": "1"}, False),
        ({"TPU_WORKER_ID": "0", "MEGASCALE_SLICE_ID": "0"}, True),
        ({"TPU_WORKER_ID": "2"}, False),
        ({"TPU_WORKER_ID": "0", "MEGASCALE_SLICE_ID": "1"}, False),
    ],
)
def test_the_environment_says_which_process_is_the_first(
    alone: pytest.MonkeyPatch, variables: dict[str, str], first: bool
) -> None:
    for name, value in variables.items():
        alone.setenv(name, value)
    assert launch.is_first_process() is first


def test_a_tpu_host_asks_its_machine_for_its_number(alone: pytest.MonkeyPatch) -> None:
    alone.setattr(launch, "tpu_attached", lambda: True)
    with metadata_server() as server:
        assert launch.is_first_process(server.url), "a host that is alone has no number"
        for number, first in (("0", True), ("3", False)):
            server.set("attributes/agent-worker-number", number)
            assert launch.is_first_process(server.url) is first


def test_each_step_of_a_launchers_processes_meets_at_a_port_of_its_own(alone: pytest.MonkeyPatch) -> None:
    alone.setenv("MASTER_PORT", "65535")
    alone.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    assert launch.environment_of_command(1)["MASTER_PORT"] == "65535", "nobody else is at that port"
    alone.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    ports = [launch.environment_of_command(number)["MASTER_PORT"] for number in (1, 2, 3)]
    assert len({*ports, "65535"}) == 4 and all(1024 <= int(port) < 65536 for port in ports)
    assert launch.environment_of_command(1)["TORCHELASTIC_USE_AGENT_STORE"] == "False"
