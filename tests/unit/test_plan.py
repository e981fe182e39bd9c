"""sft plan: what it says of a run file, by hand. Run: pytest tests/unit/test_plan.py"""

from types import SimpleNamespace

import pytest

from sft.cli import dispatch
from sft.config import RunConfig
from sft.errors import UserError
from sft.optim import parameter_groups
from sft.plan import groups_of, marks_of, take_plot
from sft.pretrained import load_causal_lm
from sft.settings import load


@pytest.fixture
def flags(base_model, prepared, strategy, tmp_path):
    options = {
        "model.path": base_model, "data.train": prepared / "train", "data.heldout": prepared / "heldout",
        "deepspeed": strategy, "out": tmp_path / "runs" / "one", "batch.rows_per_step": 8, "train.max_steps": 100,
        "checkpoint.every": 30, "eval.every": 20, "schedule.warmup": 10, "optim.lr": 0.001,
    }  # fmt: skip
    return [text for name, value in options.items() for text in (f"--{name}", str(value))]


def plan(capsys, *argv):
    dispatch(["plan", *argv])
    return capsys.readouterr().out


def test_the_plan_by_hand(flags, capsys, tmp_path):
    said = plan(capsys, *flags, "--ranks", "2")
    assert "rows per step   2 ranks x 1 micro-batch x 4 accumulation = 8\n" in said
    assert "cosine, warm-up to step 10: 1.00e-04 at step 1, 1.00e-03 at step 10, 1.00e-04 at step 100\n" in said
    assert "checkpoints     4: every 30 steps and at the last; 0.00 GiB each, at most 4 on disk" in said
    # 20 30 40 60 80 90 100
    assert "held-out loss   7: every 20 steps and every 30 steps and at the last\n" in said
    assert list(tmp_path.iterdir()) == [], "nothing is written"


def test_a_micro_batch_that_is_still_to_be_found_is_not_told_as_1(flags, capsys):
    said = plan(capsys, *flags, "--ranks", "4", "--batch.micro_batch", "auto", "--batch.sequence_parallel", "2")
    assert "rows per step   2 groups of 2 ranks x 1 micro-batch x 4 accumulation = 8\n" in said
    assert "micro-batch     auto: found by trial at the start" in said
    assert "micro-batch     auto" not in plan(capsys, *flags, "--ranks", "4")


def test_every_parameter_is_in_one_group_as_in_the_run(flags, base_model):
    more = ["--optim.layer_decay", "0.5", "--optim.multipliers", "[{match: norm, factor: 0, start: 0.3}]"]
    config = load(RunConfig, [*flags, *more], prog="sft plan")
    planned = groups_of(config)
    import torch

    model = load_causal_lm(base_model, dtype=torch.float32, attention="eager")
    made = parameter_groups(model.named_parameters(), config.optim)
    assert len(planned) > 5

    def facts(groups):
        return [
            (group["weight_decay"], group["lr_factors"], [one.shape for one in group["params"]]) for group in groups
        ]

    assert facts(planned) == facts(made)


def test_groups_are_told_with_their_rates(flags, capsys):
    more = ["--optim.multipliers", "[{match: 'layers.0.', factor: 0.5, start: 0.3}, {match: head, factor: 0}]"]
    said = plan(capsys, *flags, *more)
    assert "weight decay 0.01, lr x 0.5, from step 31\n" in said
    assert "8,288  weight decay 0.01, kept as they are\n" in said
    assert "from step" not in plan(capsys, *flags), "control: without multipliers"


def test_everything_that_happens_between_steps_has_a_row(flags):
    more = ["--eval.probe.every", "50", "--eval.samples.every", "7", "--eval.samples.prompts", "a.txt"]
    config = load(RunConfig, [*flags, *more], prog="sft plan")
    inputs = SimpleNamespace(total_steps=100, heldout=object(), probe=object())
    rows = marks_of(config, inputs)
    assert [(row.name, row.count) for row in rows] == [
        ("checkpoint", 4), ("held-out loss", 7), ("probe", 2), ("samples", 15),
    ]  # fmt: skip
    config = load(RunConfig, flags, prog="sft plan")
    assert len(marks_of(config, SimpleNamespace(total_steps=100, heldout=None, probe=None))) == 1


def test_the_picture_is_beside_the_runs_folder_which_stays_free(flags, capsys, tmp_path):
    picture = tmp_path / "runs" / "one-schedule.png"
    assert f"drawn: {picture}\n" in plan(capsys, "--plot-schedule", *flags)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "runs" / "one").exists()
    named = tmp_path / "named.PNG"
    assert f"drawn: {named}\n" in plan(capsys, *flags, f"--plot-schedule={named}")
    assert named.is_file()


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--ranks", "2"], (None, ["--ranks", "2"])),
        (["--plot-schedule"], ("", [])),
        (["--plot-schedule", "--ranks", "2"], ("", ["--ranks", "2"])),
        (["--ranks", "2", "--plot_schedule", "a.png", "--out", "b"], ("a.png", ["--ranks", "2", "--out", "b"])),
    ],
)
def test_where_the_picture_goes(argv, expected):
    assert take_plot(argv) == expected


@pytest.mark.parametrize(
    ("more", "part"),
    [
        (["--plot-schedule", "a.jpg"], "--plot-schedule a.jpg: must be the name of a .png file"),
        (["--plot-schedule", "no/such/a.png"], "--plot-schedule no/such/a.png: cannot be written"),
        (["--out", "."], "--out .: exists and is no run folder"),
        (["--ranks", "0"], "--ranks: got 0, must be greater than 0"),
        (["--ranks", "3"], "batch.rows_per_step 8 is no multiple of 3 ranks"),
        (["--rank", "3"], "unknown flag --rank; did you mean --ranks?"),
        (["--optim.multipliers", "[{match: nowhere}]"], "match 'nowhere' is found in no parameter"),
    ],
)
def test_bad_input_is_one_line(flags, more, part):
    with pytest.raises(UserError) as found:
        dispatch(["plan", *flags, *more])
    assert part in str(found.value)
    assert "\n" not in str(found.value)
