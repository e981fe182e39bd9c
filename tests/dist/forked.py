"""`python -m MODULE`, forked from a process that has imported torch, DeepSpeed and transformers: 7 core-seconds saved.

That process starts with the first of `run` and `run_ranks` and ends with pytest. What DeepSpeed's launcher adds is
tested in tests/e2e and tests/launch.
"""

import atexit
import functools
import gc
import importlib
import json
import os
import resource
import runpy
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from sft.ports import free_port
from tests import tiny

IMPORTED = ("deepspeed", "transformers", "sft.training", "sft.resume", "sft.export", "sft.eval.drift")
"""What the modules that are started import, and none of these modules: `-m` runs a module anew."""


def run(module: str, *arguments: str, timeout_s: float = 240, largest_file: int | None = None):
    """One process. It cannot write a file beyond `largest_file` bytes: as on a full disk. A hang is an error."""
    return _ask({"module": module, "arguments": arguments, "ranks": 0, "largest_file": largest_file}, timeout_s)


def run_ranks(ranks: int, module: str, *arguments: str, timeout_s: float = 240):
    """Real ranks over gloo, as tiny.run_module starts them. The first that fails ends all, and its code is returned."""
    return _ask({"module": module, "arguments": arguments, "ranks": ranks, "largest_file": None}, timeout_s)


def _ask(request: dict[str, Any], timeout_s: float) -> subprocess.CompletedProcess[str]:
    server = _server()
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        server.stdin.write(json.dumps({**request, "out": str(out), "err": str(err)}).encode() + b"\n")
        group = int(server.stdout.readline())
        try:
            ended, _, _ = select.select([server.stdout], [], [], timeout_s)
            assert ended, f"{request['module']} still runs after {timeout_s} s: {out.read_text()}{err.read_text()}"
        except BaseException:
            os.killpg(group, signal.SIGKILL)
            server.stdout.readline()
            raise
        code = int(server.stdout.readline())
        return subprocess.CompletedProcess([request["module"]], code, out.read_text(), err.read_text())


@functools.cache
def _server() -> subprocess.Popen[bytes]:
    """Unbuffered: what was read ahead could not be waited for."""
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.dist.forked"], bufsize=0, env=tiny.rank_environment(), stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )  # fmt: skip
    atexit.register(server.communicate)
    return server


# In that process


def main() -> None:
    """Fork for each request; a fork leaves `serve` with what it shall be, and ends as any Python process does."""
    request = serve()
    if request:
        become(request)


def serve() -> dict[str, Any] | None:
    """Answer each line of stdin with the id of a new process, and with its exit code when it ends."""
    answers = os.dup(1)
    os.dup2(2, 1)
    for name in IMPORTED:
        importlib.import_module(name)
    gc.freeze()  # else every full collection of every fork goes through, and copies, all that was imported
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            os.close(answers)
            os.setpgid(0, 0)
            return json.loads(line)
        os.setpgid(pid, pid)  # whichever of the two comes first
        os.write(answers, b"%d\n" % pid)
        os.write(answers, b"%d\n" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    return None


def become(request: dict[str, Any]) -> None:
    """Run the module, as one process or as ranks."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for descriptor, kind in ((1, "out"), (2, "err")):
        os.dup2(os.open(request[kind], os.O_CREAT | os.O_WRONLY | os.O_APPEND), descriptor)
    if request["largest_file"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["largest_file"], resource.RLIM_INFINITY))
    sys.argv[1:] = request["arguments"]
    os.environ["LOCAL_SIZE"] = "1"
    if request["ranks"]:
        sys.argv.insert(1, f"--local_rank={become_rank(request['ranks'])}")
    runpy.run_module(request["module"], run_name="__main__", alter_sys=True)


def become_rank(ranks: int) -> int:
    """Fork the ranks. Returns in each of them; the process that waits for them ends here."""
    port = free_port()
    running = set()
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            set_rank(rank, ranks, port)
            return rank
        running.add(pid)
    first = 0
    while running:
        pid, status = os.wait()
        running.remove(pid)
        if status and not first:
            first = os.waitstatus_to_exitcode(status)
            for other in running:
                os.kill(other, signal.SIGKILL)
    sys.exit(first)


def set_rank(rank: int, ranks: int, port: str) -> None:
    """What DeepSpeed's launcher sets. Without LOCAL_SIZE, DeepSpeed starts numactl in every backward to count CPUs."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_SIZE=str(ranks))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)


if __name__ == "__main__":
    main()
