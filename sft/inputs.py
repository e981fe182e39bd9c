"""What a run reads, opened and compared before any process group exists: mistakes show in seconds, once."""

import hashlib
import importlib.util
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.shards import Shards
from sft import lr_groups, sequence
from sft.checkpoint import check_identity, list_torn, newest_complete, read_meta
from sft.config import RunConfig, TrackSection, defaults
from sft.engine import read_strategy
from sft.errors import UserError
from sft.model import context_length, read_model_config
from sft.model_shards import open_model_shards
from sft.optim import check_optimizer
from sft.order import steps_per_epoch
from sft.probe_items import ProbeItems, open_probe
from sft.retention import bytes_per_parameter, check_disk, exported_bytes_per_parameter
from sft.sample_prompts import SamplePrompts, open_samples
from sft.tokenizer import Tokenizer, load_tokenizer
from sft.weight_files import num_parameters


@dataclass(frozen=True)
class RunInputs:
    """Everything that training reads, and the arithmetic that follows from it."""

    train: Shards
    heldout: Shards | None
    probe: ProbeItems | None
    samples: SamplePrompts | None
    tokenizer: Tokenizer
    strategy: dict[str, Any]
    """The DeepSpeed file."""
    model_config: dict[str, Any]
    """config.json of the base model."""
    world_size: int
    data_ranks: int
    """Ranks that take different packs: world_size / batch.sequence_parallel."""
    micro_batch: int
    """Packs of one forward; where the run file says auto: 1, until sft.auto_batch has found more."""
    accumulation: int
    """Forwards of one rank per optimizer step."""
    steps_per_epoch: int
    total_steps: int
    """Optimizer steps that the schedule spans."""
    last_step: int
    """The step after which the process ends: total_steps, or stop_after of a run in parts."""


def open_inputs(config: RunConfig, world_size: int) -> RunInputs:
    """Open and check everything that `config` names, for `world_size` ranks.

    Raises:
        UserError: something is missing, torn, of another tokenizer, too long, or does not divide.
    """
    data_ranks = sequence.data_ranks(world_size, config.batch.sequence_parallel)
    micro_batch = 1 if config.batch.micro_batch == "auto" else config.batch.micro_batch
    per_forward = data_ranks * micro_batch
    rows = config.batch.rows_per_step
    if rows % per_forward:
        shared = f" / {config.batch.sequence_parallel} per pack" if config.batch.sequence_parallel > 1 else ""
        raise UserError(
            f"batch.rows_per_step {rows} is no multiple of {world_size} ranks{shared} x micro_batch "
            f"{micro_batch} = {per_forward}; use {max(1, round(rows / per_forward)) * per_forward}"
        )
    _check_trackers(config.track)
    strategy = read_strategy(config.deepspeed)
    model_config = read_model_config(config.model.path)
    sequence.check_heads(config.batch.sequence_parallel, model_config)
    lr_groups.check_names(config.optim, config.model.path)
    check_optimizer(config.optim, strategy, num_parameters(Path(config.model.path)) // world_size)
    tokenizer = load_tokenizer(config.model.path)
    train = open_model_shards("data.train", config.data.train, tokenizer, model_config, config.model.path)
    heldout = None
    if config.data.heldout is not None:
        heldout = open_model_shards("data.heldout", config.data.heldout, tokenizer, model_config, config.model.path)
    epoch = steps_per_epoch(len(train), config.batch.rows_per_step)
    total = config.train.max_steps or config.train.epochs * epoch
    lr_groups.check_starts(config.optim, total)
    check_disk(
        Path(config.out),
        Path(config.model.path),
        config.checkpoint,
        total,
        heldout=heldout is not None,
        saved_itemsize=bytes_per_parameter(config.optim, config.train.ema_decay),
        exported_itemsize=exported_bytes_per_parameter(config.model.precision, config.train.ema_decay),
    )
    return RunInputs(
        train=train,
        heldout=heldout,
        probe=open_probe(config.eval.probe, tokenizer, context_length(model_config) or train.manifest["seq_len"]),
        samples=open_samples(config.eval.samples, tokenizer, train.manifest, context_length(model_config)),
        tokenizer=tokenizer,
        strategy=strategy,
        model_config=model_config,
        world_size=world_size,
        data_ranks=data_ranks,
        micro_batch=micro_batch,
        accumulation=rows // per_forward,
        steps_per_epoch=epoch,
        total_steps=total,
        last_step=min(total, config.train.stop_after or total),
    )


def identity(config: RunConfig, inputs: RunInputs) -> dict[str, Any]:
    """What makes a checkpoint this run's: a resume with any other value would not be the same run.

    Ranks, micro-batch, attention kernel, strategy and how often things happen are not in it: they may change.
    """
    model = json.dumps(inputs.model_config, sort_keys=True)
    template = inputs.train.manifest["template"]
    return {
        "data_key": inputs.train.manifest["content_key"],
        "tokenizer": inputs.tokenizer.digest,
        "stop_id": inputs.train.manifest["tokenizer"]["stop_id"],
        "chat_template": template if isinstance(template, str) else None,
        "model_config": hashlib.sha256(model.encode()).hexdigest(),
        "rows_per_step": config.batch.rows_per_step,
        "data_seed": config.data.seed,
        "total_steps": inputs.total_steps,
        **{f"optim.{key}": value for key, value in config.optim.model_dump(mode="json").items()},
        **{f"schedule.{key}": value for key, value in config.schedule.model_dump(mode="json").items()},
        "train.label_smoothing": config.train.label_smoothing,
        "train.neftune_alpha": config.train.neftune_alpha,
        "train.ema_decay": config.train.ema_decay,
        "model.attention_dropout": config.model.attention_dropout,
    }


def find_resume(config: RunConfig, inputs: RunInputs) -> Path | None:
    """The checkpoint that this command goes on from: the newest complete one, which must be this run's.

    Raises:
        UserError: it belongs to another run, or train.stop_after lies before it.
    """
    folder = Path(config.out) / "checkpoints"
    newest = newest_complete(folder)
    if newest is None:
        if torn := list_torn(folder):  # a folder gets its name when it is complete: these were
            raise UserError(
                f"checkpoint {torn[-1]}: is not complete, and no other is left; put an intact copy in its place, or, "
                "to begin anew, choose another --out"
            )
        return None
    meta = read_meta(newest)
    own = identity(config, inputs)
    check_identity(newest, {**meta, "identity": defaults(own) | meta["identity"]}, own)
    if meta["step"] > inputs.last_step:
        raise UserError(f"train.stop_after {inputs.last_step}: the run is at step {meta['step']} already ({newest})")
    return newest


def batch_arithmetic(config: RunConfig, inputs: RunInputs) -> list[str]:
    """The derived numbers, shown as the products that made them."""
    rows, micro = config.batch.rows_per_step, inputs.micro_batch
    packs = len(inputs.train)
    tokens, labels = (inputs.train.manifest["totals"][name] / packs for name in ("tokens", "labels"))
    ranks, accumulation = inputs.data_ranks, inputs.accumulation
    per_step = f"{rows * tokens:,.0f}, of which {rows * labels:,.0f} are labels"
    epoch, total = inputs.steps_per_epoch, inputs.total_steps
    share = config.batch.sequence_parallel
    groups = f"{ranks} groups of {share} ranks" if share > 1 else f"{ranks} ranks"
    return [
        f"rows per step   {groups} x {micro} micro-batch x {accumulation} accumulation = {rows}",
        f"tokens per step {rows} packs x {tokens:,.0f} = {per_step}",
        f"steps           {packs:,} packs / {rows} = {epoch:,} per epoch, {total:,} in all",
    ]


def _check_trackers(track: TrackSection) -> None:
    if track.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UserError(
            "track.tensorboard true: tensorboard is not installed; pip install tensorboard, or leave it out"
        )
    logged_in = "WANDB_API_KEY" in os.environ or Path("~/.netrc").expanduser().is_file()
    if track.wandb == "online" and not logged_in:
        raise UserError("track.wandb online: no WANDB_API_KEY in the environment and no ~/.netrc; use offline")
