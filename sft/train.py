"""ZeRO-3 supervised fine-tuning: `deepspeed … --module sft.train --config run.yaml [--section.key value]`."""

from collections.abc import Sequence

from sft.config import RunConfig
from sft.errors import run_rank
from sft.settings import load
from sft.signals import Inbox


def main(argv: Sequence[str]) -> None:
    """Train, or resume, the run that the options describe; at its end, export the model."""
    inbox = Inbox()
    inbox.listen()  # first: the imports take seconds, in which a signal would end the process
    from sft.training import run_training

    run_training(load(RunConfig, argv, prog="sft train"), inbox)


if __name__ == "__main__":
    run_rank(main)
