"""Faults of hosts and launchers in the middle of a run: all ranks end in time, the fault is named, the run goes on.

One run, to which one fault after another happens: each launch goes on where the fault before it ended the run. In the
end its numbers must be those of a run to which nothing happened.

Run: pytest tests/launch/test_faults.py
"""

import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from sft.checkpoint import check_undamaged, newest_complete, read_meta
from sft.errors import EXIT_BAD_INPUT, EXIT_PREEMPTED, EXIT_RANK_LOST
from tests.launch import jobs
from tests.launch.hosts import Host
from tests.launch.jobs import Ended, Job, Launch, pair  # noqa: F401

pytestmark = [pytest.mark.dist, pytest.mark.timeout(1200)]

LOST_AFTER_S = 6.0
STEPS = 3
"""Taken by each launch before something happens to it."""
SSH_ALIVE_S = 2
"""ssh gives a silent connection up after three times this."""
SHELL = {"PDSH_SSH_ARGS_APPEND": f"-o ServerAliveInterval={SSH_ALIVE_S}"}
SILENCE_S = LOST_AFTER_S * 4 / 3
LATE_S = 25.0
"""For a busy machine, and for a Python that starts on the other host to pass a signal on."""


@dataclass(frozen=True)
class Scene:
    """A launch in the middle of training, and what it stands on."""

    job: Job
    launch: Launch
    hosta: Host
    """Here are rank 0 and the launcher."""
    hostb: Host


@contextmanager
def rank_killed(scene: Scene) -> Iterator[None]:
    jobs.rank_on(scene.hostb, scene.job.folder).kill()
    yield


@contextmanager
def asked_to_stop(scene: Scene) -> Iterator[None]:
    scene.launch.process().send_signal(signal.SIGTERM)
    yield


@contextmanager
def asked_twice(scene: Scene) -> Iterator[None]:
    """While a rank that stands still keeps the others from saving."""
    jobs.rank_on(scene.hostb, scene.job.folder).suspend()
    scene.launch.process().send_signal(signal.SIGTERM)
    time.sleep(2.5)
    scene.launch.process().send_signal(signal.SIGTERM)
    yield


@contextmanager
def disk_full(scene: Scene) -> Iterator[None]:
    """One host sees what the others have written, and can write nothing itself."""
    small, shown = scene.job.folder / "small", scene.job.out / "checkpoints"
    small.mkdir()
    scene.hostb.mount_small_disk(small, 1)
    scene.hostb.run("mkdir", small / "upper", small / "work")
    layers = f"lowerdir={shown.resolve()},upperdir={small}/upper,workdir={small}/work"
    scene.hostb.run("bash", "-c", f"head -c 2M /dev/zero >{small}/filler || true")
    scene.hostb.run("mount", "-t", "overlay", "-o", layers, "overlay", shown.resolve())
    yield
    scene.hostb.run("umount", "--lazy", shown.resolve(), small)


@contextmanager
def link_cut(scene: Scene) -> Iterator[None]:
    scene.hostb.set_link(up=False)
    yield
    scene.hostb.set_link(up=True)


@dataclass(frozen=True)
class Fault:
    """What happens, and what is expected of the launcher."""

    happens: Callable[[Scene], AbstractContextManager[None]]
    code: int
    says: str
    """Regular expression."""
    limit_s: float
    """From the fault to the launcher's end."""


FAULTS = {
    "rank killed": Fault(
        rank_killed, EXIT_RANK_LOST, r"stopped: rank 1 on hostb \(pid \d+\) gives no sign of life", SILENCE_S + LATE_S
    ),
    "asked to stop": Fault(
        asked_to_stop, EXIT_PREEMPTED, r"SIGTERM: saving(.|\n)*stopped as asked: rank 0 received SIGTERM; step \d+ of",
        LATE_S,
    ),
    "asked twice": Fault(asked_twice, 128 + signal.SIGTERM, "stopped at once, without saving", LATE_S),
    "disk full": Fault(
        disk_full, EXIT_BAD_INPUT, r"step \d+: rank 1 on hostb could not write it: No space left on device; free disk",
        LATE_S,
    ),
    "link cut": Fault(
        link_cut, EXIT_RANK_LOST, r"stopped: rank 1 on hostb \(pid \d+\) gives no sign of life",
        SILENCE_S + 3 * SSH_ALIVE_S + LATE_S,
    ),
}  # fmt: skip


@dataclass
class Outcome:
    """What came of a fault."""

    ended: Ended
    left: list[str]
    """Processes of the run that outlived the launcher."""
    saved: int
    """Step of the newest checkpoint; it is complete and undamaged."""
    resumed: int
    """Step from which this launch went on; -1 for a first one."""


@pytest.fixture(scope="module")
def course(tmp_path_factory, pair, base_model, prepared, strategy) -> Iterator[SimpleNamespace]:  # noqa: F811
    """The run with all faults, and the same one without any."""
    folder = tmp_path_factory.mktemp("faults")
    shell = jobs.launching_shell(folder, **SHELL)
    job, untouched = (
        jobs.make_job(folder / name, base_model, prepared, strategy, train={"max_steps": jobs.ENDLESS},
                      checkpoint={"every": 2}, guard={"lost_after_s": LOST_AFTER_S})
        for name in ("faults", "untouched")
    )  # fmt: skip
    outcomes = {}
    for number, (name, fault) in enumerate(FAULTS.items(), start=1):
        launch = job.start(pair[0], environment=shell)
        job.wait_for_steps(launch, STEPS, start=number)
        with fault.happens(Scene(job, launch, *pair)):
            ended = launch.wait(fault.limit_s + 60, time.monotonic())
        left = jobs.left_on(*pair, folder=job.folder)
        jobs.clear(*pair, folder=job.folder)
        newest = newest_complete(job.out / "checkpoints")
        check_undamaged(newest)
        resumed = job.starts()[-1]["step"] if number > 1 else -1
        outcomes[name] = Outcome(ended, left, read_meta(newest)["step"], resumed)
    stop = ("--train.stop_after", str(job.metrics()[-1]["step"] + STEPS))
    last = [
        job.start(pair[0], *stop).wait(jobs.START_LIMIT_S),
        untouched.start(pair[0], *stop, hostfile="one-host").wait(2 * jobs.START_LIMIT_S),
    ]
    yield SimpleNamespace(job=job, untouched=untouched, outcomes=outcomes, last=last)
    jobs.clear(*pair)


@pytest.mark.parametrize("name", FAULTS)
def test_the_launcher_ends_in_time_and_says_why(course, name):
    ended = course.outcomes[name].ended
    assert ended.code == FAULTS[name].code, ended.said
    assert re.search(FAULTS[name].says, ended.said), ended.said
    assert "Traceback" not in ended.said
    assert ended.took_s < FAULTS[name].limit_s


@pytest.mark.parametrize("name", FAULTS)
def test_nothing_is_left_on_either_host(course, name):
    assert course.outcomes[name].left == []


def test_each_launch_goes_on_from_what_the_one_before_had_saved(course):
    """At most two steps are lost, and none where it was asked to stop."""
    outcomes = list(course.outcomes.values())
    for before, after in zip(outcomes, outcomes[1:], strict=False):
        assert after.resumed == before.saved
        assert after.saved > before.saved


def test_the_numbers_are_those_of_an_untouched_run(course):
    assert [ended.code for ended in course.last] == [0, 0], course.last
    assert len(course.job.starts()) == len(FAULTS) + 1
    touched, untouched = (job.metrics() for job in (course.job, course.untouched))
    assert [line["step"] for line in touched] == [line["step"] for line in untouched]
    for key in ("loss", "grad_norm", "label_tokens"):
        one, other = ([line[key] for line in lines] for lines in (touched, untouched))
        assert one == pytest.approx(other, rel=1e-5), key
