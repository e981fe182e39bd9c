"""Started on real ranks: how often ZeRO-3 gathers in a forward and backward, by number of MLP tiles.

    gathers_worker MODEL STRATEGY OUT

Rank 0 writes OUT: {tiles: gathers}; the first step's trace is not counted.
"""

import json
import sys
from pathlib import Path

import deepspeed.comm.comm
import numpy as np
import torch.distributed as dist

from sft.batch import build
from sft.config import DataSection, ModelSection, RunConfig
from sft.engine import build_engine, choose_numerics, join, read_strategy
from sft.rendezvous import meet


def main(argv: list[str]) -> None:
    """All numbers of tiles, one engine after the other."""
    model, strategy, out = argv[-3:]
    device = join(meet(60.0))
    calls = note_gathers()
    found = {}
    for tiles in (1, 2, 5):
        settings = ModelSection(path=model, precision="fp32", mlp_tiles=tiles)
        config = RunConfig(model=settings, data=DataSection(train="unused"), out="unused")
        engine = build_engine(config, read_strategy(strategy), choose_numerics(config, device, {}))
        engine.train()
        for _ in range(3):
            calls.clear()
            loss, _ = engine(build([(np.arange(5, 45), np.arange(5, 45))], device))
            engine.backward(loss, scale_wrt_gas=False)
            found[tiles] = len(calls)
            engine.step()
        engine.destroy()
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(found))
    dist.barrier()


def note_gathers() -> list[str]:
    """Let DeepSpeed's collectives note their all-gathers in the list that is returned."""
    backend, calls = type(deepspeed.comm.comm.cdb), []
    original = backend.all_gather_into_tensor

    def noted(*args, **kwargs):
        calls.append("all-gather")
        return original(*args, **kwargs)

    backend.all_gather_into_tensor = noted
    return calls


if __name__ == "__main__":
    main(sys.argv[1:])
