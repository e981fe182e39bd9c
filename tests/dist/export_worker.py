"""Started by test_export.py on real ranks: train two steps, save, and write the engine's own logits for comparison."""

import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from data_prep.shards import open_shards
from sft import batch, checkpoint, train
from sft.config import RunConfig
from sft.engine import build_engine, choose_numerics, start_distributed
from sft.inputs import open_inputs
from sft.metrics import Recorder
from sft.order import step_rows
from sft.settings import load


def main(argv: list[str]) -> None:
    """Writes <out>/checkpoints/step-00000002 and <out>/engine.safetensors."""
    config = load(RunConfig, argv, prog="export_worker")
    inputs = open_inputs(config, world_size=2)
    numerics = choose_numerics(config, start_distributed(), "llama")
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    with Recorder(config, out, False, 2) as recorder:
        engine = build_engine(config, inputs.strategy, numerics)
        run = train.Run(config, inputs, numerics, engine, out, recorder, 0.0)
        for step in range(2):
            train.train_step(run, step)
    checkpoint.save(engine, out / "checkpoints", 2, {"stop_id": 2, "chat_template": None}, None)
    shards = open_shards(config.data.train)
    rows = step_rows(0, 0, len(shards), 1)
    engine.eval()
    with torch.no_grad():
        hidden_TE = engine(batch.from_shards(shards, rows, numerics.device), return_hidden=True)
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
