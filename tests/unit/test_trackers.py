"""What TensorBoard and wandb were told, read back from their files. Run: pytest tests/unit/test_trackers.py"""

import json
import struct
import time

import pytest

from sft.config import DataSection, ModelSection, RunConfig, TrackSection
from sft.errors import UserError
from sft.metrics import Recorder
from sft.trackers import WANDB_ID, flat_numbers

pytest.importorskip("tensorboard", reason="the extra `tensorboard` is not installed")

SECRET = "k" * 40
LAST, FULL = 4, 1
"""Types of a piece of a record in a .wandb file: the last one, the only one."""


def config_of(out, **track):
    return RunConfig(
        model=ModelSection(path=f"s3://me:{SECRET}@bucket/m"), data=DataSection(train="d"),
        track=TrackSection(project="mine", **track), out=str(out),
    )  # fmt: skip


def line(step, loss):
    return {
        "step": step, "epoch": step / 8, "loss": loss, "lr": 1e-5, "grad_norm": 0.5, "applied": True, "mfu": None,
        "tokens_per_s": 10.0, "tokens_per_s_per_gpu": 5.0, "step_time_s": 0.1, "peak_mem_gib": None,
        "loss_by_source": {"alpaca": loss, "no labels": None},
    }  # fmt: skip


def crash(config, out):
    """Three steps, and an end that is none."""
    with Recorder(config, out, True, total_steps=4) as record:
        record.start()
        record.track(0, {"probe_mmlu_acc": 0.25})
        record.forget_after(0)
        record.metrics(line(1, 5.0))
        record.metrics({**line(2, 4.0), "heldout_loss": 4.5, "probe_mmlu_acc": 0.5})
        record.texts(2, "samples", ["prompt", "answer"], [["Say | hi", "# Hi\n*you*"]])
        record.metrics({**line(3, 99.0), "heldout_loss": 77.0})
        raise RuntimeError


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Three steps and a crash; a resume from step 2; a rollback to step 3; the last step again."""
    out = tmp_path_factory.mktemp("run")
    config = config_of(out, wandb="offline", tensorboard=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_API_KEY", SECRET)
        with pytest.raises(RuntimeError):
            crash(config, out)
        with Recorder(config, out, True, total_steps=4) as record:
            record.start()
            record.forget_after(2)
            record.metrics(line(3, 3.0))
            record.metrics(line(4, 88.0))
            record.forget_after(3)
            record.metrics(line(4, 2.0))
    return out


def read_tensorboard(out):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    return events.Reload()


def curves_of(events):
    """{name: [(step, value)]}"""
    return {name: [(at.step, at.value) for at in events.Scalars(name)] for name in events.Tags()["scalars"]}


def read_wandb(path):
    """Records of a .wandb file: LevelDB's log format behind a header of 7 bytes (wandb's reader is in Go)."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, pieces, records = path.read_bytes(), 7, b"", []
    while place + 7 <= len(content):
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        pieces += content[place + 7 : place + 7 + length]
        place += 7 + length
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
        if kind in (FULL, LAST):
            record = Record()
            record.ParseFromString(pieces)
            records.append(record)
            pieces = b""
    return records


def records_of_starts(out):
    """Of each start, in order, all records; wandb's own process writes them at its leisure."""
    deadline_s = time.monotonic() + 60
    while True:
        paths = sorted(out.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime)
        starts = [read_wandb(path) for path in paths]
        if len(starts) == 2 and all(any(r.HasField("exit") for r in records) for records in starts):
            return starts
        assert time.monotonic() < deadline_s
        time.sleep(0.1)


def history_of(records):
    """[{name: value}] of every wandb.log, without what wandb adds; a table is "<name>/_type", "<name>/path", ..."""
    rows = []
    for record in records:
        if record.HasField("history"):
            items = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
            rows.append({name: json.loads(text) for name, text in items.items() if name[0] != "_"})
    return rows


def test_both_have_the_numbers_of_metrics_jsonl_under_the_same_names(run):
    curves = curves_of(read_tensorboard(run))
    rows = [row for records in records_of_starts(run) for row in history_of(records)]
    last = {row["step"]: row for row in rows if "samples/path" not in row}  # of a step taken twice, the later one
    lines = {value["step"]: value for value in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())}
    assert list(lines) == [1, 2, 3, 4]
    for step, written in lines.items():
        expected = flat_numbers(written)
        assert last[step] == expected, step
        drawn = {name: dict(points)[step] for name, points in curves.items() if step in dict(points)}
        assert drawn == pytest.approx({name: value for name, value in expected.items() if name != "step"}, rel=1e-6)
    assert {"loss_by_source/alpaca", "heldout_loss", "probe_mmlu_acc", "eta_s", "tokens_per_s_per_gpu"} <= curves.keys()
    assert "loss_by_source/no labels" not in curves
    assert last[0] == {"step": 0, "probe_mmlu_acc": 0.25}


def test_tensorboard_has_one_point_per_step_and_none_of_abandoned_steps(run):
    curves = curves_of(read_tensorboard(run))
    assert curves["loss"] == [(1, 5.0), (2, 4.0), (3, 3.0), (4, 2.0)]
    assert curves["heldout_loss"] == [(2, 4.5)]
    assert curves["probe_mmlu_acc"] == [(0, 0.25), (2, 0.5)]


def test_abandoned_steps_are_in_the_files_and_would_show_without_the_purge(run):
    """Control: what the test above does not find was written."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), purge_orphaned_data=False).Reload()
    losses = {at.value for at in events.Scalars("loss")}
    assert losses == {5.0, 4.0, 99.0, 3.0, 88.0, 2.0}


def test_wandb_goes_on_under_the_same_id_over_the_same_axis(run):
    starts = records_of_starts(run)
    told = [next(record.run for record in records if record.HasField("run")) for records in starts]
    identifier = (run / WANDB_ID).read_text().strip()
    assert [(each.run_id, each.project) for each in told] == [(identifier, "mine")] * 2
    for records in starts:
        axes = [record.metric for record in records if record.HasField("metric")]
        assert any(axis.glob_name == "*" and axis.step_metric == "step" for axis in axes)
    exits = [record.exit.exit_code for records in starts for record in records if record.HasField("exit")]
    assert exits == [1, 0]


def test_another_run_has_another_id(tmp_path, monkeypatch):
    """With a stand-in for wandb.init, which records what it is asked for."""
    asked = stand_in(monkeypatch)
    for name in ("one", "other", "one"):
        (tmp_path / name).mkdir(exist_ok=True)
        with Recorder(config_of(tmp_path / name, wandb="online"), tmp_path / name, True, total_steps=1) as record:
            record.start()
    one, other, again = ((options["id"], options["resume"], options["mode"]) for options in asked)
    assert one == again
    assert one[1:] == ("allow", "online")
    assert other[0] != one[0]


def test_the_config_is_logged_without_secrets(run):
    told = [record.run for record in records_of_starts(run)[0] if record.HasField("run")]
    model = next(json.loads(update.value_json) for update in told[0].config.update if update.key == "model")
    assert model["path"] == "s3://***@bucket/m"
    files = [path.read_bytes() for path in run.rglob("*") if path.is_file() and not path.is_symlink()]
    assert not any(SECRET.encode() in content for content in files)


def test_texts_are_a_table_in_wandb_and_verbatim_in_tensorboard(run):
    page = read_tensorboard(run).Tensors("samples/text_summary")[0]
    assert page.step == 2
    assert page.tensor_proto.string_val[0].decode() == "**prompt**\n\n    Say | hi\n\n**answer**\n\n    # Hi\n    *you*"
    rows = [row for row in history_of(records_of_starts(run)[0]) if "samples/path" in row]
    assert [(row["step"], row["samples/_type"]) for row in rows] == [(2, "table-file")]
    table = json.loads(next(run.glob(f"wandb/offline-run-*/files/{rows[0]['samples/path']}")).read_text())
    assert table["columns"] == ["prompt", "answer"]
    assert table["data"] == [["Say | hi", "# Hi\n*you*"]]


def test_nothing_is_started_where_nothing_is_asked_for_or_on_other_ranks(tmp_path, monkeypatch):
    asked = stand_in(monkeypatch)
    for track, is_writer in (({"wandb": "off"}, True), ({"wandb": "online", "tensorboard": True}, False)):
        with Recorder(config_of(tmp_path, **track), tmp_path, is_writer, total_steps=1) as record:
            record.start()
            record.metrics(line(1, 1.0))
            record.texts(1, "samples", ["prompt"], [["x"]])
    assert asked == []
    assert {path.name for path in tmp_path.iterdir()} <= {"metrics.jsonl"}


def test_wandb_that_refuses_is_one_line(tmp_path, monkeypatch):
    import wandb

    def refuse(**_options):
        raise wandb.errors.CommError("permission denied\nand a long story")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(UserError, match=r"^track\.wandb online: permission denied; use offline, .*, or off$"):
        Recorder(config_of(tmp_path, wandb="online"), tmp_path, True, total_steps=1).start()


def stand_in(monkeypatch):
    """Replace wandb.init; returns the list of what it was asked for."""
    import wandb

    class StandIn:
        def define_metric(self, *_names, **_options): ...

        def log(self, _values): ...

        def finish(self, exit_code): ...

    asked = []
    monkeypatch.setattr(wandb, "init", lambda **options: asked.append(options) or StandIn())
    return asked
