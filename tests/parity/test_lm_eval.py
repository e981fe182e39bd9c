"""Our requests, scores and choices against lm_eval's own, live and offline, in fp32."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sft.eval.options import ScoreOptions, ShotsSection

from sft.eval.results import Record, summarize
from sft.eval.run import load_items, prepare, score_model
from sft.eval.tasks.item import Item
from sft.tokenizer import load_tokenizer
from tests.parity.jobs import JOBS

pytestmark = [pytest.mark.parity, pytest.mark.timeout(300)]
NAMES = [job[0] for job in JOBS]


def options_of(world: Path, name: str, **shots: int) -> ScoreOptions:
    task = name.split("-", maxsplit=1)[0]
    shots = shots or {task: int(name.split("-")[1])}
    return ScoreOptions(
        tasks=[task],
        data=str(world / "hub"),
        shots=ShotsSection(**shots),
        dtype="fp32",
        out="unused",
        tokens_per_batch=700,
    )


def model_of(world: Path, name: str) -> str:
    return str(world / next(model for job, model, _, _ in JOBS if job == name))


def key_of(entry: Item | Record) -> str:
    return f"mmlu_{entry.subject}/{entry.doc_id}" if entry.task == "mmlu" else f"hellaswag/{entry.doc_id}"


def our_requests(model: str, items: dict[str, list[Item]]) -> dict[str, Any]:
    prepared = prepare(model, items)
    (task,) = items
    pairs = [[request.ctx_ids.tolist(), request.cont_ids.tolist()] for request in prepared.requests[task]]
    return {key_of(item): pairs[4 * number : 4 * number + 4] for number, item in enumerate(items[task])}


@pytest.mark.parametrize("name", NAMES)
def test_requests_equal_token_by_token(world: Path, reference: dict[str, Any], name: str) -> None:
    items, _ = load_items(options_of(world, name))
    ours = our_requests(model_of(world, name), items)
    theirs = {key: sample["requests"] for key, sample in reference[name]["samples"].items()}
    assert len(theirs) == 24
    assert ours == theirs


@pytest.mark.parametrize("name", NAMES)
def test_scores_and_choices_equal(world: Path, reference: dict[str, Any], name: str) -> None:
    (task,) = (options := options_of(world, name)).tasks
    records = score_model(model_of(world, name), options)[task]
    samples = reference[name]["samples"]
    ours = np.array([record.lls for record in records])
    theirs = np.array([samples[key_of(record)]["lls"] for record in records])
    assert np.abs(ours - theirs).max() <= 1e-3
    assert [record.pred for record in records] == theirs.argmax(axis=1).tolist()
    for record in records:
        sample = samples[key_of(record)]
        assert record.prompt_sha256 == sample["prompt_hash"]
        assert record.correct == sample["acc"]
        assert task == "mmlu" or record.correct_norm == sample["acc_norm"]


@pytest.mark.parametrize("name", NAMES)
def test_accuracies_and_standard_errors_equal(world: Path, reference: dict[str, Any], name: str) -> None:
    (task,) = (options := options_of(world, name)).tasks
    summary = summarize(task, score_model(model_of(world, name), options)[task])
    theirs = reference[name]["results"]
    if task == "mmlu":
        for subject, ours in summary["subjects"].items():
            assert ours["acc"] == theirs[f"mmlu_{subject}"]["acc,none"]
            assert ours["stderr"] == pytest.approx(theirs[f"mmlu_{subject}"]["acc_stderr,none"], rel=1e-12)
        return
    for metric, error in (("acc", "stderr"), ("acc_norm", "stderr_norm")):
        assert summary[metric] == theirs["hellaswag"][f"{metric},none"]
        assert summary[error] == pytest.approx(theirs["hellaswag"][f"{metric}_stderr,none"], rel=1e-12)


def test_truncation_happens_in_the_short_jobs(world: Path, reference: dict[str, Any]) -> None:
    for name in ("mmlu-5-short", "hellaswag-10-short"):
        lengths = [
            len(ctx) + len(cont) for sample in reference[name]["samples"].values() for ctx, cont in sample["requests"]
        ]
        assert min(lengths) > 101
    lls = [[sample["lls"] for sample in reference[name]["samples"].values()] for name in ("mmlu-5", "mmlu-5-short")]
    assert np.abs(np.subtract(*lls)).max() > 1e-2


def test_bos_is_the_only_difference_between_bos_and_nobos(world: Path, reference: dict[str, Any]) -> None:
    bos = load_tokenizer(world / "bos").bos[0]
    with_bos, without = (
        reference[name]["samples"]["mmlu_anatomy/4"]["requests"] for name in ("mmlu-5", "mmlu-5-nobos")
    )
    assert [[[bos, *ctx], cont] for ctx, cont in without] == with_bos


# Negative controls: the comparison above must see each of these mistakes.


def test_a_wrong_shot_count_differs(world: Path, reference: dict[str, Any]) -> None:
    for name, shots in (("mmlu-5", {"mmlu": 4}), ("hellaswag-10", {"hellaswag": 9})):
        items, _ = load_items(options_of(world, name, **shots))
        ours = our_requests(model_of(world, name), items)
        assert all(ours[key] != sample["requests"] for key, sample in reference[name]["samples"].items())


def test_a_trailing_blank_that_stays_in_the_context_differs(world: Path, reference: dict[str, Any]) -> None:
    name = "hellaswag-0"
    items, _ = load_items(options_of(world, name))
    tokenizer = load_tokenizer(model_of(world, name))
    trailing = [item for item in items["hellaswag"] if item.context != item.context.rstrip()]
    assert trailing
    for item in trailing:
        ctx = [*tokenizer.bos, *tokenizer.encode(item.context)]
        whole = [*tokenizer.bos, *tokenizer.encode(f"{item.context} {item.choices[1]}")]
        assert [ctx, whole[len(ctx) :]] != reference[name]["samples"][key_of(item)]["requests"][1]


def test_a_stripped_choice_differs(world: Path, reference: dict[str, Any]) -> None:
    name = "hellaswag-0"
    items, _ = load_items(options_of(world, name))
    stripped = [replace(item, choices=tuple(choice.strip() for choice in item.choices)) for item in items["hellaswag"]]
    assert our_requests(model_of(world, name), {"hellaswag": stripped}) != {
        key: sample["requests"] for key, sample in reference[name]["samples"].items()
    }
