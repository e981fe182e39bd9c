"""FLOPs by hand, and the files that a run writes. Run: pytest tests/unit/test_metrics.py"""

import json
import math
import time

import numpy as np
import pytest
import torch

from sft.config import DataSection, ModelSection, RunConfig, TrackSection
from sft.errors import GuardStop, Preempted, UserError
from sft.metrics import Recorder, attention_length, flops_per_token, gpu_model, peak_flops

CONFIG = {"num_attention_heads": 4, "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 100}


def test_flops_per_token():
    # 6 x (5000 - 100 x 32) + 6 x 2 layers x 32 wide x 10 long
    assert flops_per_token(CONFIG, 5000, 10.0) == 6 * 1800 + 6 * 2 * 32 * 10
    assert flops_per_token({**CONFIG, "tie_word_embeddings": True}, 5000, 0) == 6 * 5000
    assert flops_per_token({**CONFIG, "head_dim": 16}, 3200, 1) == 6 * 2 * 64
    # the head (100 x 32) runs on a quarter of the positions
    assert flops_per_token(CONFIG, 10000, 0, label_fraction=0.25) == 6 * (10000 - 3200 - 2400)


def test_published_figure_is_reproduced():
    """torchtitan: Llama-3.1-8B at 8192, 6,667 tokens/s on an H100 is 39 % MFU by PaLM's rule, 34.7 % causal."""
    llama = {"num_attention_heads": 32, "hidden_size": 4096, "num_hidden_layers": 32, "vocab_size": 128256}
    flops = flops_per_token(llama, 8_030_261_248, 8192)
    assert 6667 * flops / 989e12 == pytest.approx(0.347, abs=0.001)


def test_llama_3_8b_by_hand():
    """All parameters but the input embedding, and attention over 8192 causal positions; PaLM's rule charges twice."""
    llama = {"num_attention_heads": 32, "hidden_size": 4096, "num_hidden_layers": 32, "vocab_size": 128256}
    embedding, per_layer, norm = 525_336_576, 218_112_000, 4096  # a layer: 41,943,040 + 176,160,768 + 8,192
    assert 2 * embedding + 32 * per_layer + norm == 8_030_261_248
    in_matrices, attention = 45_029_548_032, 6_442_450_944  # 6 x 7,504,924,672; 6 x 32 x 4096 x 8192
    assert flops_per_token(llama, 8_030_261_248, 8192) == in_matrices + attention
    assert flops_per_token(llama, 8_030_261_248, 2 * 8192) == in_matrices + 2 * attention


def test_attention_length_of_packed_documents():
    """Against every pair of tokens counted one by one; the pack's length would charge for twice as many."""
    lengths = np.array([100, 300, 600], np.int32)
    assert attention_length(lengths) == 460  # (10,000 + 90,000 + 360,000) / 1,000
    assert attention_length(np.array([700])) == 700
    pairs = sum(position + 1 for length in lengths for position in range(length))
    per_token = 3 * 4 * 32 * 2 * pairs / lengths.sum()  # thrice the forward's 2 + 2 per pair, 32 wide, 2 layers
    rule = flops_per_token(CONFIG, 3200, attention_length(lengths))
    assert rule == pytest.approx(per_token, rel=0.003)  # a token attends to itself, too
    assert flops_per_token(CONFIG, 3200, float(lengths.sum())) > 2 * per_token


def test_no_peak_is_claimed_for_a_cpu():
    assert peak_flops(torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIE"),
        ("NVIDIA H200 NVL", "H200 NVL"),
        ("NVIDIA H20", "H20"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA GB200", "GB200"),
        ("NVIDIA A100-PCIE-40GB", "A100 PCIE"),
        ("NVIDIA A10", "A10"),
        ("NVIDIA A10G", None),  # half an A10
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA RTX 4000 Ada Generation", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("AMD Instinct MI300X OAM", "MI300X"),
    ],
)
def test_models_by_device_name(name, model):
    assert gpu_model(name) == model


def recorder(out, is_writer=True):
    track = TrackSection(wandb="off")
    config = RunConfig(model=ModelSection(path="m"), data=DataSection(train="d"), track=track, out=str(out))
    return Recorder(config, out, is_writer, total_steps=3)


def line(step):
    return {
        "step": step, "epoch": 0.1, "loss": 1.0, "lr": 1e-5, "grad_norm": 1.0, "step_time_s": 0.1, "mfu": None,
        "tokens_per_s": 10.0, "tokens_per_s_per_gpu": 10.0, "peak_mem_gib": None,
    }  # fmt: skip


def steps_of(path):
    return [json.loads(text)["step"] for text in path.read_text().splitlines()]


def test_resume_forgets_what_will_run_again(tmp_path):
    with recorder(tmp_path) as record:
        for step in (1, 2, 3):
            record.metrics(line(step))
        record.forget_after(2)
        record.metrics(line(3))
    assert steps_of(tmp_path / "metrics.jsonl") == [1, 2, 3]


def test_only_the_writer_writes(tmp_path):
    with recorder(tmp_path, is_writer=False) as record:
        record.metrics(line(1))
        record.event("start", 0)
        record.forget_after(0)
    assert list(tmp_path.iterdir()) == []


def test_a_line_that_a_crash_cut_short_is_dropped(tmp_path):
    with recorder(tmp_path) as record:
        record.metrics(line(1))
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write('{"step": 2, "lo')
        record.forget_after(5)
    assert steps_of(tmp_path / "metrics.jsonl") == [1]


def kinds(folder):
    return [json.loads(text)["event"] for text in (folder / "events.jsonl").read_text().splitlines() if text[-1] == "}"]


def test_a_line_cut_short_spoils_neither_the_next_one_nor_the_next_start(tmp_path):
    (tmp_path / "events.jsonl").write_text('{"event": "start", "step": 0}\n{"event": "sa')
    for _ in range(2):
        with recorder(tmp_path) as record:
            record.start()
            record.event("finish", 3)
    assert kinds(tmp_path) == ["start", "unseen_end", "finish", "finish"]


@pytest.mark.parametrize(
    ("error", "event"),
    [(Preempted("as asked"), "preempt"), (GuardStop("zero"), "guard_stop"), (UserError("full"), "error")],
)
def test_every_end_has_its_event_and_reason(tmp_path, error, event):
    def run():
        with recorder(tmp_path) as record:
            record.metrics(line(2))
            raise error

    with pytest.raises(type(error)):
        run()
    written = json.loads((tmp_path / "events.jsonl").read_text())
    assert (written["event"], written["step"], written["reason"]) == (event, 2, str(error))


def test_an_end_that_nobody_saw_is_told_by_the_next_start(tmp_path):
    with recorder(tmp_path) as record:
        record.start()
        record.event("save", 7, gib=0.1, save_time_s=1.0)
    with recorder(tmp_path) as record:
        assert kinds(tmp_path) == ["save"], "not before the run is known to be the only one here"
        record.start()
        record.event("finish", 9)
    with recorder(tmp_path) as record:
        record.start()  # control: the end before was seen
    written = [json.loads(text) for text in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in written] == ["save", "unseen_end", "finish"]
    assert written[1]["step"] == 7


def test_the_last_words_can_be_any_ranks(tmp_path):
    with recorder(tmp_path, is_writer=False) as record:
        record.metrics(line(5))
        record.last_words("rank 0 is gone")
    written = json.loads((tmp_path / "events.jsonl").read_text())
    assert (written["event"], written["step"], written["reason"]) == ("rank_lost", 5, "rank 0 is gone")


def test_history_is_what_the_guard_saw(tmp_path):
    with recorder(tmp_path) as record:
        record.metrics({**line(1), "loss_by_source": {}})
        record.metrics({**line(2), "loss": None, "grad_norm": None})  # passed over
        record.metrics({**line(3), "loss": float("nan"), "grad_norm": float("inf"), "loss_by_source": {}})
        steps = record.history()
    assert steps[0] == (1, 1.0, 1.0)
    assert (steps[1][0], math.isnan(steps[1][1]), len(steps)) == (3, True, 2)


def test_what_is_not_finite_is_null(tmp_path):
    with recorder(tmp_path) as record:
        record.metrics({**line(1), "loss": float("nan"), "grad_norm": float("inf")})
    written = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert written["loss"] is None
    assert written["grad_norm"] is None


def test_events_have_a_time_and_their_facts(tmp_path):
    with recorder(tmp_path) as record:
        record.event("skip", 2, doc_ids=[4, 5])
    event = json.loads((tmp_path / "events.jsonl").read_text())
    assert event.pop("time") > 0
    assert event == {"event": "skip", "step": 2, "doc_ids": [4, 5]}


def test_wandb_offline_writes_beside_the_run_and_nowhere_else(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    config = RunConfig(model=ModelSection(path="m"), data=DataSection(train="d"), out=str(tmp_path))
    with Recorder(config, tmp_path, True, total_steps=1) as record:
        record.start()
        record.metrics(line(1))
    written = list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert len(written) == 1
    deadline_s = time.monotonic() + 30  # wandb's own process writes the file, at its leisure on a busy machine
    while written[0].stat().st_size <= 100 and time.monotonic() < deadline_s:
        time.sleep(0.1)
    assert written[0].stat().st_size > 100
    assert b"x" * 40 not in b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_the_held_out_loss_is_told_beside_the_lowest_before_it(tmp_path, capsys):
    def take(record, step, loss):
        record.event("evaluate", step, heldout_loss=loss)
        record.metrics({**line(step), "heldout_loss": loss})

    def told():
        return [text.partition("held-out loss ")[2] for text in capsys.readouterr().out.splitlines() if "held" in text]

    with recorder(tmp_path) as record:
        for step, loss in ((1, 3.0), (2, 2.0), (3, 2.5), (4, float("nan")), (5, 1.0)):
            take(record, step, loss)
        assert told() == [
            "3.0000", "2.0000 (the lowest so far)", "2.5000 (lowest: 2.0000 at step 2)",
            "nan (lowest: 2.0000 at step 2)", "1.0000 (the lowest so far)",
        ]  # fmt: skip
        record.forget_after(4)  # the lowest was on a path that a rollback has left
        take(record, 5, 2.2)
    with recorder(tmp_path) as record:
        record.forget_after(5)
        take(record, 6, 2.1)
    assert told() == ["2.2000 (lowest: 2.0000 at step 2)", "2.1000 (lowest: 2.0000 at step 2)"]


def test_what_is_measured_late_comes_into_its_step_s_line(tmp_path):
    with recorder(tmp_path) as record:
        for step in (1, 2):
            record.metrics({**line(step), "heldout_loss": None})
        record.amend(2, {"heldout_loss": 2.5})
        assert record.heldout_history()[1:] == [(2, 2.5)]
    lines = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(at["step"], at["heldout_loss"], at["loss"]) for at in lines] == [
        (1, None, line(1)["loss"]), (2, 2.5, line(2)["loss"]),
    ]  # fmt: skip
    assert not list(tmp_path.glob("*.partial"))


def test_lines_tell_the_time_left(tmp_path):
    with recorder(tmp_path) as record:
        for step in (1, 2, 3):
            record.metrics(line(step))
    left = [json.loads(text)["eta_s"] for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert left[0] is None
    assert left[1] == pytest.approx(0.1, abs=0.05)
    assert left[2] == 0
