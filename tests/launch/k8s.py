"""The manifests of launch/k8s as tests read them, and a pod of one of them on a host out of name spaces."""

from pathlib import Path
from typing import Any

import yaml

from tests import tiny

FOLDER = tiny.REPO / "launch" / "k8s"
JOB = FOLDER / "indexed-job.yaml"
PYTORCHJOB = FOLDER / "pytorchjob.yaml"


def documents(path: Path) -> list[dict[str, Any]]:
    """The objects of a manifest."""
    return list(yaml.safe_load_all(path.read_text()))


def of_kind(path: Path, kind: str) -> dict[str, Any]:
    """The one object of a kind."""
    (found,) = [document for document in documents(path) if document["kind"] == kind]
    return found


def pod_templates(path: Path) -> list[dict[str, Any]]:
    """Of every kind of pod that a manifest starts."""
    if path == JOB:
        return [of_kind(path, "Job")["spec"]["template"]]
    replicas = of_kind(path, "PyTorchJob")["spec"]["pytorchReplicaSpecs"]
    return [replicas[name]["template"] for name in ("Master", "Worker")]


def container(path: Path) -> dict[str, Any]:
    """The one container of a pod."""
    (found,) = pod_templates(path)[0]["spec"]["containers"]
    return found


def command(path: Path) -> list[str]:
    """What the kubelet starts."""
    return [*container(path)["command"], *container(path)["args"]]


def environment(path: Path, index: int, **more: str) -> dict[str, str]:
    """What the container finds in pod `index` besides the image's variables: the manifest's own, and its controller's.

    References to fields of the pod and to secrets are left to `more`.
    """
    own = {entry["name"]: entry["value"] for entry in container(path)["env"] if "value" in entry}
    name = documents(path)[-1]["metadata"]["name"]
    if path == JOB:
        return {**own, "JOB": name, "JOB_COMPLETION_INDEX": str(index), **more}
    (port,) = container(path)["ports"]
    from_operator = {"RANK": str(index), "WORLD_SIZE": own["NODES"], "MASTER_ADDR": f"{name}-master-0",
                     "MASTER_PORT": str(port["containerPort"]), "PYTHONUNBUFFERED": "1"}  # fmt: skip
    return {**own, **from_operator, **more}


def host_names(path: Path, nodes: int = 2) -> list[str]:
    """Of its pods, in the order of their ranks."""
    name = documents(path)[-1]["metadata"]["name"]
    if path == JOB:
        return [f"{name}-{index}" for index in range(nodes)]
    return [f"{name}-master-0", *(f"{name}-worker-{index}" for index in range(nodes - 1))]
