"""The RayJob. KubeRay's own schema is not on PyPI, so its fields are listed here; pods by Kubernetes' schema if there.

The lists are of KubeRay 1.5 (ray-operator/apis/ray/v1/rayjob_types.go and raycluster_types.go).
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import pytest
import yaml

from tests.docs.pages import ROOT

FILE = ROOT / "examples" / "clusters" / "rayjob.yaml"

RAY_JOB = {
    "activeDeadlineSeconds", "backoffLimit", "rayClusterSpec", "submitterPodTemplate", "metadata", "clusterSelector",
    "submitterConfig", "managedBy", "deletionStrategy", "entrypoint", "runtimeEnvYAML", "jobId", "submissionMode",
    "entrypointResources", "entrypointNumCpus", "entrypointNumGpus", "ttlSecondsAfterFinished",
    "shutdownAfterJobFinishes", "suspend",
}  # fmt: skip
RAY_CLUSTER = {
    "authOptions", "suspend", "managedBy", "autoscalerOptions", "headServiceAnnotations", "enableInTreeAutoscaling",
    "gcsFaultToleranceOptions", "headGroupSpec", "rayVersion", "workerGroupSpecs",
}  # fmt: skip
GROUP = {"rayStartParams", "template", "labels", "resources"}
HEAD_GROUP = GROUP | {"serviceType", "headService", "enableIngress"}
WORKER_GROUP = GROUP | {
    "groupName", "replicas", "minReplicas", "maxReplicas", "idleTimeoutSeconds", "numOfHosts", "scaleStrategy",
    "suspend",
}  # fmt: skip


@pytest.fixture
def documents() -> dict[str, dict[str, Any]]:
    return {document["kind"]: document for document in yaml.safe_load_all(FILE.read_text())}


@pytest.fixture
def job(documents: dict[str, dict[str, Any]]) -> dict[str, Any]:
    spec: dict[str, Any] = documents["RayJob"]["spec"]
    return spec


def pods(job: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Pod templates by what they are for."""
    cluster = job["rayClusterSpec"]
    (workers,) = cluster["workerGroupSpecs"]
    return {
        "submitter": job["submitterPodTemplate"],
        "head": cluster["headGroupSpec"]["template"],
        "worker": workers["template"],
    }


def test_only_fields_that_kuberay_knows(documents: dict[str, dict[str, Any]], job: dict[str, Any]) -> None:
    assert documents["RayJob"]["apiVersion"] == "ray.io/v1"
    assert set(documents["RayJob"]) == {"apiVersion", "kind", "metadata", "spec"}
    assert set(job) <= RAY_JOB
    assert set(job["submitterConfig"]) == {"backoffLimit"}
    assert job["submissionMode"] in ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode")
    cluster = job["rayClusterSpec"]
    assert set(cluster) <= RAY_CLUSTER
    assert set(cluster["headGroupSpec"]) <= HEAD_GROUP
    for group in cluster["workerGroupSpecs"]:
        assert set(group) <= WORKER_GROUP
        assert {"groupName", "minReplicas", "maxReplicas", "template"} <= set(group)
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert all(isinstance(value, str) for value in (*group["rayStartParams"].values(), *group["labels"].values()))


@pytest.mark.parametrize("name", ["submitter", "head", "worker"])
def test_pods_by_the_schema_of_kubernetes(name: str, job: dict[str, Any]) -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": pods(job)[name]["spec"]}
    kubernetes_validate.validate(pod, "1.32", strict=True)


def test_the_version_of_ray_is_the_tested_one(job: dict[str, Any]) -> None:
    assert job["rayClusterSpec"]["rayVersion"] == version("ray")


def test_one_image_and_one_user(job: dict[str, Any]) -> None:
    templates = pods(job)
    images = {container["image"] for pod in templates.values() for container in pod["spec"]["containers"]}
    assert len(images) == 1
    for name in ("head", "worker"):
        assert templates[name]["spec"]["securityContext"]["runAsUser"] == 1000  # of the image
        assert templates[name]["spec"]["serviceAccountName"] == "bmojo"


def test_a_token_is_asked_for_and_no_secret_is_written_down(job: dict[str, Any]) -> None:
    assert job["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    variables = [
        variable["name"]
        for pod in pods(job).values()
        for container in pod["spec"]["containers"]
        for variable in container.get("env", ())
    ]
    assert not [name for name in variables if "KEY" in name or "TOKEN" in name or "SECRET" in name]


def test_a_preempted_worker_has_time_to_end(job: dict[str, Any]) -> None:
    worker = pods(job)["worker"]["spec"]
    (container,) = worker["containers"]
    drain_s = {item["name"]: item["value"] for item in container["env"]}["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"]
    assert float(drain_s) + 15 <= worker["terminationGracePeriodSeconds"] < 120, "AWS gives two minutes"


def test_the_workers_have_what_training_asks_for(job: dict[str, Any]) -> None:
    asked = dict(word.split("=") for word in job["entrypoint"].split() if "=" in word)
    (group,) = job["rayClusterSpec"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    gpus = group["replicas"] * int(container["resources"]["limits"]["nvidia.com/gpu"])
    assert int(asked["train.resources.num_workers"]) * int(asked["train.resources.gpus_per_worker"]) == gpus
    assert asked["storage"].startswith("s3://")
