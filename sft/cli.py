"""The console script: one sub-command per job, each also reachable as a module."""

import importlib
import os
import subprocess
import sys
from collections.abc import Sequence

from sft import __version__
from sft.errors import UserError, run_command

COMMANDS = {
    "demo": ("sft.demo.run", "the whole pipeline on embedded data, 2 CPU ranks, a few minutes"),
    "prep": ("data_prep.build", "Alpaca-style JSON to packed, tokenized Arrow shards"),
    "show": ("data_prep.show", "look at packed rows: supervised tokens marked, document boundaries drawn"),
    "train": ("sft.cli", "ZeRO-3 training on this host, through the deepspeed launcher (--ranks N)"),
    "export": ("sft.export", "checkpoint to verified Hugging Face folder"),
    "eval": ("sft.eval.evaluate", "MMLU and HellaSwag scores of one model"),
    "drift": ("sft.eval.drift", "base against tuned: what was forgotten, with statistics and a gate"),
}


def main() -> None:
    """Entry point of the `sft` script."""
    sys.exit(run_command(dispatch))


def dispatch(argv: Sequence[str]) -> None:
    """Run the sub-command named first in `argv`."""
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        return
    command, *rest = argv
    if command == "--version":
        print(__version__)
    elif command not in COMMANDS:
        import difflib

        near = difflib.get_close_matches(command, COMMANDS, n=1, cutoff=0)[0]
        raise UserError(f"unknown command '{command}'; did you mean 'sft {near}'? See sft --help")
    elif command == "train":
        train(rest)
    else:
        importlib.import_module(COMMANDS[command][0]).main(rest)


def train(argv: Sequence[str]) -> None:
    """Check the run here, once and in seconds, then start one rank per GPU (or `--ranks N`) with the deepspeed launcher."""
    ranks, options = _take_ranks(list(argv))
    environment = {**os.environ, "DEEPSPEED_LOG_LEVEL": os.environ.get("DEEPSPEED_LOG_LEVEL", "warning")}
    ranks, cpu = check_run(options, ranks)
    if cpu:
        cores = len(os.sched_getaffinity(0))
        environment.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", str(max(1, cores // ranks))))
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks), "--master_port", _free_port()]
    launcher += ["--log_level", "error"]
    code = subprocess.run([*launcher, "--module", "sft.train", *options], env=environment, check=False).returncode
    if code:
        raise SystemExit(code)


def check_run(options: Sequence[str], ranks: int | None) -> tuple[int, bool]:
    """Validate options and inputs; returns the number of ranks and whether they run on CPU."""
    import torch

    from sft.config import RunConfig
    from sft.inputs import open_inputs, run_folder
    from sft.settings import load

    cpu = not torch.cuda.is_available()
    ranks = ranks or (1 if cpu else torch.cuda.device_count())
    config = load(RunConfig, options, prog="sft train")
    open_inputs(config, ranks)
    run_folder(config)
    return ranks, cpu


def _take_ranks(argv: list[str]) -> tuple[int | None, list[str]]:
    if "--ranks" not in argv:
        return None, argv
    at = argv.index("--ranks")
    value = argv[at + 1] if at + 1 < len(argv) else ""
    if not value.isdigit() or int(value) == 0:
        raise UserError(f"--ranks: got '{value}', must be a number of processes, 1 or more")
    return int(value), argv[:at] + argv[at + 2 :]


def _free_port() -> str:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def _usage() -> str:
    lines = ["usage: sft COMMAND [--config FILE.yaml] [--section.key value ...]", "", "commands:"]
    lines += [f"  {name:<8} {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join([*lines, "", "sft COMMAND --help lists every option; --print-config shows what it resolved to"])


if __name__ == "__main__":
    main()
