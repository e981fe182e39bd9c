"""launch/slurm.sbatch under a real Slurm: two nodes, one CPU rank each, ZeRO-3.

Run: pytest tests/launch/test_slurm.py

The signal before a time limit is sent by hand: Slurm counts limits in minutes and may send it a minute early.
"""

import re
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from sft.checkpoint import check_undamaged, newest_complete, step_of
from sft.errors import EXIT_BAD_INPUT
from tests import tiny
from tests.launch import jobs
from tests.launch.hosts import two_hosts, why_not
from tests.launch.jobs import ENDLESS, Job
from tests.launch.slurm import TOOLS, Slurm, cluster

pytestmark = [pytest.mark.dist, pytest.mark.timeout(900)]

SCRIPT = tiny.REPO / "launch" / "slurm.sbatch"
STEPS = 40
ON_CPU = {"DS_ACCELERATOR": "cpu", "LOCAL_SIZE": "1"}


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """A cluster of two nodes."""
    if reason := why_not(*TOOLS):
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("cluster")
    with two_hosts(folder / "hosts") as hosts, cluster(folder / "slurm", hosts) as running:
        yield running


def submit(slurm: Slurm, job: Job, *words: str | Path, **variables: str) -> str:
    """The job's number."""
    return slurm.submit(job.folder, "--gpus-per-node=1", *words, SCRIPT, "run.yaml", **ON_CPU, **variables)


def wait_for_step(slurm: Slurm, job: Job, number: str, step: int) -> None:
    """Until a step has been taken; a job that ends before is the test's failure."""

    def taken() -> bool:
        assert slurm.job(number)["JobState"] in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"), said(job, number)
        return any(line["step"] >= step for line in job.metrics()[-1:])

    slurm.wait_until(taken, f"step {step}")


def said(job: Job, number: str) -> str:
    """All that a job printed, in all its starts."""
    return (job.folder / f"sft-{number}.log").read_text()


def last_step(job: Job) -> int:
    return int(job.metrics()[-1]["step"])


# A job that is asked to stop


@pytest.fixture(scope="module")
def asked(tmp_path_factory, slurm, base_model, prepared, strategy) -> SimpleNamespace:
    """A job on staged files that was sent USR1, with what it had saved when it was back in the queue; the same run
    undisturbed and not staged."""
    folder = tmp_path_factory.mktemp("asked")
    job = jobs.make_job(folder / "job", base_model, prepared, strategy, train={"max_steps": STEPS})
    local = folder / "local disk"
    local.mkdir()
    for host in slurm.hosts:
        host.mount_small_disk(local, 64)
    number = submit(slurm, job, STAGE=str(local))
    wait_for_step(slurm, job, number, 2)
    slurm.command("scancel", "--signal=USR1", number)
    slurm.wait_until(lambda: slurm.job(number)["Restarts"] == "1", "requeue")
    saved = newest_complete(job.out / "checkpoints")
    check_undamaged(saved)
    stopped_after = last_step(job)
    end = slurm.wait(number)
    left = slurm.left()
    staged = [set(host.run("ls", local).stdout.split()) for host in slurm.hosts]
    alone = tiny.run_module(2, "sft.train", "--config", str(job.folder / "run.yaml"), "--out", str(folder / "alone"))
    assert alone.returncode == 0, alone.stdout + alone.stderr
    undisturbed = jobs.read_whole_lines(folder / "alone" / "metrics.jsonl")
    return SimpleNamespace(**locals())


def test_job_goes_back_into_the_queue_and_finishes_by_itself(asked):
    assert (asked.end["JobState"], asked.end["ExitCode"], asked.end["Restarts"]) == ("COMPLETED", "0:0", "1")
    assert 2 <= step_of(asked.saved) == asked.stopped_after < STEPS
    log = said(asked.job, asked.number)
    assert f"job {asked.number} goes back into the queue, and on from {asked.saved.name}\n" in log
    assert f"resumed from run/checkpoints/{asked.saved.name}\n" in log, "the log of the second start follows the first"
    assert asked.left == []
    assert list(asked.job.folder.glob("hostfile-*")) == []


def test_every_node_reads_its_own_copy(asked):
    options = yaml.safe_load((asked.job.out / "config.yaml").read_text())
    for path in (options["model"]["path"], options["data"]["train"]):
        assert Path(path).parent == asked.local
        assert all(Path(path).name in names for names in asked.staged)
    assert list(asked.local.iterdir()) == [], "control: what the nodes mounted there is seen by nobody else"


@pytest.mark.parametrize("key", ["loss", "grad_norm", "lr"])
def test_it_computes_what_an_undisturbed_run_does(asked, key):
    interrupted, undisturbed = ([line[key] for line in lines] for lines in (asked.job.metrics(), asked.undisturbed))
    assert len(interrupted) == STEPS
    assert interrupted == pytest.approx(undisturbed, rel=1e-6)
    assert interrupted[1:] != pytest.approx(undisturbed[:-1], rel=1e-3), "control: another step would show"


# Jobs that Slurm itself takes off the nodes


@pytest.fixture(scope="module")
def preempted(tmp_path_factory, slurm, base_model, prepared, strategy) -> SimpleNamespace:
    """A job that made room for an urgent one, went on, and was cancelled."""
    job = jobs.make_job(
        tmp_path_factory.mktemp("preempted") / "job", base_model, prepared, strategy, train={"max_steps": ENDLESS}
    )
    number = submit(slurm, job)
    wait_for_step(slurm, job, number, 2)
    urgent = slurm.submit(job.folder, "--partition=urgent", "--nodes=2", "--exclusive", "--wrap=true")
    urgent_end = slurm.wait(urgent)
    stopped_after = last_step(job)
    saved = newest_complete(job.out / "checkpoints")
    wait_for_step(slurm, job, number, stopped_after + 2)
    before = slurm.job(number)
    slurm.command("scancel", number)
    end = slurm.wait(number)
    slurm.wait_until(lambda: not slurm.command("squeue", "--noheader"), "an empty queue")
    left = slurm.left()
    return SimpleNamespace(**locals())


def test_preempted_job_saves_and_goes_on_later(preempted):
    assert preempted.urgent_end["JobState"] == "COMPLETED"
    assert (preempted.before["JobState"], preempted.before["Restarts"]) == ("RUNNING", "1")
    assert 2 <= step_of(preempted.saved) == preempted.stopped_after
    assert f"resumed from run/checkpoints/{preempted.saved.name}\n" in said(preempted.job, preempted.number)
    steps = [line["step"] for line in preempted.job.metrics()]
    assert steps == list(range(1, len(steps) + 1)), "no step twice, none left out"


def test_cancelled_job_saves_and_stays_out_of_the_queue(preempted):
    assert (preempted.end["JobState"], preempted.end["Restarts"]) == ("CANCELLED", "1")
    saved = newest_complete(preempted.job.out / "checkpoints")
    check_undamaged(saved)
    assert step_of(saved) == last_step(preempted.job)
    assert "goes back into the queue" not in said(preempted.job, preempted.number)
    assert preempted.left == []


# Jobs that fail


def test_lost_rank_ends_the_job_and_is_named(tmp_path, slurm, base_model, prepared, strategy):
    job = jobs.make_job(tmp_path / "job", base_model, prepared, strategy, train={"max_steps": ENDLESS})
    number = submit(slurm, job)
    wait_for_step(slurm, job, number, 2)
    jobs.rank_on(slurm.hosts[1], job.folder).kill()
    end = slurm.wait(number)
    assert (end["JobState"], end["ExitCode"], end["Restarts"]) == ("FAILED", f"{128 + signal.SIGKILL}:0", "0")
    log = said(job, number)
    assert re.findall(r"^error: (rank \d+ on \w+) .*killed", log, re.MULTILINE) == ["rank 1 on hostb"], log
    assert slurm.left() == []


MISTAKES: dict[str, tuple[list[str], dict[str, str], str]] = {
    "no such file": (["missing.yaml"], {}, "usage: "),
    "unknown option": (["run.yaml", "--optim.lrr", "1"], {}, "error: unknown flag --optim.lrr"),
    "unknown kind of job": (["run.yaml"], {"JOB": "probe"}, "usage: "),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_ends_the_job_at_once_and_is_told_once(tmp_path, slurm, base_model, prepared, strategy, mistake):
    words, variables, message = MISTAKES[mistake]
    job = jobs.make_job(tmp_path / "job", base_model, prepared, strategy)
    number = slurm.submit(job.folder, "--gpus-per-node=1", SCRIPT, *words, **ON_CPU, **variables)
    end = slurm.wait(number, 30)
    assert (end["JobState"], end["ExitCode"], end["Restarts"]) == ("FAILED", f"{EXIT_BAD_INPUT}:0", "0")
    assert said(job, number).startswith(message)
    assert said(job, number).count("\n") == 1
    assert not job.out.exists()
