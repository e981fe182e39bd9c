"""`sft prep`: Alpaca-style JSON to packed shards. The same bytes for any number of workers.

read -> encode and prove (worker processes) -> weights, duplicates, held-out rows -> pack -> shards and report.
"""

import hashlib
import json
import os
import shutil
import signal
import sys
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from data_prep import filters, template
from data_prep.blocks import Block, Encoder, RawBlock, encode_blocks, read_blocks
from data_prep.dedup import first_occurrences
from data_prep.encode import compare_with_reference, eos_of, probe_ids
from data_prep.formats import file_digest, parse_row
from data_prep.mixture import choose_heldout, copies
from data_prep.pack import pack
from data_prep.report import SourceFate, describe_split, escape_unprintable, summary_tables
from data_prep.shards import Documents, open_shards, read_manifest, write_json, write_shards
from sft.config import PrepConfig
from sft.errors import UserError
from sft.settings import load
from sft.tokenizer import Tokenizer, load_tokenizer

CODE_VERSION = 2
"""Raised whenever the same input would give other bytes."""
REFERENCE_TEXTS = 200
PLAIN_PROGRESS_EVERY_S = 10.0


@dataclass(frozen=True, eq=False)
class Corpus:
    """All documents of all sources, in row order."""

    documents: Documents
    row_numbers: NDArray[np.int64]
    keys: NDArray[np.uint64]


def main(argv: Sequence[str]) -> None:
    """Entry of `sft prep` and `python -m data_prep`.

    Raises:
        UserError: bad options, input, tokenizer or output folder.
    """
    config = load(PrepConfig, argv, prog="sft prep")
    escape_unprintable(sys.stdout)
    started_s = time.perf_counter()
    out = Path(os.path.realpath(config.out))
    tokenizer = load_tokenizer(config.tokenizer)
    eos_of(tokenizer)
    key = content_key(config, tokenizer)
    if is_up_to_date(out, key, with_heldout=config.heldout > 0):
        print(f"{config.out} is up to date (content key {key})")
        return
    with sigterm_unwinds():
        report = build(config, tokenizer, key, out)
    report["timings_s"]["total"] = time.perf_counter() - started_s
    for table in summary_tables(report):
        Console().print(table)
    print(f"wrote {config.out} in {report['timings_s']['total']:.1f} s; content key {key}")


def build(config: PrepConfig, tokenizer: Tokenizer, key: str, out: Path) -> dict[str, Any]:
    """Run the whole job, write `out`, and return what report.json holds.

    Raises:
        UserError: bad input, no row left for training, or `out` cannot be written.
    """
    clock = _Clock()
    fates = [
        SourceFate(source.name or Path(source.path).stem, source.path, source.format, source.weight)
        for source in config.sources
    ]
    texts: list[str] = []
    encoder = Encoder(tokenizer, config.seq_len, config.overlong)
    raw = _remember_texts(texts, _raw_blocks(config))
    corpus = gather(_progress(encode_blocks(raw, encoder, _num_workers(config))), fates)
    clock.lap("encode")
    reference = compare_with_reference(tokenizer, texts)
    _tell_disagreement(reference)
    splits = choose(config, corpus, fates)
    clock.lap("choose")
    shared = describe_build(config, tokenizer, key, fates, reference)
    described = {}
    with new_folder(out) as temporary:
        for split, index in splits.items():
            documents = corpus.documents.take(index)
            packs = pack(documents.lengths, config.seq_len)
            manifest = write_shards(temporary / split, documents, packs, {**shared, "split": split})
            described[split] = describe_split(manifest, documents.lengths)
        clock.lap("pack_and_write")
        report = {
            "content_key": key,
            "sources": [fate.describe() for fate in fates],
            "splits": described,
            "tokenizer_reference": reference,
            "timings_s": {**clock.laps_s, "rows_per_s": sum(fate.rows for fate in fates) / clock.laps_s["encode"]},
        }
        write_json(temporary / "report.json", report)
    return report


def content_key(config: PrepConfig, tokenizer: Tokenizer) -> str:
    """sha256 over all that the shards' bytes follow from: input bytes, tokenizer, template, settings, code version."""
    settings = config.model_dump(mode="json", exclude={"sources", "tokenizer", "out", "workers", "engine"})
    identity = {
        "code_version": CODE_VERSION,
        "sources": [
            [source.name or Path(source.path).stem, source.format, source.weight, file_digest(source.path)]
            for source in config.sources
        ],
        "tokenizer": tokenizer.digest,
        "template": [template.ALPACA_WITH_INPUT, template.ALPACA_WITHOUT_INPUT],
        "settings": settings,
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def is_up_to_date(out: Path, key: str, with_heldout: bool) -> bool:
    """True where `out` already holds the whole output of this very job, False where it is free.

    Raises:
        UserError: `out` holds something else, a torn shard set, or only a part of the output.
        OSError: `out` cannot be looked at: its name is too long, or a loop of symbolic links.
    """
    try:
        out.stat()
    except FileNotFoundError:
        return False
    if out.is_dir() and not any(out.iterdir()):
        return False
    if not (out / "train" / "manifest.json").is_file():
        raise UserError(f"out {out}: exists and is no output of sft prep; choose another folder")
    found = read_manifest(out / "train").get("content_key")
    if found != key:
        raise UserError(
            f"out {out}: holds shards of other input or settings (content key {str(found)[:12]}, now {key[:12]}); "
            "remove it or choose another folder"
        )
    splits = ("train", "heldout") if with_heldout else ("train",)
    for name in (*splits, "report.json"):
        if not (out / name).exists():
            raise UserError(f"out {out}: {name} is missing, so it is not the whole output; remove {out} and run again")
    for split in splits:
        open_shards(out / split)
    return True


def gather(blocks: Iterable[Block], fates: Sequence[SourceFate]) -> Corpus:
    """Join blocks in order and count their rows into `fates`; document ids run over the rows of all sources.

    Raises:
        UserError: no block holds a document.
    """
    kept: list[Block] = []
    for block in blocks:
        fate = fates[block.source_id]
        fate.rows += block.num_rows
        fate.truncated += block.truncated
        for row_number, reason in block.dropped:
            fate.dropped[reason].append(row_number)
        kept += [block] if len(block.lengths) else []
    if not kept:
        raise _nothing_left(fates)
    first_row = np.cumsum([0, *(fate.rows for fate in fates)])
    row_numbers = np.concatenate([block.row_numbers for block in kept])
    source_ids = np.concatenate([np.full(len(block.lengths), block.source_id, dtype=np.int16) for block in kept])
    lengths = np.concatenate([block.lengths for block in kept])
    documents = Documents(
        ids=np.concatenate([block.ids for block in kept]),
        starts=np.cumsum(lengths, dtype=np.int64) - lengths,
        lengths=lengths,
        num_prefix=np.concatenate([block.num_prefix for block in kept]),
        doc_ids=first_row[source_ids] + row_numbers - 1,
        source_ids=source_ids,
    )
    return Corpus(documents, row_numbers, np.concatenate([block.keys for block in kept]))


def choose(config: PrepConfig, corpus: Corpus, fates: Sequence[SourceFate]) -> dict[str, NDArray[np.int64]]:
    """Documents of each split, in row order: weights, then duplicates, then held-out rows, which are used once.

    Raises:
        UserError: the training split, or a held-out split that was asked for, is empty.
    """
    source_ids = corpus.documents.source_ids
    times = np.zeros(len(source_ids), dtype=np.int64)
    for source_id, source in enumerate(config.sources):
        rows = source_ids == source_id
        times[rows] = copies(corpus.keys[rows], source.weight, config.seed)
    index = _keep(np.arange(len(times)), times > 0, filters.NOT_SAMPLED, corpus, fates)
    if config.dedup == "exact" and len(index):
        index = _keep(index, first_occurrences(corpus.keys[index]), filters.DUPLICATE, corpus, fates)
    heldout = np.zeros(len(index), dtype=np.bool_)
    if config.heldout > 0 and len(index):
        heldout = choose_heldout(corpus.keys[index], config.heldout, config.seed)
    train = np.repeat(index[~heldout], times[index[~heldout]])
    for source_id, fate in enumerate(fates):
        fate.train_rows = int((source_ids[index[~heldout]] == source_id).sum())
        fate.heldout_rows = int((source_ids[index[heldout]] == source_id).sum())
        fate.train_documents = int((source_ids[train] == source_id).sum())
        used = corpus.row_numbers[index[source_ids[index] == source_id]]
        fate.truncated = np.intersect1d(np.array(fate.truncated, dtype=np.int64), used).tolist()
    if not len(train):
        raise _nothing_left(fates)
    if config.heldout > 0 and not heldout.any():
        raise UserError(f"heldout {config.heldout:g}: keeps none of the {len(index)} rows; raise it, or set it to 0")
    return {"train": train, "heldout": index[heldout]} if config.heldout > 0 else {"train": train}


def describe_build(
    config: PrepConfig, tokenizer: Tokenizer, key: str, fates: Sequence[SourceFate], reference: dict[str, object] | None
) -> dict[str, Any]:
    """The part of the manifest that both splits share."""
    return {
        "content_key": key,
        "seq_len": config.seq_len,
        "settings": config.model_dump(mode="json", exclude={"sources", "tokenizer", "out", "workers", "engine"}),
        "sources": [
            {"name": fate.name, "path": fate.path, "format": fate.format, "weight": fate.weight, "rows": fate.rows}
            for fate in fates
        ],
        "tokenizer": {
            "path": config.tokenizer,
            "digest": tokenizer.digest,
            "vocab_size": tokenizer.vocab_size,
            "bos_id": tokenizer.bos[0] if tokenizer.bos else None,
            "eos_id": tokenizer.eos_id,
            "probe": probe_ids(tokenizer),
            "reference": reference,
        },
        "special_ids": sorted(tokenizer.special_ids),
    }


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its name when the body succeeds, and is removed when it fails.

    Raises:
        UserError: the disk is full, or the folder cannot be made or renamed.
    """
    temporary = out.with_name(f"{out.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        os.replace(temporary, out)
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())[:200]
        raise UserError(
            f"out {out}: cannot be written: {reason}; check space and permissions of {out.parent}, "
            "or choose another folder"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def sigterm_unwinds() -> Iterator[None]:
    """Let SIGTERM, which schedulers send first, end the body as an exception: no worker and no folder is left behind.

    Raises:
        SystemExit: 143, as a shell reports a process that SIGTERM ended.
    """

    def leave(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Clock:
    def __init__(self) -> None:
        self.laps_s: dict[str, float] = {}
        self._last_s = time.perf_counter()

    def lap(self, name: str) -> None:
        now_s = time.perf_counter()
        self.laps_s[name] = now_s - self._last_s
        self._last_s = now_s


def _raw_blocks(config: PrepConfig) -> Iterator[RawBlock]:
    for source_id, source in enumerate(config.sources):
        yield from read_blocks(source_id, source.path, source.format)


def _remember_texts(texts: list[str], blocks: Iterable[RawBlock]) -> Iterator[RawBlock]:
    """Pass blocks on, and keep the text of the first rows for the comparison with the reference tokenizer."""
    for block in blocks:
        for number, value in block.rows[: REFERENCE_TEXTS - len(texts)]:
            example = parse_row(value, block.format, f"source {block.path}: row {number}")
            texts += [example.prompt + example.response] if filters.text_reason(example) is None else []
        yield block


def _num_workers(config: PrepConfig) -> int:
    return len(os.sched_getaffinity(0)) if config.workers == "auto" else config.workers


def _progress(blocks: Iterator[Block]) -> Iterator[Block]:
    """Rows done: a moving line on a terminal, now and then a plain line elsewhere."""
    rows, told_s = 0, time.perf_counter()
    columns = (SpinnerColumn(), TextColumn("encoding {task.completed:,} rows"), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("encoding", total=None)
        for block in blocks:
            rows += block.num_rows
            bar.update(task, completed=rows)
            if not console.is_terminal and time.perf_counter() - told_s > PLAIN_PROGRESS_EVERY_S:
                told_s = time.perf_counter()
                print(f"encoded {rows:,} rows", file=sys.stderr)
            yield block


def _keep(
    index: NDArray[np.int64], keep: NDArray[np.bool_], reason: str, corpus: Corpus, fates: Sequence[SourceFate]
) -> NDArray[np.int64]:
    for document in index[~keep].tolist():
        fates[corpus.documents.source_ids[document]].dropped[reason].append(int(corpus.row_numbers[document]))
    return index[keep]


def _nothing_left(fates: Sequence[SourceFate]) -> UserError:
    totals = {reason: sum(len(fate.dropped.get(reason, [])) for fate in fates) for reason in filters.MEANING}
    told = [f"{count} {reason}" for reason, count in totals.items() if count]
    told += [f"{held} held out"] if (held := sum(fate.heldout_rows for fate in fates)) else []
    rows = sum(fate.rows for fate in fates)
    return UserError(
        f"sources: none of the {rows} rows is left for training ({', '.join(told)}); check input and settings"
    )


def _tell_disagreement(reference: dict[str, Any] | None) -> None:
    if reference is None or reference["equal"] == reference["texts"]:
        return
    different = reference["texts"] - reference["equal"]
    print(
        f"WARNING: transformers and sentencepiece give different ids on {different} of the first "
        f"{reference['texts']} rows; the shards hold those of {reference['used']}. Other tools that read this "
        "tokenizer folder may not give the model these ids.",
        file=sys.stderr,
    )
