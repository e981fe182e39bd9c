"""What would fail, told before a GPU hour is spent: `sft doctor [--config run.yaml] [--section.key value]`.

On one host, or under any launcher on every rank: `deepspeed … --module sft.doctor --config run.yaml`.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from rich.console import Console
from torch.distributed import DistError

from sft.config import GuardSection, RunConfig
from sft.doctor import report
from sft.doctor.finding import Finding
from sft.doctor.group import Group
from sft.doctor.options import STDOUT, DoctorConfig, HostConfig, take_json
from sft.errors import EXIT_RANK_LOST, RankLost, run_rank
from sft.launch_env import drop_secrets, take_secrets
from sft.rendezvous import Meeting, meet
from sft.settings import load, walk_options

LEAVE_S = 10.0
"""Rank 0 stays so long for the others to read the outcome: its store goes with it."""
STOPPED_LEAVE_S = 2.0
"""The same where some of them will not ask."""
LOOK_S = 0.05
WIDTH = 120
"""Columns of the table where no terminal says how wide it is."""
HELP = """Checks this host, and with a run (--config, or any option of sft train) what that run needs. Under a launcher,
on every rank: deepspeed --hostfile ... --module sft.doctor --config run.yaml. Exit code 2 where something fails.

--json [FILE]         Findings as JSON: to FILE beside the table, or to standard output instead of it.
"""


def main(argv: Sequence[str]) -> None:
    """Check all hosts that ranks were started on, and the run that the options describe."""
    take_secrets()
    target, flags = take_json(argv)
    if {"-h", "--help"} & set(flags):
        print(HELP)
    config = read_options(flags)
    outcome = Outcome(target, config)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a lost rank is named in one line; torch's is a C++ stack
    try:
        check_all(config, outcome)
    except RankLost as error:
        outcome.stop(Finding("ranks", "fail", "all ranks", str(error), "see the output of the ranks that are named"))
        raise
    raise SystemExit(outcome.agree())


def check_all(config: DoctorConfig | HostConfig, outcome: "Outcome") -> None:
    """Meet the other ranks and look at everything with them. Collective."""
    run = config if isinstance(config, DoctorConfig) else None
    outcome.meeting = meeting = meet((run.guard if run else GuardSection()).arrive_after_s)
    if meeting.rank == 0:
        drop_secrets()
    # the others wait longer, so that it is rank 0 that finds out who is late: it has the table
    limit_s = config.doctor.limit_s * (1 if meeting.rank == 0 else 2)
    group = Group(meeting, int(os.environ["LOCAL_RANK"]), limit_s)
    from sft.doctor.course import examine  # brings transformers: seconds in which the others would wait

    examine(group, run, config.doctor, outcome.findings, outcome.say, outcome.stop)


def read_options(flags: Sequence[str]) -> DoctorConfig | HostConfig:
    """With a run, its options and the doctor's; without, the doctor's alone.

    Raises:
        UserError: as sft.settings.load.
    """
    names = {flag.partition("=")[0].removeprefix("--").replace("-", "_") for flag in flags if flag.startswith("-")}
    asks = {"_h", "help", "print_config", "print_schema"}
    if names & {"config", *asks, *(name for name, _ in walk_options(RunConfig))}:
        return load(DoctorConfig, flags, prog="sft doctor")
    return load(HostConfig, flags, prog="sft doctor")


class Outcome:
    """What rank 0 knows so far, shown once: at the end, or where the process must leave before it.

    Args:
        target: file of the JSON; STDOUT; None: no JSON.
    """

    def __init__(self, target: str | None, config: DoctorConfig | HostConfig) -> None:
        self.findings: list[Finding] = []
        self.meeting: Meeting | None = None
        self._target, self._began_s = target, time.monotonic()
        self._out = config.out if isinstance(config, DoctorConfig) else None
        self._is_first = os.environ.get("RANK", "0") == "0"
        self._showing, self._shown = threading.Lock(), False

    def say(self, check: str) -> None:
        """Tell on rank 0 what is being looked at: some checks take a minute."""
        if self._is_first:
            print(f"[{time.monotonic() - self._began_s:5.1f} s] {check}", file=sys.stderr, flush=True)

    def stop(self, finding: Finding) -> None:
        """Show what was found until now, and why there is no more. For rank 0, from any thread; once."""
        self._show(finding, EXIT_RANK_LOST)

    def agree(self) -> int:
        """Show all findings on rank 0; its exit code, on every rank. Collective.

        Raises:
            RankLost: rank 0 is gone.
        """
        if self._is_first:
            code = report.exit_code(self.findings)
            self._show(None, code)
            return code
        return self._await_code()

    def _show(self, stopped: Finding | None, code: int) -> None:
        with self._showing:
            if self._shown or not self._is_first:
                return
            self._shown = True
            found = [*self.findings, *([stopped] if stopped else [])]
            try:
                self._print(found, stopped)
            finally:
                self._publish(code, STOPPED_LEAVE_S if stopped else LEAVE_S)

    def _print(self, found: list[Finding], stopped: Finding | None) -> None:
        hosts = self.meeting.hosts if self.meeting else [os.uname().nodename]
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        content = report.to_dict(
            found, world_size=world_size, hosts=hosts, out=self._out, stopped=stopped.found if stopped else None
        )
        if self._target == STDOUT:
            print(json.dumps(content, indent=2), flush=True)
            return
        width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else WIDTH
        console = Console(width=width)
        with console.capture() as shown:  # rich would end the process where the reader has left
            console.print(report.to_table(found))
        print("\n".join(line.rstrip() for line in shown.get().splitlines()))
        print(f"\n{report.summarize(found, world_size, len(hosts))}", flush=True)
        if self._target is not None:
            write_whole(Path(self._target), json.dumps(content, indent=2) + "\n")

    def _publish(self, code: int, linger_s: float) -> None:
        """Rank 0: tell the others that they may leave, and stay until they have read it."""
        if self.meeting is None or self.meeting.world_size == 1:
            return
        try:
            # a connection of its own: the main thread may wait in a call on the shared one
            store = self.meeting.store.clone()  # type: ignore[attr-defined]
            store.set("doctor/code", str(code))
            deadline_s = time.monotonic() + linger_s
            while store.add("doctor/read", 0) < self.meeting.world_size - 1 and time.monotonic() < deadline_s:
                time.sleep(LOOK_S)
        except DistError:  # a store of torchrun's that is gone: nobody can be told
            return

    def _await_code(self) -> int:
        assert self.meeting is not None
        store = self.meeting.store
        try:
            store.wait(["doctor/code"], timedelta(minutes=10))
            code = int(store.get("doctor/code"))
            store.add("doctor/read", 1)
        except DistError as error:
            raise RankLost(f"rank {self.meeting.rank} on {os.uname().nodename}: lost rank 0 at the end") from error
        return code


def write_whole(path: Path, text: str) -> None:
    """Write a file that is never seen half-written."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


if __name__ == "__main__":
    run_rank(main)
