"""Two hosts on one machine: name spaces with an address, a host name, processes and mounts of their own, and sshd.

    switch                     a network name space that holds nothing but a bridge
      ├─ hosta  10.77.0.1      network, host name, processes, mounts; eth0; sshd
      └─ hostb  10.77.0.2

They share this machine's files, as the hosts of a cluster share a file system, except what a test mounts over. Nothing
is made outside the name spaces, so that nothing can be left behind: they end with the processes that hold them, and
those with this process.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests import tiny

NAMES = ("hosta", "hostb")
ADDRESSES = dict(zip(NAMES, ("10.77.0.1", "10.77.0.2"), strict=True))
INTERFACE = "eth0"
TOOLS = {"ip": "iproute2", "tc": "iproute2", "unshare": "util-linux", "nsenter": "util-linux", "sshd": "openssh-server",
         "ssh": "openssh-client", "pdsh": "pdsh"}  # fmt: skip
SBIN = "/usr/sbin:/sbin"
SSH_CONFIG = """
Host *
    IdentityFile {key}
    StrictHostKeyChecking no
    UserKnownHostsFile /dev/null
    LogLevel ERROR
"""
SSHD_CONFIG = """
HostKey {key}
AuthorizedKeysFile {key}.pub
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
MaxStartups 100
"""


@dataclass(frozen=True)
class Host:
    """One of the hosts. `pid` is its first process, as this machine sees it."""

    name: str
    address: str
    pid: int
    switch_pid: int

    def inside(self, command: Sequence[str | Path]) -> list[str]:
        """The command line that runs `command` on this host, in the current folder."""
        enter = ["nsenter", "--target", str(self.pid), "--net", "--uts", "--mount", "--pid"]
        # a mount name space is entered at its root
        back = ["bash", "-c", 'cd "$0" && exec "$@"', str(Path.cwd())]
        return [*enter, *back, *map(str, command)]

    def run(self, *command: str | Path, timeout_s: float = 60, **options: Any) -> "subprocess.CompletedProcess[str]":
        """Run a command on this host to its end; its failure is an error."""
        done = subprocess.run(
            self.inside(command), capture_output=True, text=True, timeout=timeout_s, check=False, **options
        )
        assert done.returncode == 0, f"{self.name}: {command}: {done.stdout}{done.stderr}"
        return done

    def popen(
        self,
        *command: str | Path,
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
        **more: Any,
    ) -> "subprocess.Popen[str]":
        """Start a command on this host; output as text through pipes where asked for."""
        where = ["bash", "-c", 'cd "$0" && exec "$@"', str(folder or Path.cwd()), *map(str, command)]
        return subprocess.Popen(self.inside(where), env=environment or cluster_environment(), text=True, **more)

    def mount_small_disk(self, folder: Path, mib: int) -> None:
        """A file system of its own, that nobody else sees, over `folder`."""
        self.run("mount", "-t", "tmpfs", "-o", f"size={mib}m", "none", folder)

    def mount_over(self, source: Path, target: Path) -> None:
        """On this host alone, `target` shows `source`, a folder or a file."""
        self.run("mount", "--bind", source, target)

    def set_link(self, up: bool) -> None:
        """Plug the cable in, or out: the other side of eth0, as a switch sees it."""
        port = ["ip", "link", "set", self.name, "up" if up else "down"]
        subprocess.run(["nsenter", "--target", str(self.switch_pid), "--net", *port], check=True)

    def slow_down(self, mbit_per_s: int, delay_ms: int = 0) -> None:
        """Limit what this host sends; netem where the kernel has it, else a token bucket (which cannot delay)."""
        netem = f"netem rate {mbit_per_s}mbit" + (f" delay {delay_ms}ms" if delay_ms else "")
        bucket = f"tbf rate {mbit_per_s}mbit burst 64kbit latency 400ms"
        for discipline in (netem, bucket):
            command = self.inside(["tc", "qdisc", "replace", "dev", INTERFACE, "root", *discipline.split()])
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                return
        pytest.fail(f"tc: {done.stderr}")

    def full_speed(self) -> None:
        """Undo `slow_down`."""
        self.run("tc", "qdisc", "del", "dev", INTERFACE, "root")

    def processes(self) -> list[psutil.Process]:
        """What runs here besides the first process and sshd."""
        name_space = os.readlink(f"/proc/{self.pid}/ns/pid")
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                same = os.readlink(f"/proc/{process.pid}/ns/pid") == name_space
                if same and process.pid != self.pid and process.name() not in ("sshd", "sleep"):
                    found.append(process)
        return found


def why_not(*more_tools: str) -> str | None:
    """Why hosts cannot be made here, or None. `more_tools`: commands that a test needs besides."""
    if os.geteuid() != 0:
        return "needs root, to make network name spaces"
    path = f"{os.environ.get('PATH', '')}:{SBIN}"
    missing = [tool for tool in [*TOOLS, *more_tools] if shutil.which(tool, path=path) is None]
    if missing:
        packages = sorted({TOOLS.get(tool, tool) for tool in missing})
        return f"needs {', '.join(missing)} (packages: {', '.join(packages)})"
    done = subprocess.run(["unshare", "--net", "--mount", "true"], capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else f"needs name spaces: {done.stderr.strip()}"


@contextlib.contextmanager
def two_hosts(folder: Path) -> Iterator[tuple[Host, Host]]:
    """Two hosts that reach each other by name, through ssh too; keys and settings are written to `folder`.

    As on Debian, each host's own name is an address of its loopback, which no other host can reach.
    """
    folder.mkdir(parents=True, exist_ok=True)
    key = folder / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    (folder / "ssh_config").write_text(SSH_CONFIG.format(key=key))
    (folder / "sshd_config").write_text(SSHD_CONFIG.format(key=key))
    with contextlib.ExitStack() as stack:
        switch = stack.enter_context(_name_space("--net"))
        _on(switch, "ip link add bridge type bridge", "ip link set bridge up")
        hosts = []
        for name, address in ADDRESSES.items():
            pid = stack.enter_context(_name_space("--net", "--uts", "--mount", "--pid", "--mount-proc"))
            _on(
                switch,
                f"ip link add {name} type veth peer name {INTERFACE} netns {pid}",
                f"ip link set {name} master bridge up",
            )
            host = Host(name, address, pid, switch)
            _set_up(host, folder)
            hosts.append(host)
        for host, other in (hosts, reversed(hosts)):
            _wait_for_ssh(host, other)
        yield hosts[0], hosts[1]


def cluster_environment(**more: str) -> dict[str, str]:
    """Environment of a launching shell: CPU ranks, this Python's commands first. The hosts reach nothing else."""
    base = {key: value for key, value in tiny.rank_environment().items() if not key.startswith("SLURM")}
    base["PYTHONPATH"] = str(tiny.REPO)  # without tests/offline, which allows loopback alone
    return {**base, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}:{SBIN}", **more}


@contextlib.contextmanager
def _name_space(*kinds: str) -> Iterator[int]:
    """A process that does nothing in name spaces of its own, and its pid; all of it ends with this process."""
    command = ["unshare", *kinds, "--fork", "--kill-child", "sleep", "infinity"]
    holder = subprocess.Popen(command, start_new_session=True)
    try:
        first = psutil.Process(holder.pid)
        deadline_s = time.monotonic() + 20
        while not (children := first.children()) or children[0].name() != "sleep":
            assert holder.poll() is None, f"{command}: ended"
            assert time.monotonic() < deadline_s, f"{command}: no process"
            time.sleep(0.01)
        yield children[0].pid
    finally:
        with contextlib.suppress(psutil.NoSuchProcess, UnboundLocalError):
            children[0].kill()
        holder.kill()
        holder.wait()


def _on(pid: int, *commands: str) -> None:
    for command in commands:
        subprocess.run(["nsenter", "--target", str(pid), "--net", *command.split()], check=True)


def _set_up(host: Host, folder: Path) -> None:
    names = [f"{'127.0.1.1' if name == host.name else address} {name}" for name, address in ADDRESSES.items()]
    hosts_file = folder / f"hosts-{host.name}"
    hosts_file.write_text("\n".join(["127.0.0.1 localhost", *names, ""]))
    host.run("hostname", host.name)
    host.run("mount", "--make-rprivate", "/")
    host.mount_over(hosts_file, Path("/etc/hosts"))
    host.mount_over(folder / "ssh_config", Path("/etc/ssh/ssh_config"))
    host.run("mount", "-t", "tmpfs", "none", "/run")
    host.run("mount", "-t", "tmpfs", "none", "/dev/shm")
    host.run("mkdir", "/run/sshd")
    host.run("ip", "link", "set", "lo", "up")
    host.run("ip", "address", "add", f"{host.address}/24", "dev", INTERFACE)
    host.run("ip", "link", "set", INTERFACE, "up")
    host.run("/usr/sbin/sshd", "-f", folder / "sshd_config", "-E", folder / f"sshd-{host.name}.log")


def _wait_for_ssh(host: Host, other: Host) -> None:
    deadline_s = time.monotonic() + 20
    while True:
        done = subprocess.run(
            host.inside(["ssh", "-o", "BatchMode=yes", other.name, "hostname"]),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode == 0:
            assert done.stdout.strip() == other.name
            return
        assert time.monotonic() < deadline_s, f"ssh from {host.name} to {other.name}: {done.stderr}"
        time.sleep(0.1)
