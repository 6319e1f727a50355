"""Every way to start a training that the documentation names, really started, finished and stopped."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from numina_finetune import launch
from numina_finetune.config import RunConfig
from tests.conftest import ROOT, TINY, Run, environment, train

DEADLINE = 400.0
"""Seconds after which something that must happen counts as never happening."""

NATIVE = {"ACCELERATE_USE_CPU": "1"}
SPMD = {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "2"}


def installed(name: str) -> str:
    """A command of the interpreter's own environment."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    assert found, f"{name} is not installed"
    return found


def console_script() -> list[str]:
    """What ``numina-finetune`` runs; the generated script itself where the package is installed."""
    script = Path(sys.executable).with_name("numina-finetune")
    return [str(script)] if script.exists() else [sys.executable, "-c", "from numina_finetune.cli import main; main()"]


@dataclass(frozen=True)
class Form:
    """One way to start a training; run from the checkout's root."""

    words: Callable[[], list[str]]
    env: Mapping[str, str] = field(default_factory=lambda: SPMD)
    own_process: bool = False
    """Whether the process that was started is the training itself, so that its exit code is the contract's."""
    says: tuple[str, ...] = ("backend xla (PJRT_DEVICE=CPU is set)", "XLA SPMD on 2 CPU devices, mesh fsdp=2, 1 proc")


def _accelerate(*words: str) -> Callable[[], list[str]]:
    return lambda: [installed("accelerate"), "launch", *words]


FORMS = {
    "console": Form(console_script, own_process=True),
    "module": Form(lambda: [sys.executable, "-m", "numina_finetune"], own_process=True),
    "accelerate-config": Form(
        _accelerate("--config_file", str(ROOT / "configs/accelerate/tpu_spmd.yaml"), "-m", "numina_finetune")
    ),
    "accelerate-tpu": Form(
        _accelerate("--tpu", "numina-finetune"), own_process=True, says=("one SPMD process for all", "XLA SPMD on")
    ),
    "accelerate": Form(_accelerate("numina-finetune")),
    "torchrun": Form(
        lambda: [
            *(installed("torchrun"), "--standalone", "--nproc_per_node", "2"),
            *("-m", "numina_finetune", "--backend", "native"),
        ],
        env=NATIVE,
        says=("backend native (asked for by --backend)", "native torch on cpu, 2 process(es)"),
    ),
}


class Started:
    """A training under way, and every process that belongs to it."""

    def __init__(self, form: Form, folder: Path, *options: str) -> None:
        self.folder, self._log = folder, folder.parent / "output.txt"
        cache = ["--output-dir", str(folder), "--cache-dir", str(folder.parent / "cache")]
        # HF_HOME is where a user's own Accelerate configuration would be found.
        own = environment() | {"HF_HOME": str(folder.parent / "hf"), **form.env}
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [*form.words(), *TINY, *cache, *options],
                env=own,
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        return self._log.read_text(encoding="utf-8")

    def wait(self) -> Run:
        return Run(self.process.wait(timeout=DEADLINE), self.output, self.folder)

    def wait_until(self, what: str, happened: Callable[[], bool], *, running: bool = True) -> None:
        deadline = time.monotonic() + DEADLINE
        while not happened():
            assert not (running and self.process.poll() is not None), f"ended before {what}:\n{self.output}"
            assert time.monotonic() < deadline, f"never {what}:\n{self.output}"
            time.sleep(0.1)

    def steps_logged(self) -> int:
        return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in self.folder.glob("*/metrics.jsonl"))

    def training_pid(self) -> int:
        (started,) = self.folder.glob("*/attempts/1/started.json")
        return int(json.loads(started.read_text(encoding="utf-8"))["pid"])

    def alive(self) -> list[int]:
        """Processes whose command line names this run's folder."""
        found = []
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = entry.read_bytes()
            except OSError:  # it ended meanwhile
                continue
            if str(self.folder).encode() in words:
                found.append(int(entry.parent.name))
        return found


@contextmanager
def started(form: Form, folder: Path, *options: str) -> Iterator[Started]:
    training = Started(form, folder, *options)
    try:
        yield training
    finally:
        for pid in training.alive():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        training.process.wait()


@contextmanager
def under_way(form: Form, folder: Path, *options: str) -> Iterator[Started]:
    """A long training that has logged its second step."""
    endless = ("--max-steps", "2000", "--logging-steps", "1", "--save-steps", "0")
    with started(form, folder, *endless, *options) as training:
        training.wait_until("two steps were logged", lambda: training.steps_logged() >= 2)
        yield training


def saved_and_gone(training: Started, kind: str) -> Run:
    """The stopped run: a committed checkpoint, an outcome that says so, and no process left behind."""
    training.wait_until("every process ended", lambda: not training.alive(), running=False)
    run = training.wait()
    outcome = run.outcome()
    assert outcome["kind"] == kind, run.output
    assert outcome["step"] >= 2
    assert [int(path.parent.name.removeprefix("step-")) for path in run.checkpoints] == [outcome["step"]]
    return run


# --- to the end -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    # The plain command, and Accelerate's for TPUs: the others are among the slow tests.
    [name if name in ("console", "accelerate-tpu") else pytest.param(name, marks=pytest.mark.slow) for name in FORMS],
)
def test_every_launch_form_trains_once_to_the_end(name: str, tmp_path: Path) -> None:
    form = FORMS[name]
    with started(form, tmp_path / "run", "--max-steps", "3", "--logging-steps", "1") as training:
        run = training.wait()
    assert run.code == 0, run.output
    assert [path.name for path in (run.run / "attempts").iterdir()] == ["1"]
    assert [record["step"] for record in run.metrics if "loss" in record] == [1, 2, 3]
    assert run.outcome()["kind"] == "done"
    assert (run.run / "model" / "model.safetensors").is_file()
    assert all(words in run.output for words in form.says), run.output


# --- stopped ----------------------------------------------------------------------------------------------------------

STOPS = [
    pytest.param("module", "training", marks=pytest.mark.slow),
    pytest.param("accelerate-config", "launcher"),
    pytest.param("accelerate-tpu", "training", marks=pytest.mark.slow),
    pytest.param("torchrun", "launcher", marks=pytest.mark.slow),
    pytest.param("console", "training", marks=pytest.mark.slow),
    pytest.param("accelerate-config", "training", marks=pytest.mark.slow),
    pytest.param("accelerate", "launcher", marks=pytest.mark.slow),
    pytest.param("accelerate", "training", marks=pytest.mark.slow),
    pytest.param("torchrun", "training", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "target"), STOPS)
def test_sigterm_saves_and_leaves_no_process_behind(name: str, target: str, tmp_path: Path) -> None:
    form = FORMS[name]
    with under_way(form, tmp_path / "run") as training:
        pid = training.training_pid()
        assert (pid == training.process.pid) is form.own_process
        os.kill(pid if target == "training" else training.process.pid, signal.SIGTERM)
        run = saved_and_gone(training, "preempted")
    assert run.outcome()["reason"] == "SIGTERM" or name == "torchrun"
    if form.own_process:
        assert run.code == 42
    else:
        assert run.code != 0, "a launcher's exit code is its own, but never success"


@pytest.mark.parametrize("backend", ["native", pytest.param("xla", marks=pytest.mark.slow)])
def test_ctrl_c_saves_and_exits_130(backend: str, tmp_path: Path) -> None:
    with under_way(FORMS["module"], tmp_path / "run", "--backend", backend) as training:
        training.process.send_signal(signal.SIGINT)
        run = saved_and_gone(training, "stopped")
    assert run.code == 130


@pytest.mark.slow
@pytest.mark.parametrize("name", ["accelerate-config", "torchrun"])
def test_ctrl_c_in_a_launchers_terminal_saves(name: str, tmp_path: Path) -> None:
    with under_way(FORMS[name], tmp_path / "run") as training:
        os.killpg(training.process.pid, signal.SIGINT)  # a terminal signals every process in its foreground
        saved_and_gone(training, "stopped")


# --- the choice of the backend ----------------------------------------------------------------------------------------


def test_native_is_native_although_torch_xla_is_installed_and_its_variables_are_set(tmp_path: Path) -> None:
    env = environment(devices=2, USE_TORCH_XLA="true")
    run = train(tmp_path / "run", "--max-steps", "3", "--backend", "native", "--dry-run", env=env)
    assert run.code == 0, run.output
    assert "backend native (asked for by --backend)" in run.output
    assert "native torch on" in run.output and "XLA SPMD" not in run.output
    assert not run.folder.exists(), "a dry run writes no run"


@pytest.mark.parametrize(
    ("env", "tpu", "backend", "reason"),
    [
        ({}, False, "native", "no TPU is attached"),
        ({}, True, "xla", "a TPU is attached"),
        ({"PJRT_DEVICE": "TPU"}, True, "xla", "PJRT_DEVICE=TPU is set"),
        ({"ACCELERATE_USE_CPU": "True"}, True, "native", "ACCELERATE_USE_CPU=True is set"),
        ({"ACCELERATE_USE_CPU": "False"}, True, "xla", "a TPU is attached"),
        ({"ACCELERATE_USE_CPU": "True", "PJRT_DEVICE": "CPU"}, False, "xla", "PJRT_DEVICE=CPU is set"),
    ],
)
def test_auto_goes_by_what_is_set_and_then_by_what_is_attached(
    env: dict[str, str], tpu: bool, backend: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PJRT_DEVICE", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launch, "tpu_attached", lambda: tpu)
    chosen, why = launch.choose_backend(RunConfig())
    assert chosen == backend and reason in why


@pytest.mark.parametrize(
    "words", [("-m", "numina_finetune"), pytest.param(("numina-finetune",), marks=pytest.mark.slow)], ids=" ".join
)
def test_accelerate_launch_is_not_xla_because_a_library_set_its_variable(
    words: tuple[str, ...], tmp_path: Path
) -> None:
    """torch_xla, which the launcher imports, sets PJRT_DEVICE for all that the launcher starts."""
    form = Form(_accelerate(*words), env={})
    with started(form, tmp_path / "run", "--max-steps", "3", "--dry-run") as training:
        run = training.wait()
    assert run.code == 0, run.output
    assert "Defaulting to PJRT_DEVICE=CPU" in run.output, "torch_xla does not set it any more"
    assert "backend native (no TPU is attached" in run.output
    assert "PJRT_DEVICE=CPU was set by torch_xla, not by you" in run.output
    assert "native torch on" in run.output and "XLA SPMD" not in run.output


TELLS = "from numina_finetune.launchers import set_by_user; print(set_by_user('PJRT_DEVICE'))"
LAUNCHER = """
import os, subprocess, sys
os.environ.update({name: value for name, value in [word.split("=") for word in sys.argv[1].split()]})
raise SystemExit(subprocess.call(sys.argv[2:]))
"""


@pytest.mark.parametrize(
    ("given", "launcher", "script", "user"),
    [
        ({}, "PJRT_DEVICE=CPU", None, False),
        ({"PJRT_DEVICE": "CPU"}, "PJRT_DEVICE=CPU", None, True),
        ({}, "OTHER=1", "PJRT_DEVICE=CPU", True),  # the user's script, which the launcher starts
        ({}, "PJRT_DEVICE=CPU", "OTHER=1", False),
        ({}, "PJRT_DEVICE=CPU", "PJRT_DEVICE=TPU", True),
        ({}, None, "PJRT_DEVICE=CPU", True),  # a script that is no launcher
        ({"PJRT_DEVICE": "CPU"}, None, None, True),
    ],
)
def test_a_variable_is_the_users_unless_the_launcher_itself_came_by_it(
    given: dict[str, str], launcher: str | None, script: str | None, user: bool, tmp_path: Path
) -> None:
    """Real processes, the launcher's being Python with a script of Accelerate's name that is quick to start."""
    (tmp_path / "accelerate").write_text(LAUNCHER)
    (tmp_path / "wrapper.py").write_text(LAUNCHER)
    words = [sys.executable, "-c", TELLS]
    for name, sets in (("wrapper.py", script), ("accelerate", launcher)):
        words = [sys.executable, str(tmp_path / name), sets, *words] if sets else words
    told = subprocess.run(words, env=environment(**given), cwd=ROOT, capture_output=True, text=True, check=True)
    assert told.stdout.strip() == str(user)


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        ((), "PJRT_DEVICE=TPU (which `accelerate launch --tpu` means too), and no TPU is attached"),
        pytest.param(("--mixed_precision", "fp16"), "ACCELERATE_MIXED_PRECISION=fp16", marks=pytest.mark.slow),
        pytest.param(("--dynamo_backend", "inductor"), "ACCELERATE_DYNAMO_BACKEND=INDUCTOR", marks=pytest.mark.slow),
    ],
    ids=lambda words: " ".join(words) if isinstance(words, tuple) else "",
)
def test_what_accelerate_for_tpus_is_told_reaches_the_training_that_takes_its_place(
    words: tuple[str, ...], fault: str, tmp_path: Path
) -> None:
    form = Form(_accelerate("--tpu", *words, "numina-finetune"), env={})
    with started(form, tmp_path / "run", "--max-steps", "3", "--dry-run") as training:
        run = training.wait()
    assert run.code == 2, run.output
    assert fault in run.output and "Traceback" not in run.output


def test_the_link_explains_itself_when_something_else_imports_it() -> None:
    script = "import importlib; importlib.import_module('numina-finetune')"
    result = subprocess.run(
        [sys.executable, "-c", script], env=environment(), cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert "accelerate launch --tpu numina-finetune" in result.stderr
