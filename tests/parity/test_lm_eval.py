"""Our requests, scores and choices against lm_eval's own, live and offline."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sft.eval.options import ScoreOptions
from sft.eval.requests import Prompting, TokenRequests, build_requests
from sft.eval.results import Record, summarize
from sft.eval.run import load_items, score_model
from sft.eval.stats import pooled_stderr
from sft.eval.tasks.item import Item
from sft.eval.tasks.mmlu import category_of
from sft.tokenizer import load_tokenizer
from tests.parity.jobs import BY_NAME, JOBS, Job

pytestmark = [pytest.mark.parity, pytest.mark.timeout(300)]
FP32 = [job.name for job in JOBS if job.dtype == "float32" and job.world == 1]
BF16 = [job.name for job in JOBS if job.dtype == "bfloat16"]
ENGINES = ["packed", "plain"]
Scorer = Callable[..., list[Record]]


def options_of(world: Path, job: Job, **changes: Any) -> ScoreOptions:
    options = {"data": str(world / job.hub), "out": "unused", "dtype": "fp32", "tokens_per_batch": 700}
    return ScoreOptions(**(job.options() | options | changes))


def items_of(world: Path, job: Job) -> list[Item]:
    return load_items(options_of(world, job)).items[job.task]


def ask(world: Path, job: Job, items: list[Item]) -> TokenRequests:
    prompting = Prompting(job.chat, job.system_instruction, job.compat)
    return build_requests(items, load_tokenizer(world / job.model), 2048, prompting)


def key_of(entry: Item | Record) -> str:
    return f"mmlu_{entry.subject}/{entry.doc_id}" if entry.task == "mmlu" else f"hellaswag/{entry.doc_id}"


def our_requests(world: Path, job: Job, items: list[Item]) -> dict[str, Any]:
    pairs = [[request.ctx_ids.tolist(), request.cont_ids.tolist()] for request in ask(world, job, items).requests]
    return {key_of(item): pairs[4 * number : 4 * number + 4] for number, item in enumerate(items)}


def their_requests(reference: dict[str, Any], job: Job) -> dict[str, Any]:
    return {key: sample["requests"] for key, sample in reference[job.name]["samples"].items()}


@pytest.fixture(scope="module")
def scored(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Scorer:
    """Records of a job, computed once."""

    @cache
    def score(name: str, engine: str, **changes: Any) -> list[Record]:
        job = BY_NAME[name]
        out = tmp_path_factory.mktemp("out") / name
        options = options_of(world, job, engine=engine, out=str(out), **changes)
        return score_model(str(world / job.model), options).records[job.task]

    return score


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)
def test_requests_equal_token_by_token(world: Path, reference: dict[str, Any], job: Job) -> None:
    items = items_of(world, job)
    theirs = their_requests(reference, job)
    assert len(theirs) == len(items) >= 8
    assert our_requests(world, job, items) == theirs
    hashes = [hashlib.sha256(prompt.encode()).hexdigest() for prompt in ask(world, job, items).prompts]
    assert hashes == [reference[job.name]["samples"][key_of(item)]["prompt_hash"] for item in items]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", FP32)
def test_scores_and_choices_equal(reference: dict[str, Any], scored: Scorer, name: str, engine: str) -> None:
    records, samples = scored(name, engine), reference[name]["samples"]
    ours = np.array([record.lls for record in records])
    theirs = np.array([samples[key_of(record)]["lls"] for record in records])
    assert np.abs(ours - theirs).max() <= 1e-3
    assert [record.pred for record in records] == theirs.argmax(axis=1).tolist()
    for record in records:
        sample = samples[key_of(record)]
        assert record.prompt_sha256 == sample["prompt_hash"]
        assert list(record.greedy) == sample["greedy"]
        assert record.correct == sample["acc"]
        assert record.task == "mmlu" or record.correct_norm == sample["acc_norm"]


@pytest.mark.parametrize("name", BF16)
def test_bf16_scores_in_lm_evals_batches_are_equal_to_the_bit(
    reference: dict[str, Any], scored: Scorer, name: str
) -> None:
    changes = {"dtype": "bf16", "score_dtype": "native", "tokens_per_batch": 16384}
    samples = reference[name]["samples"]
    records = scored(name, "plain", batch_size=4, **changes)
    assert {key_of(record): list(record.lls) for record in records} == {
        key: sample["lls"] for key, sample in samples.items()
    }
    others = scored(name, "plain", batch_size=4, **(changes | {"score_dtype": "fp32"}))
    assert any(list(record.lls) != samples[key_of(record)]["lls"] for record in others)


@pytest.mark.parametrize("name", ["mmlu-5", "hellaswag-0", "hellaswag-10"])
def test_accuracies_and_standard_errors_equal(reference: dict[str, Any], scored: Scorer, name: str) -> None:
    job = BY_NAME[name]
    summary = summarize(job.task, scored(name, "packed"))
    theirs = reference[name]["results"]
    if job.task == "mmlu":
        for subject, ours in summary["subjects"].items():
            assert ours["acc"] == theirs[f"mmlu_{subject}"]["acc,none"]
            assert ours["stderr"] == pytest.approx(theirs[f"mmlu_{subject}"]["acc_stderr,none"], rel=1e-12)
        return
    for metric, error in (("acc", "stderr"), ("acc_norm", "stderr_norm")):
        assert summary[metric] == theirs["hellaswag"][f"{metric},none"]
        assert summary[error] == pytest.approx(theirs["hellaswag"][f"{metric}_stderr,none"], rel=1e-12)


def test_groups_of_all_57_subjects_equal(reference: dict[str, Any], scored: Scorer) -> None:
    records = scored("mmlu-5-all", "packed")
    summary, theirs = summarize("mmlu", records), reference["mmlu-5-all"]["results"]
    assert len(summary["subjects"]) == 57
    groups = {"mmlu": (summary, records)} | {
        f"mmlu_{name}": (ours, [record for record in records if category_of(record.subject) == name])
        for name, ours in summary["categories"].items()
    }
    assert sorted(groups) == ["mmlu", "mmlu_humanities", "mmlu_other", "mmlu_social_sciences", "mmlu_stem"]
    for name, (ours, members) in groups.items():
        assert ours["acc"] == pytest.approx(theirs[name]["acc,none"], rel=1e-12)
        by_subject = [
            [record.correct for record in members if record.subject == subject]
            for subject in {record.subject for record in members}
        ]
        assert pooled_stderr(by_subject) == pytest.approx(theirs[name]["acc_stderr,none"], rel=1e-12)
    assert summary["stderr_pooled"] == pytest.approx(theirs["mmlu"]["acc_stderr,none"], rel=1e-12)
    assert summary["stderr"] != pytest.approx(theirs["mmlu"]["acc_stderr,none"], rel=1e-3)


def test_truncation_happens_in_the_short_jobs(reference: dict[str, Any]) -> None:
    for name in ("mmlu-5-short", "hellaswag-10-short"):
        lengths = [
            len(ctx) + len(cont) for pairs in their_requests(reference, BY_NAME[name]).values() for ctx, cont in pairs
        ]
        assert min(lengths) > 101
    whole, cut = (reference[name]["samples"] for name in ("mmlu-5", "mmlu-5-short"))
    assert max(np.abs(np.subtract(whole[key]["lls"], cut[key]["lls"])).max() for key in cut) > 1e-2


@pytest.mark.parametrize("other", ["mmlu-5-nobos", "mmlu-5-old"])
def test_bos_is_the_only_difference_to_requests_without(world: Path, reference: dict[str, Any], other: str) -> None:
    bos = load_tokenizer(world / "bos").bos[0]
    whole, without = (their_requests(reference, BY_NAME[name]) for name in ("mmlu-5", other))
    for key, pairs in without.items():
        assert [[[bos, *ctx], cont] for ctx, cont in pairs] == whole[key]


def test_a_chat_has_one_bos_whoever_brings_it(world: Path, reference: dict[str, Any]) -> None:
    bos = load_tokenizer(world / "chat").bos[0]
    for name in ("mmlu-2-turns", "mmlu-2-turns-refused", "mmlu-2-turns-old"):
        for [[ctx, _], *_] in their_requests(reference, BY_NAME[name]).values():
            assert ctx[0] == bos
            assert ctx.count(bos) == 1


def test_a_refused_system_message_takes_the_description_along(world: Path, reference: dict[str, Any]) -> None:
    for name, refused in (("mmlu-2-turns-system", False), ("mmlu-2-turns-refused", True)):
        job = BY_NAME[name]
        asked = ask(world, job, items_of(world, job))
        assert asked.system_dropped == refused
        assert ("Answer well." in asked.prompts[0]) != refused
        assert ("multiple choice questions" in asked.prompts[0]) != refused


# Negative controls: the comparison above must see each of these mistakes.


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("mmlu-5", {"shots": 4}),
        ("hellaswag-10", {"shots": 9}),
        ("mmlu-2-turns", {"chat": "single_turn"}),
        ("mmlu-2-turn", {"chat": "multi_turn"}),
        ("mmlu-2-turn", {"system_instruction": "Antworte kurz:"}),
        ("mmlu-2-turns-system", {"system_instruction": None}),
        ("mmlu-1-system", {"system_instruction": "Answer well.\n"}),
        ("hellaswag-1-system", {"system_instruction": None}),
        ("mmlu-5", {"compat": "lm_eval<=0.4.9.1"}),
        ("mmlu-5-old", {"compat": "lm_eval>=0.4.9.2"}),
    ],
)
def test_other_options_give_other_requests(
    world: Path, reference: dict[str, Any], name: str, changes: dict[str, Any]
) -> None:
    job = BY_NAME[name]
    wrong = replace(job, **changes)
    ours, theirs = our_requests(world, wrong, items_of(world, wrong)), their_requests(reference, job)
    assert ours.keys() == theirs.keys()
    assert all(ours[key] != theirs[key] for key in theirs)


def test_ranks_draw_other_examples(world: Path, reference: dict[str, Any]) -> None:
    job = BY_NAME["hellaswag-10-world2"]
    alone, theirs = our_requests(world, job, items_of(world, replace(job, world=1))), their_requests(reference, job)
    assert alone["hellaswag/0"] == theirs["hellaswag/0"]
    assert all(alone[key] != theirs[key] for key in theirs if key != "hellaswag/0")


def test_a_trailing_blank_that_stays_in_the_context_differs(world: Path, reference: dict[str, Any]) -> None:
    job = BY_NAME["hellaswag-0"]
    tokenizer = load_tokenizer(world / job.model)
    trailing = [item for item in items_of(world, job) if item.context != item.context.rstrip()]
    assert trailing
    for item in trailing:
        ctx = [*tokenizer.bos, *tokenizer.encode(item.context)]
        whole = [*tokenizer.bos, *tokenizer.encode(f"{item.context} {item.choices[1]}")]
        assert [ctx, whole[len(ctx) :]] != reference[job.name]["samples"][key_of(item)]["requests"][1]


def test_a_stripped_choice_differs(world: Path, reference: dict[str, Any]) -> None:
    job = BY_NAME["hellaswag-0"]
    stripped = [
        replace(item, choices=tuple(choice.strip() for choice in item.choices)) for item in items_of(world, job)
    ]
    assert our_requests(world, job, stripped) != their_requests(reference, job)


def test_a_delimiter_before_a_chats_answer_differs(world: Path, reference: dict[str, Any]) -> None:
    job = BY_NAME["mmlu-2-turns"]
    items = [replace(item, choices=tuple(f" {choice}" for choice in item.choices)) for item in items_of(world, job)]
    ours, theirs = our_requests(world, job, items), their_requests(reference, job)
    assert all(ours[key] != theirs[key] for key in theirs)
