"""From options and a model folder to records on disk: what `sft eval` and `sft drift` share."""

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sft.errors import UserError
from sft.eval import earlier, weights
from sft.eval.finished import (
    FOLDER,
    IDENTITY,
    Kept,
    check_same,
    close_unfinished,
    open_unfinished,
    read_identity,
)
from sft.eval.header import describe_setting, identity
from sft.eval.ids_cache import read_or_build
from sft.eval.options import ScoreOptions, ShotsSection
from sft.eval.ranks import Ranks, join_ranks
from sft.eval.requests import Prompting, Request, TokenRequests, count_truncated, digest_requests
from sft.eval.results import Asked, Record, Scored, make_folder, make_records, write_results
from sft.eval.score import check_vocabulary, compare_engines, score_requests, why_not_packed
from sft.eval.tasks import data, hellaswag, mmlu
from sft.eval.tasks.item import NUM_CHOICES, Item, digest_items
from sft.eval.tree import Bin, distinct_rows, plan_packed, plan_plain
from sft.pretrained import choose_dtype
from sft.tokenizer import Tokenizer, load_tokenizer

NOT_CONVERTED = (
    "NOTE: the tokenizer is a bare tokenizer.model: its ids are sentencepiece's, as the model was trained; lm_eval "
    "would score those of transformers' conversion, which differ on some texts"
)
SIGNIFICAND_BITS = {torch.float32: 24, torch.bfloat16: 8, torch.float16: 11}


@dataclass(frozen=True)
class Questions:
    """The items of every task, and for each a line that says which files they came from."""

    items: dict[str, list[Item]]
    sources: dict[str, str]


@dataclass(frozen=True)
class Prepared:
    """A model's requests, before its weights are read."""

    folder: str
    tokenizer: Tokenizer
    config: Any
    max_length: int
    questions: Questions
    asked: dict[str, TokenRequests]
    header: dict[str, Any]
    """What the scores depend on; see sft.eval.header."""

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in."""
        dtype = getattr(torch, self.header["dtype"])
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def is_partitioned(self) -> bool:
        """The weights are spread over the ranks, which run their forwards together."""
        return bool(self.header["placement"] == "zero3")


def load_items(options: ScoreOptions) -> Questions:
    """What is asked.

    Raises:
        UserError: data are missing, malformed, or too few for the shots.
    """
    items: dict[str, list[Item]] = {}
    sources: dict[str, str] = {}
    for task in dict.fromkeys(options.tasks):
        if task == "mmlu":
            subjects, source = data.load_mmlu(Path(options.data))
            built = [mmlu.build_items(subject, options.shots.mmlu, options.limit) for subject in subjects]
            items[task] = [item for group in built for item in group]
        else:
            shots = options.shots
            validation, train, source = data.load_hellaswag(Path(options.data), need_train=shots.hellaswag > 0)
            items[task] = hellaswag.build_items(
                validation,
                train,
                shots.hellaswag,
                options.limit,
                draw=shots.hellaswag_draw,
                world=shots.hellaswag_world,
            )
        sources[task] = source
    return Questions(items, sources)


def prepare(folder: str, questions: Questions, options: ScoreOptions, ranks: Ranks) -> Prepared:
    """Tokenise the items for a model, and say what its scores will depend on. Collective.

    Raises:
        UserError: config or tokenizer are missing, or the tokenizer cannot be scored.
    """
    config = weights.read_config(folder)  # first: the tokenizer's loader reads it too, and would be blamed for it
    tokenizer = load_tokenizer(folder)
    max_length = weights.read_max_length(config, tokenizer)
    asked: dict[str, TokenRequests] = ranks.on_first(lambda: _tokenise(questions, tokenizer, max_length, options))
    digest = ranks.on_first(lambda: weights.digest_weights(folder))
    placement = weights.choose_placement(options.placement, folder, choose_dtype(options.dtype, ranks.device), ranks)
    header = describe_setting(folder, tokenizer, options, ranks) | {
        "max_length": max_length,
        "weights_sha256": digest,
        "placement": placement,
        "tasks": {
            task: {
                **_shots(task, options.shots),
                "items_sha256": digest_items(items),
                "requests_sha256": digest_requests(asked[task].requests),
                "system_dropped": asked[task].system_dropped,
                "truncated_items": count_truncated(asked[task].requests, max_length),
                "source": questions.sources[task],
            }
            for task, items in questions.items.items()
        },
    }
    return Prepared(folder, tokenizer, config, max_length, questions, asked, header)


def describe(prepared: Prepared) -> list[str]:
    """What a user should know before the scoring: data, items that are cut, prompts without their description."""
    lines = [NOT_CONVERTED] if prepared.tokenizer.sentencepiece is not None else []
    for task, facts in prepared.header["tasks"].items():
        lines.append(facts["source"])
        if facts["truncated_items"]:
            lines.append(
                f"{task}: {facts['truncated_items']} of {len(prepared.questions.items[task])} items are longer than "
                f"the model's {prepared.max_length} tokens and lose their beginning"
            )
        if facts["system_dropped"]:
            lines.append(f"{task}: the chat template takes no system message: prompts are without their description")
    return lines


def read_finished(out: Path, prepared: Prepared) -> Scored | None:
    """What an earlier run with the same settings has left in `out`; None where there are no results.

    Raises:
        UserError: the results are of other settings, or damaged.
    """
    if not (out / "results.json").is_file():
        return None
    scored = earlier.read_scored(out, list(prepared.questions.items))
    check_same(identity(scored.header), identity(prepared.header), f"--out {out} holds results")
    return Scored(scored.header, scored.records, _texts(prepared))


def score(prepared: Prepared, model: Any, options: ScoreOptions, ranks: Ranks, out: Path) -> Scored:
    """Score all requests and, on the first rank, write the results. Collective.

    Raises:
        UserError: `out` holds an interrupted run with other settings or cannot be written, the model cannot read the
            ids, or its scores are not finite.
    """
    ranks.on_first(lambda: _open(out, prepared.header))
    engine, fallback = _choose_engine(prepared, model, options, ranks)
    header = prepared.header | {"engine": engine, "fallback": fallback}
    records: dict[str, list[Record]] = {}
    for task, asked in prepared.asked.items():
        bins = plan(asked.requests, prepared.max_length, options, engine)
        started_s = time.monotonic()
        try:
            scores = score_requests(
                model,
                bins,
                len(asked.requests),
                ranks=ranks,
                native=options.score_dtype == "native",
                lockstep=prepared.is_partitioned,
                kept=Kept(out, f"{task}-{engine}", ranks.rank),
                label=f"{task}: {prepared.folder}",
            )
        except UserError:  # on all ranks: what is not finite is not worth keeping, and must not bind the next settings
            ranks.on_first(lambda: close_unfinished(out))
            raise
        bits = SIGNIFICAND_BITS[prepared.dtype]
        records[task] = make_records(prepared.questions.items[task], asked.prompts, scores, bits)
        header["tasks"][task] |= {
            "near_ties": sum(record.near_tie for record in records[task]),
            "tokens": sum(bin.num_tokens for bin in bins),
        }
        if ranks.rank == 0:
            seconds = time.monotonic() - started_s
            tell([_describe_speed(f"{prepared.folder}: {task}", asked.requests, prepared.max_length, bins, seconds)])
    ranks.on_first(lambda: _write(out, header, records))
    return Scored(header, records, _texts(prepared))


def plan(requests: Sequence[Request], max_length: int, options: ScoreOptions, engine: str) -> list[Bin]:
    """The bins of an engine."""
    rows = distinct_rows(requests, max_length)
    if engine == "plain":
        return plan_plain(rows, options.tokens_per_batch, options.batch_size)
    return plan_packed(rows, options.tokens_per_batch)


def score_model(folder: str, options: ScoreOptions) -> Scored:
    """Scores of one model, from options.out where they are there already; alone or with the launcher's other ranks.

    Raises:
        UserError: data, model, tokenizer or options.out cannot be used.
    """
    with join_ranks() as ranks:
        ranks.on_first(lambda: make_folder(Path(options.out)))
        questions = ranks.on_first(lambda: load_items(options))
        prepared = prepare(folder, questions, options, ranks)
        if ranks.rank == 0:
            tell(describe(prepared))
        ranks.on_first(lambda: check_reusable({Path(options.out): prepared}))
        finished = ranks.on_first(lambda: read_finished(Path(options.out), prepared))
        if finished is not None:
            if ranks.rank == 0:
                tell([f"{options.out} holds these scores already: nothing is computed again"])
            return finished
        with weights.open_model(folder, prepared.dtype, prepared.header["placement"], ranks) as model:
            return score(prepared, model, options, ranks, Path(options.out))


def tell(lines: Sequence[str]) -> None:
    """Print lines as they are. Where the reader has left, the scores, and the gate, are wanted all the same."""
    if sys.stdout is None:  # closed by whoever started this
        return
    text, encoding = "".join(f"{line}\n" for line in lines), sys.stdout.encoding or "utf-8"
    try:
        sys.stdout.write(text.encode(encoding, "replace").decode(encoding))  # a Δ must not cost the exit code
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _shots(task: str, shots: ShotsSection) -> dict[str, Any]:
    if task == "mmlu":
        return {"shots": shots.mmlu}
    return {"shots": shots.hellaswag, "draw": shots.hellaswag_draw, "world": shots.hellaswag_world}


def check_reusable(places: dict[Path, Prepared]) -> None:
    """Refuse folders that hold scores of other settings, whole or interrupted, before hours are spent.

    Raises:
        UserError: naming the setting that differs, or that a folder cannot be written.
    """
    for out, prepared in places.items():
        make_folder(out)
        read_finished(out, prepared)
        file = out / FOLDER / IDENTITY
        if file.is_file():
            check_same(read_identity(file), identity(prepared.header), f"--out {out} holds an interrupted run")


def _tokenise(
    questions: Questions, tokenizer: Tokenizer, max_length: int, options: ScoreOptions
) -> dict[str, TokenRequests]:
    prompting = Prompting(options.chat, options.system_instruction, options.compat)
    return {task: read_or_build(items, tokenizer, max_length, prompting) for task, items in questions.items.items()}


def _open(out: Path, header: dict[str, Any]) -> None:
    if open_unfinished(out, identity(header)):
        tell([f"{out}: goes on from what an interrupted run had finished"])


def _write(out: Path, header: dict[str, Any], records: dict[str, list[Record]]) -> None:
    write_results(out, header, records)
    close_unfinished(out)


def _choose_engine(prepared: Prepared, model: Any, options: ScoreOptions, ranks: Ranks) -> tuple[str, str | None]:
    """(engine, why it is not the one that was asked for). Collective."""
    requests = [request for asked in prepared.asked.values() for request in asked.requests]
    check_vocabulary(model, requests)
    if options.engine == "plain":
        return "plain", None
    longest = max(len(request.ctx_ids) + len(request.cont_ids) - 1 for request in requests)
    reason = why_not_packed(prepared.config, min(longest, prepared.max_length))
    found = []
    if reason is None:
        for task, asked in prepared.asked.items():
            difference, limit = compare_engines(
                model, asked.requests, prepared.max_length, options.tokens_per_batch, ranks
            )
            found.append(f"{difference:.1e} on {task} (limit {limit:.0e})")
            if difference > limit:
                reason = f"scores differ by {difference:.2g} nats on {task} (limit {limit:.2g})"
                break
    if ranks.rank == 0:
        shown = f"{prepared.folder}: engine probe: packed against plain {', '.join(found)}"
        if reason is not None:
            shown = f"WARNING: {prepared.folder}: {reason}: engine plain is used, which takes several times as long"
        tell([shown])
    return ("packed", None) if reason is None else ("plain", reason)


def _describe_speed(
    label: str, requests: Sequence[Request], max_length: int, bins: Sequence[Bin], seconds: float
) -> str:
    computed = sum(bin.num_tokens for bin in bins)
    asked = sum(len(row.ids) for row in distinct_rows(requests, max_length))
    return (
        f"{label}: {len(requests) // NUM_CHOICES:,} items in {seconds:.1f} s; {computed:,} tokens computed, "
        f"{asked / computed:.1f}x fewer than lm_eval's"
    )


def _texts(prepared: Prepared) -> dict[str, list[Asked]]:
    return {
        task: [Asked(item.question, item.choices) for item in items] for task, items in prepared.questions.items.items()
    }


def check_comparable(base: Prepared, tuned: Prepared) -> None:
    """Refuse to score two models that would be asked different things, before either is loaded.

    Raises:
        UserError: context length or token ids differ.
    """
    if base.max_length != tuned.max_length:
        raise UserError(
            f"max_position_embeddings: {base.folder} has {base.max_length}, {tuned.folder} has {tuned.max_length}; "
            "long items would be cut at different places: make config.json equal"
        )
    for task in base.asked:
        if base.header["tasks"][task]["requests_sha256"] != tuned.header["tasks"][task]["requests_sha256"]:
            where = _first_difference(base.questions.items[task], base.asked[task].requests, tuned.asked[task].requests)
            raise UserError(
                f"{task}: the tokenizers of {base.folder} and {tuned.folder} give different ids, first at {where}; "
                "were the tokenizer's files converted, BOS lost, or a token added when the tuned model was saved? "
                "Use the base model's tokenizer files"
            )


def _first_difference(items: Sequence[Item], base: Sequence[Request], tuned: Sequence[Request]) -> str:
    for number, (before, after) in enumerate(zip(base, tuned, strict=True)):
        ids_before, ids_after = [*before.ctx_ids, *before.cont_ids], [*after.ctx_ids, *after.cont_ids]
        if ids_before != ids_after or len(before.cont_ids) != len(after.cont_ids):
            shorter = min(len(before.ctx_ids), len(after.ctx_ids))
            pairs = enumerate(zip(ids_before, ids_after, strict=False))
            place = next((at for at, (one, other) in pairs if one != other), shorter)
            shown = " against ".join(str([int(id) for id in ids[place : place + 4]]) for ids in (ids_before, ids_after))
            return f"{items[number // NUM_CHOICES].name} (from token {place} on: {shown})"
    return "no item"
