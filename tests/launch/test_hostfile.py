"""Training over two hosts through launch/multi_node.sh, pdsh and ssh: what is computed, and what reaches the ranks.

Run: pytest tests/launch/test_hostfile.py
"""

import contextlib
import hashlib
import json
import re
import signal
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from sft.checkpoint import check_undamaged, newest_complete, read_meta, step_folder
from sft.errors import EXIT_BAD_INPUT, EXIT_PREEMPTED
from sft.hf_folder import verify_export
from tests.launch import jobs
from tests.launch.jobs import pair  # noqa: F401

pytestmark = [pytest.mark.dist, pytest.mark.timeout(600)]

SECRET = "not-for-the-eyes-of-others-0815"
AWKWARD = """a 'b' $HOME "q" %n %h (x) `y` \\z; * #"""
"""An option's value with what shells, pdsh and DeepSpeed each read in their own way."""
OWN_FILE = f"""
# the user's own
MY_PLAIN=plain

MY_SPACES=with a space, and = a sign
MY_QUOTES=one " and one ' in it
MY_QUOTED="in quotes"
MY_DOLLAR=$HOME %n `id`
export MY_EXPORTED=exported
MY_TOKEN={SECRET}-2
"""
OWN_VARIABLES = {
    "MY_PLAIN": "plain",
    "MY_SPACES": "with a space, and = a sign",
    "MY_QUOTES": "one \" and one ' in it",
    "MY_QUOTED": "in quotes",
    "MY_DOLLAR": "$HOME %n `id`",
    "MY_EXPORTED": "exported",
    "MY_TOKEN": f"{SECRET}-2",
}
SHELL = {"NCCL_DEBUG": "WARN", "WANDB_PROJECT": 'two words, $HOME "and more"', "HF_HOME": "/nowhere"}
MARKER = "--track.project"
PROBE = """
import hashlib, json, os, sys

leave = os._exit


def tell(code):
    shown = {name: hashlib.sha256(value.encode()).hexdigest() for name, value in os.environ.items()}
    with open(f"seen-by-{os.uname().nodename}.json", "w") as file:
        json.dump(shown, file)
    leave(code)


if "sft.train" in sys.orig_argv and any(word.startswith("--local_rank") for word in sys.orig_argv):
    os._exit = tell
"""
"""A sitecustomize.py: each rank shows, when it leaves, digests of its variables; the secret itself stands nowhere."""


class Watcher:
    """Looks through the command lines of all processes of this machine, those of the hosts among them."""

    def __init__(self) -> None:
        self.seen: set[str] = set()
        self.looks = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> "Watcher":
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._stop.wait(0.05):
            self.looks += 1
            for folder in Path("/proc").glob("[0-9]*"):
                with contextlib.suppress(OSError):
                    self.seen.add((folder / "cmdline").read_bytes().decode(errors="replace"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, pair, base_model, prepared, strategy):  # noqa: F811
    """A run of four steps on two hosts, in two launches, and what was seen meanwhile; the same run on one host."""
    hosta, hostb = pair
    folder = tmp_path_factory.mktemp("hostfile")
    job = jobs.make_job(folder / "two-hosts", base_model, prepared, strategy)
    (job.folder / ".deepspeed_env").write_text(OWN_FILE)
    (job.folder / "sitecustomize.py").write_text(PROBE)
    shell = jobs.launching_shell(folder, WANDB_API_KEY=SECRET, NOT_ON_THE_LIST="1", **SHELL)
    project = [MARKER, AWKWARD]
    with Watcher() as watcher:
        first = job.start(hosta, *project, "--train.stop_after", "2", environment=shell)
        job.wait_for_steps(first, 1)
        command_lines = [jobs.rank_on(host, job.folder).cmdline() for host in pair]
        ended = [first.wait(60)]
        shown = [json.loads((job.folder / f"seen-by-{host.name}.json").read_text()) for host in pair]
        left = jobs.left_on(*pair)
        secret_files = files_with(SECRET, job.folder)
        job_metrics = job.metrics()
        ended.append(job.start(hosta, *project, environment={**shell, "GLOO_SOCKET_IFNAME": "eth0"}).wait(120))
    alone = jobs.make_job(folder / "one-host", base_model, prepared, strategy)
    ended.append(alone.start(hosta, hostfile="one-host").wait(120))
    yield SimpleNamespace(**locals())
    jobs.clear(*pair)


def files_with(text: str, folder: Path) -> list[Path]:
    """Files that hold a text, but for the user's own."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".deepspeed_env"]
    return [path for path in files if text.encode() in path.read_bytes()]


def digest(value: str) -> str:
    """As PROBE has it."""
    return hashlib.sha256(value.encode()).hexdigest()


def test_two_launches_end_well(trained):
    assert [ended.code for ended in trained.ended] == [0, 0, 0], trained.ended
    assert [line["step"] for line in trained.job_metrics] == [1, 2]
    assert [event["event"] for event in jobs.read_whole_lines(trained.job.out / "events.jsonl")].count("resume") == 1
    assert trained.left == []
    assert jobs.left_on(*trained.pair) == []


@pytest.mark.parametrize("key", ["loss", "grad_norm", "lr", "label_tokens"])
def test_the_same_numbers_as_on_one_host(trained, key):
    two, one = ([line[key] for line in job.metrics()] for job in (trained.job, trained.alone))
    assert len(two) == 4
    assert two == pytest.approx(one, rel=1e-6)
    assert two[1:] != pytest.approx(one[:-1], rel=1e-3), "control: another step would show"


def test_each_host_wrote_its_part_and_the_export_is_whole(trained):
    saved = step_folder(trained.job.out / "checkpoints", 4)
    check_undamaged(saved)
    assert read_meta(saved)["world_size"] == 2
    verify_export(saved, trained.job.out / "export")
    for step in (2, 4):
        assert f"step {step}: saved" in trained.ended[0].said + trained.ended[1].said


def test_the_interface_is_found_though_the_own_name_is_a_loopback(trained):
    hosta, _ = trained.pair
    known = hosta.run("getent", "ahostsv4", hosta.name).stdout.split()[0]
    assert known.startswith("127."), "the premise: this is where gloo would look"
    assert "GLOO_SOCKET_IFNAME" not in trained.shell
    assert [seen["GLOO_SOCKET_IFNAME"] for seen in trained.shown] == [digest("eth0")] * 2


def test_options_arrive_as_they_were_given(trained):
    assert yaml.safe_load((trained.job.out / "config.yaml").read_text())["track"]["project"] == AWKWARD
    for words in trained.command_lines:
        assert words[words.index(MARKER) + 1] == AWKWARD


@pytest.mark.parametrize(("name", "value"), [*SHELL.items(), *OWN_VARIABLES.items(), ("WANDB_API_KEY", SECRET)])
def test_variables_reach_the_ranks_of_both_hosts(trained, name, value):
    """Of the launching shell and of the user's own file, the secret ones among them."""
    assert [seen.get(name) for seen in trained.shown] == [digest(value)] * 2


def test_variables_that_are_not_on_the_list_stay(trained):
    assert trained.shell["NOT_ON_THE_LIST"]
    assert not any("NOT_ON_THE_LIST" in seen for seen in trained.shown)


def test_no_command_line_showed_a_secret(trained):
    lines = trained.watcher.seen
    assert trained.watcher.looks > 50
    assert any(MARKER in line and "pdsh" in line for line in lines), "control: it saw the launchers' command lines"
    assert any(MARKER in line and "--local_rank" in line for line in lines), "and those of the ranks"
    assert [line for line in lines if SECRET in line] == []


def test_no_file_and_no_output_kept_a_secret(trained):
    (trained.job.folder / "planted").write_text(f"x{SECRET}")
    assert files_with(SECRET, trained.job.folder) == [trained.job.folder / "planted"], "control, and nothing else"
    assert trained.secret_files == []
    assert not any(SECRET in ended.said for ended in trained.ended)


@pytest.fixture
def cleared(pair):  # noqa: F811
    """The hosts, on which nothing is left for the next test."""
    yield pair
    jobs.clear(*pair)


def test_an_interface_that_leads_nowhere_is_told(tmp_path, cleared, base_model, prepared, strategy):
    """What gloo does by itself on such hosts, and all that the search for the interface prevents."""
    job = jobs.make_job(tmp_path / "loopback", base_model, prepared, strategy)
    shell = jobs.launching_shell(tmp_path, GLOO_SOCKET_IFNAME="lo")
    ended = job.start(cleared[0], environment=shell).wait(jobs.START_LIMIT_S)
    assert ended.code == EXIT_BAD_INPUT, ended.said
    assert re.search(r"rank \d on host[ab]: no TCP connection with the others .*GLOO_SOCKET_IFNAME", ended.said)
    assert "Traceback" not in ended.said
    assert jobs.left_on(*cleared) == []


def test_from_a_login_node(tmp_path, cleared, base_model, prepared, strategy):
    """No rank runs where the command does: SIGTERM to it still saves, and its exit code is the ranks'."""
    job = jobs.make_job(tmp_path / "login", base_model, prepared, strategy, train={"max_steps": jobs.ENDLESS})
    launch = job.start(cleared[0], hostfile="hostb-only")
    job.wait_for_steps(launch, 2)
    assert not any(jobs.is_rank(process) for process in cleared[0].processes()), "the premise"
    launch.process().send_signal(signal.SIGTERM)
    ended = launch.wait(60)
    assert ended.code == EXIT_PREEMPTED, ended.said
    assert "SIGTERM: saving, then stopping" in ended.said
    newest = newest_complete(job.out / "checkpoints")
    check_undamaged(newest)
    assert read_meta(newest)["step"] == job.metrics()[-1]["step"]
    assert jobs.left_on(*cleared) == []
