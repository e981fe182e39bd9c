"""One optimizer step, and the held-out loss: what every rank does together, with one host sync at the end."""

import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from sft import batch, order, schedule
from sft.config import RunConfig
from sft.engine import Numerics, data_parallel_size
from sft.inputs import RunInputs
from sft.metrics import Recorder, attention_length, flops_per_token, peak_flops
from sft.model import attention_dropout
from sft.optim import set_rates
from sft.preemption import StopRequest
from sft.saver import Saver
from sft.sequence import Shares, own_part
from sft.watchdog import Watchdog

SLOW_LIMIT_S = 3600.0
"""Longest that reading a model or a checkpoint, or writing one, may take without being taken for a hang."""

MEASURED = ("data_stall_s", "peak_mem_gib", "peak_host_mem_gib")
"""What each rank measures of itself; metrics.jsonl has the largest value of any."""


@dataclass(frozen=True)
class Run:
    """What every phase of a run needs; made once, never changed."""

    config: RunConfig
    inputs: RunInputs
    identity: dict[str, Any]
    """What a resume must agree with."""
    numerics: Numerics
    engine: Any
    out: Path
    recorder: Recorder
    watch: Watchdog
    stop: StopRequest
    saver: Saver
    shares: Shares
    flops_per_token: float
    """See sft.metrics.flops_per_token."""

    @property
    def checkpoints(self) -> Path:
        """Folder of this run's checkpoints."""
        return self.out / "checkpoints"


@dataclass(frozen=True)
class Totals:
    """Sums over all ranks."""

    loss: float
    loss_by_source: list[float]
    tokens_by_source: list[float]
    labels_by_source: list[float]
    measured: dict[str, float | None]
    """Of each of MEASURED, the largest value of any rank."""
    saved: bool
    """Every rank has written its part of the checkpoint that is under way."""


def train_step(run: Run, step: int, pass_over: str | None = None, lr: float | None = None) -> dict[str, Any] | None:
    """One optimizer step (0-based `step`): loss = sum of token losses / labels of the whole step, over all ranks.

    The denominator is read from the shards before the first backward. With `pass_over`, a reason, nothing is updated.
    `lr` takes the schedule's place.

    Returns:
        The line of metrics.jsonl; None where the run was asked to stop: nothing was updated then.
    """
    started_s = time.perf_counter()
    config, shards, engine = run.config, run.inputs.train, run.engine
    rows = order.step_rows(config.data.seed, step, len(shards), config.batch.rows_per_step)
    labels = batch.num_labels(shards, rows)
    if lr is None:
        lr = schedule.lr_at(step + 1, run.inputs.total_steps, config.optim.lr, config.schedule)
    set_rates(engine.optimizer.param_groups, step + 1, run.inputs.total_steps, lr, config.train.ema_decay)
    if pass_over is None and labels == 0:  # decay and momentum would still move the weights
        pass_over = "no labels in this step"
    if pass_over is not None:
        return None if run.stop.agreed() else step_passed_over(run, step, rows, lr, pass_over)
    scale = data_parallel_size(engine) / labels  # ZeRO averages over ranks; the sum is wanted
    parts = order.cut(rows, run.shares.data_rank, run.shares.data_ranks, run.inputs.micro_batch)
    losses, by_source = [], torch.zeros(len(shards.manifest["sources"]), device=run.numerics.device)
    data_stall_s = 0.0
    engine.train()
    for part, seeds in zip(parts, noise_seeds(run, step), strict=True):
        if run.stop.agreed():
            return None
        run.watch.mark("forward and backward", step + 1)
        seed_dropout(seeds, run.shares)
        waits_since_s = time.perf_counter()
        micro_batch = own_part(batch.from_shards(shards, part, run.numerics.device, seeds), run.shares)
        data_stall_s += time.perf_counter() - waits_since_s
        loss, part_by_source = engine(micro_batch)
        engine.backward(loss * scale, scale_wrt_gas=False)
        losses.append(loss.detach())
        by_source += part_by_source
    run.watch.mark("waiting for a checkpoint", step + 1, SLOW_LIMIT_S)
    run.saver.before_update()
    run.watch.mark("update", step + 1)
    engine.step()
    totals = reduce_step(run, parts, torch.stack(losses), by_source, data_stall_s)
    applied = engine.was_step_applied()
    if not applied:
        record_not_finite(run, step, parts, losses)
    if totals.saved:
        run.saver.publish()
    norm = float(engine.get_global_grad_norm())
    facts = {"loss": totals.loss / labels, "lr": lr, "grad_norm": norm, "applied": applied}
    return step_metrics(run, step, rows, started_s, facts) | totals.measured | source_metrics(run, totals)


def noise_seeds(run: Run, step: int) -> list[list[int]]:
    """For each of this rank's forwards of a step: seeds of its packs; none where nothing is random.

    They follow from the step and the place in it alone: nothing to restore, and no trace of ranks or accumulation.
    """
    rows_per_step, shares = run.config.batch.rows_per_step, run.shares
    places = order.cut(np.arange(rows_per_step), shares.data_rank, shares.data_ranks, run.inputs.micro_batch)
    if not run.config.train.neftune_alpha and not attention_dropout(run.config.model, run.inputs.model_config):
        return [[] for _ in places]
    return [[order.seed_at(run.config.data.seed, step, int(place)) for place in part] for part in places]


def seed_dropout(seeds: Sequence[int], shares: Shares) -> None:
    """Seed torch's own generators, from which attention kernels draw what they drop, for one forward and its backward.

    With the first pack's seed: with dropout, unlike anything else, the update depends on the micro-batch.
    """
    if seeds:
        torch.manual_seed((seeds[0] + shares.rank) % 2**63)


def step_passed_over(run: Run, step: int, rows: order.Rows, lr: float, reason: str) -> dict[str, Any]:
    """Pass over the packs of a step without an update; its number, learning rate and packs are used up."""
    run.recorder.event("skip", step + 1, reason=reason)
    facts = {"loss": None, "lr": lr, "grad_norm": None, "applied": False}
    return step_metrics(run, step, rows, None, facts)


def reduce_step(
    run: Run, parts: list[order.Rows], losses: torch.Tensor, by_source_S: torch.Tensor, data_stall_s: float
) -> Totals:
    """Everything that the ranks must agree on after a step: one all-reduce, one host sync.

    What each rank has measured has a place of its own in the sum, so that the largest can be told.
    """
    own = np.concatenate(parts) if run.shares.rank == 0 else np.zeros(0, np.int64)  # packs that are shared count once
    counts_2S = batch.source_counts(run.inputs.train, own)
    measured_RM = np.zeros((dist.get_world_size(), len(MEASURED)))
    measured_RM[dist.get_rank()] = measure_rank(run.numerics.device, data_stall_s)
    flags = [run.saver.is_written(), *run.stop.own_request()]
    on_host = np.array([*counts_2S.flatten(), *measured_RM.flatten(), *flags], dtype=np.float64)
    vector = torch.cat(
        [losses.sum(dtype=torch.float64)[None], by_source_S.double(), batch.to_device(on_host, losses.device)]
    )
    dist.all_reduce(vector)
    loss, *rest, written, asked, code = vector.tolist()
    run.stop.learn(asked, code)
    count = len(by_source_S)
    saved = written == dist.get_world_size()
    sources, largest = rest[: 3 * count], np.reshape(rest[3 * count :], measured_RM.shape).max(axis=0)
    measured: dict[str, float | None] = dict(zip(MEASURED, largest.tolist(), strict=True))
    if losses.device.type != "cuda":
        measured["peak_mem_gib"] = None
    return Totals(loss, sources[:count], sources[count : 2 * count], sources[2 * count :], measured, saved)


def measure_rank(device: torch.device, data_stall_s: float) -> tuple[float, ...]:
    """Of this rank, in the order of MEASURED: the peaks since its process began, 0 GiB of a GPU where it has none."""
    on_gpu = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10  # Linux counts in KiB
    return data_stall_s, on_gpu / 2**30, resident / 2**30


def record_not_finite(run: Run, step: int, parts: list[order.Rows], losses: list[torch.Tensor]) -> None:
    """Name the documents whose loss was not finite; all of the step's where only the gradient was not. Collective."""
    own = [int(row) for part, loss in zip(parts, losses, strict=True) if not torch.isfinite(loss) for row in part]
    found: list[list[int]] = [[]] * dist.get_world_size()
    dist.all_gather_object(found, own)
    rows = sorted({row for rank_rows in found for row in rank_rows} - {order.FILLER})
    reason = "loss is not finite"
    if not rows:
        config = run.config
        reason = "gradient is not finite, though every loss is"
        rows = list(order.step_rows(config.data.seed, step, len(run.inputs.train), config.batch.rows_per_step))
    run.recorder.event("skip", step + 1, reason=reason, doc_ids=document_ids(run, np.array(rows)))


def step_metrics(
    run: Run, step: int, rows: order.Rows, started_s: float | None, facts: dict[str, Any]
) -> dict[str, Any]:
    """The line of metrics.jsonl; what is logged is what was optimised, None where nothing was."""
    tokens, labels = batch.num_tokens(run.inputs.train, rows), batch.num_labels(run.inputs.train, rows)
    step_time_s = None if started_s is None else time.perf_counter() - started_s
    tokens_per_s = tokens / step_time_s if step_time_s else None
    peak = peak_flops(run.numerics.device)
    return {
        "step": step + 1,
        "epoch": round((step + 1) / run.inputs.steps_per_epoch, 4),
        **facts,
        "tokens": tokens,
        "label_tokens": labels,
        "tokens_per_s": tokens_per_s,
        "tokens_per_s_per_gpu": tokens_per_s / run.inputs.world_size if tokens_per_s else None,
        "mfu": tokens_per_s / run.inputs.world_size * run.flops_per_token / peak if peak and tokens_per_s else None,
        "step_time_s": step_time_s,
        "save_stall_s": run.saver.take_stall_s(),
        **dict.fromkeys(MEASURED),
    }


def source_metrics(run: Run, totals: Totals) -> dict[str, Any]:
    """Of each data source that had a part in the step: mean loss per label, and its share of the step's tokens."""
    names = [source["name"] for source in run.inputs.train.manifest["sources"]]
    all_tokens = sum(totals.tokens_by_source)
    sums = zip(names, totals.loss_by_source, totals.tokens_by_source, totals.labels_by_source, strict=True)
    present = [(name, loss, tokens, labels) for name, loss, tokens, labels in sums if tokens]
    return {
        "loss_by_source": {name: loss / labels if labels else None for name, loss, _, labels in present},
        "token_share_by_source": {name: tokens / all_tokens for name, _, tokens, _ in present},
    }


def heldout_loss(run: Run, step: int) -> float | None:
    """Mean loss per label over the held-out packs; every rank runs the same number of forwards.

    Returns:
        None where the run was asked to stop meanwhile.
    """
    shards = run.inputs.heldout
    assert shards is not None
    data_ranks, micro_batch = run.shares.data_ranks, run.inputs.micro_batch
    rows = order.pad(np.arange(len(shards)), data_ranks * micro_batch)
    total = torch.zeros((), dtype=torch.float64, device=run.numerics.device)
    run.engine.eval()
    with torch.no_grad():
        for part in order.cut(rows, run.shares.data_rank, data_ranks, micro_batch):
            if run.stop.agreed():
                return None
            run.watch.mark("held-out loss", step)
            total += run.engine(own_part(batch.from_shards(shards, part, run.numerics.device), run.shares))[0]
    dist.all_reduce(total)
    loss = total.item() / batch.num_labels(shards, rows)
    run.recorder.event("evaluate", step, heldout_loss=loss)
    return loss


def document_ids(run: Run, rows: order.Rows) -> list[int]:
    """Input rows of every document in these packs: what to look at when their loss is not finite."""
    return [int(doc) for row in rows if row != order.FILLER for doc in run.inputs.train.pack(int(row)).doc_ids]


def training_flops_per_token(engine: Any, inputs: RunInputs) -> float:
    """FLOPs of one token on this data: attention is charged for the real document lengths."""
    num_parameters = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())
    sample = np.concatenate([inputs.train.pack(i).seq_lens for i in range(min(len(inputs.train), 1000))])
    totals = inputs.train.manifest["totals"]
    supervised = totals["labels"] / totals["tokens"]
    return flops_per_token(inputs.model_config, num_parameters, attention_length(sample), supervised)
