"""The console script: one sub-command per job, each also reachable as a module."""

import difflib
import importlib
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Sequence

from sft import __version__
from sft.errors import UserError, run_command
from sft.ports import free_port

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
    # transformers imports deepspeed, which warns of a missing GPU in commands that need none
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())
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
        near = difflib.get_close_matches(command, COMMANDS, n=1, cutoff=0)[0]
        raise UserError(f"unknown command '{command}'; did you mean 'sft {near}'? See sft --help")
    elif command == "train":
        train(rest)
    else:
        importlib.import_module(COMMANDS[command][0]).main(rest)


def train(argv: Sequence[str]) -> None:
    """Check the run, once and in seconds, then start a rank per GPU (or `--ranks N`) with the deepspeed launcher."""
    wanted, options = _take_ranks(list(argv))
    ranks, on_cpu = check_run(options, wanted)
    environment = dict(os.environ)
    if on_cpu:
        threads = str(max(1, len(os.sched_getaffinity(0)) // ranks))
        environment = {"OMP_NUM_THREADS": threads, **environment, "DS_ACCELERATOR": "cpu"}
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "error", "--num_gpus", str(ranks)]
    command = [*launcher, "--master_port", free_port(), "--module", "sft.train", *options]
    # a group of its own: the launcher passes no signal on, and its ranks would outlive it
    launched = subprocess.Popen(command, env=environment, start_new_session=True)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda received, _frame: os.killpg(launched.pid, received))
    code = launched.wait()
    if code:
        raise SystemExit(code if code > 0 else 128 - code)


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


def _usage() -> str:
    lines = ["usage: sft COMMAND [--config FILE.yaml] [--section.key value ...]", "", "commands:"]
    lines += [f"  {name:<8} {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join([*lines, "", "sft COMMAND --help lists every option; --print-config shows what it resolved to"])


if __name__ == "__main__":
    main()
