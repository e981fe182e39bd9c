"""Two hosts without ssh: the pods of launch/k8s, `deepspeed --no_ssh`, and torchrun.

A pod is what the kubelet makes of a manifest: its command with its variables, as the first process of a process name
space, with a host name of its own; what is stopped or killed is that process.
"""

import signal
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from sft.errors import EXIT_PREEMPTED, EXIT_RANK_LOST
from sft.ports import free_port
from tests.dist.training import largest_relative
from tests.launch import jobs, k8s
from tests.launch.hosts import Host
from tests.launch.jobs import START_LIMIT_S, Job, Launch, pair  # noqa: F401 (a fixture)

pytestmark = [pytest.mark.dist, pytest.mark.timeout(600)]
VOLUME = Path("/mnt/sft")
LOST_AFTER_S = 8.0
FIRST_STEPS = 4
ENDLESS = {"max_steps": jobs.ENDLESS}
END_S = 40.0
"""From the moment that a rank is taken for lost to the end of the pods that are left, on a busy machine."""
AGREE_WITHIN = 1e-6
AGAIN = 128
"""What pytorchjob.yaml adds to an exit code that is worth another start."""


@pytest.fixture(scope="module")
def cluster(pair: tuple[Host, Host]) -> tuple[Host, Host]:  # noqa: F811
    """The hosts with the names of the pods, and a place for their volume."""
    for host in pair:
        for path, suffix in ((k8s.JOB, ".sft"), (k8s.PYTORCHJOB, "")):
            for name, node in zip(k8s.host_names(path), pair, strict=True):
                host.run("bash", "-c", f"echo {node.address} {name} {name}{suffix} >>/etc/hosts")
        host.run("mount", "-t", "tmpfs", "none", VOLUME.parent)
        host.run("mkdir", VOLUME)
    return pair


@pytest.fixture(autouse=True)
def swept(cluster: tuple[Host, Host]) -> Iterator[None]:
    """What a failed test leaves must not meet the ranks of the next."""
    yield
    jobs.clear(*cluster)


@pytest.fixture(scope="module")
def parts(base_model: Path, prepared: Path, strategy: Path) -> tuple[Path, Path, Path]:
    return base_model, prepared, strategy


def make_job(folder: Path, parts: tuple[Path, Path, Path], **sections: Mapping[str, Any]) -> Job:
    return jobs.make_job(folder, *parts, **{"guard": {"lost_after_s": LOST_AFTER_S}, **sections})


def rewrite(job: Job, section: str, **options: object) -> None:
    path = job.folder / "run.yaml"
    run = yaml.safe_load(path.read_text())
    run[section] = {**run.get(section, {}), **options}
    path.write_text(yaml.safe_dump(run))


def start(host: Host, folder: Path, command: list[str], **variables: str) -> Launch:
    log = folder / f"launch-{len(list(folder.glob('launch-*.log')))}.log"
    environment = jobs.launching_shell(folder, TMPDIR=str(folder), **variables)
    with log.open("w") as stream:
        return Launch(host.popen(*command, folder=folder, environment=environment, stdout=stream, stderr=stream), log)


def start_pod(path: Path, index: int, host: Host, job: Job, **variables: str) -> Launch:
    """Pod `index` of a manifest, with one CPU rank in the place of its GPUs."""
    host.mount_over(job.folder, VOLUME)
    as_pod = ["unshare", "--uts", "--pid", "--fork", "--mount-proc", "--kill-child", "bash", "-c",
              f'hostname "$0" && cd {k8s.container(path)["workingDir"]} && exec "$@"']  # fmt: skip
    command = [*as_pod, k8s.host_names(path)[index], *k8s.command(path)]
    return start(host, job.folder, command, **k8s.environment(path, index, GPUS="1", **variables))


def start_pods(path: Path, hosts: tuple[Host, Host], job: Job) -> list[Launch]:
    return [start_pod(path, index, host, job) for index, host in enumerate(hosts)]


def first_process(pod: Launch) -> psutil.Process:
    (first,) = pod.process().children()
    return first


def wait_for_step(job: Job, launch: Launch, step: int) -> None:
    def taken() -> bool:
        assert launch.entered.poll() is None, f"ended with {launch.entered.returncode}:\n{launch.said()}"
        return any(line["step"] >= step for line in job.metrics()[-1:])

    jobs.wait_until(taken, f"step {step}", START_LIMIT_S, launch.said)


def losses(job: Job, steps: int = FIRST_STEPS) -> list[float]:
    lines = job.metrics()
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines[:steps]]


@pytest.fixture(scope="module")
def job_in_pods(cluster: tuple[Host, Host], parts: tuple[Path, Path, Path], tmp_path_factory) -> Job:
    """The Indexed Job, stopped in the middle by SIGTERM to one pod, and started again."""
    job = make_job(tmp_path_factory.mktemp("job") / "run", parts, train=ENDLESS)
    pods = start_pods(k8s.JOB, cluster, job)
    wait_for_step(job, pods[0], FIRST_STEPS)
    first_process(pods[1]).send_signal(signal.SIGTERM)
    ended = [pod.wait(60) for pod in pods]
    assert [one.code for one in ended] == [EXIT_PREEMPTED] * 2, [one.said for one in ended]
    assert "SIGTERM: saving, then stopping" in ended[1].said
    (stop,) = job.events("preempt")
    assert stop["reason"].startswith("rank 1 received SIGTERM")
    stopped_at = job.metrics()[-1]["step"]

    rewrite(job, "train", stop_after=stopped_at + 2)
    ended = [pod.wait(START_LIMIT_S) for pod in start_pods(k8s.JOB, cluster, job)]
    assert [one.code for one in ended] == [0, 0], [one.said for one in ended]
    assert job.metrics()[-1]["step"] == stopped_at + 2
    assert [event["step"] for event in job.events("resume")] == [stopped_at]
    return job


def test_a_pod_that_is_stopped_takes_the_other_along_and_both_go_on(job_in_pods: Job):
    measured = losses(job_in_pods)
    assert len(measured) == FIRST_STEPS
    assert largest_relative(measured[1:], measured[:-1]) > 1e-3  # else any run would agree with any other


def test_deepspeed_without_ssh_gives_the_same(job_in_pods: Job, cluster, parts, tmp_path: Path):
    job = make_job(tmp_path / "run", parts, train={**ENDLESS, "stop_after": FIRST_STEPS})
    port = free_port()
    started = [
        start(host, job.folder, [
            sys.executable, "-m", "sft.launch", "deepspeed", "--no_ssh", "--hostfile", "hostfile", "--node_rank",
            str(index), "--master_addr", cluster[0].address, "--master_port", port,
            "--module", "sft.train", "--config", "run.yaml",
        ])
        for index, host in enumerate(cluster)
    ]  # fmt: skip
    ended = [launch.wait(START_LIMIT_S) for launch in started]
    assert [one.code for one in ended] == [0, 0], [one.said for one in ended]
    assert largest_relative(losses(job), losses(job_in_pods)) < AGREE_WITHIN


def test_torchrun_on_one_host_gives_the_same(job_in_pods: Job, cluster, parts, tmp_path: Path):
    job = make_job(tmp_path / "run", parts, train=ENDLESS)
    command = [sys.executable, "-m", "sft.launch", "torchrun", "--nnodes", "1", "--nproc_per_node", "2",
               "--master_port", free_port(), "-m", "sft.train", "--config", "run.yaml"]  # fmt: skip
    launch = start(cluster[0], job.folder, command)
    wait_for_step(job, launch, FIRST_STEPS)
    launch.process().send_signal(signal.SIGTERM)
    ended = launch.wait(60)
    assert ended.code == EXIT_PREEMPTED, ended.said
    assert job.events("preempt")
    assert largest_relative(losses(job), losses(job_in_pods)) < AGREE_WITHIN


def test_plain_torchrun_on_two_hosts_gives_the_same(job_in_pods: Job, cluster, parts, tmp_path: Path):
    job = make_job(tmp_path / "run", parts, train={**ENDLESS, "stop_after": FIRST_STEPS})
    port = free_port()
    started = [
        start(host, job.folder, [
            "torchrun", "--nnodes", "2", "--node_rank", str(index), "--nproc_per_node", "1",
            "--master_addr", cluster[0].address, "--master_port", port, "-m", "sft.train", "--config", "run.yaml",
        ])
        for index, host in enumerate(cluster)
    ]  # fmt: skip
    ended = [launch.wait(START_LIMIT_S) for launch in started]
    assert [one.code for one in ended] == [0, 0], [one.said for one in ended]
    assert largest_relative(losses(job), losses(job_in_pods)) < AGREE_WITHIN


def test_a_pytorchjob_that_is_stopped_and_one_whose_worker_is_killed(cluster, parts, tmp_path: Path):
    job = make_job(tmp_path / "run", parts, train=ENDLESS)
    master, worker = start_pods(k8s.PYTORCHJOB, cluster, job)
    wait_for_step(job, master, 2)
    first_process(master).send_signal(signal.SIGTERM)
    ended = [pod.wait(60) for pod in (master, worker)]
    assert [one.code for one in ended] == [EXIT_PREEMPTED + AGAIN] * 2, [one.said for one in ended]
    stopped_at = job.metrics()[-1]["step"]

    master, worker = start_pods(k8s.PYTORCHJOB, cluster, job)
    wait_for_step(job, master, stopped_at + 2)
    first_process(worker).kill()
    ended_master = master.wait(LOST_AFTER_S + END_S)
    assert ended_master.code == EXIT_RANK_LOST + AGAIN, ended_master.said
    assert "rank 1 on sft-worker-0" in ended_master.said
    assert worker.wait(10).code != 0


def test_a_node_that_never_comes_is_named(cluster, parts, tmp_path: Path):
    """Both ways round at once: they knock at different doors."""
    job = make_job(tmp_path / "run", parts, guard={"arrive_after_s": 3})
    pods = [start_pod(k8s.JOB, 0, cluster[0], job), start_pod(k8s.JOB, 1, cluster[1], job, MASTER_PORT="29501")]
    ended = [pod.wait(START_LIMIT_S) for pod in pods]
    assert [one.code for one in ended] == [EXIT_RANK_LOST] * 2, [one.said for one in ended]
    assert "rank 1 on sft-1 did not come within 3 s" in ended[0].said
    assert "no answer from rank 0 on sft-0 at sft-0.sft:29501" in ended[1].said
    assert not job.metrics()
