"""sft report: what it reads from a run's files, however little or broken, and what it makes of long curves."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sft.report.charts import Chart, Line, draw
from sft.report.curves import MIN_SMOOTHED, PIXEL_COLUMNS, LogAxis, StepAxis, ceiling, smooth, thin, window
from sft.report.facts import HANG_AFTER_S, gather, last_sign, total_steps
from sft.report.files import read_metrics, read_run
from tests.run_files import BEGAN_S, STEP_S, event, invented

NOW_S = BEGAN_S + 10**6


def write(folder: Path, name: str, *lines: Any) -> Path:
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    (folder / name).write_text(text)
    return folder


def test_lines_cut_short_and_fields_of_other_kinds_are_passed_over(tmp_path: Path) -> None:
    write(
        tmp_path,
        "metrics.jsonl",
        {"step": 1, "loss": 2.0, "applied": True},
        {"step": 2, "loss": None, "loss_by_source": None},
        '{"step": 3, "loss": 1.',
        "[1, 2]",
        {"step": "four", "loss": 1.0},
        {"step": True, "loss": 1.0},
        {"step": 5, "loss": "low", "loss_by_source": {"a": 0.5, "b": None}},
        '{"step": 6, "loss": 0.25}',
        '{"step": 7, "lo',
    )
    metrics = read_metrics(tmp_path / "metrics.jsonl")
    assert metrics.step.tolist() == [1, 2, 5, 6]
    assert [np.array(column).tolist() for column in metrics.known("loss")] == [[1, 6], [2.0, 0.25]]
    assert metrics.columns["applied"][0] == 1.0
    assert np.isnan(metrics.columns["mfu"]).all()
    np.testing.assert_array_equal(metrics.loss_by_source["a"], [np.nan, np.nan, 0.5, np.nan])


def test_the_last_line_of_a_step_counts(tmp_path: Path) -> None:
    """As where a killed run has taken steps again, and was killed before it dropped the old lines."""
    lines = [{"step": step, "loss": float(loss)} for step, loss in ((1, 10), (2, 20), (3, 30), (2, 21), (4, 40))]
    metrics = read_metrics(write(tmp_path, "metrics.jsonl", *lines) / "metrics.jsonl")
    assert metrics.step.tolist() == [1, 2, 3, 4]
    assert metrics.columns["loss"].tolist() == [10, 21, 30, 40]


def test_a_folder_without_files_has_no_figures(tmp_path: Path) -> None:
    facts = gather(read_run(tmp_path), NOW_S)
    assert (facts.step, facts.loss, facts.tokens, facts.first_s) == (0, None, 0, None)
    assert (facts.state.words, facts.state.is_over) == ("Nothing trained yet", False)


def test_figures_of_a_run_are_those_of_its_files(tmp_path: Path) -> None:
    facts = gather(read_run(invented(tmp_path, steps=400, every=40)), NOW_S)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    heldout = {line["step"]: line["heldout_loss"] for line in lines if "heldout_loss" in line}
    assert facts.best_heldout == min(heldout.items(), key=lambda pair: pair[1])
    assert facts.best_heldout != facts.last_heldout == (400, heldout[400])
    assert facts.loss == lines[-1]["loss"]
    assert facts.tokens == sum(line["tokens"] for line in lines)
    speeds = [line["tokens_per_s"] for line in lines if line["tokens_per_s"] is not None]
    assert facts.tokens_per_s == pytest.approx(np.median(speeds))
    assert facts.tokens_per_s_per_gpu == pytest.approx(np.median(speeds) / 8)
    assert facts.peak_mem_gib == 61.25
    assert facts.counts == {"restarts": 2, "rollbacks": 1, "spikes": 3, "skipped": 3}
    assert facts.trained_s == pytest.approx(400 * STEP_S)
    assert facts.save_stall_s == pytest.approx(sum(line["save_stall_s"] for line in lines))
    assert facts.state.words == "Finished"
    assert facts.total_steps == facts.step == 400


@pytest.mark.parametrize(
    ("last", "words"),
    [
        (event("guard_stop", 9, 60.0, reason="loss is 0"), "Stopped by the guard"),
        (event("preempt", 9, 60.0, reason="SIGTERM"), "Stopped as asked; the same command goes on"),
        (event("error", 9, 60.0, reason="disk full"), "Ended with an error"),
        (event("early_stop", 9, 60.0, reason="no new lowest"), "Stopped early"),
    ],
)
def test_the_end_is_told_with_its_reason(tmp_path: Path, last: dict[str, Any], words: str) -> None:
    begin = event("start", 0, 0.0, world_size=2)
    write(tmp_path, "events.jsonl", begin, last, event("delete", 4, 61.0), event("export", 9, 62.0))
    state = gather(read_run(tmp_path), NOW_S).state
    assert (state.words, state.reason, state.is_over) == (words, last["reason"], True)
    write(tmp_path, "events.jsonl", begin, last, event("resume", 9, 70.0))
    assert not gather(read_run(tmp_path), NOW_S).state.is_over


def test_running_or_silent_by_the_last_sign_of_life(tmp_path: Path) -> None:
    """Steps after the last event count by how long they took; the files' times do not."""
    write(tmp_path, "events.jsonl", event("start", 0, 0.0, world_size=2), event("save", 10, 100.0))
    lines = [{"step": step, "loss": 1.0, "step_time_s": 10.0, "eta_s": 3600.0} for step in range(1, 31)]
    run = read_run(write(tmp_path, "metrics.jsonl", *lines))
    seen_s = BEGAN_S + 100 + 20 * 10
    assert last_sign(run) == seen_s
    running = gather(run, seen_s + HANG_AFTER_S - 1)
    assert (running.state.words, running.eta_s) == ("Running", 3600.0)
    silent = gather(run, seen_s + HANG_AFTER_S + 1)
    assert silent.state.words == "No end recorded"
    assert "2025-10-09 08:58 UTC" in silent.state.reason
    (tmp_path / "config.yaml").write_text("guard: {hang_after_s: 5000}")
    assert gather(read_run(tmp_path), seen_s + HANG_AFTER_S + 1).state.words == "Running"


def test_total_steps(tmp_path: Path) -> None:
    def found(config: str, epoch: float) -> int | None:
        (tmp_path / "config.yaml").write_text(config)
        return total_steps(read_run(write(tmp_path, "metrics.jsonl", {"step": 100, "epoch": epoch})), 100)

    assert found("train: {max_steps: 700, epochs: 3}", 0.5) == 700
    assert found("train: {max_steps: null, epochs: 3}", 0.5) == 600
    assert found("train: {max_steps: null, epochs: 3}", 0.0001) is None
    assert found("train: [half writ", 0.5) is None
    write(tmp_path, "events.jsonl", event("finish", 601, 0.0))
    assert found("train: {max_steps: null, epochs: 3}", 0.5) == 601


def test_checkpoints(tmp_path: Path) -> None:
    invented(tmp_path, steps=20, every=10)
    torn, damaged = tmp_path / "checkpoints" / "step-00000015", tmp_path / "checkpoints" / "step-00000005.damaged"
    for folder, text in ((torn, '{"heldout_loss": null}'), (damaged, "{}")):
        folder.mkdir()
        (folder / "meta.json").write_text(text)
    (tmp_path / "checkpoints" / "step-00000010" / "meta.json").write_text('{"half')
    saved = read_run(tmp_path).checkpoints
    assert [(one.step, one.is_complete, one.heldout_loss) for one in saved] == [(15, False, None), (20, True, 1.11)]
    assert (saved[1].num_bytes, saved[1].ranks) == (10 * 2**30, 8)


def test_thinned_curve_keeps_every_spike_and_the_ends_of_each_column() -> None:
    random = np.random.RandomState(0)
    values = random.randn(200_000)
    spikes = random.choice(200_000, 20, replace=False)
    values[spikes] = 100 + np.arange(20)
    steps = np.arange(1, 200_001)
    kept = set(thin(steps, values).tolist())
    assert len(kept) <= 4 * PIXEL_COLUMNS
    pixel = np.minimum((steps - 1) * PIXEL_COLUMNS // 199_999, PIXEL_COLUMNS - 1)
    columns = [np.flatnonzero(pixel == column) for column in range(PIXEL_COLUMNS)]
    ends = [
        {column[0], column[-1], column[values[column].argmin()], column[values[column].argmax()]} for column in columns
    ]
    assert kept == set.union(*ends)
    every_nth = set(np.linspace(0, 199_999, len(kept)).round().astype(int).tolist())  # the control: these lose spikes
    assert len(kept & set(spikes.tolist())) > 15 > len(every_nth & set(spikes.tolist()))


def test_short_curves_stay_whole() -> None:
    for length in (0, 1, 7, 4 * PIXEL_COLUMNS):
        assert thin(np.arange(length), np.zeros(length)).tolist() == list(range(length))


def test_smoothed_curve_is_the_mean_around_each_place() -> None:
    values = np.random.RandomState(1).randn(1000)
    width = window(1000)
    assert width == 21
    expected = [values[max(0, at - 10) : at + 11].mean() for at in range(1000)]
    np.testing.assert_allclose(smooth(values), expected)
    short = values[: MIN_SMOOTHED - 1]
    assert smooth(short) is short


def test_a_picture_is_cut_above_a_few_spikes_only() -> None:
    values = np.linspace(2.0, 1.0, 1000)
    assert ceiling(values) == 2.0
    values[500] = 50.0
    assert 2.0 < ceiling(values) < 3.0
    assert ceiling(np.array([1.0, 50.0])) == 50.0


def test_a_curve_of_another_height_is_no_spike() -> None:
    """One source is at 0.2 throughout, the other falls from 9: nothing may be left out."""
    steps = np.arange(1, 101)
    flat, falling = np.full(100, 0.2), np.linspace(9.0, 0.0, 100)
    lines = [Line("corpus", "source0", steps, flat), Line("alpaca", "source1", steps, falling)]
    markup, _ = draw(Chart("sources", "Loss by source", "nats", lines, cut=True), StepAxis(0, 100))
    assert "above the picture" not in markup
    assert max(float(tick) for tick in re.findall(r"<em[^>]*>([\d.]+)</em>", markup)) >= 8
    falling[0] = 900.0
    markup, _ = draw(Chart("sources", "Loss by source", "nats", lines, cut=True), StepAxis(0, 100))
    assert "1 of 100 steps lie above the picture; the highest is 900, in step 1." in markup, "control"


def test_axes() -> None:
    axis = LogAxis([0.01, 100.0])
    assert axis.place(1.0) == pytest.approx(50.0)
    assert axis.place(0.0) == 0.0
    assert axis.ticks() == pytest.approx([0.01, 0.1, 1, 10, 100])
    assert StepAxis(0, 1).ticks() == [0, 1]
    assert StepAxis(0, 3).ticks() == [0, 1, 2, 3]
