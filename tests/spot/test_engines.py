"""The files for other engines, as far as they can be judged without a cluster."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from numina_finetune.errors import ExitCode
from tests.conftest import ROOT

IMAGE = "us-docker.pkg.dev/p/r/i@sha256:" + "0" * 64
XPK = ROOT / "configs" / "xpk"


def load(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return content


def test_the_jobset_restarts_after_a_preemption_and_not_after_a_configuration_error() -> None:
    jobset = load(XPK / "jobset.yaml")
    (job,) = jobset["spec"]["replicatedJobs"]
    (rule,) = job["template"]["spec"]["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    hopeless = rule["onExitCodes"]["values"]
    assert ExitCode.CONFIGURATION in hopeless and ExitCode.STOPPED in hopeless
    assert ExitCode.PREEMPTED not in hopeless and ExitCode.CRASHED not in hopeless
    (policy,) = jobset["spec"]["failurePolicy"]["rules"]
    assert (policy["action"], policy["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["numina-finetune"], "no shell between the kubelet's SIGTERM and the training"
    assert container["name"] == rule["onExitCodes"]["containerName"]
    chips = job["template"]["spec"]["parallelism"] * container["resources"]["limits"]["google.com/tpu"]
    assert chips == 16, "a whole slice of 4x4"


def test_the_skypilot_job_recovers_on_the_preempted_exit_code() -> None:
    task = load(ROOT / "configs" / "skypilot" / "spot_job.yaml")
    assert task["resources"]["use_spot"] is True
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [ExitCode.PREEMPTED]
    assert task["run"].startswith("exec ")
    assert task["secrets"] == {"HF_TOKEN": ""}, "asked for at launch, in no file"
    for script in (task["setup"], task["run"]):
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_skypilot_reads_its_file() -> None:
    sky = pytest.importorskip("sky", reason="SkyPilot is not installed")
    task = sky.Task.from_yaml(str(ROOT / "configs" / "skypilot" / "spot_job.yaml"))
    (resources,) = task.resources
    assert resources.use_spot and resources.job_recovery["recover_on_exit_codes"] == [42]


@pytest.mark.skipif(not shutil.which("xpk"), reason="XPK is not installed")
def test_xpk_writes_the_manifest_of_the_workload(tmp_path: Path) -> None:
    manifest = tmp_path / "jobset.yaml"
    environment = {
        **os.environ,
        **{"HOME": str(tmp_path), "CLOUDSDK_CONFIG": str(tmp_path), "CLOUDSDK_CORE_CHECK_GCE_METADATA": "false"},
        **{"PROJECT": "p", "ZONE": "us-east5-b", "CLUSTER": "c", "IMAGE": IMAGE, "OUTPUT": "gs://b/runs"},
        **{"RUN_ID": "gsm8k-1", "XPK_OPTIONS": f"--dry-run --output-manifest-file={manifest}"},
    }
    command = ["bash", str(XPK / "workload.sh"), "--model-name", "Qwen/Qwen3-0.6B", "--system-prompt", "two words"]
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=120)
    text = manifest.read_text(encoding="utf-8")
    assert "exec numina-finetune --model-name Qwen/Qwen3-0.6B --system-prompt two\\ words" in text
    assert "operator: NotIn" in text and "values: [42," in text and "terminationGracePeriodSeconds: 300" in text


def test_the_image_starts_the_training_itself() -> None:
    lines = (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8").splitlines()
    assert lines[-1] == 'ENTRYPOINT ["numina-finetune"]'
    copied = " ".join(line for line in lines if line.startswith("COPY")).split()
    named = [word for word in copied if word not in ("COPY", "./", "./numina_finetune")]
    assert all((ROOT / word).exists() for word in named), named
