"""What two real ranks record, over a stop and a resume. Run: pytest tests/dist/test_metrics.py"""

import json

import pytest

from sft.trackers import flat_numbers
from tests.dist import forked
from tests.dist.metrics_worker import MORE_BYTES, SLOW_S
from tests.dist.training import SETTINGS, metrics

pytestmark = [pytest.mark.dist, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def run(tmp_path_factory, base_model, prepared, strategy):
    pytest.importorskip("tensorboard", reason="the extra `tensorboard` is not installed")
    out = tmp_path_factory.mktemp("metrics") / "run"
    settings = {
        **SETTINGS, "model.path": base_model, "data.train": prepared / "train", "data.heldout": prepared / "heldout",
        "deepspeed": strategy, "eval.every": 1, "track.wandb": "offline", "track.tensorboard": "true", "out": out,
    }  # fmt: skip
    flags = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    for module, more in (("tests.dist.metrics_worker", ["--train.stop_after", "2"]), ("sft.train", [])):
        done = forked.run_ranks(2, module, *flags, *more)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "(the lowest so far)" in done.stdout
    return out


def test_the_worst_rank_is_told(run):
    lines = metrics(run)
    (stall_0, _, host_0), (stall_1, _, host_1) = (json.loads((run / f"own-{r}.json").read_text()) for r in (0, 1))
    assert (lines[1]["data_stall_s"], lines[1]["peak_host_mem_gib"]) == (stall_1, max(host_0, host_1))
    forwards = SETTINGS["batch.rows_per_step"] // 2
    assert stall_1 >= forwards * SLOW_S > stall_0, "rank 1 alone is slow"
    assert host_1 > host_0 + 0.5 * MORE_BYTES / 2**30
    assert all(line["data_stall_s"] < line["step_time_s"] for line in lines)
    assert [line["peak_mem_gib"] for line in lines] == [None] * 4, "no GPU"


def test_speed_of_all_ranks_and_of_each(run):
    for line in metrics(run):
        assert line["tokens_per_s"] == pytest.approx(line["tokens"] / line["step_time_s"])
        assert line["tokens_per_s_per_gpu"] == line["tokens_per_s"] / 2


def test_time_left_is_told_from_the_second_step_of_each_start(run):
    left = [line["eta_s"] for line in metrics(run)]
    assert [value is None for value in left] == [True, False, True, False]
    assert left[3] == 0 < left[1]


def test_trackers_have_one_curve_over_the_resume(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    for name in ("loss", "heldout_loss", "data_stall_s"):
        points = [(at.step, at.value) for at in events.Scalars(name)]
        written = [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in metrics(run)]
        assert points == written
    names = {name for line in metrics(run) for name in flat_numbers(line)} - {"step"}
    assert set(events.Tags()["scalars"]) == names
    starts = [path.name for path in sorted(run.glob("wandb/offline-run-*"))]
    assert len(starts) == 2
    assert len({name.rpartition("-")[2] for name in starts}) == 1, "one id"
