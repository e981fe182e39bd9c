"""`python -m sft.launch deepspeed ... --module sft.train OPTIONS`: a launcher of one's own choice, with the signals and
exit codes of `sft train`. The files in launch/ are built on it; also for torchrun, and for sft.doctor."""

import contextlib
import functools
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from sft.config import RunConfig
from sft.doctor.options import DoctorConfig, take_json
from sft.errors import (
    EXIT_BAD_INPUT,
    EXIT_CODES_FOLDER,
    EXIT_PREEMPTED,
    EXIT_RANK_LOST,
    UserError,
    run_command,
)
from sft.launch_env import HOSTS, for_pdsh, hand_on
from sft.ranks import DOCTOR, MODULES, TRAINER
from sft.run_folder import LAUNCH
from sft.settings import load
from sft.ssh import PDSH_OPTIONS, check_hosts, read_hostfile, ssh_options
from sft.supervisor import Job, supervise

MEANING = {
    EXIT_BAD_INPUT: "something in the input must be mended first; a line above says what",
    EXIT_RANK_LOST: "a rank was lost, as a line above says; run the same command again to go on",
    EXIT_PREEMPTED: "stopped as asked, and saved; run the same command again to go on",
}
BY_SSH = "--force_multi"
"""In the command of `deepspeed` where it starts the ranks of every host through ssh."""


def main(argv: Sequence[str]) -> None:
    """Check the options, then run the command under supervision and leave with the ranks' exit code.

    Raises:
        UserError: the command starts no module of ours, its options are wrong, or a host does not answer.
    """
    module = next((word for word in argv if word in MODULES), None)
    if module is None:
        raise UserError(
            f"sft.launch: no {MODULES[0]} in the command; expected: deepspeed ... --module {MODULES[0]} OPTIONS"
        )
    at = list(argv).index(module)
    command, options = argv[:at], argv[at + 1 :]
    own = take_json(options)[1] if module == DOCTOR else options
    config = load(DoctorConfig if module == DOCTOR else RunConfig, own, prog=module.replace(".", " "))
    say = functools.partial(print, file=sys.stderr, flush=True)
    make_job = job_by_ssh if BY_SSH in command else job_here
    with make_job(command, module, options, config) as job:
        code = supervise(job, say)
    if code in MEANING:  # torchrun and launch.py end with lines of their own, of failures
        say(f"exit code {code}: {MEANING[code]}")
    if code:
        raise SystemExit(code)


def files_named_in(options: Sequence[str]) -> list[Path]:
    """The run file, which every rank reads."""
    return [Path(options[at + 1]) for at, word in enumerate(options[:-1]) if word == "--config"]


@contextlib.contextmanager
def job_here(command: Sequence[str], module: str, options: Sequence[str], config: RunConfig) -> Iterator[Job]:
    """The command as it is: its ranks run on this host."""
    with tempfile.TemporaryDirectory(prefix="sft-", ignore_cleanup_errors=True) as folder:
        yield Job([*command, module, *options], module, os.environ, Path(folder), config.guard.lost_after_s)


@contextlib.contextmanager
def job_by_ssh(command: Sequence[str], module: str, options: Sequence[str], config: RunConfig) -> Iterator[Job]:
    """`deepspeed --hostfile FILE --force_multi`, with what DeepSpeed leaves to its user.

    Hosts that do not answer are told before anything starts; variables and secrets reach the ranks (sft.launch_env);
    options survive two shells; a silent ssh connection ends.
    """
    for path in (str(Path.cwd()), sys.executable):
        if not re.fullmatch(r"[\w@+=:,./-]+", path):
            raise UserError(
                f"{path}: DeepSpeed cannot start ranks in a folder with such a name; use one without spaces"
            )
    if shutil.which("pdsh") is None:
        raise UserError(
            "pdsh: no such command on this host, and DeepSpeed starts the ranks of others with it; install it"
        )
    if "--hostfile" not in command[:-1]:
        raise UserError(f"sft.launch: {BY_SSH} needs --hostfile FILE before --module")
    hostfile = Path(command[command.index("--hostfile") + 1])
    hosts = read_hostfile(hostfile)
    out = Path(config.out)
    is_new = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=LAUNCH, dir=out))  # mode 0700
    try:
        codes = folder / "exit-codes"
        codes.mkdir()
        # what the doctor is there to find must not keep it from starting
        shared = [codes.absolute()] if module == TRAINER else []
        own = check_hosts(hosts, hostfile, [*shared, *files_named_in(options)])
        address = os.environ.get("MASTER_ADDR") or own
        by_rank = ",".join(f"{host}:{slots}" for host, slots in hosts.items())
        environment = {**os.environ, HOSTS: by_rank, EXIT_CODES_FOLDER: str(codes.absolute())}
        launcher = [*command[:-1], "--no_ssh_check", "--master_addr", address, command[-1]]
        yield Job(
            [*launcher, module, *map(for_pdsh, options)],
            module,
            {**hand_on(environment, folder), PDSH_OPTIONS: ssh_options()},
            codes,
            config.guard.lost_after_s,
            hosts,
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if is_new:
            with contextlib.suppress(OSError):  # it holds a run by now
                out.rmdir()


if __name__ == "__main__":
    sys.exit(run_command(main))
