"""The list of options is frozen: adding, renaming or dropping one is a decision that shows in review."""

import ast
import inspect
from collections.abc import Iterator
from typing import get_args

import pytest
from pydantic import BaseModel

from sft import config, prep_options
from sft.augment_options import AugmentConfig
from sft.doctor.options import DoctorConfig
from sft.eval.options import DriftConfig, EvalConfig
from sft.merge import MergeConfig
from sft.plan import PlanConfig
from sft.report.run import ReportConfig
from sft.settings import walk_options
from sft.stage import StageConfig

COMMANDS = {
    "sft prep": prep_options.PrepConfig,
    "sft augment": AugmentConfig,
    "sft prep verify": prep_options.VerifyConfig,
    "sft train": config.RunConfig,
    "sft stage": StageConfig,
    "sft plan": PlanConfig,
    "sft report": ReportConfig,
    "sft merge": MergeConfig,
    "sft doctor": DoctorConfig,
    "sft blame": config.BlameConfig,
    "sft export": config.ExportConfig,
    "sft eval": EvalConfig,
    "sft drift": DriftConfig,
    "sft show": prep_options.ShowConfig,
    "sft demo": config.DemoConfig,
}
OPTIONS = {
    "sft prep": [
        "sources*",
        "tokenizer*",
        "template",
        "seq_len",
        "overlong",
        "on_error",
        "filters.garbled",
        "filters.refusals",
        "filters.max_repetition",
        "filters.min_response_tokens",
        "filters.max_response_tokens",
        "heldout",
        "dedup",
        "near.threshold",
        "near.ngram",
        "near.seed",
        "decontaminate",
        "decontaminate_ngram",
        "seed",
        "workers",
        "engine",
        "dry_run",
        "out*",
    ],
    "sft augment": [
        "input*",
        "method",
        "models",
        "hook",
        "fields",
        "prefix",
        "variants",
        "temperature",
        "top_p",
        "beams",
        "max_new_tokens",
        "batch_size",
        "seed",
        "out*",
    ],
    "sft train": [
        "model.path*",
        "model.attention",
        "model.activation_checkpointing",
        "model.precision",
        "model.kernels",
        "model.attention_dropout",
        "model.mlp_tiles",
        "data.train*",
        "data.heldout",
        "data.seed",
        "batch.rows_per_step",
        "batch.micro_batch",
        "batch.sequence_parallel",
        "train.epochs",
        "train.max_steps",
        "train.stop_after",
        "train.early_stop.patience",
        "train.early_stop.min_delta",
        "train.label_smoothing",
        "train.neftune_alpha",
        "train.ema_decay",
        "optim.name",
        "optim.states",
        "optim.lr",
        "optim.betas",
        "optim.eps",
        "optim.weight_decay",
        "optim.no_decay",
        "optim.layer_decay",
        "optim.multipliers",
        "optim.l2_sp",
        "optim.grad_clip",
        "schedule.name",
        "schedule.warmup",
        "schedule.min_lr_ratio",
        "schedule.cycles",
        "deepspeed",
        "checkpoint.every",
        "checkpoint.keep_last",
        "checkpoint.keep_best",
        "checkpoint.keep_every",
        "guard.max_skipped",
        "guard.on_spike",
        "guard.spike_window",
        "guard.spike_deviations",
        "guard.max_rollbacks",
        "guard.arrive_after_s",
        "guard.lost_after_s",
        "guard.hang_after_s",
        "eval.every",
        "eval.probe.data",
        "eval.probe.tasks",
        "eval.probe.shots.mmlu",
        "eval.probe.shots.hellaswag",
        "eval.probe.items",
        "eval.probe.every",
        "eval.probe.max_drop",
        "eval.samples.prompts",
        "eval.samples.every",
        "eval.samples.max_new_tokens",
        "track.wandb",
        "track.project",
        "track.tensorboard",
        "max_hours",
        "lr_finder",
        "out*",
    ],
    "sft blame": ["run*", "step*"],
    "sft export": [
        "run*",
        "ema",
        "average",
        "out",
        "dtype",
        "max_shard_gb",
    ],
    "sft report": ["run*", "out"],
    "sft merge": ["base*", "tuned*", "alpha*", "out*", "dtype", "max_shard_gb"],
    "sft eval": [
        "tasks",
        "data*",
        "shots.mmlu",
        "shots.hellaswag",
        "shots.hellaswag_draw",
        "shots.hellaswag_world",
        "limit",
        "chat",
        "system_instruction",
        "compat",
        "engine",
        "dtype",
        "score_dtype",
        "tokens_per_batch",
        "batch_size",
        "placement",
        "out*",
        "model*",
    ],
    "sft drift": [
        "tasks",
        "data",
        "shots.mmlu",
        "shots.hellaswag",
        "shots.hellaswag_draw",
        "shots.hellaswag_world",
        "limit",
        "chat",
        "system_instruction",
        "compat",
        "engine",
        "dtype",
        "score_dtype",
        "tokens_per_batch",
        "batch_size",
        "placement",
        "out*",
        "base*",
        "tuned*",
        "heldout",
        "gate.max_drop",
        "gate.confidence",
        "gate.rule",
        "answers.prompts",
        "answers.template",
        "answers.max_new_tokens",
        "noise_items",
    ],
    "sft prep verify": [
        "shards*",
        "tokenizer",
    ],
    "sft show": [
        "shards*",
        "rows",
        "start",
        "doc",
        "html",
        "tokenizer",
    ],
    "sft demo": [
        "out",
        "ranks",
    ],
}
OPTIONS["sft plan"] = [*OPTIONS["sft train"], "ranks"]
OPTIONS["sft stage"] = [*OPTIONS["sft train"], "to*"]
OPTIONS["sft doctor"] = [
    *OPTIONS["sft train"],
    "doctor.digests",
    "doctor.network_mib",
    "doctor.overlap",
    "doctor.limit_s",
]
"""A trailing * marks an option that has no default. Change this list on purpose only, with a line in the CHANGELOG."""


def options_of(model: type[BaseModel]) -> list[str]:
    return [name + "*" * field.is_required() for name, field in walk_options(model)]


def nested_models(annotation: object) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from nested_models(part)


def every_model() -> set[type[BaseModel]]:
    found: set[type[BaseModel]] = set()
    waiting: list[type[BaseModel]] = list(COMMANDS.values())
    while waiting:
        model = waiting.pop()
        if model not in found:
            found.add(model)
            waiting += [inner for field in model.model_fields.values() for inner in nested_models(field.annotation)]
    return found


@pytest.mark.parametrize("command", COMMANDS)
def test_options_are_frozen(command):
    assert options_of(COMMANDS[command]) == OPTIONS[command]


def test_source_keys_are_frozen():
    assert options_of(prep_options.Source) == [
        "path*",
        "name",
        "format",
        "columns",
        "train_on",
        "weight",
        "role",
        "ratio",
        "balance_by",
    ]


def test_keys_of_a_multiplier_are_frozen():
    assert options_of(config.LrMultiplier) == ["match*", "factor", "start"]


def test_every_command_has_a_list():
    """A config class that is added to sft.config without being frozen here would slip through the test above."""
    defined = {
        item
        for _, item in inspect.getmembers(config, inspect.isclass)
        if issubclass(item, config.Section) and item.__module__ == config.__name__
    }
    bases = {base for model in every_model() for base in model.__mro__}
    assert defined - bases == set()


def test_every_option_is_documented_once():
    """The docstring under a field is its only description: it becomes --help and the JSON schema."""
    silent = [
        f"{model.__name__}.{name}"
        for model in every_model()
        for name, field in model.model_fields.items()
        if not list(nested_models(field.annotation)) and not field.description
    ]
    assert silent == []
    assert "description=" not in inspect.getsource(config)


def test_every_config_is_frozen_and_refuses_unknown_keys():
    for model in every_model():
        assert model.model_config["frozen"], model
        assert model.model_config["extra"] == "forbid", model


def test_config_imports_nothing_heavy():
    tree = ast.parse(inspect.getsource(config))
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    modules |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert modules <= {"re", "typing", "pydantic"}
