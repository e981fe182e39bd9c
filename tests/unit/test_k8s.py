"""launch/k8s against the schemas that Kubernetes and Kubeflow publish, and what no schema sees."""

import copy
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
from kubeflow.training import models

from sft.errors import EXIT_BAD_INPUT, EXIT_GATE_FAILED, EXIT_GUARD, EXIT_PREEMPTED, EXIT_RANK_LOST
from sft.saver import ASSUMED_BYTES_PER_S
from tests.launch import k8s

MANIFESTS = [k8s.JOB, k8s.PYTORCHJOB]
OLDEST, NEWEST = "1.29", kubernetes_validate.latest_version()
AGAIN = {1, EXIT_RANK_LOST, EXIT_PREEMPTED}
NOT_AGAIN = {EXIT_BAD_INPUT, EXIT_GATE_FAILED, EXIT_GUARD}
STATE_OF_70B_BYTES = 771 * 2**30
"""docs/checkpoints.md."""
STUB = """#!/usr/bin/env bash
trap 'exit 75' TERM
printf '%s\\n' "$BASHPID" "$SFT_HOSTS" "$@" >>"$TOLD.part"
while [[ $# -gt 0 ]]; do [[ $1 != --hostfile ]] || cat "$2" >"$TOLD.hosts"; shift; done
mv "$TOLD.part" "$TOLD"
for ((i = 0; i < STAY; i++)); do sleep 0.05; done
exit "$CODE"
"""
"""In the place of python: says what it was given, and ends as it is told."""


def check_core(document: dict[str, Any]) -> None:
    for version in (OLDEST, NEWEST):
        kubernetes_validate.validate(document, version, strict=True)


def check_pytorchjob(document: dict[str, Any]) -> None:
    build(models.KubeflowOrgV1PyTorchJob, document, "PyTorchJob")


def build(model: type, value: dict[str, Any], where: str) -> object:
    """One of Kubeflow's published models out of plain data: unknown fields, other types and missing fields are errors.

    Pod templates and metadata are Kubernetes' own types, and are given to its schema.
    """
    fields = {json_name: field for field, json_name in model.attribute_map.items()}
    assert not (unknown := value.keys() - fields), f"{where}: unknown {unknown}"
    return model(**{fields[name]: read(model.openapi_types[fields[name]], entry, f"{where}.{name}")
                    for name, entry in value.items()})  # fmt: skip


def read(kind: str, value: Any, where: str) -> Any:
    if kind == "V1PodTemplateSpec":
        check_core({"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "pod"}, "template": value})
    elif kind == "V1ObjectMeta":
        check_core({"apiVersion": "v1", "kind": "PodTemplate", "metadata": value})
    elif kind.startswith("dict(str, "):
        return {key: read(kind[10:-1], entry, f"{where}.{key}") for key, entry in value.items()}
    elif kind in ("str", "int", "bool"):
        assert type(value).__name__ == kind, f"{where}: {value!r} is no {kind}"
    else:
        return build(getattr(models, kind), value, where)
    return value


def test_every_object_fits_the_published_schema():
    for document in k8s.documents(k8s.JOB):
        check_core(document)
    (pytorchjob,) = k8s.documents(k8s.PYTORCHJOB)
    assert (pytorchjob["apiVersion"], pytorchjob["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    check_pytorchjob(pytorchjob)


def job_with(change: Callable[[dict], object]) -> None:
    job = copy.deepcopy(k8s.of_kind(k8s.JOB, "Job"))
    change(job)
    check_core(job)


def pytorchjob_with(change: Callable[[dict], object]) -> None:
    job = copy.deepcopy(k8s.of_kind(k8s.PYTORCHJOB, "PyTorchJob"))
    change(job)
    check_pytorchjob(job)


@pytest.mark.parametrize(
    "change",
    [
        lambda job: job["spec"].update(backofLimitPerIndex=6),
        lambda job: job["spec"].update(completions="two"),
        lambda job: job["spec"].pop("template"),
        lambda job: job["spec"]["podFailurePolicy"]["rules"][0].pop("action"),
        lambda job: job["spec"]["podFailurePolicy"]["rules"][0]["onExitCodes"].update(values="2, 3"),
        lambda job: job["spec"]["template"]["spec"]["containers"][0]["env"][0].update(valu="2"),
        lambda job: job["spec"]["template"]["spec"]["volumes"][1]["emptyDir"].update(sizelimit="1Gi"),
    ],
)
def test_the_job_schema_refuses(change: Callable[[dict], object]):
    with pytest.raises(kubernetes_validate.ValidationError):
        job_with(change)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda job: job["spec"].update(runpolicy={}), AssertionError),
        (lambda job: job["spec"]["runPolicy"].update(activeDeadlineSeconds="7 days"), AssertionError),
        (lambda job: job["spec"]["runPolicy"].update(cleanPods="Running"), AssertionError),
        (lambda job: job["spec"]["pytorchReplicaSpecs"]["Worker"].update(replica=1), AssertionError),
        (lambda job: job["spec"]["pytorchReplicaSpecs"]["Worker"].update(replicas="1"), AssertionError),
        (lambda job: job["spec"].pop("pytorchReplicaSpecs"), ValueError),
        (lambda job: job["spec"].pop("runPolicy"), ValueError),
        (
            lambda job: job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"].update(subDomain="sft"),
            kubernetes_validate.ValidationError,
        ),
        (lambda job: job["metadata"].update(nmae="sft"), kubernetes_validate.ValidationError),
    ],
)
def test_the_pytorchjob_models_refuse(change: Callable[[dict], object], expected: type[Exception]):
    with pytest.raises(expected):
        pytorchjob_with(change)


def test_exit_codes_of_the_job():
    """Rule by rule, as the Job controller reads them: the first that matches decides; else the failure counts."""
    spec = k8s.of_kind(k8s.JOB, "Job")["spec"]
    (name,) = [container["name"] for container in spec["template"]["spec"]["containers"]]
    actions = {}
    for rule in reversed(spec["podFailurePolicy"]["rules"]):
        if codes := rule.get("onExitCodes"):
            assert (codes["containerName"], codes["operator"]) == (name, "In")
            actions |= dict.fromkeys(codes["values"], rule["action"])
    assert actions == {**dict.fromkeys(NOT_AGAIN, "FailJob"), EXIT_PREEMPTED: "Ignore"}
    assert {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]} in spec[
        "podFailurePolicy"
    ]["rules"]
    assert spec["template"]["spec"]["restartPolicy"] == "Never"  # podFailurePolicy is refused with any other
    assert spec["maxFailedIndexes"] == 0
    assert spec["backoffLimitPerIndex"] > 0


def test_names_and_ports_of_the_job():
    service, job = k8s.of_kind(k8s.JOB, "Service"), k8s.of_kind(k8s.JOB, "Job")
    spec, name = job["spec"], job["metadata"]["name"]
    pod, container = spec["template"]["spec"], k8s.container(k8s.JOB)
    assert service["metadata"]["name"] == pod["subdomain"] == name  # the command uses one name for both
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"]
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    environment = k8s.environment(k8s.JOB, 0)
    (port,) = service["spec"]["ports"]
    assert [port["port"]] == [entry["containerPort"] for entry in container["ports"]]
    assert environment["MASTER_PORT"] == str(port["port"])
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"] == int(environment["NODES"])
    (reference,) = [entry["valueFrom"] for entry in container["env"] if entry["name"] == "JOB"]
    assert reference == {"fieldRef": {"fieldPath": "metadata.labels['batch.kubernetes.io/job-name']"}}


def test_names_and_counts_of_the_pytorchjob():
    spec = k8s.of_kind(k8s.PYTORCHJOB, "PyTorchJob")["spec"]
    replicas = spec["pytorchReplicaSpecs"]
    assert sum(replica["replicas"] for replica in replicas.values()) == int(k8s.environment(k8s.PYTORCHJOB, 0)["NODES"])
    assert replicas["Master"]["replicas"] == 1
    assert {replica["restartPolicy"] for replica in replicas.values()} == {"ExitCode"}
    assert replicas["Master"]["template"] == replicas["Worker"]["template"]
    assert all("restartPolicy" not in template["spec"] for template in k8s.pod_templates(k8s.PYTORCHJOB))
    container = k8s.container(k8s.PYTORCHJOB)
    assert container["name"] == "pytorch"
    assert [port["name"] for port in container["ports"]] == ["pytorchjob-port"]
    assert spec["runPolicy"]["cleanPodPolicy"] == "Running"
    assert spec["runPolicy"]["activeDeadlineSeconds"] > 0


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_what_every_pod_needs(path: Path):
    for template in k8s.pod_templates(path):
        spec = template["spec"]
        (container,) = spec["containers"]
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
        assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
        assert mounts["/dev/shm"]["emptyDir"]["sizeLimit"].endswith("Gi")
        assert "persistentVolumeClaim" in mounts[container["workingDir"]]
        environment = k8s.environment(path, 0)
        gpus = container["resources"]["limits"]["nvidia.com/gpu"]
        assert str(gpus) == environment["GPUS"]
        save_s = STATE_OF_70B_BYTES / int(environment["NODES"]) / gpus / ASSUMED_BYTES_PER_S
        assert spec["terminationGracePeriodSeconds"] >= 2 * save_s
        (secret,) = [entry for entry in container["env"] if entry["name"] == "WANDB_API_KEY"]
        assert secret.keys() == {"name", "valueFrom"}
        assert "secretKeyRef" in secret["valueFrom"]


def test_both_manifests_start_the_same_pod():
    def shared(path: Path) -> dict[str, Any]:
        spec = copy.deepcopy(k8s.pod_templates(path)[0]["spec"])
        container = spec["containers"][0]
        for own in ("subdomain", "restartPolicy"):
            spec.pop(own, None)
        for own in ("name", "ports", "args"):
            del container[own]
        container["env"] = [entry for entry in container["env"] if entry["name"] not in ("JOB", "MASTER_PORT")]
        return spec

    assert shared(k8s.JOB) == shared(k8s.PYTORCHJOB)


def test_placeholders_cannot_be_overlooked():
    for path in MANIFESTS:
        (container,) = k8s.pod_templates(path)[0]["spec"]["containers"]
        claims = [
            volume["persistentVolumeClaim"]["claimName"]
            for volume in k8s.pod_templates(path)[0]["spec"]["volumes"]
            if "persistentVolumeClaim" in volume
        ]
        assert [container["image"], *claims] == ["REPLACE_IMAGE", "REPLACE_CLAIM"]


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_the_command_is_sound_shell(path: Path):
    script = "#!/usr/bin/env bash\nset -eu\n" + k8s.command(path)[-1]
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([shellcheck, "-"], input=script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def start(path: Path, folder: Path, index: int, code: int = 0, stay: bool = False, **more: str):
    """A pod's command, with a stub in the place of python."""
    stub = folder / "bin" / "python"
    stub.parent.mkdir(exist_ok=True)
    stub.write_text(STUB)
    stub.chmod(stub.stat().st_mode | stat.S_IXUSR)
    base = {"PATH": f"{stub.parent}:{os.environ['PATH']}", "TMPDIR": str(folder), "TOLD": str(folder / "told"),
            "CODE": str(code), "STAY": "400" if stay else "0"}  # fmt: skip
    return subprocess.Popen(k8s.command(path), env={**base, **k8s.environment(path, index, **more)}, cwd=folder)


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
@pytest.mark.parametrize("nodes", [1, 2, 3])
def test_what_the_command_starts(path: Path, nodes: int, tmp_path: Path):
    started = start(path, tmp_path, nodes - 1, NODES=str(nodes), GPUS="4")
    assert started.wait(20) == 0
    pid, hosts, *words = (tmp_path / "told").read_text().splitlines()
    names = k8s.host_names(path, nodes)
    suffix = ".sft" if path == k8s.JOB else ""
    assert hosts.strip(",") == ",".join(f"{name}:4" for name in names)
    assert (tmp_path / "told.hosts").read_text() == "".join(f"{name}{suffix} slots=4\n" for name in names)
    (hostfile,) = tmp_path.glob("tmp.*")
    port = "29500" if path == k8s.JOB else "23456"
    assert words == [
        "-m", "sft.launch", "deepspeed", "--no_ssh", "--hostfile", str(hostfile), "--node_rank", str(nodes - 1),
        "--master_addr", names[0] + suffix, "--master_port", port, "--module", "sft.train", "--config", "run.yaml",
    ]  # fmt: skip
    if path == k8s.JOB:
        assert int(pid) == started.pid  # `exec`: the container's first process


@pytest.mark.parametrize("code", sorted({0, *AGAIN, *NOT_AGAIN, 137}))
def test_exit_codes_of_the_commands(code: int, tmp_path: Path):
    """The operator replaces a pod that ended with 128 or more, and takes all below for final."""
    assert start(k8s.JOB, tmp_path, 0, code).wait(20) == code
    assert start(k8s.PYTORCHJOB, tmp_path, 0, code).wait(20) == (code + 128 if code in AGAIN else code)


@pytest.mark.parametrize(("path", "expected"), [(k8s.JOB, 75), (k8s.PYTORCHJOB, 75 + 128)])
def test_sigterm_reaches_the_launcher(path: Path, expected: int, tmp_path: Path):
    started = start(path, tmp_path, 0, code=1, stay=True)
    deadline_s = time.monotonic() + 20
    while not (tmp_path / "told").exists():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    started.send_signal(signal.SIGTERM)
    assert started.wait(20) == expected
