"""Two processes with gloo between them, each with its own files: nothing is committed that one of them lacks."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping

import pytest

from numina_finetune.checkpoint.reading import committed, faults_of
from numina_finetune.storage import Store
from tests.conftest import ROOT, environment
from tests.gcs import Gcs


def start(url: str, action: str, extra: Mapping[str, str]) -> list[subprocess.Popen[str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "1"}
    shared |= {"USE_TORCH_XLA": "false", "PYTHONFAULTHANDLER": "1"}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "tests.checkpoint.host", url, action],
            env=environment(RANK=str(rank), LOCAL_RANK=str(rank), **shared, **extra),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]


def wait_until(condition: Callable[[], bool], processes: list[subprocess.Popen[str]]) -> None:
    until = time.monotonic() + 90
    while not condition():
        if time.monotonic() > until:
            for process in processes:
                process.send_signal(signal.SIGABRT)  # which prints where it stands
        if any(process.poll() is not None for process in processes):
            pytest.fail("\n".join(process.communicate()[0] for process in processes))
        time.sleep(0.02)


@pytest.fixture
def killed(service: Gcs, cloud: Store) -> Store:
    """A run that committed step 1; its second host died while it stored its files of step 2."""
    service.fault("delay", r"step-00000002/.*/state/00001", seconds=3.0)
    hosts = start(cloud.url, "saves", service.environment)
    wait_until(lambda: service.count(r"step-00000002/.*/state/00001") > 0, hosts)
    hosts[1].send_signal(signal.SIGKILL)
    outputs = [host.communicate(timeout=120)[0] for host in hosts]
    assert hosts[0].returncode not in (0, None), outputs[0]
    return cloud


def test_a_host_that_dies_while_it_stores_its_files_leaves_no_commit_and_both_resume_at_the_same_step(
    service: Gcs, killed: Store
) -> None:
    assert [checkpoint.step for checkpoint in committed(killed)] == [1]
    hosts = start(killed.url, "resume", service.environment)
    outputs = [host.communicate(timeout=120)[0] for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], outputs
    for output in outputs:
        assert "resumed at step 1: True 1" in output
        assert "committed: [2, 1]" in output
    newest = committed(killed)[0]
    assert newest.attempt == 2
    assert faults_of(newest) == []
    written = {name.removeprefix(newest.prefix) for name in killed.names(newest.prefix)}
    assert {"state/00000-00000.bin", "state/00001-00000.bin", "done/host-00000.json", "done/host-00001.json"} <= written


def test_what_one_host_cannot_read_no_host_resumes_from(service: Gcs, cloud: Store) -> None:
    """The checkpoint before is taken by all, not only by the one that found the damage."""
    hosts = start(cloud.url, "saves", service.environment)
    wait_until(lambda: len(committed(cloud)) >= 2, hosts)
    for host in hosts:
        host.kill()
        host.communicate()
    newest, before = committed(cloud)[:2]
    # Only the second host reads its own random states: this damage reaches it on the way there.
    service.fault("corrupt", rf"GET .*{newest.prefix}accelerate/00001/.*alt=media", times=100)
    hosts = start(cloud.url, "resume", service.environment)
    outputs = [host.communicate(timeout=120)[0] for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], outputs
    assert all(f"resumed at step {before.step}: True" in output for output in outputs), outputs
