"""Started by test_watchdog.py: a loop of small collectives under a watchdog, in which one rank misbehaves.

By a launcher, with the arguments CASE FOLDER LOST_AFTER_S HANG_AFTER_S: one rank of one case. Without one, with
FOLDER LOST_AFTER_S HANG_AFTER_S CASE...: forks the ranks of every case, so that torch is imported once, and writes to
<folder>/<case>/ what they say (rank-0.err), the steps they finish (rank-0.log) and how they end (ends.jsonl).

A case is what happens and to which rank, perhaps with a prefix. far: three ranks that take each other for processes of
other hosts. blind: no watchdog; what is left of these is killed when all other cases have ended.
"""

import contextlib
import dataclasses
import json
import os
import signal
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

import sft.watchdog
from sft.errors import Preempted, UserError, run_rank
from sft.ports import free_port
from sft.vitals import this_member
from sft.watchdog import Watchdog
from tests.dist.forked import set_rank

STEPS = 4
BAD_STEP = 3


def main(argv: list[str]) -> None:
    """All cases, or one rank of one."""
    if "RANK" in os.environ:
        case, folder, lost_after_s, hang_after_s = [text for text in argv if not text.startswith("--local_rank")]
        train(case, Path(folder), float(lost_after_s), float(hang_after_s))
    else:
        fork_all(Path(argv[0]), float(argv[1]), float(argv[2]), argv[3:])


def train(case: str, folder: Path, lost_after_s: float, hang_after_s: float) -> None:
    """Two steps go well; what happens in the third is the case."""
    # as in training: a request to stop is a flag for the loop, and a launcher sends one to the survivors
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    dist.init_process_group("gloo", timeout=timedelta(minutes=5))
    rank = dist.get_rank()

    def record(reason: str) -> None:
        append(folder / "events.jsonl", rank=rank, reason=reason)

    if case.startswith("far_"):
        sft.watchdog.this_member = lambda rank: dataclasses.replace(
            this_member(rank), host=f"node{rank}", place=str(rank)
        )
    if case == "absent_1" and rank == 1:
        return
    if case.startswith("broken_"):  # the wait for a verdict that never comes, made short
        sft.watchdog.LEAVE_S, hang_after_s = 1.0, 60.0
    store = dist.distributed_c10d._get_default_store()
    watchdog = Watchdog(rank, dist.get_world_size(), lost_after_s, hang_after_s, record, folder / "stacks", store)
    with contextlib.nullcontext() if case.startswith("blind_") else watchdog:
        for step in range(1, STEPS + 1):
            watchdog.mark("forward", step)
            if step == BAD_STEP:
                append(folder / f"rank-{rank}.log", step=step, time=time.time())
                misbehave(case, rank, hang_after_s)
            dist.all_reduce(torch.ones(1))
            append(folder / f"rank-{rank}.log", step=step, time=time.time())
    if case == "export_0" and rank == 0:
        time.sleep(2)  # alone, its peers have left


def misbehave(case: str, rank: int, hang_after_s: float) -> None:
    """What the case says, on the rank that it names."""
    action, where = case.split("_")[-2:]
    if action == "mistake":  # every rank's, but not at the same time
        time.sleep(2.0 * (rank == int(where)))
        raise UserError("every rank finds it")
    if action == "preempted":
        time.sleep(2.0 * (rank == int(where)))
        raise Preempted("as asked")
    if where != str(rank) and action != "suspend":
        return
    if action in ("kill", "stop", "suspend"):
        os.kill(os.getpid(), signal.SIGKILL if action == "kill" else signal.SIGSTOP)
    elif action == "hang":
        dream_on()
    elif action == "error":
        raise UserError("--data.train x: a mistake on one rank")
    elif action == "crash":
        raise ZeroDivisionError("a bug")
    elif action == "broken":
        raise RuntimeError("[x/gloo/transport/tcp/pair.cc:553] Connection reset by peer")
    elif action == "slow":
        time.sleep(0.7 * hang_after_s)


def dream_on() -> None:
    """Named, so that the stacks can show it."""
    time.sleep(600)


def fork_all(folder: Path, lost_after_s: float, hang_after_s: float, cases: list[str]) -> None:
    """Start all ranks and wait for their ends.

    A rank that is stopped goes on as soon as another one of its case has left; suspended ones go on together.
    """
    ranks: dict[int, tuple[str, int]] = {}
    resume_s = time.monotonic() + 2 * lost_after_s
    try:
        for case in cases:
            (folder / case).mkdir()
            port, world_size = free_port(), 3 if case.startswith("far_") else 2
            for rank in range(world_size):
                pid = os.fork()
                if pid == 0:
                    become_rank(rank, world_size, port, folder / case)
                    run_rank(lambda _, case=case: train(case, folder / case, lost_after_s, hang_after_s))
                ranks[pid] = (case, rank)
        while ranks:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid:
                case, rank = ranks.pop(pid)
                code = os.waitstatus_to_exitcode(status)
                append(folder / case / "ends.jsonl", rank=rank, code=code, time=time.time())
                send(signal.SIGCONT, [other for other, (name, _) in ranks.items() if name == case])
            if time.monotonic() > resume_s:
                send(signal.SIGCONT, [other for other, (name, _) in ranks.items() if name.startswith("suspend_")])
            if all(name.startswith("blind_") for name, _ in ranks.values()):
                send(signal.SIGKILL, list(ranks))
            time.sleep(0.02)
    finally:
        send(signal.SIGKILL, list(ranks))


def send(number: signal.Signals, pids: list[int]) -> None:
    """One signal to some processes."""
    for pid in pids:
        os.kill(pid, number)


def become_rank(rank: int, world_size: int, port: str, folder: Path) -> None:
    """Make this forked process a rank with its own standard error."""
    set_rank(rank, world_size, port)
    if folder.name.startswith("far_"):
        os.environ.update(LOCAL_RANK="0", LOCAL_SIZE="1")
    stream = os.open(folder / f"rank-{rank}.err", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(stream, 2)


def append(path: Path, **facts: object) -> None:
    """One JSON line."""
    with path.open("a") as stream:
        stream.write(json.dumps(facts) + "\n")


if __name__ == "__main__":
    run_rank(main)
