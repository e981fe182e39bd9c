"""Started by test_export.py on real ranks: train two steps, save, and write the engine's own logits for comparison."""

import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from data_prep.shards import open_shards
from sft import batch
from sft.config import RunConfig
from sft.engine import choose_numerics, join
from sft.inputs import open_inputs
from sft.metrics import Recorder
from sft.order import step_rows
from sft.preemption import StopRequest
from sft.rendezvous import meet
from sft.settings import load
from sft.signals import Inbox
from sft.step import train_step
from sft.training import start_up, watch_over


def main(argv: list[str]) -> None:
    """Writes <out>/checkpoints/step-00000002 and <out>/engine.safetensors."""
    config = load(RunConfig, argv, prog="export_worker")
    inputs = open_inputs(config, world_size=2)
    meeting = meet(60.0)
    numerics = choose_numerics(config, join(meeting), {})
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    with Recorder(config, out, False, 2) as recorder:
        # not started: a rank that is lost here ends the test by its launcher
        watch = watch_over(meeting, config, out, recorder)
        run = start_up(config, inputs, numerics, out, recorder, watch, StopRequest(Inbox(), None))
        for step in range(2):
            train_step(run, step)
        run.saver.begin(2, None)
        run.saver.finish()
        run.saver.wait_for_deletions()
        run.stop.close()
    engine = run.engine
    shards = open_shards(config.data.train)
    rows = step_rows(0, 0, len(shards), 1)
    engine.eval()
    with torch.no_grad():
        hidden_TE = engine(batch.from_shards(shards, rows, numerics.device), ask="hidden")
    head = engine.module.hf.lm_head
    with deepspeed.zero.GatheredParameters([head.weight]):
        if dist.get_rank() == 0:
            ids = torch.from_numpy(shards.pack(int(rows[0])).input_ids.copy())
            lengths = torch.from_numpy(shards.pack(int(rows[0])).seq_lens.copy())
            logits_TV = (hidden_TE @ head.weight.T).contiguous()
            save_file({"logits_TV": logits_TV, "ids_T": ids, "seq_lens": lengths}, out / "engine.safetensors")
    dist.barrier()


if __name__ == "__main__":
    main(sys.argv[1:])
