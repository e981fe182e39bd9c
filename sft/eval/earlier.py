"""Models that were scored before: results of `sft eval`, or lm_eval's samples; and whether two may be compared."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from sft.errors import UserError
from sft.eval.results import Record, Scored, summarize
from sft.eval.samples import is_samples_folder, read_samples
from sft.eval.tasks.fields import choice_field, show, text_field
from sft.eval.tasks.files import iterate_jsonl, read_object
from sft.eval.tasks.item import NUM_CHOICES

T = TypeVar("T")

SCORE_FACTS = {
    "engine": "score both with `sft eval` and one engine, or both with lm_eval",
    "dtype": "score both with the same --dtype",
    "score_dtype": "score both with the same --score_dtype (lm_eval: softmax_dtype)",
    "max_length": "long items would be cut at different places: make max_position_embeddings in config.json equal",
    "compat": "BOS would differ: score both with the same --compat (lm_eval: version and add_bos_token)",
    "chat": "score both with the same --chat",
    "chat_template_sha256": "use the base model's chat template for both",
    "system_instruction": "score both with the same --system_instruction",
}
"""What two models must share, and what to do where they do not."""
HEADER_TYPES: dict[str, type | tuple[type, ...]] = {
    "model": str,
    "dtype": str,
    "max_length": int,
    "versions": dict,
}


def kind_of(folder: Path) -> Literal["model", "results", "lm_eval"]:
    """What a side of a comparison is. A folder that holds a model counts as one, whatever lies beside it.

    Raises:
        UserError: it is none of the three.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give a model, results of `sft eval`, or lm_eval's --output_path")
    if (folder / "config.json").is_file() or any(folder.glob("*.safetensors")):
        return "model"
    if (folder / "results.json").is_file() or any(folder.glob("items-*.jsonl")):
        return "results"
    if is_samples_folder(folder):
        return "lm_eval"
    inside = sorted(path.parent.name for path in folder.glob("*/results.json"))
    raise UserError(
        f"{folder}: neither a model (config.json) nor results of `sft eval` (results.json) nor lm_eval's output "
        f"(samples_<task>_<date>.jsonl, here or one folder below); "
        + (f"results lie one folder below: give {folder / inside[0]}" if inside else "give one of these folders")
    )


def read_scored(folder: Path, tasks: Sequence[str]) -> Scored:
    """Records of these tasks as `sft eval` or lm_eval left them; texts only where the samples hold them.

    Raises:
        UserError: a task is missing, or a file is torn, half-written or contradicts itself.
    """
    if kind_of(folder) == "lm_eval":
        return read_samples(folder, tasks)
    manifest = folder / "results.json"
    if not manifest.is_file():
        raise UserError(
            f"{folder}: has no results.json, which is written last: the run that wrote the items was interrupted; "
            "run it again"
        )
    results = read_object(manifest)
    header, stored = _dict_field(results, "header", manifest), _dict_field(results, "tasks", manifest)
    for key, kind in HEADER_TYPES.items():
        if not isinstance(header.get(key), kind):
            raise UserError(f"{manifest}: header field '{key}' is {show(header.get(key))}; score the model again")
    if missing := [task for task in tasks if task not in stored]:
        raise UserError(
            f"{manifest}: holds {', '.join(stored) or 'no task'}, not {missing[0]}; "
            "give --tasks without it, or score it"
        )
    records, facts = {}, {}
    for task in tasks:
        records[task], facts[task] = _read_task(folder, task, _dict_field(stored, task, manifest))
    return Scored({**header, "tasks": facts}, records, asked={})


def _read_task(folder: Path, task: str, stored: dict[str, Any]) -> tuple[list[Record], dict[str, Any]]:
    """Records of one task, and what results.json says of it besides its accuracies."""
    file = folder / f"items-{task}.jsonl"
    if not file.is_file():
        raise UserError(f"{folder / 'results.json'}: vouches for {file.name}, which is missing; score the model again")
    places: dict[tuple[str, int], str] = {}
    records = []
    for number, row in iterate_jsonl(file):
        place = f"{file} line {number}"
        record = _record(row, task, place)
        key = (record.subject, record.doc_id)
        if key in places:
            raise UserError(f"{places[key]} and {place}: {_name(record)} twice; score the model again")
        places[key] = place
        records.append(record)
    if not records or stored.get("n") != len(records) or not isinstance(stored.get("records_sha256"), str):
        raise UserError(
            f"{file}: {len(records)} items, but results.json counts {show(stored.get('n'))}; score the model again"
        )
    if stored["records_sha256"] != hashlib.sha256(file.read_bytes()).hexdigest():
        raise UserError(f"{file}: is not the file that results.json vouches for; score the model again")
    known = {*summarize(task, records), "records_sha256"}
    return records, {key: value for key, value in stored.items() if key not in known}


def _record(row: dict[str, Any], task: str, place: str) -> Record:
    if row.get("task") != task:
        raise UserError(f"{place}: field 'task' is {show(row.get('task'))}; need '{task}'")
    doc_id = row.get("doc_id")
    if not isinstance(doc_id, int) or isinstance(doc_id, bool) or doc_id < 0:
        raise UserError(f"{place}: field 'doc_id' is {show(doc_id)}; need a row number")
    record = Record(
        task=task,
        subject=text_field(row, "subject", place),
        doc_id=doc_id,
        gold=choice_field(row, "gold", place),
        lls=_four(row, "lls", float, "finite numbers", place),
        pred=choice_field(row, "pred", place),
        pred_norm=choice_field(row, "pred_norm", place),
        correct=_one(row, "correct", bool, place),
        correct_norm=_one(row, "correct_norm", bool, place),
        prompt_sha256=text_field(row, "prompt_sha256", place),
        cluster=text_field(row, "cluster", place),
        greedy=_four(row, "greedy", bool, "times true or false", place),
        chars=_four(row, "chars", int, "lengths", place),
        utf8_bytes=_four(row, "utf8_bytes", int, "lengths", place),
        gap=_one(row, "gap", float, place),
        near_tie=_one(row, "near_tie", bool, place),
    )
    _check_decision(record, place)
    return record


def _check_decision(record: Record, place: str) -> None:
    """Choices and correctness must follow from the log-likelihoods."""
    if min(record.chars) < 0 or not all(math.isfinite(ll) for ll in record.lls):
        raise UserError(f"{place}: lls {record.lls} and chars {record.chars} are no scores; score the model again")
    per_char = [ll / length if length else -math.inf for ll, length in zip(record.lls, record.chars, strict=True)]
    pred, pred_norm = record.lls.index(max(record.lls)), per_char.index(max(per_char))
    follows = (pred, pred_norm, pred == record.gold, pred_norm == record.gold)
    if (record.pred, record.pred_norm, record.correct, record.correct_norm) != follows:
        raise UserError(
            f"{place}: pred, pred_norm, correct or correct_norm does not follow from lls, which give "
            f"{', '.join(map(str, follows))}; score the model again"
        )


def _one(row: dict[str, Any], field: str, kind: type[T], place: str) -> T:
    value = row.get(field)
    if not isinstance(value, kind):
        raise UserError(f"{place}: field '{field}' is {show(value)}; need a {kind.__name__}; score the model again")
    return value


def _four(row: dict[str, Any], field: str, kind: type[T], need: str, place: str) -> tuple[T, ...]:
    value = row.get(field)
    if not isinstance(value, list) or len(value) != NUM_CHOICES or not all(type(one) is kind for one in value):
        raise UserError(f"{place}: field '{field}' is {show(value)}; need {NUM_CHOICES} {need}; score the model again")
    return tuple(value)


def _dict_field(parent: dict[str, Any], field: str, file: Path) -> dict[str, Any]:
    value = parent.get(field)
    if not isinstance(value, dict):
        raise UserError(f"{file}: '{field}' is {show(value)}, no JSON object; score the model again")
    return value


def check_same_items(base: Scored, tuned: Scored, base_name: str, tuned_name: str) -> Scored:
    """Refuse to compare models that were not asked the same in the same way; `tuned` in the order of `base`.

    A fact is compared where both sides know it: lm_eval's samples do not tell token ids.

    Raises:
        UserError: settings, items, answers, prompts, choices or token ids differ.
    """
    for fact, advice in SCORE_FACTS.items():
        ours, theirs = base.header.get(fact), tuned.header.get(fact)
        if fact == "chat_template_sha256" and base.header.get("chat") == "none":
            continue  # no template was used: the tuned model may have got one
        is_known = all(fact in side.header for side in (base, tuned)) and (
            fact == "system_instruction" or (ours is not None and theirs is not None)
        )
        if is_known and ours != theirs:
            raise UserError(f"{fact}: {base_name} has {show(ours)}, {tuned_name} {show(theirs)}; {advice}")
    names = f"{base_name} and {tuned_name}"
    if lone := sorted(set(base.records) ^ set(tuned.records)):
        raise UserError(f"{names}: only one of them has {lone[0]}; give --tasks without it, or score it for the other")
    ordered, asked = {}, {}
    for task, records in base.records.items():
        order = _match_items(records, tuned.records[task], base_name, tuned_name)
        ordered[task] = [tuned.records[task][place] for place in order]
        _check_same_questions(task, base, tuned, ordered[task], names)
        if task in tuned.asked:
            asked[task] = [tuned.asked[task][place] for place in order]
            _check_same_texts(task, base, asked[task], names)
    return replace(tuned, records=ordered, asked=asked)


def _match_items(base: Sequence[Record], tuned: Sequence[Record], base_name: str, tuned_name: str) -> list[int]:
    """For each item of base its place in tuned."""
    places = {(record.subject, record.doc_id): place for place, record in enumerate(tuned)}
    known = {(record.subject, record.doc_id) for record in base}
    lone = [(record, base_name, tuned_name) for record in base if (record.subject, record.doc_id) not in places]
    lone += [(record, tuned_name, base_name) for record in tuned if (record.subject, record.doc_id) not in known]
    if lone:
        record, owner, other = lone[0]
        raise UserError(
            f"{record.task}: {owner} holds {_name(record)}, {other} does not ({len(base)} and {len(tuned)} items); "
            "score both with the same data and --limit"
        )
    return [places[record.subject, record.doc_id] for record in base]


def _check_same_questions(task: str, base: Scored, tuned: Scored, ordered: Sequence[Record], names: str) -> None:
    before, after = (side.header["tasks"].get(task, {}) for side in (base, tuned))

    def differ(fact: str) -> bool:
        ours, theirs = before.get(fact), after.get(fact)
        return ours not in (None, "") and theirs not in (None, "") and ours != theirs

    if differ("shots"):
        raise UserError(
            f"{task}: {names} were given {before['shots']} and {after['shots']} solved examples; "
            f"score both with the same --shots.{task}"
        )
    for ours, theirs in zip(base.records[task], ordered, strict=True):
        if ours.prompt_sha256 != theirs.prompt_sha256:
            raise UserError(
                f"{task}: {names} were given other prompts, first {_name(ours)}; score both with the same data, "
                "shots, chat template and system message"
            )
        if (ours.gold, ours.chars, ours.utf8_bytes) != (theirs.gold, theirs.chars, theirs.utf8_bytes):
            raise UserError(
                f"{task}: {names} have another answer or other choices at {_name(ours)}; score both with the same data"
            )
    if differ("items_sha256"):
        raise UserError(f"{task}: {names} were given other choices or answers; score both with the same data")
    if differ("requests_sha256"):
        raise UserError(
            f"{task}: the tokenizers of {names} gave different ids for the same texts; was BOS lost, or a token added, "
            "when the tuned model was saved? Use the base model's tokenizer files, and score again"
        )


def _check_same_texts(task: str, base: Scored, asked: Sequence[Any], names: str) -> None:
    """Endings are no part of the prompt, and may differ at equal lengths."""
    for record, ours, theirs in zip(base.records[task], base.asked.get(task, asked), asked, strict=True):
        if ours.choices != theirs.choices:
            raise UserError(
                f"{task}: {names} were given other choices at {_name(record)}; score both with the same data"
            )


def _name(record: Record) -> str:
    return f"{record.subject} item {record.doc_id}"
