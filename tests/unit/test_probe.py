"""What the drift probe asks, how the micro-batch is laid out, and what counts as a drop that is shown."""

import json
import math

import numpy as np
import pytest
import torch

from sft import batch, probe
from sft.config import ProbeSection, RunConfig
from sft.errors import EXIT_GATE_FAILED, UserError
from sft.eval.requests import Prompting, build_requests
from sft.eval.stats import score_interval
from sft.eval.tasks.item import Item
from sft.model import context_length
from sft.probe_items import ProbeItems, cut_forwards, group_documents, open_probe, spread
from sft.ranks import exit_code
from sft.settings import load
from sft.tokenizer import load_tokenizer
from tests import tiny

CPU = torch.device("cpu")


def item(number: int = 0, gold: int = 0, task: str = "mmlu", choices: tuple[str, ...] = ("A", "B", "C", "D")) -> Item:
    return Item(task, "s", number, "", (), f"Question {number}?", choices, gold, "s")


# The layout of a forward


def test_a_scored_micro_batch_predicts_each_continuation_behind_its_input():
    letters = [np.array([token]) for token in (50, 51)]
    ending = np.array([7, 8, 9])
    built = batch.build_scored([(np.array([1, 2, 3]), letters), (np.array([4, 5, 7, 8]), [ending])], CPU)
    assert built.ids_1T.tolist() == [[1, 2, 3, 4, 5, 7, 8]]
    assert built.pos_1T.tolist() == [[0, 1, 2, 0, 1, 2, 3]]
    assert built.layout.seq_lens == (3, 4)
    assert built.predict_N.tolist() == [2, 2, 4, 5, 6], "both letters behind 3; 7 8 9 behind 5 7 8"
    assert built.targets_N.tolist() == [50, 51, 7, 8, 9]
    assert built.source_N.tolist() == [0, 1, 2, 2, 2]
    assert built.num_sources == 3


def test_a_single_continuation_is_laid_out_as_a_document_with_labels():
    ids, scored = np.array([1, 2, 3, 4]), np.array([3, 4])
    built = batch.build_scored([(ids[:-1], [scored])], CPU)
    labelled = batch.build([(ids, np.array([-100, -100, 3, 4]))], CPU)
    assert built.predict_N.tolist() == labelled.predict_N.tolist()
    assert built.targets_N.tolist() == labelled.targets_N.tolist()


def test_a_forward_of_nothing_weighs_nothing():
    built = batch.build_scored([], CPU)
    assert built.ids_1T.shape == (1, 1)
    assert built.predict_N.numel() == built.targets_N.numel() == built.source_N.numel() == 0
    assert built.predict_N.dtype == built.source_N.dtype == torch.int64
    assert built.num_sources == 1


# What is asked


@pytest.fixture(scope="module")
def evals(tmp_path_factory):
    return tiny.make_evals(tmp_path_factory.mktemp("evals"), items=6)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(tiny.make_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def test_items_are_spread_evenly_over_all_there_are(evals, tokenizer):
    asked = open_probe(ProbeSection(data=str(evals), items=4), tokenizer, 4096)
    assert [(one.subject, one.doc_id) for one in asked.items] == [
        ("anatomy", 0), ("anatomy", 3), ("virology", 0), ("virology", 3),
        ("hellaswag", 0), ("hellaswag", 1), ("hellaswag", 3), ("hellaswag", 4),
    ]  # fmt: skip
    assert asked.rows() == {"mmlu": slice(0, 4), "hellaswag": slice(4, 8)}
    assert [one.doc_id for one in spread([item(number) for number in range(3)], 200)] == [0, 1, 2]


def test_no_data_no_probe(tokenizer):
    assert open_probe(ProbeSection(), tokenizer, 4096) is None


def test_every_choice_is_scored_once_and_equal_inputs_are_computed_once(tokenizer):
    items = [item(0), item(1, task="hellaswag", choices=("goes.", "goes on.", "b", "b"))]
    requests = build_requests(items, tokenizer, 4096, Prompting()).requests
    documents = group_documents(requests, 4096)
    assert sorted(cell for document in documents for cell in document.cells) == list(range(8))
    assert [document.cells for document in documents if 0 in document.cells] == [(0, 1, 2, 3)]
    assert (6, 7) in [document.cells for document in documents]
    for document in documents:
        for cell, continuation in zip(document.cells, document.continuations, strict=True):
            ids, scored = requests[cell].clip(4096)
            assert document.ids.tolist() == ids.tolist()
            assert continuation.tolist() == scored.tolist()


def test_a_long_input_loses_its_beginning(tokenizer):
    requests = build_requests([item()], tokenizer, 10, Prompting()).requests
    (document,) = group_documents(requests, 10)
    assert len(document.ids) == 10
    assert len(group_documents(requests, 4096)[0].ids) > 10


def test_forwards_hold_at_most_so_many_tokens_but_a_longer_document_stands_alone(tokenizer):
    questions = [item(number) for number in range(4)]
    documents = group_documents(build_requests(questions, tokenizer, 4096, Prompting()).requests, 4096)
    length = len(documents[0].ids)
    assert {len(document.ids) for document in documents} == {length}
    assert [len(forward) for forward in cut_forwards(documents, 3 * length)] == [3, 1]
    assert [len(forward) for forward in cut_forwards(documents, length - 1)] == [1, 1, 1, 1]
    assert cut_forwards([], 100) == []


@pytest.mark.parametrize(
    "change", [{"items": 5}, {"shots": {"mmlu": 4}}, {"tasks": ["mmlu"]}, {"shots": {"hellaswag": 1}}]
)
def test_the_digest_tells_other_items_apart(evals, tokenizer, change):
    same = [open_probe(ProbeSection(data=str(evals)), tokenizer, 4096).digest for _ in range(2)]
    assert same[0] == same[1]
    assert open_probe(ProbeSection(data=str(evals), **change), tokenizer, 4096).digest != same[0]
    assert open_probe(ProbeSection(data=str(evals)), tokenizer, 100).digest != same[0], "cut elsewhere"


def test_unusable_data_are_one_line(tmp_path, tokenizer):
    for folder in (tmp_path / "missing", tmp_path):
        with pytest.raises(UserError, match=r"^eval\.probe: ") as error:
            open_probe(ProbeSection(data=str(folder)), tokenizer, 4096)
        assert "\n" not in str(error.value)


# What counts as a drop


def compared(right_before: list[bool], right_after: list[bool]) -> dict[str, probe.Shift]:
    """Items whose right answer is 0; a wrong one has its best score at 1."""
    items = [item(number) for number in range(len(right_before))]
    before, after = (np.array([[0, -9, -9, -9] if right else [-9, 0, -9, -9] for right in side], float)
                     for side in (right_before, right_after))  # fmt: skip
    return probe.compare(ProbeItems(items, [], ""), before, after)


def test_a_shift_counts_flips_against_the_base_model():
    (shift,) = compared([True] * 6 + [False] * 4, [True] * 3 + [False] * 3 + [True] + [False] * 3).values()
    assert (shift.metric, shift.n, shift.base, shift.value) == ("acc", 10, 0.6, 0.4)
    assert (shift.delta, shift.right_to_wrong, shift.wrong_to_right) == (pytest.approx(-0.2), 3, 1)
    assert shift.interval == score_interval(10, 3, 1)
    assert shift.at_most == score_interval(10, 3, 1, 0.9)[1] < shift.interval[1]
    p_right, p_wrong = (math.exp(-other) / (1 + 3 * math.exp(-9)) for other in (0, 9))
    assert shift.p_gold_delta == pytest.approx(-0.2 * (p_right - p_wrong))
    deltas = (p_right - p_wrong) * np.array([-1] * 3 + [1] + [0] * 6)
    assert shift.p_gold_se == pytest.approx(deltas.std(ddof=1) / math.sqrt(10))


def test_hellaswag_is_right_by_length_and_an_ending_without_characters_never_wins():
    one = item(task="hellaswag", gold=1, choices=("a", "abcdefghij", "", "b"))
    scores = np.array([[-2.0, -10.0, 0.0, -3.0]])
    asked = ProbeItems([one], [], "")
    assert probe.compare(asked, scores, scores)["hellaswag"].value == 1, "-1 per character"
    assert probe.compare(ProbeItems([item(gold=2)], [], ""), scores, scores)["mmlu"].value == 1, "by the sum"


def test_a_drop_must_be_shown_to_exceed_the_budget():
    base = [True] * 200
    for lost, shown in ((0, False), (8, False), (12, True), (200, True)):
        line = probe.over_budget(compared(base, [False] * lost + [True] * (200 - lost)), 0.03)
        assert (line is not None) == shown, lost
    assert probe.over_budget(compared(base, [False] * 200), None) is None
    assert probe.over_budget(compared([False] * 200, base), 0.0) is None, "a gain"
    line = probe.over_budget(compared(base, [False] * 12 + [True] * 188), 0.03)
    assert line.startswith("mmlu acc 1.000 -> 0.940 on 200 items: with 95 % confidence the drop is at least 0.03")
    assert line.endswith("above eval.probe.max_drop 0.03")


def test_metrics_have_the_names_of_task_and_metric():
    values = probe.metrics_of(compared([True], [False]))
    assert set(values) == {"probe_mmlu_acc", "probe_mmlu_delta", "probe_mmlu_p_gold_delta"}
    assert values["probe_mmlu_delta"] == -1


# What is kept, and how it ends


def test_scores_are_kept_exactly_and_only_for_the_same_items(tmp_path):
    path, identity = tmp_path / "probe.json", {"asked": "x", "precision": "torch.float32"}
    scores = np.random.RandomState(0).randn(3, 4)
    probe._write(path, identity, scores)
    assert np.array_equal(probe._read(path, identity, 3), scores)
    assert probe._read(path, {**identity, "asked": "y"}, 3) is None
    assert probe._read(path, identity, 4) is None
    assert probe._read(tmp_path / "none.json", identity, 3) is None
    path.write_text(path.read_text()[:-20])
    assert probe._read(path, identity, 3) is None, "cut short"
    path.write_text(json.dumps([1]))
    assert probe._read(path, identity, 3) is None


def test_a_budget_without_data_is_refused(tmp_path):
    flags = ["--model.path", "m", "--data.train", "d", "--out", str(tmp_path)]
    with pytest.raises(UserError, match=r"eval\.probe\.max_drop 0\.02 needs eval\.probe\.data"):
        load(RunConfig, [*flags, "--eval.probe.max_drop", "0.02"], prog="sft train")
    config = load(RunConfig, [*flags, "--eval.probe.max_drop", "0.02", "--eval.probe.data", "e"], prog="sft train")
    assert config.eval.probe.max_drop == 0.02


def test_the_supervisor_knows_the_ending_where_the_launcher_hides_it():
    assert exit_code(1, {0: EXIT_GATE_FAILED, 1: EXIT_GATE_FAILED}) == EXIT_GATE_FAILED
    assert exit_code(1, {}) == 1


@pytest.mark.parametrize(
    ("config", "length"),
    [
        ({"max_position_embeddings": 4096}, 4096),
        ({"max_position_embeddings": 32768, "sliding_window": 4096}, 4096),
        ({"max_position_embeddings": 32768, "sliding_window": 4096, "use_sliding_window": False}, 32768),
        ({"max_position_embeddings": 2048, "sliding_window": None}, 2048),
        ({}, None),
    ],
)
def test_inputs_are_as_long_as_the_model_attends_to(config, length):
    assert context_length(config) == length
