"""ZeRO-3 supervised fine-tuning: `deepspeed … --module sft.train --config run.yaml [--section.key value]`."""

import dataclasses
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from data_prep.shards import Shards
from sft import batch, checkpoint, order, schedule
from sft.config import RunConfig
from sft.engine import (
    Numerics,
    build_engine,
    choose_numerics,
    data_parallel_size,
    dtype_table,
    start_distributed,
)
from sft.errors import UserError, run_rank
from sft.guard import SkipCounter
from sft.hf_folder import export_checkpoint, verify_export
from sft.inputs import RunInputs, batch_arithmetic, find_resume, identity, open_inputs, run_folder
from sft.isolation import prove_isolation
from sft.metrics import Recorder, flops_per_token, peak_flops
from sft.settings import load, to_yaml


def main(argv: Sequence[str]) -> None:
    """Train, or resume, the run that the options describe; at its end, export the model."""
    config = load(RunConfig, argv, prog="sft train")
    inputs = open_inputs(config, world_size=int(os.environ.get("WORLD_SIZE", "1")))
    out = run_folder(config)
    device = start_distributed()
    is_writer = dist.get_rank() == 0
    newest = agree(find_resume(config, inputs))
    finished = newest is not None and steps_of(newest) == inputs.total_steps
    if not finished:
        numerics = choose_numerics(config, device, inputs.model_config["model_type"])
        write_config(config, out)
        with Recorder(config, out, is_writer, inputs.total_steps) as recorder:
            train(config, inputs, numerics, out, recorder, newest)
    dist.destroy_process_group()  # what follows is rank 0's alone: nobody waits for it in a collective
    if is_writer:
        finish(config, inputs, out, already=finished)


def train(
    config: RunConfig, inputs: RunInputs, numerics: Numerics, out: Path, recorder: Recorder, newest: Path | None
) -> None:
    """From the base model, or the checkpoint `newest`, to the last checkpoint."""
    engine = build_engine(config, inputs.strategy, numerics)
    run = Run(config, inputs, numerics, engine, out, recorder, training_flops_per_token(engine, inputs))
    announce(run)
    recorder.say(prove_isolation(engine, inputs.model_config["vocab_size"], numerics.device))
    skips = SkipCounter()
    for step in range(start_from(run, newest), inputs.last_step):
        metrics = train_step(run, step)
        if metrics["label_tokens"]:
            skips.update(metrics["applied"], step + 1)
        done = step + 1
        saving = done == inputs.last_step or done % config.checkpoint.every == 0
        if inputs.heldout is not None and (saving or done % config.eval.every == 0):
            metrics["heldout_loss"] = heldout_loss(run, inputs.heldout)
            recorder.event("evaluate", done, heldout_loss=metrics["heldout_loss"])
        recorder.metrics(metrics)
        if saving:
            save(run, done, metrics.get("heldout_loss"))
    recorder.event("finish" if inputs.last_step == inputs.total_steps else "stop", inputs.last_step)


@dataclasses.dataclass(frozen=True)
class Run:
    """What every phase of a run needs; made once, never changed."""

    config: RunConfig
    inputs: RunInputs
    numerics: Numerics
    engine: Any
    out: Path
    recorder: Recorder
    flops_per_token: float
    """See sft.metrics.flops_per_token."""

    @property
    def checkpoints(self) -> Path:
        """Folder of this run's checkpoints."""
        return self.out / "checkpoints"


def train_step(run: Run, step: int) -> dict[str, Any]:
    """One optimizer step (0-based `step`): loss = sum of token losses / labels of the whole step, over all ranks.

    The denominator is read from the shards before the first backward. One host sync, at the end.
    """
    started = time.perf_counter()
    config, shards, engine = run.config, run.inputs.train, run.engine
    rows = order.step_rows(config.data.seed, step, len(shards), config.batch.rows_per_step)
    labels, tokens = batch.num_labels(shards, rows), batch.num_tokens(shards, rows)
    lr = schedule.lr_at(step + 1, run.inputs.total_steps, config.optim.lr, config.schedule)
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    if labels == 0:  # nothing to learn from: without this, decay and momentum would still move the weights
        run.recorder.event("skip", step + 1, reason="no labels in this step")
        return step_metrics(run, step, None, None, lr, tokens, labels, started, applied=False)
    scale = data_parallel_size(engine) / labels  # ZeRO averages over ranks; the sum is wanted
    loss_sum = torch.zeros((), dtype=torch.float32, device=run.numerics.device)
    engine.train()
    for part in order.cut(rows, dist.get_rank(), dist.get_world_size(), config.batch.micro_batch):
        loss, _ = engine(batch.from_shards(shards, part, run.numerics.device))
        loss_sum += loss.detach()
        engine.backward(loss * scale, scale_wrt_gas=False)
    engine.step()
    dist.all_reduce(loss_sum)
    applied = engine.was_step_applied()
    if not applied:
        run.recorder.event("skip", step + 1, reason="non-finite gradient", doc_ids=document_ids(run, rows))
    norm = float(engine.get_global_grad_norm())
    return step_metrics(run, step, loss_sum.item() / labels, norm, lr, tokens, labels, started, applied=applied)


def step_metrics(
    run: Run,
    step: int,
    loss: float | None,
    norm: float | None,
    lr: float,
    tokens: int,
    labels: int,
    started: float,
    *,
    applied: bool,
) -> dict[str, Any]:
    """The line of metrics.jsonl; what is logged is what was optimised, None where nothing was."""
    step_time_s = time.perf_counter() - started
    tokens_per_s = tokens / step_time_s
    peak = peak_flops(run.numerics.device)
    on_gpu = run.numerics.device.type == "cuda"
    return {
        "step": step + 1,
        "epoch": round((step + 1) / run.inputs.steps_per_epoch, 4),
        "loss": loss,
        "lr": lr,
        "grad_norm": norm,
        "tokens": tokens,
        "label_tokens": labels,
        "tokens_per_s": tokens_per_s,
        "mfu": tokens_per_s / run.inputs.world_size * run.flops_per_token / peak if peak else None,
        "step_time_s": step_time_s,
        "peak_mem_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
        "applied": applied,
    }


def heldout_loss(run: Run, shards: Shards) -> float:
    """Mean loss per label over the held-out packs; every rank runs the same number of forwards."""
    world_size, micro_batch = dist.get_world_size(), run.config.batch.micro_batch
    rows = order.pad(np.arange(len(shards)), world_size * micro_batch)
    total = torch.zeros((), dtype=torch.float64, device=run.numerics.device)
    run.engine.eval()
    with torch.no_grad():
        for part in order.cut(rows, dist.get_rank(), world_size, micro_batch):
            loss, _ = run.engine(batch.from_shards(shards, part, run.numerics.device))
            total += loss
    dist.all_reduce(total)
    return total.item() / batch.num_labels(shards, rows)


def agree(newest: Path | None) -> Path | None:
    """Rank 0's answer on every rank: on a network file system the others may see an older folder."""
    answer = [str(newest) if newest else None]
    dist.broadcast_object_list(answer)
    return Path(answer[0]) if answer[0] else None


def write_config(config: RunConfig, out: Path) -> None:
    """Save the resolved options, and see that every rank finds them: `out` must be one folder for all.

    Raises:
        UserError: this rank's host does not see rank 0's file.
    """
    if dist.get_rank() == 0:
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    dist.barrier()
    if not (out / "config.yaml").is_file():
        host = os.uname().nodename
        raise UserError(
            f"--out {out}: {host} does not see what rank 0 wrote there; choose a file system that all share"
        )


def start_from(run: Run, newest: Path | None) -> int:
    """Load the checkpoint to go on from, if there is one; returns the number of steps already taken."""
    for torn in [path for path in checkpoint.list_checkpoints(run.checkpoints) if not checkpoint.is_complete(path)]:
        run.recorder.say(f"not complete, left alone: {torn}")
    step = 0
    if newest is not None:
        step = steps_of(newest)
        checkpoint.load(run.engine, newest)
        run.recorder.say(f"resumed from {newest}")
    run.recorder.forget_after(step)
    facts = {"checkpoint": str(newest)} if newest else {"identity": identity(run.config, run.inputs)}
    run.recorder.event("resume" if newest else "start", step, world_size=run.inputs.world_size, **facts)
    return step


def steps_of(saved: Path) -> int:
    """Optimizer steps after which a checkpoint was written."""
    return int(checkpoint.read_meta(saved)["step"])


def save(run: Run, step: int, heldout: float | None) -> None:
    """Checkpoint, then delete what retention no longer wants: never before the new one is complete."""
    started = time.perf_counter()
    checkpoint.save(run.engine, run.checkpoints, step, identity(run.config, run.inputs), heldout)
    run.recorder.event("save", step, save_time_s=round(time.perf_counter() - started, 3))
    if dist.get_rank() == 0:
        retention = run.config.checkpoint
        for dropped in checkpoint.prune(run.checkpoints, retention.keep_last, retention.keep_best):
            run.recorder.event("delete", step, checkpoint=str(dropped))


def announce(run: Run) -> None:
    """Say what is about to happen: the batch arithmetic, and what is held in which precision."""
    numerics = run.numerics
    lines = batch_arithmetic(run.config, run.inputs)
    lines += [f"{what:<24} {dtype}" for what, dtype in dtype_table(run.engine).items()]
    kernels = "liger" if numerics.liger else "torch"
    lines += [f"device {numerics.device.type}, attention {numerics.attention}, kernels {kernels}"]
    for line in lines:
        run.recorder.say(line)


def finish(config: RunConfig, inputs: RunInputs, out: Path, *, already: bool) -> None:
    """Export a finished run, once, and say where it is."""
    if already:
        print(f"{out}: this run is finished ({inputs.total_steps} steps); nothing to train")
    elif inputs.last_step < inputs.total_steps:
        print(f"{out}: stopped after step {inputs.last_step} of {inputs.total_steps} as asked; run again to go on")
        return
    last = checkpoint.step_folder(out / "checkpoints", inputs.total_steps)
    export = out / "export"
    if export.exists():
        verify_export(last, export)
    else:
        export_checkpoint(last, Path(config.model.path), export)
    print(f"model: {export} (loaded back with transformers, every tensor equal to the checkpoint)")


def document_ids(run: Run, rows: order.Rows) -> list[int]:
    """Input rows of every document of a step: what to look at when its gradient is not finite."""
    return [int(doc) for row in rows if row != order.FILLER for doc in run.inputs.train.pack(int(row)).doc_ids]


def training_flops_per_token(engine: Any, inputs: RunInputs) -> float:
    """FLOPs of one token on this data: attention is charged for the real document lengths."""
    num_parameters = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())
    sample = np.concatenate([inputs.train.pack(i).seq_lens for i in range(min(len(inputs.train), 1000))]).astype(float)
    totals = inputs.train.manifest["totals"]
    attention_length = float((sample**2).sum() / sample.sum())
    return flops_per_token(inputs.model_config, num_parameters, attention_length, totals["labels"] / totals["tokens"])


if __name__ == "__main__":
    run_rank(main)
