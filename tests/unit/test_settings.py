"""YAML and flags become one config; a mistake is named with the place, the value and the remedy."""

import json
from typing import Any

import jsonschema
import pytest
import yaml

from sft.config import ExportConfig, RunConfig
from sft.errors import UserError
from sft.eval.options import DriftConfig, EvalConfig
from sft.prep_options import PrepConfig, ShowConfig
from sft.settings import load, redact, to_yaml

REQUIRED = ["--model.path", "base", "--data.train", "shards", "--out", "run"]
SAMPLE = {
    "model": {"path": "base"},
    "data": {"train": "shards"},
    "batch": {"rows_per_step": 8, "micro_batch": 2},
    "out": "run",
}


@pytest.fixture
def write_yaml(tmp_path):
    def write(content: str | dict[str, Any]) -> str:
        path = tmp_path / "run.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return str(path)

    return write


def run(*argv: str) -> RunConfig:
    return load(RunConfig, argv, prog="sft train")


def message(*argv: str, model: Any = RunConfig, positional: str | None = None) -> str:
    with pytest.raises(UserError) as error:
        load(model, argv, prog="sft", positional=positional)
    return str(error.value)


# Where values come from


def test_flags_win_over_yaml_and_yaml_over_defaults(write_yaml):
    config = run("--config", write_yaml(SAMPLE), "--batch.rows_per_step", "64", "--model.path=other")
    assert config.batch.rows_per_step == 64
    assert config.model.path == "other"
    assert config.batch.micro_batch == 2
    assert config.optim.lr == 2e-5


def test_flags_alone_are_enough():
    config = run(*REQUIRED)
    assert (config.model.path, config.data.train, config.out) == ("base", "shards", "run")


def test_launcher_rank_flag_is_accepted():
    assert run(*REQUIRED, "--local_rank=1") == run(*REQUIRED)


def test_null_means_unset(write_yaml):
    path = write_yaml({**SAMPLE, "data": {"train": "shards", "heldout": "some"}, "train": {"max_steps": 7}})
    assert run("--config", path).data.heldout == "some"
    cleared = run("--config", path, "--data.heldout", "null", "--train.max_steps", "null")
    assert cleared.data.heldout is None
    assert cleared.train.max_steps is None


def test_null_is_no_text_for_a_required_option():
    assert run(*REQUIRED[:-1], "null").out == "null"


def test_numbers_without_a_point_are_numbers(write_yaml):
    """YAML 1.1 reads 1e-5 as text."""
    assert run(*REQUIRED, "--optim.lr", "1e-5").optim.lr == 1e-5
    assert run("--config", write_yaml("model: {path: m}\ndata: {train: d}\nout: o\noptim: {lr: 1e-5}")).optim.lr == 1e-5


def test_text_that_looks_like_a_number_stays_text():
    assert run(*REQUIRED[:-1], "2024").out == "2024"


@pytest.mark.parametrize("word", ["off", "offline"])
def test_off_is_a_word_not_a_boolean(write_yaml, word):
    """YAML 1.1 reads a bare `off` as false."""
    assert run(*REQUIRED, "--track.wandb", word).track.wandb == word
    path = write_yaml(f"model: {{path: m}}\ndata: {{train: d}}\nout: o\ntrack: {{wandb: {word}}}")
    assert run("--config", path).track.wandb == word


def test_booleans(write_yaml):
    assert run(*REQUIRED, "--track.tensorboard", "true").track.tensorboard is True
    assert run("--config", write_yaml({**SAMPLE, "track": {"tensorboard": True}})).track.tensorboard is True


def test_lists_by_comma_and_by_yaml():
    expected = ["a", "b"]
    assert run(*REQUIRED, "--optim.no_decay", "a,b").optim.no_decay == expected
    assert run(*REQUIRED, "--optim.no_decay", "[a, b]").optim.no_decay == expected
    assert run(*REQUIRED, "--optim.betas", "[0.8, 0.9]").optim.betas == (0.8, 0.9)


def test_sources_by_comma_and_in_full():
    argv = ["--tokenizer", "t", "--out", "o", "--sources"]
    short = load(PrepConfig, [*argv, "a.json, b.jsonl"], prog="sft prep")
    assert [source.path for source in short.sources] == ["a.json", "b.jsonl"]
    full = load(PrepConfig, [*argv, "[{path: a.json, weight: 2}]"], prog="sft prep")
    assert full.sources[0].weight == 2.0


def test_positional_argument():
    def show(*argv: str) -> ShowConfig:
        return load(ShowConfig, argv, prog="sft show", positional="shards")

    assert show("folder").shards == show("--shards", "folder").shards == "folder"
    assert show("folder", "--rows", "5").rows == 5
    assert "--shards is missing" in message(model=ShowConfig, positional="shards")
    assert message("a", "b", model=ShowConfig, positional="shards") == "unexpected argument 'b'"


def test_a_yes_or_no_flag_does_not_swallow_the_positional_argument():
    def export(*argv: str) -> tuple[str, bool]:
        config = load(ExportConfig, argv, prog="sft export", positional="run")
        return config.run, config.ema

    assert (
        export("--ema", "runs/a") == export("runs/a", "--ema") == export("--ema", "true", "runs/a") == ("runs/a", True)
    )
    assert export("--ema", "--run", "runs/a") == export("--ema", "yes", "--run", "runs/a") == ("runs/a", True)
    assert export("--ema", "false", "runs/a") == export("--ema=false", "runs/a") == ("runs/a", False)


# Mistakes


def test_typo_in_a_flag_names_the_nearest():
    assert message(*REQUIRED, "--optim.lrr", "1e-5") == "unknown flag --optim.lrr; did you mean --optim.lr?"
    assert message(*REQUIRED, "--optim.lrr=1e-5") == "unknown flag --optim.lrr; did you mean --optim.lr?"


def test_flags_are_not_abbreviated():
    """`--optim.weight` must not silently become --optim.weight_decay."""
    assert "did you mean --optim.weight_decay?" in message(*REQUIRED, "--optim.weight", "0.1")


@pytest.mark.parametrize(
    ("change", "wrong", "near"),
    [
        ({"optim": {"learning_rate": 1}}, "optim.learning_rate", "lr"),
        ({"shedule": {"name": "cosine"}}, "shedule", "schedule"),
        ({"batch": {"rows_per_stp": 8}}, "batch.rows_per_stp", "rows_per_step"),
    ],
)
def test_typo_in_yaml_names_the_file_and_a_key_of_that_section(write_yaml, change, wrong, near):
    path = write_yaml({**SAMPLE, **change})
    text = message("--config", path)
    assert text.startswith(f"unknown key '{wrong}' in {path}; did you mean '")
    suggestion = text.split("'")[-2]
    assert suggestion == near or wrong == "optim.learning_rate"
    section = wrong.split(".")[0] if "." in wrong else None
    fields = RunConfig.model_fields[section].annotation.model_fields if section else RunConfig.model_fields
    assert suggestion in fields


def test_typo_inside_a_list_of_sources():
    text = message("--tokenizer", "t", "--out", "o", "--sources", "[{path: a, wieght: 2}]", model=PrepConfig)
    assert text == "unknown key --sources.0.wieght; did you mean 'weight'?"


def test_a_pull_that_would_overshoot_is_refused():
    assert load(RunConfig, [*REQUIRED, "--optim.lr", "2e-5", "--optim.l2_sp", "100"], prog="sft").optim.l2_sp == 100
    refused = message(*REQUIRED, "--optim.lr", "2e-5", "--optim.l2_sp", "50000")
    assert refused.startswith("optim.l2_sp 50000 x optim.lr 2e-05 is 1 or more"), refused


def test_every_problem_in_one_message(write_yaml):
    path = write_yaml({"model": {"path": "m"}, "optim": {"lr": -1, "betas": [0.9, 2]}, "schedul": {}})
    text = message("--config", path, "--batch.micro_batch", "two", "--foo", "1")
    first, *rest = text.split("\n")
    assert first == f"{len(rest)} problems"
    for part in (
        "unknown flag --foo",
        f"'optim.lr' in {path}: got -1, must be greater than 0",
        f"'optim.betas.1' in {path}: got 2, must be less than 1",
        f"unknown key 'schedul' in {path}; did you mean 'schedule'?",
        "--batch.micro_batch: got 'two', must be a valid integer",
        "--data.train is missing",
        "--out is missing",
    ):
        assert sum(part in line for line in rest) == 1, part
    assert len(rest) == 7


def test_wrong_value_names_place_value_and_choices(write_yaml):
    path = write_yaml({**SAMPLE, "schedule": {"name": "cosin"}})
    expected = "got 'cosin', must be 'cosine', 'linear', 'constant' or 'cosine_restarts'"
    assert message("--config", path) == f"'schedule.name' in {path}: {expected}"
    assert message(*REQUIRED, "--schedule.name", "cosin") == f"--schedule.name: {expected}"


def test_element_of_a_flag_is_not_blamed_on_the_file(write_yaml):
    path = write_yaml({"model": "m", "data": "d", "out": "o"})
    assert message("--config", path, "--tasks", "mmlu,arc", model=EvalConfig).startswith("--tasks.1: got 'arc'")


def test_rules_across_fields():
    assert message(*REQUIRED, "--batch.rows_per_step", "7", "--batch.micro_batch", "2") == (
        "batch.rows_per_step 7 must be a multiple of batch.micro_batch 2"
    )
    assert "needs train.early_stop.patience" in message(*REQUIRED, "--train.early_stop.min_delta", "0.1")
    assert "needs schedule.name cosine_restarts" in message(*REQUIRED, "--schedule.cycles", "2")
    restarts = run(*REQUIRED, "--schedule.cycles", "2", "--schedule.name", "cosine_restarts")
    assert restarts.schedule.cycles == 2


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("a: [1\n", "not valid YAML"),
        ("- 1\n", "must hold `key: value` lines, got a list"),
        ("out: a\nout: b\n", "key 'out' is given twice"),
        ("optim: {lr: 1.0e-5, lr: 2.0e-5}\n", "key 'lr' is given twice"),
    ],
)
def test_file_that_is_no_config(write_yaml, content, expected):
    path = write_yaml(content)
    text = message("--config", path)
    assert text.startswith(f"--config {path}: ")
    assert expected in text
    assert "\n" not in text


def test_file_that_cannot_be_read(tmp_path):
    assert message("--config", str(tmp_path / "none.yaml")) == f"--config {tmp_path / 'none.yaml'}: no such file"
    assert "cannot be read" in message("--config", str(tmp_path))


def test_section_that_is_no_section(write_yaml):
    path = write_yaml({**SAMPLE, "optim": 3})
    assert message("--config", path) == (
        f"'optim' in {path}: got 3, must be a section of `key: value` lines, or be left out"
    )
    assert "--optim.lr: the file sets 'optim' to 3, which is no section" in message(
        "--config", path, "--optim.lr", "1e-5"
    )


def test_flag_without_value():
    assert "argument --optim.lr: expected one argument" in message(*REQUIRED, "--optim.lr")


def test_missing_section_names_its_required_options():
    lines = message("--out", "o").split("\n  ")
    assert lines[1:] == [
        f"--{name} is missing: give the flag, or the key in --config FILE.yaml" for name in ("model.path", "data.train")
    ]


# What is printed


def test_print_config_reads_back_to_the_same_config(write_yaml, capsys):
    argv = [*REQUIRED, "--optim.betas", "[0.8, 0.9]", "--track.wandb", "off", "--train.max_steps", "5"]
    with pytest.raises(SystemExit) as end:
        run(*argv, "--print-config")
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert run("--config", write_yaml(printed)) == run(*argv)


def test_print_config_of_a_wrong_config_is_an_error(capsys):
    assert "did you mean" in message(*REQUIRED, "--optim.lrr", "1", "--print-config")
    assert capsys.readouterr().out == ""


def schema_of(model: type, capsys) -> dict[str, Any]:
    with pytest.raises(SystemExit) as end:
        load(model, ["--print-schema"], prog="sft")
    assert end.value.code == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("model", [RunConfig, PrepConfig, EvalConfig, DriftConfig])
def test_print_schema_is_a_valid_json_schema(model, capsys):
    jsonschema.Draft202012Validator.check_schema(schema_of(model, capsys))


def test_schema_accepts_a_sample_and_refuses_a_typo(capsys):
    validator = jsonschema.Draft202012Validator(schema_of(RunConfig, capsys))
    assert list(validator.iter_errors(SAMPLE)) == []
    assert list(validator.iter_errors(run(*REQUIRED).model_dump(mode="json"))) == []
    for wrong in ({"optim": {"lrr": 1}}, {"optim": {"lr": -1}}, {"schedule": {"name": "cosin"}}, {"shedule": {}}):
        assert list(validator.iter_errors({**SAMPLE, **wrong})), wrong


def test_schema_describes_every_option(capsys):
    schema = schema_of(RunConfig, capsys)
    assert set(schema["properties"]) == set(RunConfig.model_fields)
    assert schema["additionalProperties"] is False
    optim = schema["$defs"]["OptimSection"]
    assert optim["additionalProperties"] is False
    assert "Peak learning rate" in optim["properties"]["lr"]["description"]
    assert schema["$defs"]["ScheduleSection"]["properties"]["name"]["enum"][0] == "cosine"
    assert sorted(schema["required"]) == ["data", "model", "out"]


def test_help_shows_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit) as end:
        run("--help")
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--optim.weight_decay FLOAT Decoupled decay" in text
    assert "[default: 0.01]" in text
    assert "--model.path STR Folder of the base model" in text
    assert "[required]" in text
    assert "local_rank" not in text


# Secrets


def test_secrets_do_not_reach_the_printed_config(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    config = run(*REQUIRED[:-1], "s3://user:password@bucket/0123456789abcdef/run")
    text = to_yaml(config)
    assert "password" not in text
    assert "0123456789abcdef" not in text
    assert yaml.safe_load(text)["out"] == "s3://***@bucket/***/run"


def test_redaction_leaves_the_rest_alone(monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HF_TOKEN", "")
    value = {"a": ["mail@example.org", 3, None], "b": "https://host/path@1"}
    assert redact(value) == value


@pytest.mark.parametrize("text", ["2024-13-45", "{" * 2000])
def test_text_that_yaml_cannot_convert_is_a_bad_value_and_no_crash(text):
    with pytest.raises(UserError, match="data.seed"):
        load(RunConfig, ["--model.path", "m", "--data.train", "d", "--out", "o", "--data.seed", text], prog="sft train")


def test_a_nul_character_is_refused(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text('model: {path: "a\\0b"}\ndata: {train: d}\nout: o\n')
    with pytest.raises(UserError, match="NUL"):
        load(RunConfig, ["--config", str(file)], prog="sft train")


def test_a_file_that_refers_to_itself_is_refused(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("out: o\ndata: &a {train: *a}\n")
    with pytest.raises(UserError, match="refers to itself"):
        load(RunConfig, ["--config", str(file)], prog="sft train")


def test_flags_take_hyphens_and_yes_or_no_flags_no_value(tmp_path):
    argv = ["--sources", "a.json", "--tokenizer", "t", "--out", "o", "--seq-len", "512", "--dry-run"]
    config = load(PrepConfig, argv, prog="sft prep")
    assert (config.seq_len, config.dry_run) == (512, True)
    assert load(PrepConfig, [*argv, "--filters.garbled=false"], prog="sft prep").filters.garbled is False
    with pytest.raises(UserError, match="unknown flag --seqq-len"):
        load(PrepConfig, [*argv, "--seqq-len", "1"], prog="sft prep")


@pytest.mark.parametrize(
    "section", ["train: {early_stop: {patience: true}}", "optim: {layer_decay: true}", "batch: {micro_batch: true}"]
)
def test_yes_is_no_number(write_yaml, section):
    told = message("--config", write_yaml(section), *REQUIRED)
    assert told.endswith("got True, must be a number")


def test_two_numbers_by_comma():
    assert run(*REQUIRED, "--optim.betas", "0.9,0.99").optim.betas == (0.9, 0.99)
    assert run(*REQUIRED, "--optim.betas", "[0.9, 0.99]").optim.betas == (0.9, 0.99)


def test_steps_beyond_what_can_be_counted_are_refused():
    assert "must be less than or equal to" in message(*REQUIRED, "--train.max_steps", str(10**26))
