"""`sft prep`: rows to packed shards. The same bytes for any number of workers, on either engine, killed or not.

inputs -> encode and prove (workers; finished blocks on disk) -> choose rows -> pack -> shards and report.
"""

import errno
import os
import shutil
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep import ray_engine, workers
from data_prep.blocks import SEPARATOR, Block, Encoder, make_encoder, parse_examples
from data_prep.console import Output
from data_prep.corpus import Clusters, Corpus, choose, describe_clusters, gather, targets_of
from data_prep.documents import eos_of
from data_prep.formats import check_columns
from data_prep.identity import (
    NOT_CONTENT,
    InputFile,
    blocks_key,
    content_key,
    find_inputs,
    is_up_to_date,
    source_name,
    template_text,
)
from data_prep.pack import Packs, pack
from data_prep.probe import check_vocabulary, compare_conversion, compare_encoders, probe_ids
from data_prep.progress import with_progress
from data_prep.readers import RawBlock, read_blocks
from data_prep.report import (
    SourceFate,
    describe_split,
    escape_unprintable,
    output_bytes,
    summary_lines,
    summary_tables,
)
from data_prep.shard_writer import Documents, Ids, write_json, write_shards
from data_prep.source_files import check_apart
from data_prep.spill import Spill, remove_leftover, without_ids, work_folder
from sft.errors import UserError
from sft.prep_options import PrepConfig
from sft.settings import load
from sft.tokenizer import load_tokenizer

REFERENCE_TEXTS = 200


def main(argv: Sequence[str]) -> None:
    """Entry of `sft prep` and `python -m data_prep`.

    Raises:
        UserError: bad options, input, tokenizer or output folder.
    """
    clock = Clock()
    config = load(PrepConfig, argv, prog="sft prep")
    escape_unprintable(sys.stdout)
    out = Path(os.path.realpath(config.out))
    for source in config.sources:
        check_columns(source)
        check_apart(source.path, out)
    tokenizer = load_tokenizer(config.tokenizer)
    eos_of(tokenizer)
    check_vocabulary(tokenizer)
    encoder = make_encoder(config, tokenizer)
    clock.lap("load")
    inputs = find_inputs(config)
    key = content_key(config, encoder, inputs)
    clock.lap("digest")
    if not config.dry_run and is_up_to_date(out, key, with_heldout=config.heldout > 0):
        with out_errors(out):
            remove_leftover(out)
        print(f"{config.out} is up to date (content key {key})")
        return
    with sigterm_unwinds(), out_errors(out):
        report = build(encoder, inputs, key, out, clock)
    tell(config, report, key)


def tell(config: PrepConfig, report: dict[str, Any], key: str) -> None:
    """Print what was done.

    Raises:
        UserError: standard output cannot be written, as on a full disk; the shards are not concerned.
    """
    done = "dry run: nothing written" if config.dry_run else f"wrote {config.out}"
    try:
        for table in summary_tables(report):
            Output().print(table)
        for line in summary_lines(report, config.dry_run):
            print(line)
        print(f"{done} in {report['timings_s']['total']:.1f} s; content key {key}", flush=True)
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise UserError(f"standard output: cannot be written: {error.strerror}; the job itself {done}") from None


def build(encoder: Encoder, inputs: Sequence[InputFile], key: str, out: Path, clock: "Clock") -> dict[str, Any]:
    """Run the whole job, write `out` unless it is a dry run, and return what report.json holds.

    Raises:
        UserError: bad input, no row left for training, or another process writes `out`.
        OSError: `out` cannot be written.
    """
    config = encoder.config
    encoder, compared = prove_tokens(encoder, inputs)
    clock.lap("probe")
    fates = [SourceFate(source_name(config, number), source) for number, source in enumerate(config.sources)]
    with nullcontext(None) if config.dry_run else work_folder(out, blocks_key(key)) as spill:
        blocks = with_progress(encode_all(encoder, inputs, spill), sum(file.stamp[0] for file in inputs))
        corpus = gather(blocks, fates)
        clock.lap("encode")
        splits, clusters = choose(config, corpus, fates)
        clock.lap("choose")
        packs = {split: pack(corpus.lengths[index], config.seq_len) for split, index in splits.items()}
        clock.lap("pack")
        report = describe_job(encoder, key, corpus, splits, packs, clusters, fates, compared)
        if spill is not None:
            shared = describe_build(encoder, key, fates, compared)
            temporary = write_splits(spill, corpus, fates, splits, packs, shared, threads=min(num_workers(config), 4))
            clock.lap("write")
            report["timings_s"] = clock.timings(sum(fate.rows for fate in fates))
            write_json(temporary / "report.json", report)
            os.replace(temporary, out)
    report["timings_s"] = clock.timings(sum(fate.rows for fate in fates))
    return report


def prove_tokens(encoder: Encoder, inputs: Sequence[InputFile]) -> tuple[Encoder, dict[str, Any]]:
    """(the encoder, with gigatoken where it is proved, what was compared) on fixed texts and the first rows of each
    source. Tells on stderr what a user would not expect."""
    firsts = {file.source_id: file for file in reversed(inputs)}
    texts: list[str] = []
    of_model: list[str] = []
    bare = encoder.tokenizer.sentencepiece is not None
    for source_id, file in sorted(firsts.items()):
        for raw in islice(read_blocks(source_id, file.path), 1):
            rows, _, _ = parse_examples(encoder, raw, limit=REFERENCE_TEXTS)
            texts += [text for row in rows for text in row.example.texts]
            for row in rows:
                # Behind a special token the two may differ by a space mark. That matters where the ids are
                # sentencepiece's and users load the folder with transformers, not where they are transformers' own.
                of_model += row.example.texts if row.example.stop or bare else row.content.split(SEPARATOR)
    fast, record = compare_encoders(encoder.tokenizer, texts)
    conversion = compare_conversion(encoder.tokenizer, of_model)
    if fast is None:
        why = f"differs on {record['texts'] - record['equal']} of {record['texts']} texts"
        sys.stderr.write(
            f"gigatoken {why if record['supported_by_gigatoken'] else 'has no such tokenizer'}; "
            f"{record['reference']} encodes, which takes longer\n"
        )
    if conversion is not None and conversion["equal"] < conversion["texts"]:
        different = conversion["texts"] - conversion["equal"]
        sys.stderr.write(
            f"WARNING: transformers and sentencepiece give different ids on {different} of the first "
            f"{conversion['texts']} texts; the shards hold those of {conversion['used']}. Other tools that read this "
            "tokenizer folder may not give the model these ids.\n"
        )
    return replace(encoder, fast=fast), {"encoder": record, "conversion": conversion}


def encode_all(encoder: Encoder, inputs: Sequence[InputFile], spill: Spill | None) -> Iterator[tuple[int, Block]]:
    """(bytes of input, block without its ids) of every block in order; those of an earlier run are not made again."""
    raws = _raw_blocks(inputs)
    number = 0
    for block, raw in zip(spill.finished() if spill else (), raws, strict=False):
        number += 1
        yield raw.input_bytes, block
    if number:
        sys.stderr.write(f"{number} finished blocks of an earlier run are used again\n")
    sizes: deque[int] = deque()

    def noted() -> Iterator[RawBlock]:
        for raw in raws:
            sizes.append(raw.input_bytes)
            yield raw

    run = ray_engine.encode_blocks if encoder.config.engine == "ray" else workers.encode_blocks
    for done, block in enumerate(run(noted(), encoder, num_workers(encoder.config)), start=number):
        yield sizes.popleft(), spill.add(done, block) if spill else without_ids(block)


def as_documents(corpus: Corpus, ids: Ids, fates: Sequence[SourceFate]) -> Documents:
    """All documents, with global row numbers: document ids run over the rows of all sources."""
    first_row = np.cumsum([0, *(fate.rows for fate in fates)])
    return Documents(
        ids=ids,
        starts=np.cumsum(corpus.lengths, dtype=np.int64) - corpus.lengths,
        lengths=corpus.lengths,
        runs=corpus.runs,
        first_run=np.cumsum(corpus.num_runs, dtype=np.int64) - corpus.num_runs,
        num_runs=corpus.num_runs,
        doc_ids=first_row[corpus.source_ids] + corpus.rows,
        source_ids=corpus.source_ids,
    )


def write_splits(
    spill: Spill,
    corpus: Corpus,
    fates: Sequence[SourceFate],
    splits: dict[str, NDArray[np.int64]],
    packs: dict[str, Packs],
    shared: dict[str, Any],
    threads: int,
) -> Path:
    """Write every split into a new folder, which is returned.

    Raises:
        OSError: the disk has no room for it.
    """
    folder = spill.new_output()
    needed = sum(output_bytes(corpus.lengths[index]) for index in splits.values())
    if (free := shutil.disk_usage(folder).free) < needed:
        raise OSError(errno.ENOSPC, f"{needed / 2**30:.1f} GiB are needed, {free / 2**30:.1f} GiB are free")
    documents = as_documents(corpus, spill.ids(), fates)
    for split, index in splits.items():
        of_split = replace(packs[split], order=index[packs[split].order])
        manifest = {**shared, "split": split}
        write_shards(folder / split, documents, of_split, manifest, threads=threads)
    return folder


def describe_build(encoder: Encoder, key: str, fates: Sequence[SourceFate], compared: dict[str, Any]) -> dict[str, Any]:
    """The part of the manifest that both splits share."""
    config, tokenizer = encoder.config, encoder.tokenizer
    return {
        "content_key": key,
        "seq_len": config.seq_len,
        "settings": config.model_dump(mode="json", exclude=NOT_CONTENT),
        "template": template_text(encoder),
        "sources": [
            {"name": fate.name, **fate.source.model_dump(mode="json", exclude={"name"}), "rows": fate.rows}
            for fate in fates
        ],
        "tokenizer": {
            "path": config.tokenizer,
            "digest": tokenizer.digest,
            "vocab_size": tokenizer.vocab_size,
            "bos_id": tokenizer.bos[0] if tokenizer.bos else None,
            "eos_id": tokenizer.eos_id,
            "stop_id": tokenizer.eos_id if encoder.chat is None else tokenizer.backend.token_to_id(encoder.chat.stop),
            "probe": probe_ids(tokenizer),
            **compared,
        },
        "special_ids": sorted(tokenizer.special_ids),
    }


def describe_job(
    encoder: Encoder,
    key: str,
    corpus: Corpus,
    splits: dict[str, NDArray[np.int64]],
    packs: dict[str, Packs],
    clusters: Clusters | None,
    fates: Sequence[SourceFate],
    compared: dict[str, Any],
) -> dict[str, Any]:
    """What report.json holds, but for the times."""
    all_tokens = sum(fate.train_tokens for fate in fates)
    described = {
        split: describe_split(
            corpus.lengths[index], targets_of(corpus)[index], len(packs[split]), encoder.config.seq_len
        )
        for split, index in splits.items()
    }
    written = sum(output_bytes(corpus.lengths[index]) for index in splits.values())
    work = 4 * int(corpus.lengths.sum(dtype=np.int64)) + 40 * len(corpus)
    return {
        "content_key": key,
        "sources": [fate.describe(all_tokens) for fate in fates],
        "splits": described,
        "tokenizer": compared,
        "near_duplicates": None if clusters is None else describe_clusters(clusters, corpus, fates),
        "decontamination": _describe_items(encoder),
        "disk_bytes": {"output": written, "while_running": written + work},
    }


def _describe_items(encoder: Encoder) -> dict[str, Any] | None:
    known = encoder.decontaminator
    if known is None:
        return None
    return {"items": known.num_items, "ngram": known.ngram, "too_short_to_check": known.too_short}


def num_workers(config: PrepConfig) -> int:
    """Worker processes that the options ask for."""
    return len(os.sched_getaffinity(0)) if config.workers == "auto" else config.workers


@contextmanager
def out_errors(out: Path) -> Iterator[None]:
    """Say in one line that the output cannot be written.

    Raises:
        UserError: the body raised an OSError.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())[:200]
        raise UserError(
            f"out {out}: cannot be written: {reason}; check space and permissions of {out.parent}, "
            "or choose another folder; finished work is kept for the next run"
        ) from None


@contextmanager
def sigterm_unwinds() -> Iterator[None]:
    """Let SIGTERM, which schedulers send first, end the body as an exception, so that no worker is left behind.

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


class Clock:
    """Time spent in each stage."""

    def __init__(self) -> None:
        self.laps_s: dict[str, float] = {}
        self._last_s = time.perf_counter()

    def lap(self, name: str) -> None:
        """End a stage."""
        now_s = time.perf_counter()
        self.laps_s[name] = now_s - self._last_s
        self._last_s = now_s

    def timings(self, rows: int) -> dict[str, float]:
        """Seconds per stage and in all, and the rows per second of encoding."""
        return {**self.laps_s, "total": sum(self.laps_s.values()), "rows_per_s": rows / self.laps_s["encode"]}


def _raw_blocks(inputs: Sequence[InputFile]) -> Iterator[RawBlock]:
    for file in inputs:
        yield from read_blocks(file.source_id, file.path)
        file.check_unchanged()
