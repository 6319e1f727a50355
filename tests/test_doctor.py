"""``doctor`` on this machine, and against every fault that it names."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from pathlib import Path

import pytest
import torch

from numina_finetune.config import RunConfig
from numina_finetune.doctor.devices import Machine, check_devices
from numina_finetune.doctor.findings import Finding, Level
from numina_finetune.doctor.places import check_place, zone_of_machine
from numina_finetune.doctor.room import check_room
from numina_finetune.doctor.software import check_software
from tests.conftest import ROOT, environment
from tests.gcs import Gcs, gcs
from tests.metadata_server import metadata_server


@pytest.fixture(scope="module")
def service() -> Iterator[Gcs]:
    with gcs() as running:
        yield running


def faults(found: Iterator[Finding]) -> list[Finding]:
    """The faults among the findings; each must say what to do."""
    wrong = [finding for finding in found if finding.level is Level.FAULT]
    assert all(finding.text and finding.fix for finding in wrong)
    return wrong


def doctor(*options: str, **env: str) -> tuple[int, str]:
    result = subprocess.run(
        [sys.executable, "-m", "numina_finetune", "doctor", *options],
        env=environment(**env),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in result.stderr, result.stderr
    return result.returncode, result.stdout + result.stderr


# --- the command ------------------------------------------------------------------------------------------------------


def test_nothing_stands_in_the_way_of_the_tiny_model(tmp_path: Path) -> None:
    code, said = doctor("--model-name", "tiny-qwen3", "--output-dir", str(tmp_path / "runs"))
    assert code == 0, said
    assert "written, read back and deleted" in said
    assert "nothing stands in the way" in said
    assert list((tmp_path / "runs").rglob("*doctor*")) == []


def test_faults_are_counted_told_with_their_fix_and_exit_3(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    options = ("--model-name", "Qwen/Qwen3-32B", "--output-dir", str(tmp_path / "file"), "--json")
    code, said = doctor(*options, HF_HOME=str(tmp_path), ACCELERATE_MIXED_PRECISION="fp16")
    told = json.loads(said)
    wrong = {finding["subject"]: finding for finding in told["findings"] if finding["level"] == "fault"}
    assert code == 3
    assert told["faults"] == len([f for f in told["findings"] if f["level"] == "fault"])
    assert {"environment", "output", "hub", "memory"} <= wrong.keys()
    assert all(finding["fix"] for finding in wrong.values())
    assert "32.76B parameters" in said


# --- packages ---------------------------------------------------------------------------------------------------------


def test_packages_that_do_not_fit_are_named_with_both_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "numina_probe-1.0.dist-info"
    folder.mkdir()
    needs = ["torch==9.9", "numpy>=2", "no-such-package-here>=3", "jax; extra == 'tpu'", "numpy<1; extra == 'tpu'"]
    lines = ["Metadata-Version: 2.1", "Name: numina_probe", "Version: 1.0", *(f"Requires-Dist: {one}" for one in needs)]
    (folder / "METADATA").write_text("\n".join(lines) + "\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    here = [finding.text for finding in faults(check_software(on_tpu=False, package="numina_probe"))]
    assert here == [
        f"torch is {metadata.version('torch')}, ==9.9 is needed",
        "no-such-package-here is not installed, no-such-package-here>=3 is needed",
    ]
    on_tpu = [finding.text for finding in faults(check_software(on_tpu=True, package="numina_probe"))]
    assert any(text.startswith("numpy is ") and text.endswith("<1 is needed") for text in on_tpu)


def test_a_package_that_is_not_installed_itself_is_no_fault() -> None:
    (finding,) = check_software(on_tpu=False, package="numina-never-installed")
    assert finding.level is Level.NOTE and finding.fix


# --- devices ----------------------------------------------------------------------------------------------------------


def machine(folder: Path, *devices: str) -> Machine:
    """One with these device files, and with this machine's processes."""
    for name in devices:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    return Machine(dev=folder, lock=folder / "lock")


@pytest.mark.parametrize("held", ["accel1", "vfio/0", "lock"])
def test_the_process_that_holds_the_tpu_is_named(tmp_path: Path, held: str) -> None:
    there = machine(tmp_path, "accel0", "accel1", "vfio/0", "lock")
    script = f"import sys, time; file = open({str(tmp_path / held)!r}); print('open', flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as holder:
        assert holder.stdout and holder.stdout.readline() == b"open\n"
        (finding,) = faults(check_devices(RunConfig(), there))
        holder.kill()
    assert f"process {holder.pid} (" in finding.text
    assert f"kill {holder.pid}" in finding.fix
    assert faults(check_devices(RunConfig(), there)) == []


def test_a_tpu_without_its_library_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "libtpu", None)  # as if it were not installed
    (finding,) = faults(check_devices(RunConfig(), machine(tmp_path, "accel0")))
    assert "libtpu is not installed" in finding.text
    assert "[tpu]" in finding.fix


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use this machine's GPU")
def test_a_gpu_that_torch_cannot_use_is_told(tmp_path: Path) -> None:
    (finding,) = faults(check_devices(RunConfig(), machine(tmp_path, "nvidia0")))
    assert "cannot use them" in finding.text


# --- where the run writes ---------------------------------------------------------------------------------------------


def test_a_bucket_is_written_read_and_left_as_it_was(service: Gcs) -> None:
    service.clear()
    found = list(check_place(f"{service.url}/runs", None))
    assert found[0].level is Level.OK
    assert service.count("^POST") >= 1 and service.count("^GET") >= 1 and service.count("^DELETE") == 1


def test_a_missing_bucket_is_told_with_the_command_that_makes_it(service: Gcs) -> None:
    (finding,) = faults(check_place("gs://there-is-none/runs", None))
    assert "there is no bucket 'there-is-none'" in finding.text
    assert "buckets create gs://there-is-none" in finding.fix


def test_an_account_without_the_role_is_told_which_one_it_needs(service: Gcs) -> None:
    service.clear()
    service.fault(403, "^POST", times=100)
    (finding,) = faults(check_place(f"{service.url}/runs", None))
    service.clear()
    assert "Storage Object User" in finding.fix


def test_a_bucket_in_another_region_is_told(service: Gcs) -> None:
    def told(zone: str | None) -> Finding:
        return list(check_place(f"{service.url}/runs", zone))[-1]

    location = told(None)
    assert location.level is Level.NOTE and "--zone" in location.fix
    far = told("nowhere-north9-z")
    assert far.level is Level.NOTE and "use a bucket in nowhere-north9" in far.fix


def test_the_zone_of_the_machine_is_its_metadatas() -> None:
    with metadata_server() as server:
        server.set("zone", "projects/123/zones/us-east5-b")
        assert zone_of_machine(server.url) == "us-east5-b"
        server.fault(500)
        assert zone_of_machine(server.url) is None
    assert zone_of_machine("none") is None


# --- the hub ----------------------------------------------------------------------------------------------------------


@contextmanager
def hub(status: int, code: str) -> Iterator[str]:
    """One that gives every question the same answer; its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = b'{"name": "somebody", "sha": "0123456789abcdef", "id": "a/b"}'
            self.send_response(200 if self.path.endswith("whoami-v2") and code else status)
            if code:
                self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("status", "code", "says"),
    [
        (403, "GatedRepo", "Qwen/Qwen3-0.6B is gated"),
        (404, "RepoNotFound", "--model-name Qwen/Qwen3-0.6B is not on the hub"),
        (404, "RevisionNotFound", "has no revision abc"),
        (401, "", "it refuses the token (401)"),
    ],
)
def test_what_the_hub_refuses_is_told_with_its_remedy(status: int, code: str, says: str, tmp_path: Path) -> None:
    script = (
        "from numina_finetune.config import RunConfig; from numina_finetune.doctor.hub import check_hub\n"
        "for finding in check_hub(RunConfig(model_name='Qwen/Qwen3-0.6B', model_revision='abc')): print(finding.line())"
    )
    with hub(status, code) as address:
        env = environment(HF_ENDPOINT=address, HF_TOKEN="hf_x", HF_HOME=str(tmp_path)) | {"HF_HUB_OFFLINE": "0"}
        result = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "fault" in result.stdout and "fix: " in result.stdout
    assert says in result.stdout
    assert "hf_x" not in result.stdout


# --- room -------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="compares with this machine's memory")
def test_a_model_beyond_this_machine_is_told_what_it_takes(tmp_path: Path) -> None:
    big = RunConfig(model_name="meta-llama/Llama-3.1-70B", output_dir=str(tmp_path), save_total_limit=1000)
    told = {finding.subject: finding for finding in faults(check_room(big, Machine(dev=tmp_path)))}
    assert {"memory", "checkpoints"} <= told.keys()
    assert "1128.9 GB" in told["memory"].text  # 16 bytes for each of 70.55 billion
    assert "plan" in told["memory"].fix


def test_adapters_need_less_room(tmp_path: Path) -> None:
    one = RunConfig(model_name="Qwen/Qwen3-0.6B", output_dir=str(tmp_path))
    lora = RunConfig(model_name="Qwen/Qwen3-0.6B", output_dir=str(tmp_path), lora_rank=8)
    needs = [
        [f.text for f in check_room(config, Machine(dev=tmp_path)) if f.subject == "memory"] for config in (one, lora)
    ]
    assert "9.5 GB" in needs[0][0]
    assert "1.2 GB" in needs[1][0]
