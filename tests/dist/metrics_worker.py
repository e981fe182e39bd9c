"""Started by test_metrics.py on real ranks: sft.train, in which rank 1 is slow at reading and holds more memory.

    metrics_worker OPTIONS...

Written to the run folder: own-<rank>.json, what each rank measured of itself in its last step.
"""

import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch

import sft.step
from sft import batch
from sft.errors import run_rank
from sft.train import main as train

SLOW_S = 0.2
MORE_BYTES = 512 * 2**20


def main(argv: list[str]) -> None:
    """Train with the patches."""
    rank = int(os.environ["RANK"])
    out = Path(argv[argv.index("--out") + 1])
    from_shards, measure_rank = batch.from_shards, sft.step.measure_rank
    more = np.ones(rank * MORE_BYTES, np.uint8)

    def slow(*args, **options):
        time.sleep(SLOW_S * rank)
        return from_shards(*args, **options)

    def measure(device: torch.device, data_stall_s: float) -> tuple[float, ...]:
        own = measure_rank(device, data_stall_s)
        (out / f"own-{rank}.json").write_text(json.dumps(own))
        return own

    batch.from_shards = slow
    sft.step.measure_rank = measure
    train(argv)
    assert len(more) == rank * MORE_BYTES


if __name__ == "__main__":
    sys.exit(run_rank(main))
