"""Launches of `sft doctor`, one after the other, whose ranks are forked from one process that has imported everything.

Arguments: a JSON file with the launches, and where to write how their ranks ended.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sft.doctor import course, gpus, machine, network, run
from sft.errors import run_rank
from sft.ports import free_port

LIMIT_S = 120.0


def launch(argv: list[str], ranks: list[dict[str, str]], folder: Path) -> list[dict[str, Any]]:
    """Start all ranks; a rank's `fault` is planted, its `site` comes first on its path. Their codes and output."""
    folder.mkdir()
    port = free_port()
    pids = []
    for rank, own in enumerate(ranks):
        pid = os.fork()
        if pid == 0:
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": len(ranks), "LOCAL_WORLD_SIZE": len(ranks)}
            os.environ.update({name: str(value) for name, value in place.items()})
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            for descriptor, kind in ((1, "stdout"), (2, "stderr")):
                os.dup2(os.open(folder / f"{rank}.{kind}", os.O_CREAT | os.O_WRONLY | os.O_APPEND), descriptor)
            plant(**own)
            sys.argv[1:] = argv
            run_rank(run.main)
        pids.append(pid)
    codes = await_all(pids)
    said = [
        {kind: (folder / f"{rank}.{kind}").read_text() for kind in ("stdout", "stderr")} for rank in range(len(pids))
    ]
    return [{"code": code, **texts} for code, texts in zip(codes, said, strict=True)]


def await_all(pids: list[int]) -> list[int | None]:
    """Exit codes; None: stopped for good, or still there after LIMIT_S."""
    codes: dict[int, int | None] = {}
    deadline_s = time.monotonic() + LIMIT_S
    while len(codes) < len(pids):
        for pid in set(pids) - codes.keys():
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                codes[pid] = os.waitstatus_to_exitcode(status)
        others = set(pids) - codes.keys()
        if time.monotonic() > deadline_s or all(is_stopped(pid) for pid in others):
            for pid in others:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                codes[pid] = None
        time.sleep(0.05)
    return [codes[pid] for pid in pids]


def is_stopped(pid: int) -> bool:
    """By a signal."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def plant(fault: str = "", site: str = "", local_rank: str = "") -> None:
    """In a rank with `fault`: raise, kill or wait in the network's check; stop or sleep in that of the machine."""
    if local_rank:
        os.environ["LOCAL_RANK"] = local_rank
    if site:
        sys.path.insert(0, site)
    if not fault:
        return
    gpus.WARM_UP_S = 0.0
    course.LOST_S = 6.0
    collect = machine.collect

    def local(*given: Any) -> dict[str, Any]:
        if fault == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        if fault == "sleep":
            time.sleep(LIMIT_S)
        return collect(*given)

    def together(*_: object) -> list:
        """Wait for a rank that does not come, or be that rank."""
        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "raise":
            raise OSError("planted")
        dist.all_reduce(torch.zeros(1))
        raise AssertionError("the other rank was to leave")

    machine.collect, network.measure = local, together


def main(plan: str, results: str) -> None:
    """All launches of the plan: {name: {"argv": [...], "ranks": [arguments of `plant`]}}."""
    ended = {}
    for name, asked in json.loads(Path(plan).read_text()).items():
        ended[name] = launch(asked["argv"], asked["ranks"], Path(results).with_name(name))
    Path(results).write_text(json.dumps(ended))


if __name__ == "__main__":
    main(*sys.argv[1:])
