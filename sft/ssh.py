"""The hosts of a hostfile, as a launching host sees them through ssh."""

import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sft.errors import UserError, shorten

CONNECT_S = 10
ALIVE_S = 15
"""A connection whose other end is silent for three times this long is given up: TCP alone would wait for hours."""
OPTIONS = f"-o BatchMode=yes -o ConnectTimeout={CONNECT_S} -o ServerAliveInterval={ALIVE_S} -o ServerAliveCountMax=3"
PDSH_OPTIONS = "PDSH_SSH_ARGS_APPEND"
"""Environment variable of pdsh: options for every ssh that it starts. The user's own come first, and win."""
LINE = re.compile(r"(?P<name>[^\s=#]+)\s+slots=(?P<slots>\d+)")


def read_hostfile(path: Path) -> dict[str, int]:
    """Ranks by host, from lines of `name slots=8`; blank lines and comments are passed over.

    Raises:
        UserError: a line is something else, a host stands there twice, or there is none.
    """
    hosts: dict[str, int] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        found = LINE.fullmatch(text)
        if not found or int(found["slots"]) == 0:
            raise UserError(f"hostfile {path}, line {number}: '{shorten(text)}' is not `name slots=8`")
        if found["name"] in hosts:
            raise UserError(f"hostfile {path}, line {number}: {found['name']} stands there twice; add its slots up")
        hosts[found["name"]] = int(found["slots"])
    if not hosts:
        raise UserError(f"hostfile {path}: names no host; write one line `name slots=8` for each")
    return hosts


def ssh_options() -> str:
    """Options of every ssh connection: no questions, and an end where the other side is gone."""
    return f"{os.environ.get(PDSH_OPTIONS, '')} {OPTIONS}".strip()


def on_hosts(hosts: Sequence[str], command: Sequence[str], limit_s: float) -> dict[str, tuple[int, str]]:
    """Run a command in this folder on all hosts at once; (exit code, output) by host. Code 255: ssh itself failed."""
    python_path = shlex.quote(os.environ.get("PYTHONPATH", ""))
    text = f"cd {shlex.quote(str(Path.cwd()))} && PYTHONPATH={python_path} {shlex.join(command)}"

    def run(host: str) -> tuple[int, str]:
        words = ["ssh", "-n", *shlex.split(ssh_options()), host, text]
        try:
            done = subprocess.run(words, capture_output=True, text=True, timeout=limit_s, check=False)
        except subprocess.TimeoutExpired:
            return 255, f"no answer in {limit_s:.0f} s"
        except FileNotFoundError:
            raise UserError("ssh: no such command on this host; install openssh-client") from None
        return done.returncode, done.stdout if done.returncode == 0 else done.stderr or done.stdout

    with ThreadPoolExecutor(min(64, len(hosts))) as pool:
        return dict(zip(hosts, pool.map(run, hosts), strict=True))


def check_hosts(hosts: Mapping[str, int], hostfile: Path, shared: Sequence[Path] = ()) -> str:
    """Reach every host and look for this folder, this Python and `shared` there; returns the address of the first.

    Raises:
        UserError: names every host that cannot take part, and why.
    """
    wanted = [("x", sys.executable), *(("r", str(path)) for path in shared)]
    looks = [
        f"test -{how} {shlex.quote(path)} || {{ echo no {shlex.quote(path)} >&2; exit 3; }}" for how, path in wanted
    ]
    look = "; ".join([*looks, "hostname -I"])
    answers = on_hosts(list(hosts), ["bash", "-c", look], limit_s=4 * CONNECT_S)
    problems = [f"{host}: {_reason(text)}" for host, (code, text) in answers.items() if code != 0]
    if problems:
        those = problems[0] if len(problems) == 1 else "\n  ".join([f"{len(problems)} hosts", *problems])
        raise UserError(
            f"hostfile {hostfile}: {those}\n  every host must be reached by `ssh -o BatchMode=yes HOST` without a "
            "password, and see this folder, this Python and --out under the same paths; mend it, or take its line out"
        )
    first = next(iter(hosts))
    return _address(first, answers[first][1].split())


def _address(host: str, own: Sequence[str]) -> str:
    """The address under which this host knows the first one, if that is one of its own, else its first."""
    try:
        known = socket.gethostbyname(host.rpartition("@")[2])
    except OSError:  # an alias of ~/.ssh/config
        known = ""
    return known if known in own else next(iter(own), "127.0.0.1")


def _reason(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("Warning: Permanently added")]
    return shorten(" ".join(" ".join(lines[-2:]).split()) or "no answer", 200)
