"""lm_eval's --log_samples output as records: samples_<task>_<date>.jsonl beside results_<date>.json."""

import hashlib
import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sft.errors import UserError
from sft.eval.harness_run import HarnessRun, read_harness_run
from sft.eval.results import Asked, Record, Scored, Scores, make_records
from sft.eval.tasks.data import describe_rows, describe_subjects
from sft.eval.tasks.fields import INDEX, LETTERS_OR_INDEX, choice_field, four_texts_field, show, text_field
from sft.eval.tasks.files import iterate_jsonl
from sft.eval.tasks.item import NUM_CHOICES, Item
from sft.eval.tasks.mmlu import LETTERS, category_of

DATE = r"\d{4}-\d{2}-\d{2}T\d{2}-\d{2}-\d{2}(?:\.\d+)?"
SAMPLES_NAME = re.compile(rf"samples_(?P<name>.+)_(?P<date>{DATE})\.jsonl")
RESULTS_NAME = re.compile(rf".+_(?P<date>{DATE})\.json")
SIGNIFICAND_BITS = {"float32": 24, "float16": 11, "bfloat16": 8}
DESCRIPTIVE = {"device", "batch_size", "limit", "versions", "parity_with"}
"""What two runs may differ in and still be one model's scores."""


@dataclass(frozen=True)
class _SamplesFile:
    path: Path
    name: str
    """lm_eval's name of the task: hellaswag, mmlu_<subject>."""
    date: str

    @property
    def subject(self) -> str:
        return self.name.removeprefix("mmlu_")


def is_samples_folder(folder: Path) -> bool:
    """Whether lm_eval wrote here, or one folder below, as it does with --output_path."""
    return any(
        SAMPLES_NAME.fullmatch(path.name) or RESULTS_NAME.fullmatch(path.name)
        for pattern in ("*", "*/*")
        for path in folder.glob(pattern)
    )


def read_samples(folder: Path, tasks: Sequence[str]) -> Scored:
    """Records of these tasks with their texts: of each lm_eval task the newest samples, by subject and number.

    Raises:
        UserError: a task is missing, a file is torn or half-written, or two files are of different models or settings.
    """
    home = _find_home(folder)
    newest, num_older = _newest(home)
    runs: dict[str, HarnessRun] = {}
    records: dict[str, list[Record]] = {}
    asked: dict[str, list[Asked]] = {}
    facts: dict[str, dict[str, Any]] = {}
    for task in tasks:
        files = [file for file in newest if _task_of(file.name) == task]
        if not files:
            raise UserError(
                f"{home}: holds no samples of {task}; run lm_eval with --tasks {task} --log_samples, "
                "or give --tasks without it"
            )
        pairs, skipped = [], Counter[str]()
        for file in files:
            if file.date not in runs:
                runs[file.date] = _read_run(home, file)
            found, other_filters = _read_file(file, task, runs[file.date])
            pairs += found
            skipped += other_filters
        records[task], asked[task] = [record for record, _ in pairs], [text for _, text in pairs]
        facts[task] = {
            "shots": _shots(files, runs),
            "items_sha256": "",
            "requests_sha256": "",
            "source": _describe(home, files, records[task], num_older, skipped),
            "truncated_items": None,
            "near_ties": sum(record.near_tie for record in records[task]),
        }
    return Scored({**_common_header(list(runs.values())), "tasks": facts}, records, asked)


def _find_home(folder: Path) -> Path:
    """The one folder that holds samples."""
    homes = {
        path.parent for pattern in ("*", "*/*") for path in folder.glob(pattern) if SAMPLES_NAME.fullmatch(path.name)
    }
    if not homes:
        raise UserError(
            f"{folder}: holds lm_eval's results but no samples_<task>_<date>.jsonl; run it with --log_samples"
        )
    if len(homes) > 1:
        first, second, *_ = sorted(homes)
        raise UserError(
            f"{folder}: holds samples of {len(homes)} models; give one of their folders: {first} or {second}"
        )
    return homes.pop()


def _newest(home: Path) -> tuple[list[_SamplesFile], int]:
    """The newest file of every task, by name, and how many older ones there are."""
    by_name: dict[str, list[_SamplesFile]] = defaultdict(list)
    for path in home.iterdir():
        if (match := SAMPLES_NAME.fullmatch(path.name)) and _task_of(match["name"]):
            by_name[match["name"]].append(_SamplesFile(path, match["name"], match["date"]))
    newest = [max(by_name[name], key=lambda file: file.date) for name in sorted(by_name)]
    return newest, sum(map(len, by_name.values())) - len(newest)


def _task_of(name: str) -> str | None:
    """mmlu, hellaswag, or None for lm_eval's other tasks (mmlu_anatomy_generative is none of ours)."""
    if name == "hellaswag":
        return name
    return "mmlu" if name.startswith("mmlu_") and category_of(name.removeprefix("mmlu_")) else None


def _read_run(home: Path, file: _SamplesFile) -> HarnessRun:
    """lm_eval writes the results first: with `--output_path x.json` as x_<date>.json."""
    found = sorted(home.glob(f"*_{file.date}.json"))
    if not found:
        raise UserError(
            f"{file.path}: no results_{file.date}.json beside it, which says what the samples depend on; "
            "copy it here, too"
        )
    return read_harness_run(found[0])


def _read_file(file: _SamplesFile, task: str, run: HarnessRun) -> tuple[list[tuple[Record, Asked]], Counter[str]]:
    """Records and texts by doc_id (several ranks write theirs one after the other), and how many rows of other filters
    were passed over."""
    bits = SIGNIFICAND_BITS.get(run.header["dtype"], SIGNIFICAND_BITS["bfloat16"])  # unknown: the widest ties
    pairs: dict[int, tuple[Record, Asked]] = {}
    skipped = Counter[str]()
    for number, row in iterate_jsonl(file.path):
        place = f"{file.path} line {number}"
        used = row.get("filter", "none")
        if used != "none":
            skipped[str(used)] += 1
            continue
        item, asked = _item(row, task, file.subject, place)
        record = _record(row, item, _prompt(row, item.choices, place), bits, place)
        if item.doc_id in pairs:
            raise UserError(f"{place}: doc_id {item.doc_id} for the second time; two runs in one file? Score again")
        pairs[item.doc_id] = (record, asked)
    expected = run.counts.get(file.name, len(pairs))
    if not pairs or len(pairs) != expected:
        raise UserError(
            f"{file.path}: {len(pairs)} items, but {run.file.name} counts {expected}; "
            "the file is not whole: get it again"
        )
    return [pairs[doc_id] for doc_id in sorted(pairs)], skipped


def _item(row: dict[str, Any], task: str, subject: str, place: str) -> tuple[Item, Asked]:
    doc_id, doc = row.get("doc_id"), row.get("doc")
    if not isinstance(doc_id, int) or isinstance(doc_id, bool) or doc_id < 0:
        raise UserError(f"{place}: field 'doc_id' is {show(doc_id)}; need a row number")
    if not isinstance(doc, dict):
        raise UserError(f"{place}: field 'doc' is {show(doc)}; need the row that was asked")
    texts = four_texts_field(doc, "choices", place)
    if task == "mmlu":
        if row.get("target") in LETTERS:
            row = row | {"target": LETTERS.index(row["target"])}
        gold = choice_field(row, "target", place, LETTERS_OR_INDEX)
        asked = Asked(text_field(doc, "question", place).strip(), texts)
        choices, cluster = LETTERS, subject
        told = doc.get("subject")
        if told and (not isinstance(told, str) or told.replace(" ", "_") != subject):
            raise UserError(f"{place}: the row's subject is {show(told)}, the file's {subject!r}; get the file again")
    else:
        gold = choice_field(row, "target", place, INDEX)
        asked = Asked(text_field(doc, "query", place), texts)
        choices, cluster = texts, str(doc.get("source_id") or f"row {doc_id}")
    question = asked.question  # where it stands in the prompt does not matter here: the prompt is in the row, too
    return Item(task, subject, doc_id, "", (), question, choices, gold, cluster), asked


def _prompt(row: dict[str, Any], choices: Sequence[str], place: str) -> str:
    """The prompt, which the four requests share; each continuation is the choice, behind a blank in plain text."""
    arguments = row.get("arguments")
    names = [f"gen_args_{number}" for number in range(NUM_CHOICES)]
    if not isinstance(arguments, dict) or set(arguments) != set(names):
        found = sorted(arguments) if isinstance(arguments, dict) else arguments
        raise UserError(f"{place}: field 'arguments' is {show(found)}; need those of {NUM_CHOICES} choices")
    pairs = []
    for name in names:
        pair = arguments[name]
        if not isinstance(pair, dict):
            raise UserError(f"{place}: field '{name}' is {show(pair)}; need arg_0 and arg_1")
        pairs.append((text_field(pair, "arg_0", place), text_field(pair, "arg_1", place)))
    prompt, first = pairs[0]
    delimiter = first.removesuffix(choices[0])
    for (other, continuation), choice, name in zip(pairs, choices, names, strict=True):
        if other != prompt:
            raise UserError(f"{place}: {name} has another prompt than gen_args_0; get the file again")
        if delimiter not in ("", " ") or continuation != delimiter + choice:
            raise UserError(
                f"{place}: {name} continues with {show(continuation)}; need the choice {show(choice)}, behind a "
                "blank in plain text"
            )
    digest = hashlib.sha256(prompt.encode()).hexdigest()
    if row.get("prompt_hash", digest) != digest:
        raise UserError(f"{place}: prompt_hash is not the prompt's; the line was changed: get the file again")
    return prompt


def _record(row: dict[str, Any], item: Item, prompt: str, significand_bits: int, place: str) -> Record:
    answers = row.get("resps")
    if not isinstance(answers, list) or len(answers) != NUM_CHOICES:
        raise UserError(f"{place}: field 'resps' is {show(answers)}; need {NUM_CHOICES} answers")
    pairs = [_answer(answer, place) for answer in answers]
    scores = Scores(np.array([[ll for ll, _ in pairs]]), np.array([[greedy for _, greedy in pairs]]))
    [record] = make_records([item], [prompt], scores, significand_bits)
    for metric in ("acc", "acc_norm"):
        told = row.get(metric)
        if told is not None and (not isinstance(told, int | float) or told != record.is_right(metric)):
            raise UserError(
                f"{place}: doc_id {item.doc_id} has {metric} {show(told)}, but its log-likelihoods and target give "
                f"{float(record.is_right(metric))}; the line was changed: get the file again"
            )
    return record


def _answer(answer: Any, place: str) -> tuple[float, bool]:
    """[["-13.73", "False"]]: log-likelihood, and whether greedy decoding would have written it."""
    match answer:
        case [[(str() | float() | int()) as ll, ("True" | "False" | True | False) as greedy]]:
            pass
        case _:
            raise UserError(f"{place}: field 'resps' holds {show(answer)}; need a log-likelihood and True or False")
    try:
        value = float(ll)
    except (ValueError, OverflowError):
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{place}: field 'resps' holds the log-likelihood {show(ll)}; need a finite number")
    return value, str(greedy) == "True"


def _shots(files: Sequence[_SamplesFile], runs: dict[str, HarnessRun]) -> int | None:
    told = {file.name: runs[file.date].shots.get(file.name) for file in files}
    first = files[0].name
    for name, shots in told.items():
        if shots != told[first]:
            raise UserError(
                f"{files[0].path.parent}: {first} was given {told[first]} solved examples, {name} {shots}; "
                "keep the files of one run"
            )
    return told[first]


def _common_header(runs: Sequence[HarnessRun]) -> dict[str, Any]:
    """The newest run's; older ones must be of the same model and settings."""
    newest = max(runs, key=lambda run: run.file.name)
    for run in runs:
        for fact, value in newest.header.items():
            if fact not in DESCRIPTIVE and run.header[fact] != value:
                raise UserError(
                    f"{run.file} and {newest.file}: {fact} is {show(run.header[fact])} and {show(value)}; "
                    "keep the files of one run"
                )
    return newest.header


def _describe(
    home: Path, files: Sequence[_SamplesFile], records: Sequence[Record], num_older: int, skipped: Counter[str]
) -> str:
    if files[0].name == "hellaswag":
        counts = describe_rows(len(records), "validation")
    else:
        counts = describe_subjects([file.subject for file in files], len(records))
    dates = sorted({file.date for file in files})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    line = f"lm_eval samples from {home}, {when}: {counts}"
    if num_older:
        line += f"; {num_older} older samples file{'s' * (num_older > 1)} left out"
    if skipped:
        rows = ", ".join(f"{count} of {name}" for name, count in sorted(skipped.items()))
        line += f"; rows of other filters left out, which score something else: {rows}"
    return line
