"""`sft doctor` whose network check breaks off on the rank that has PLANTED in its environment: raise, or kill."""

import os
import signal

import torch
import torch.distributed as dist

from sft.doctor import network, run
from sft.errors import run_rank


def measure(*_: object) -> list:
    """Wait for a rank that does not come, or be that rank."""
    if fault := os.environ.get("PLANTED"):
        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError("planted")
    dist.all_reduce(torch.zeros(1))
    raise AssertionError("the other rank was to leave")


if __name__ == "__main__":
    network.measure = measure
    run_rank(run.main)
