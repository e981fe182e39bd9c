"""The console script: one sub-command per job, each also reachable as a module."""

import difflib
import functools
import importlib
import logging
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from sft import __version__
from sft.errors import UserError, run_command
from sft.local_ranks import run_ranks
from sft.ports import free_port
from sft.ranks import TRAINER
from sft.supervisor import Job, supervise

COMMANDS = {
    "demo": ("sft.demo.run", "the whole pipeline on embedded data, 2 CPU ranks, a few minutes"),
    "prep": ("data_prep.build", "Alpaca, chat and text rows to packed, tokenized Arrow shards"),
    "augment": ("sft.augment", "paraphrase or back-translate rows with local models, or with a function of your own"),
    "prep verify": ("data_prep.verify", "check every digest, count and contract of prepared shards"),
    "show": ("data_prep.show", "look at packed rows: supervised tokens marked, document boundaries drawn"),
    "doctor": (
        "sft.doctor.run",
        "what would fail on these hosts, and for a run, before a GPU hour is spent (--ranks N)",
    ),
    "stage": ("sft.stage", "copy model and shards to this host's own disk, once, with checksums"),
    "plan": ("sft.plan", "what follows from a run file, before it runs (--ranks N, --plot-schedule)"),
    "train": ("sft.cli", "ZeRO-3 training on this host, through the deepspeed launcher (--ranks N)"),
    "report": ("sft.report.run", "one HTML page of a run, running or ended: curves, events, samples"),
    "blame": ("sft.blame", "the documents of an optimizer step, from their source files"),
    "export": ("sft.export", "checkpoint, its moving average, or several's mean, to a verified Hugging Face folder"),
    "merge": ("sft.merge", "models between base and tuned: (1 - alpha) base + alpha tuned"),
    "eval": ("sft.eval.evaluate", "MMLU and HellaSwag scores of one model (--ranks N)"),
    "drift": ("sft.eval.drift", "base against tuned: what was forgotten, with statistics and a gate (--ranks N)"),
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
    words = 2 if " ".join(argv[:2]) in COMMANDS else 1
    command, rest = " ".join(argv[:words]), argv[words:]
    if command == "--version":
        print(__version__)
    elif command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1, cutoff=0)[0]
        raise UserError(f"unknown command '{command}'; did you mean 'sft {near}'? See sft --help")
    elif command == "train":
        train(rest)
    elif command in ("doctor", "eval", "drift"):
        evaluate(COMMANDS[command][0], rest)
    else:
        importlib.import_module(COMMANDS[command][0]).main(rest)


def train(argv: Sequence[str]) -> None:
    """Check the run, once and in seconds, then start a rank per GPU (or `--ranks N`) with the deepspeed launcher."""
    wanted, options = take_ranks(list(argv))
    if {"-h", "--help"} & set(options):
        print("--ranks N             Processes on this host. [default: one per visible GPU; 1 on CPU]\n")
    ranks, on_cpu, lost_after_s = check_run(options, wanted)
    environment = dict(os.environ)
    launcher = [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        "--log_level",
        "critical",
        "--master_port",
        free_port(),
    ]
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if on_cpu:
        threads = str(max(1, len(os.sched_getaffinity(0)) // ranks))
        environment = {"OMP_NUM_THREADS": threads, **environment, "DS_ACCELERATOR": "cpu"}
    if visible and not on_cpu:  # with --num_gpus the launcher would ignore it and take the first GPUs of the host
        launcher += ["--include", "localhost:" + ",".join(visible.split(",")[:ranks])]
    else:
        launcher += ["--num_gpus", str(ranks)]
    say = functools.partial(print, file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix="sft-", ignore_cleanup_errors=True) as folder:
        job = Job([*launcher, "--module", TRAINER, *options], TRAINER, environment, Path(folder), lost_after_s)
        code = supervise(job, say)
    if code:
        raise SystemExit(code)


def evaluate(module: str, argv: Sequence[str]) -> None:
    """Score, or check, in this process, or in a rank per GPU (or `--ranks N`) of this host."""
    wanted, options = take_ranks(list(argv))
    asks = {"-h", "--help", "--print-config", "--print-schema"} & set(options)
    if {"-h", "--help"} & asks:
        print("--ranks N             Processes on this host. [default: one per visible GPU; 1 on CPU]\n")
    ranks = 1 if asks or "RANK" in os.environ else _choose_ranks(wanted)
    if ranks == 1:
        importlib.import_module(module).main(options)
    elif code := run_ranks(module, options, ranks):
        raise SystemExit(code)


def _choose_ranks(wanted: int | None) -> int:
    """As many as wanted, else one per GPU; on CPU, where ranks share it, 1.

    Raises:
        UserError: there are fewer GPUs.
    """
    import torch

    gpus = torch.cuda.device_count()
    if wanted and 0 < gpus < wanted:
        raise UserError(f"--ranks {wanted}: only {gpus} GPUs are visible here")
    return wanted or max(1, gpus)


def check_run(options: Sequence[str], wanted: int | None) -> tuple[int, bool, float]:
    """Validate options and inputs; returns the number of ranks, whether they run on CPU, and guard.lost_after_s."""
    import torch

    from sft.config import RunConfig
    from sft.inputs import find_resume, open_inputs
    from sft.lr_finder import refuse_begun
    from sft.run_folder import run_folder
    from sft.settings import load

    on_cpu = os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available()
    config = load(RunConfig, options, prog="sft train")
    ranks = wanted or (1 if on_cpu else torch.cuda.device_count())
    if not on_cpu and ranks > torch.cuda.device_count():
        raise UserError(f"--ranks {ranks}: only {torch.cuda.device_count()} GPUs are visible here")
    inputs = open_inputs(config, ranks)
    run_folder(config)
    find_resume(config, inputs)
    if config.lr_finder:
        refuse_begun(Path(config.out))
    return ranks, on_cpu, config.guard.lost_after_s


def take_ranks(argv: list[str]) -> tuple[int | None, list[str]]:
    """`--ranks N` or `--ranks=N`, the launcher's own option, and the options without it.

    Raises:
        UserError: N is no positive number.
    """
    at = next((index for index, word in enumerate(argv) if word.split("=")[0] == "--ranks"), None)
    if at is None:
        return None, argv
    rest = argv[at].partition("=")[1:] if "=" in argv[at] else ("", "".join(argv[at + 1 : at + 2]))
    if not rest[1].isdecimal() or int(rest[1]) == 0:
        raise UserError(f"--ranks: got '{rest[1]}', must be a number of processes, 1 or more")
    return int(rest[1]), argv[:at] + argv[at + (1 if rest[0] else 2) :]


def _usage() -> str:
    lines = ["usage: sft COMMAND [--config FILE.yaml] [--section.key value ...]", "", "commands:"]
    lines += [f"  {name:<11} {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join([*lines, "", "sft COMMAND --help lists every option; --print-config shows what it resolved to"])


if __name__ == "__main__":
    main()
