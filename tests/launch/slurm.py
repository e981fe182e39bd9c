"""A real Slurm on the two hosts of tests.launch.hosts: slurmctld on the first, slurmd on each, munge between them.

Everything it writes is below one folder or in the hosts' own /run, where names of sockets are short (a kernel takes 108
characters); everything it starts ends with the hosts' name spaces.
"""

import contextlib
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.launch import jobs
from tests.launch.hosts import Host

TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
CREDENTIAL_S = 5
"""As long a job that was put back waits before it may start again, lest its old self still have a valid credential."""
KILL_WAIT_S = 15
SLURM_CONF = """
ClusterName=test
SlurmctldHost={first.name}({first.address})
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=/run/munge.socket,cred_expire={credential_s}
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir=/run/slurmd
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_min_interval=0,batch_sched_delay=0,bf_interval=1
GresTypes=gpu
SlurmdParameters=config_overrides
KillWait={kill_wait_s}
SlurmdTimeout=10
ReturnToService=2
{nodes}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=ALL Default=YES PriorityTier=1
PartitionName=urgent Nodes=ALL PriorityTier=2 PreemptMode=OFF
"""
GRES_CONF = "Name=gpu File=/dev/null\n"
DAEMONS = ("munged", "slurmctld", "slurmscriptd", "slurmd", "slurmstepd")


@dataclass(frozen=True)
class Slurm:
    """A running cluster. Commands are given on its first host."""

    folder: Path
    hosts: tuple[Host, Host]
    environment: dict[str, str]

    def command(self, *words: str | Path, **variables: str) -> str:
        """Run one of Slurm's commands on the first host and return what it printed."""
        environment = {**self.environment, **variables}
        return self.hosts[0].run(*words, env=environment).stdout.strip()

    def submit(self, work: Path, *words: str | Path, **variables: str) -> str:
        """sbatch in a folder; returns the number of the job."""
        return self.command("sbatch", "--parsable", f"--chdir={work}", *words, **variables)

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says: JobState, ExitCode, Restarts, ..."""
        return dict(re.findall(r"(\w+)=(\S*)", self.command("scontrol", "show", "job", number)))

    def wait_until(self, condition: Callable[[], object], what: str, timeout_s: float = 240.0) -> None:
        """Wait for `condition`; a failure shows the logs of Slurm."""
        deadline_s = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline_s, f"{what}: not within {timeout_s:.0f} s\n{self.logs()}"
            time.sleep(0.2)

    def wait(self, number: str, timeout_s: float = 240.0) -> dict[str, str]:
        """Wait until a job has ended for good, and return what Slurm says of it."""
        ended = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED"}
        self.wait_until(lambda: self.job(number)["JobState"] in ended, f"end of job {number}", timeout_s)
        return self.job(number)

    def left(self) -> list[str]:
        """Command lines of what jobs have left on the hosts, after a moment in which what is ending may end."""
        deadline_s = time.monotonic() + 3
        while (found := _of_jobs(self.hosts)) and time.monotonic() < deadline_s:
            time.sleep(0.1)
        return found

    def logs(self) -> str:
        """The end of every log of Slurm's daemons."""
        logs = sorted(self.folder.glob("*.log"))
        return "\n".join(f"== {path.name}\n" + "\n".join(path.read_text().splitlines()[-15:]) for path in logs)


@contextlib.contextmanager
def cluster(folder: Path, hosts: tuple[Host, Host], gpus: int = 1) -> Iterator[Slurm]:
    """A Slurm whose nodes have `gpus` devices in name alone: /dev/null under Slurm's name gpu."""
    (folder / "state").mkdir(parents=True)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    nodes = [f"NodeName={host.name} NodeAddr={host.address} CPUs=4 Gres=gpu:{gpus}" for host in hosts]
    settings = SLURM_CONF.format(
        first=hosts[0], folder=folder, credential_s=CREDENTIAL_S, kill_wait_s=KILL_WAIT_S, nodes="\n".join(nodes)
    )
    (folder / "slurm.conf").write_text(settings)
    (folder / "gres.conf").write_text(GRES_CONF * gpus)
    environment = {**jobs.launching_shell(folder), "SLURM_CONF": str(folder / "slurm.conf")}
    for host in hosts:
        munge = ["munged", "--force", "--socket=/run/munge.socket", f"--key-file={key}", "--pid-file=/run/munged.pid"]
        host.run(*munge, f"--seed-file={folder}/seed-{host.name}", f"--log-file={folder}/munged-{host.name}.log")
    hosts[0].run("slurmctld", env=environment)
    for host in hosts:
        host.run("slurmd", "-N", host.name, env=environment)
    slurm = Slurm(folder, hosts, environment)
    slurm.wait_until(lambda: _idle(slurm) == len(hosts), "nodes", 30)
    yield slurm


def _idle(slurm: Slurm) -> int:
    done = subprocess.run(
        slurm.hosts[0].inside(["sinfo", "--noheader", "--partition=main", "--Node", "--format=%T"]),
        env=slurm.environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.stdout.split().count("idle")


def _of_jobs(hosts: Sequence[Host]) -> list[str]:
    found = []
    for process in [process for host in hosts for process in host.processes()]:
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()  # of a zombie: none
            if words and not any(daemon in words[0] or words[-1:] == [daemon] for daemon in DAEMONS):
                found.append(" ".join(words)[:300])
    return found
