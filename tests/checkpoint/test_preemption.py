"""Notices to stop: from signals and from the metadata service."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest

from numina_finetune.checks import config_faults
from numina_finetune.config import RunConfig, SourceConfig
from tests.conftest import ROOT, environment
from tests.metadata_server import MetadataServer, metadata_server

SOON = 20.0
"""Seconds after which what must happen soon counts as never happening; a busy machine may need some of them."""

LISTENER = """
import json, logging, sys, threading
from numina_finetune.checkpoint.preemption import StopNotice

logging.basicConfig(level=logging.DEBUG, stream=sys.stderr, format="%(levelname)s %(message)s")
grace, url, can_migrate = float(sys.argv[1]), sys.argv[2], sys.argv[3] == "True"
with StopNotice(grace) as notice:
    if url != "none":
        notice.watch_metadata(url, can_migrate=can_migrate)
    print("ready", flush=True)
    for _ in sys.stdin:
        print(json.dumps({
            "wanted": notice.wanted,
            "reason": notice.reason,
            "signal": notice.signal and notice.signal.name,
            "remaining": notice.remaining(),
            "listening": threading.active_count() > 1,
        }), flush=True)
"""
"""Says on request what its StopNotice knows."""


class Listener:
    """A process with a StopNotice."""

    def __init__(
        self, url: str, *, grace: float = 25.0, can_migrate: bool = False, env: Mapping[str, str] | None = None
    ) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", LISTENER, str(grace), url, str(can_migrate)],
            env=environment() | dict(env or {}),
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._line() == "ready"

    def _line(self) -> str:
        assert self.process.stdout is not None
        return str(self.process.stdout.readline()).strip()

    def state(self) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write("state\n")
        self.process.stdin.flush()
        state: dict[str, Any] = json.loads(self._line())
        return state

    def until(self, reached: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The first state in which ``reached`` holds."""
        end = time.monotonic() + SOON
        while not reached(state := self.state()):
            assert time.monotonic() < end, state
            time.sleep(0.01)
        return state

    def told(self) -> dict[str, Any]:
        return self.until(lambda state: bool(state["wanted"]))

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def end(self) -> tuple[str, float]:
        """Let it leave the context and exit; what it logged, and the seconds it took."""
        began = time.monotonic()
        _, logged = self.process.communicate(timeout=SOON)
        return logged, time.monotonic() - began


@contextmanager
def listener(url: str, **options: Any) -> Iterator[Listener]:
    one = Listener(url, **options)
    try:
        yield one
    finally:
        one.process.kill()
        one.process.communicate()


@pytest.fixture
def machine() -> Iterator[MetadataServer]:
    with metadata_server() as server:
        yield server


def wait_for(reached: Callable[[], bool]) -> None:
    end = time.monotonic() + SOON
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.01)


def holding(machine: MetadataServer) -> Callable[[], bool]:
    """Whether the listener has asked about everything once, and waits for the next change."""
    return lambda: machine.count("upcoming-maintenance") >= 1 and machine.count("wait_for_change") >= 2


# --- signals ----------------------------------------------------------------------------------------------------------


def test_sigterm_is_a_notice_and_its_grace_runs_from_then_on() -> None:
    with listener("none", grace=25.0) as process:
        assert process.state() == {
            "wanted": False, "reason": "", "signal": None, "remaining": None, "listening": False,
        }  # fmt: skip
        process.send(signal.SIGTERM)
        first = process.told()
        assert (first["reason"], first["signal"]) == ("SIGTERM", "SIGTERM")
        assert 15 < first["remaining"] <= 25
        process.send(signal.SIGTERM)
        time.sleep(0.3)
        assert process.state()["remaining"] <= first["remaining"] - 0.3, "another SIGTERM does not start it anew"


def test_a_grace_that_is_over_leaves_nothing() -> None:
    with listener("none", grace=0.0) as process:
        process.send(signal.SIGTERM)
        assert process.told()["remaining"] == 0


def test_a_first_sigint_asks_to_stop_without_a_deadline_and_the_second_interrupts_at_once() -> None:
    with listener("none") as process:
        process.send(signal.SIGINT)
        state = process.told()
        assert (state["reason"], state["signal"], state["remaining"]) == ("SIGINT", "SIGINT", None)
        process.send(signal.SIGINT)
        logged, _ = process.end()
        assert process.process.returncode == -signal.SIGINT
        assert "KeyboardInterrupt" in logged


def test_a_machine_that_goes_while_the_user_stops_sets_the_deadline() -> None:
    with listener("none", grace=25.0) as process:
        process.send(signal.SIGINT)
        process.told()
        process.send(signal.SIGTERM)
        state = process.until(lambda state: state["remaining"] is not None)
        assert (state["reason"], state["signal"]) == ("SIGINT", "SIGINT"), "the first notice stays the reason"
        assert 15 < state["remaining"] <= 25


def test_one_sigint_after_another_notice_does_not_interrupt_the_save() -> None:
    with listener("none") as process:
        process.send(signal.SIGTERM)
        process.told()
        process.send(signal.SIGINT)
        time.sleep(0.2)
        assert process.state()["signal"] == "SIGTERM"
        process.send(signal.SIGINT)
        process.end()
        assert process.process.returncode == -signal.SIGINT


# --- the metadata service ---------------------------------------------------------------------------------------------


def test_a_preemption_is_told_as_soon_as_the_service_knows_it(machine: MetadataServer) -> None:
    with listener(machine.url) as process:
        wait_for(holding(machine))
        assert not process.state()["wanted"]
        began = time.monotonic()
        machine.set("preempted", "TRUE")
        state = process.told()
        assert time.monotonic() - began < 2, "the question was held, not asked again later"
        assert (state["reason"], state["signal"]) == ("preempted (metadata)", None)
        assert 15 < state["remaining"] <= 25
        logged, _ = process.end()
    assert "INFO notice to stop: preempted (metadata)" in logged


def test_a_preemption_that_is_already_known_at_the_start_is_told(machine: MetadataServer) -> None:
    machine.set("preempted", "TRUE")
    with listener(machine.url) as process:
        assert process.told()["reason"] == "preempted (metadata)"


def test_metadata_and_then_sigterm_are_one_notice(machine: MetadataServer) -> None:
    with listener(machine.url) as process:
        machine.set("preempted", "TRUE")
        first = process.told()
        time.sleep(0.3)
        process.send(signal.SIGTERM)
        time.sleep(0.2)
        second = process.state()
    assert (second["reason"], second["signal"]) == ("preempted (metadata)", None)
    assert second["remaining"] <= first["remaining"] - 0.5


def test_sigterm_and_then_metadata_are_one_notice(machine: MetadataServer) -> None:
    with listener(machine.url) as process:
        wait_for(holding(machine))
        process.send(signal.SIGTERM)
        first = process.told()
        machine.set("preempted", "TRUE")
        second = process.until(lambda state: not state["listening"])
    assert (second["reason"], second["signal"]) == ("SIGTERM", "SIGTERM")
    assert second["remaining"] < first["remaining"]


@pytest.mark.parametrize(
    ("key", "value", "can_migrate", "reason"),
    [
        ("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE", True, "maintenance TERMINATE_ON_HOST_MAINTENANCE"),
        ("maintenance-event", "MIGRATE_ON_HOST_MAINTENANCE", False, "maintenance MIGRATE_ON_HOST_MAINTENANCE"),
        ("upcoming-maintenance", '{"maintenance_status": "ONGOING", "type": "SCHEDULED"}', True, "maintenance ONGOING"),
        (
            "upcoming-maintenance",
            '{"upcomingMaintenance": {"maintenanceStatus": "ONGOING"}}',
            True,
            "maintenance ONGOING",
        ),
    ],
)
def test_maintenance_that_ends_the_machine_is_a_notice(
    machine: MetadataServer, key: str, value: str, can_migrate: bool, reason: str
) -> None:
    machine.set(key, value)
    with listener(machine.url, can_migrate=can_migrate) as process:
        assert process.told()["reason"] == f"{reason} (metadata)"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("maintenance-event", "MIGRATE_ON_HOST_MAINTENANCE"),
        ("maintenance-event", "A_VALUE_OF_THE_FUTURE"),
        ("upcoming-maintenance", '{"maintenance_status": "COMPLETE"}'),
        ("upcoming-maintenance", "{}"),
        ("upcoming-maintenance", '"NONE"'),
        ("upcoming-maintenance", "[not JSON"),
        ("preempted", "NONE"),
    ],
)
def test_what_leaves_the_machine_alone_is_no_notice(machine: MetadataServer, key: str, value: str) -> None:
    machine.set(key, value)
    with listener(machine.url, can_migrate=True) as process:
        wait_for(holding(machine))
        state = process.state()
        assert not state["wanted"] and state["listening"]


def test_maintenance_that_is_only_announced_is_said_once_and_training_goes_on(machine: MetadataServer) -> None:
    machine.set(
        "upcoming-maintenance",
        '{"maintenance_status": "PENDING", "type": "SCHEDULED", "window_start_time": "2031-05-01T19:00:00Z"}',
    )
    with listener(machine.url) as process:
        wait_for(holding(machine))
        machine.set("preempted", "NONE")  # a change that is no notice brings the next round of questions
        wait_for(lambda: machine.count("upcoming-maintenance") >= 2)
        assert not process.state()["wanted"]
        logged, _ = process.end()
    assert logged.count("INFO maintenance of this machine is announced for 2031-05-01T19:00:00Z") == 1


@pytest.mark.parametrize("fault", [503, 404, "drop", "garbage"])
def test_errors_of_the_service_are_survived_without_pestering_it(machine: MetadataServer, fault: int | str) -> None:
    with listener(machine.url) as process:
        wait_for(holding(machine))
        before = len(machine.asked)
        machine.fault(fault)
        time.sleep(2.5)
        assert len(machine.asked) - before <= 12
        assert not process.state()["wanted"]
        machine.set("preempted", "TRUE")
        machine.fault(None)
        assert process.told()["reason"] == "preempted (metadata)"
        logged, _ = process.end()
    assert "WARNING" not in logged and "Traceback" not in logged


def test_a_service_that_no_longer_answers_is_asked_again(machine: MetadataServer) -> None:
    machine.fault("stall")
    with listener(machine.url) as process:
        wait_for(lambda: len(machine.asked) >= 2)  # the first question was given up
        machine.set("preempted", "TRUE")
        machine.fault(None)
        assert process.told()["reason"] == "preempted (metadata)"


def test_a_service_that_does_not_hold_its_answers_is_not_asked_without_pause(machine: MetadataServer) -> None:
    machine.holds = False
    with listener(machine.url) as process:
        wait_for(holding(machine))
        before = machine.count("wait_for_change")
        time.sleep(2.5)
        assert process.state()["listening"]
        assert 1 <= machine.count("wait_for_change") - before <= 3
        machine.set("preempted", "TRUE")
        assert process.told()["reason"] == "preempted (metadata)"


def closed_port() -> str:
    with metadata_server() as server:
        return server.url


@pytest.mark.parametrize("absent", ["closed port", "unknown name", "impossible name", "another server"])
def test_without_a_metadata_service_nothing_is_said_and_nothing_waits(machine: MetadataServer, absent: str) -> None:
    machine.flavor = None
    machine.set("preempted", "TRUE")  # another server's answers mean nothing
    url = {
        "closed port": closed_port(),
        "unknown name": "http://metadata.invalid/computeMetadata/v1",
        "impossible name": f"http://{'x' * 100}/computeMetadata/v1",
        "another server": machine.url,
    }[absent]
    with listener(url) as process:
        state = process.until(lambda state: not state["listening"])
        assert not state["wanted"]
        logged, _ = process.end()
    assert logged.count("no metadata service answers") == 1
    assert all(line.startswith("DEBUG") for line in logged.splitlines()), logged


def test_proxies_are_not_used(machine: MetadataServer) -> None:
    machine.set("preempted", "TRUE")
    proxies = dict.fromkeys(("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"), "http://127.0.0.1:9")
    with listener(machine.url, env={**proxies, "no_proxy": "", "NO_PROXY": ""}) as process:
        assert process.told()["reason"] == "preempted (metadata)"


@pytest.mark.parametrize("fault", [None, "stall"])
def test_leaving_waits_for_no_answer(machine: MetadataServer, fault: str | None) -> None:
    machine.fault(fault)
    with listener(machine.url) as process:
        wait_for((lambda: len(machine.asked) >= 1) if fault else holding(machine))
        _, seconds = process.end()
        assert process.process.returncode == 0
    assert seconds < 2  # the question in flight would be held for ten


# --- options ----------------------------------------------------------------------------------------------------------


def faults(**values: Any) -> list[str]:
    return config_faults(
        RunConfig(model_name="tiny-qwen3", datasets=(SourceConfig("synthetic-gsm8k"),), output_dir="runs", **values)
    )


@pytest.mark.parametrize("url", ["none", "http://metadata.google.internal/computeMetadata/v1", "http://127.0.0.1:80/x"])
def test_an_address_or_none_is_taken(url: str) -> None:
    assert faults(metadata_url=url, preemption_grace=0.0) == []


@pytest.mark.parametrize("url", ["", "metadata.google.internal", "https://host/x", "http://", "http://host:port/x"])
def test_what_is_no_address_is_refused_with_the_way_to_write_it(url: str) -> None:
    (fault,) = faults(metadata_url=url)
    assert fault.startswith(f"--metadata-url {url!r}") and "http://HOST[:PORT]/PATH, or none" in fault


@pytest.mark.parametrize("seconds", [-1.0, float("nan"), float("inf")])
def test_a_grace_that_is_no_time_is_refused(seconds: float) -> None:
    (fault,) = faults(preemption_grace=seconds)
    assert fault.startswith(f"--preemption-grace {seconds}")
