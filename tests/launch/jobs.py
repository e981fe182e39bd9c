"""Tiny training jobs on the two hosts: what the launch tests start, wait for, and read back."""

import contextlib
import dataclasses
import json
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests import tiny
from tests.launch.hosts import NAMES, Host, cluster_environment, two_hosts, why_not

SCRIPT = tiny.REPO / "launch" / "multi_node.sh"
START_LIMIT_S = 180.0
"""From the command to the first steps; most of it is imports, on a busy machine."""
ENDLESS = 100_000
"""Steps of a run in the middle of which something is to happen."""


@dataclass(frozen=True)
class Ended:
    """What came of a launch."""

    code: int
    said: str
    """Everything that the launcher and the ranks printed."""
    took_s: float
    """From the moment that the test names, or from the start."""


@dataclass
class Launch:
    """A launcher at work on one of the hosts. Its output is a file: a pipe would be held open by what it leaves."""

    entered: "subprocess.Popen[str]"
    log: Path
    began_s: float = dataclasses.field(default_factory=time.monotonic)

    def said(self) -> str:
        """What was printed so far."""
        return self.log.read_text(errors="replace")

    def process(self) -> psutil.Process:
        """The launcher itself, which nsenter has started."""
        wait_until(lambda: bool(psutil.Process(self.entered.pid).children()), "the launcher", 20)
        return psutil.Process(self.entered.pid).children()[0]

    def wait(self, limit_s: float, since_s: float | None = None) -> Ended:
        """Its end; that it comes too late is the test's failure.

        Args:
            limit_s: from now.
            since_s: `took_s` counts from this time.monotonic().
        """
        try:
            code = self.entered.wait(limit_s)
        except subprocess.TimeoutExpired:
            pytest.fail(f"no end within {limit_s:.0f} s:\n{self.said()}")
        return Ended(code, self.said(), time.monotonic() - (since_s or self.began_s))


@dataclass(frozen=True)
class Job:
    """A run on the hosts: its files, and the command that starts and resumes it."""

    folder: Path
    """Where it is started, with run.yaml and the hostfiles; on every host the same files."""

    @property
    def out(self) -> Path:
        """The run's folder."""
        return self.folder / "run"

    def start(
        self,
        host: Host,
        *overrides: str,
        hostfile: str = "hostfile",
        environment: Mapping[str, str] | None = None,
        script: Path = SCRIPT,
    ) -> Launch:
        """`launch/multi_node.sh HOSTFILE run.yaml [overrides]` on `host`."""
        log = self.folder / f"launch-{len(list(self.folder.glob('launch-*.log')))}.log"
        with log.open("w") as stream:
            entered = host.popen(
                script, hostfile, "run.yaml", *overrides, folder=self.folder, stdout=stream, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL, environment=environment or launching_shell(self.folder),
            )  # fmt: skip
        return Launch(entered, log)

    def metrics(self) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl; one that is being written is passed over."""
        return read_whole_lines(self.out / "metrics.jsonl")

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Events of one kind."""
        return [event for event in read_whole_lines(self.out / "events.jsonl") if event["event"] == kind]

    def starts(self) -> list[dict[str, Any]]:
        """Events of the launches that got as far as training."""
        return [event for event in read_whole_lines(self.out / "events.jsonl") if event["event"] in ("start", "resume")]

    def wait_for_steps(self, launch: Launch, steps: int, start: int = 1) -> None:
        """Until the run's `start`-th launch has taken so many steps; a launcher that ends before is a failure."""

        def taken() -> bool:
            assert launch.entered.poll() is None, f"ended with {launch.entered.returncode}:\n{launch.said()}"
            starts = self.starts()
            return len(starts) >= start and any(
                line["step"] >= starts[-1]["step"] + steps for line in self.metrics()[-1:]
            )

        wait_until(taken, f"{steps} steps", START_LIMIT_S, launch.said)


def launching_shell(home: Path, **more: str) -> dict[str, str]:
    """Environment of a launching shell whose ~/.deepspeed_env is the test's."""
    environment = cluster_environment(HOME=str(home))
    kept = {name: value for name, value in environment.items() if name not in ("GLOO_SOCKET_IFNAME", "MASTER_ADDR")}
    return {**kept, **more}


def make_job(folder: Path, model: Path, prepared: Path, strategy: Path, **sections: Mapping[str, Any]) -> Job:
    """A ZeRO-3 run in fp32, one rank per host.

    Args:
        prepared: with train/ and heldout/.
        sections: of run.yaml, over those of every test.
    """
    folder.mkdir(parents=True)
    run: dict[str, Any] = {
        "model": {"path": str(model), "precision": "fp32"},
        "data": {"train": str(prepared / "train")},
        "batch": {"rows_per_step": 2},
        "train": {"max_steps": 4},
        "optim": {"lr": 0.01},
        "schedule": {"warmup": 0},
        "deepspeed": str(strategy),
        "track": {"wandb": "off"},
        "out": "run",
    }
    for name, section in sections.items():
        run[name] = {**run.get(name, {}), **section}
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    (folder / "hostfile").write_text("".join(f"{name} slots=1\n" for name in NAMES))
    (folder / "one-host").write_text(f"{NAMES[0]} slots=2\n")
    (folder / "hostb-only").write_text(f"{NAMES[1]} slots=1\n")
    return Job(folder)


def rank_on(host: Host, folder: Path) -> psutil.Process:
    """The rank's process, on a host that has one, of the job in `folder`."""
    found = [process for process in _running(host, folder) if is_rank(process)]
    (outermost,) = [process for process in found if process.ppid() not in [other.pid for other in found]]
    return outermost


def has_rank(host: Host, folder: Path) -> bool:
    """Whether a rank of the job in `folder` runs on a host."""
    return any(is_rank(process) for process in _running(host, folder))


def is_rank(process: psutil.Process) -> bool:
    """Whether it is a rank of sft.train."""
    with contextlib.suppress(psutil.Error):
        words = process.cmdline()
        return "sft.train" in words and any(word.startswith("--local_rank") for word in words)
    return False


def wait_until(condition: Callable[[], bool], what: str, limit_s: float, tell: Callable[[], str] = lambda: "") -> float:
    """Seconds until a condition holds; one that does not in time is the test's failure."""
    began_s = time.monotonic()
    while not condition():
        if time.monotonic() - began_s > limit_s:
            pytest.fail(f"{what}: not within {limit_s:.0f} s\n{tell()}")
        time.sleep(0.05)
    return time.monotonic() - began_s


def left_on(*hosts: Host, folder: Path | None = None, within_s: float = 3.0) -> list[str]:
    """What still runs on the hosts (in `folder` alone), after a moment in which what is ending may end."""
    deadline_s = time.monotonic() + within_s
    while any(_running(host, folder) for host in hosts) and time.monotonic() < deadline_s:
        time.sleep(0.1)
    found = []
    for host in hosts:
        for process in _running(host, folder):
            with contextlib.suppress(psutil.Error):
                found.append(f"{host.name}: {' '.join(process.cmdline())[:300]}")
    return found


def _running(host: Host, folder: Path | None) -> list[psutil.Process]:
    found = []
    for process in host.processes():
        with contextlib.suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE and folder in (None, Path(process.cwd())):
                found.append(process)
    return found


def clear(*hosts: Host, folder: Path | None = None) -> None:
    """Kill what runs on the hosts (in `folder` alone)."""
    for host in hosts:
        for process in _running(host, folder):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def read_whole_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON lines file to which somebody may be writing."""
    if not path.is_file():
        return []
    text = path.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Host, Host]]:
    """The two hosts of a test file."""
    if reason := why_not():
        pytest.skip(reason)
    with two_hosts(tmp_path_factory.mktemp("hosts")) as hosts:
        yield hosts
