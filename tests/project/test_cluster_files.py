"""The example cluster files have fields and values that Ray and KubeRay accept."""

from __future__ import annotations

import copy
import shlex
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from packaging.version import Version
from ray.autoscaler._private.util import prepare_config, validate_config

from rayprune.config.yaml import parse_overrides
from tests.support.paths import ROOT

CLUSTER = ROOT / "configs" / "cluster"
# The fields of KubeRay's v1 API used here (ray-operator/apis/ray/v1), with their types; "!" marks required ones.
POD_TEMPLATE = {"spec!": dict, "metadata": dict}
RAY_JOB: dict[str, Any] = {
    "entrypoint": str,
    "submissionMode": str,
    "shutdownAfterJobFinishes": bool,
    "ttlSecondsAfterFinished": int,
    "activeDeadlineSeconds": int,
    "backoffLimit": int,
    "runtimeEnvYAML": str,
    "entrypointNumCpus": float,
    "clusterSelector": dict,
    "submitterPodTemplate": dict,
    "suspend": bool,
    "rayClusterSpec": {
        "rayVersion": str,
        "enableInTreeAutoscaling": bool,
        "autoscalerOptions": dict,
        "headGroupSpec!": {"rayStartParams!": dict, "serviceType": str, "template!": POD_TEMPLATE},
        "workerGroupSpecs": [
            {
                "groupName!": str,
                "replicas": int,
                "minReplicas!": int,
                "maxReplicas!": int,
                "numOfHosts": int,
                "rayStartParams!": dict,
                "template!": POD_TEMPLATE,
            }
        ],
    },
}


def check(value: Any, fields: Any, where: str) -> None:
    """Assert that no field is unknown, missing or of a wrong type."""
    if isinstance(fields, list):
        assert isinstance(value, list), where
        for number, item in enumerate(value):
            check(item, fields[0], f"{where}[{number}]")
    elif isinstance(fields, dict):
        known = {name.rstrip("!"): inner for name, inner in fields.items()}
        assert not value.keys() - known.keys(), f"{where}: unknown {value.keys() - known.keys()}"
        required = {name[:-1] for name in fields if name.endswith("!")}
        assert not required - value.keys(), f"{where}: missing {required - value.keys()}"
        for name, inner in value.items():
            check(inner, known[name], f"{where}.{name}")
    else:
        assert type(value) is fields, f"{where} = {value!r}"


def ray_up() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((CLUSTER / "ray_up_aws.yaml").read_text())
    return loaded


def ray_job() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((CLUSTER / "kuberay_rayjob.yaml").read_text())
    return loaded


def test_rays_own_validator_accepts_the_ray_up_file() -> None:
    config = prepare_config(ray_up())
    validate_config(config)
    assert config["available_node_types"]["head"]["max_workers"] == 0


@pytest.mark.parametrize("mistake", [{"max_worker": 4}, {"head_node_type": "none"}, {"max_workers": 0}])
def test_the_validator_detects_mistakes(mistake: dict[str, Any]) -> None:
    config = prepare_config(copy.deepcopy(ray_up()))
    with pytest.raises((ValueError, jsonschema.ValidationError)):
        validate_config({**config, **mistake})


def test_the_ray_job_has_the_fields_of_kuberays_api() -> None:
    job = ray_job()
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    check(job["spec"], RAY_JOB, "spec")
    assert job["spec"]["submissionMode"] in {"K8sJobMode", "HTTPMode", "InteractiveMode"}
    assert isinstance(yaml.safe_load(job["spec"]["runtimeEnvYAML"])["env_vars"], dict)
    cluster = job["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values()), "KubeRay accepts only strings"
        pod = group["template"]["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
        mounted = [mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]]
        assert "/mnt/runs" in mounted, "every machine mounts the run folder"


def test_the_check_detects_mistakes() -> None:
    spec = copy.deepcopy(ray_job()["spec"])
    spec["rayClusterSpec"]["workerGroupSpecs"][0]["minReplicas"] = "1"
    with pytest.raises(AssertionError, match=r"spec.rayClusterSpec.workerGroupSpecs\[0\].minReplicas = '1'"):
        check(spec, RAY_JOB, "spec")
    with pytest.raises(AssertionError, match=r"unknown \{'entryPoint'\}"):
        check({"entryPoint": ""}, RAY_JOB, "spec")


def test_the_files_name_the_tested_ray_version_and_existing_keys() -> None:
    version = Version(ray.__version__)
    assert ray_job()["spec"]["rayClusterSpec"]["rayVersion"] == f"{version.major}.{version.minor}.0"
    assert any(
        f"ray[default,train,data,tune]=={version.major}.{version.minor}." in c for c in ray_up()["setup_commands"]
    )
    words = shlex.split(ray_job()["spec"]["entrypoint"])
    assert words[:3] == ["rayprune", "train", "/configs/digits_infobatch.yaml"]
    changes = parse_overrides(words[3:])
    assert changes["run"]["storage_path"] == "/mnt/runs"
    assert changes["scaling"]["num_workers"] == [1, 2]


def test_the_dashboard_of_ray_up_listens_on_the_loopback_interface() -> None:
    (start,) = [command for command in ray_up()["head_start_ray_commands"] if "ray start" in command]
    assert "--dashboard-host=127.0.0.1" in start
