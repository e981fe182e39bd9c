"""Starts over ssh that cannot become a run, a launcher that is killed, and a second start of a run that is at work.

Run: pytest tests/launch/test_starts.py
"""

import signal
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from sft.checkpoint import check_undamaged, newest_complete, read_meta
from sft.errors import EXIT_BAD_INPUT, EXIT_RANK_LOST
from tests.launch import jobs
from tests.launch.jobs import pair  # noqa: F401

pytestmark = [pytest.mark.dist, pytest.mark.timeout(900)]

LOST_AFTER_S = 4.0
ARRIVE_AFTER_S = 8.0
CONNECT_S = 10.0
"""ConnectTimeout of every ssh."""
REST_WAIT_S = 90.0
"""Of sft.supervisor: what is left of a run goes this long, and LOST_AFTER_S, after the first rank has."""
LATE_S = 25.0


@pytest.fixture(scope="module")
def make(tmp_path_factory, base_model, prepared, strategy):
    """A new run of the given name, that would go on for ever."""
    folder = tmp_path_factory.mktemp("starts")
    sections = {
        "train": {"max_steps": jobs.ENDLESS},
        "checkpoint": {"every": 2},
        "guard": {"lost_after_s": LOST_AFTER_S, "arrive_after_s": ARRIVE_AFTER_S},
    }
    return lambda name: jobs.make_job(folder / name, base_model, prepared, strategy, **sections)


@pytest.fixture(scope="module")
def stuck(pair, make) -> Iterator[SimpleNamespace]:  # noqa: F811
    """A launch of which one rank stands still before it has come; it takes minutes, beside the other tests."""
    job = make("stuck")
    launch = job.start(pair[0], environment=jobs.launching_shell(job.folder, MASTER_PORT="29600"))
    jobs.wait_until(lambda: jobs.has_rank(pair[1], job.folder), "a rank", jobs.START_LIMIT_S, launch.said)
    jobs.rank_on(pair[1], job.folder).suspend()
    yield SimpleNamespace(job=job, launch=launch)
    jobs.clear(*pair, folder=job.folder)


@pytest.fixture(scope="module")
def two_starts(pair, make, stuck) -> SimpleNamespace:  # noqa: F811
    """A run whose launcher is killed; then the same command again; then a signal to one of the first one's ranks."""
    hosta, _ = pair
    job = make("two-starts")
    first = job.start(hosta)
    job.wait_for_steps(first, 3)
    ranks = [jobs.rank_on(host, job.folder) for host in pair]
    first.process().kill()
    second = job.start(hosta).wait(jobs.START_LIMIT_S)
    steps = job.metrics()[-1]["step"]
    time.sleep(3)
    alive = [rank.is_running() for rank in ranks]
    progress = job.metrics()[-1]["step"] - steps
    if alive[1]:
        ranks[1].send_signal(signal.SIGTERM)
    jobs.wait_until(lambda: not any(rank.is_running() for rank in ranks), "the end of the ranks", LATE_S, first.said)
    left = jobs.left_on(*pair, folder=job.folder, within_s=LATE_S)  # DeepSpeed's launcher notices it by itself
    jobs.clear(*pair, folder=job.folder)
    return SimpleNamespace(**locals())


def test_hosts_that_do_not_answer_are_told_before_anything_starts(pair, make):  # noqa: F811
    job = make("unreached")
    with (job.folder / "hostfile").open("a") as file:
        file.write("hostc slots=1\n")
    pair[1].set_link(up=False)
    try:
        ended = job.start(pair[0]).wait(CONNECT_S + LATE_S)
    finally:
        pair[1].set_link(up=True)
    assert ended.code == EXIT_BAD_INPUT, ended.said
    assert "error: hostfile hostfile: 2 hosts\n  hostb: ssh: connect to host hostb" in ended.said
    assert "\n  hostc: ssh: Could not resolve hostname hostc" in ended.said
    assert "hosta" not in ended.said
    assert "Traceback" not in ended.said
    assert jobs.left_on(*pair, folder=job.folder) == []
    assert not job.out.exists()


def test_a_run_survives_its_launcher(two_starts):
    """Nobody is left to end it: the run goes on, to its end or to a signal to any of its ranks."""
    assert two_starts.first.entered.wait(10) == -signal.SIGKILL
    assert two_starts.alive == [True, True], f"{two_starts.second.said}\n{two_starts.first.said()}"
    assert two_starts.progress > 0
    assert [event["step"] for event in two_starts.job.events("preempt")] == [two_starts.job.metrics()[-1]["step"]]
    newest = newest_complete(two_starts.job.out / "checkpoints")
    check_undamaged(newest)
    assert read_meta(newest)["step"] == two_starts.job.metrics()[-1]["step"]
    assert two_starts.left == []


def test_a_second_start_is_refused_and_leaves_the_first_one_alone(two_starts):
    second = two_starts.second
    assert second.code == EXIT_BAD_INPUT, second.said
    assert "error: " in second.said
    assert "Traceback" not in second.said


def test_a_rank_that_never_comes_is_named(pair, stuck, two_starts):  # noqa: F811
    ended = stuck.launch.wait(ARRIVE_AFTER_S + LOST_AFTER_S + REST_WAIT_S + 2 * LATE_S)
    assert ended.code == EXIT_RANK_LOST, ended.said
    assert f"rank 1 on hostb did not come within {ARRIVE_AFTER_S:.0f} s (1 of 2" in ended.said
    assert "Traceback" not in ended.said
    assert jobs.left_on(*pair, folder=stuck.job.folder) == []
    assert jobs.left_on(*pair) == []
