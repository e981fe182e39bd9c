"""Variants of rows from local models or a function of one's own: `python -m sft.augment --input F --out F.jsonl …`."""

import hashlib
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

import sft
from data_prep.readers import BadRow, block_rows, file_digest, read_blocks, source_files
from sft.augment_models import folder_digest, load_seq2seq, rewrite_rows
from sft.augment_options import AugmentConfig
from sft.augment_output import Identity, Progress, finished, open_partial, publish, save_progress
from sft.augment_rows import (
    MEANING,
    OWN_FIELDS,
    Dropped,
    Row,
    Variant,
    call_hook,
    hook_digest,
    load_hook,
    to_line,
    written_variants,
)
from sft.errors import UserError, run_command, shorten
from sft.progress import track
from sft.settings import load

Numbered = tuple[int, Row]
Vary = Callable[[list[Numbered]], list[list[Variant]]]

WINDOW_BATCHES = 8
"""Batches that are saved together and share their rows by length: less padding, and never more work lost than this."""


def main(argv: Sequence[str]) -> None:
    """Write variants of every row of the input; go on where a killed job stopped."""
    config = load(AugmentConfig, argv, prog="sft augment")
    source = _one_file(config.input)
    out = Path(config.out)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    identity = _identity(config, source, device)
    if done := finished(out, identity):
        print(f"{out}: is already finished, by the same command")
        _summarise(out, done)
        return
    rows = check_rows(source, config)
    with open_partial(out, identity) as (file, progress):
        if progress.rows:
            print(f"{out}: goes on after {progress.rows} of {rows} rows")
        vary = _vary(config, device)
        begin_s, begin_rows = time.monotonic(), progress.rows
        window_rows = config.batch_size * WINDOW_BATCHES
        numbered = islice(read_rows(source), begin_rows, None)
        for _ in track(range(begin_rows, rows, window_rows), f"augment, {window_rows} rows each", visible=True):
            window = list(islice(numbered, window_rows))
            _write_window(window, vary_window(window, config, vary), _label(config), file, progress)
            save_progress(file, out, identity, progress)
        publish(out)
    _summarise(out, progress)
    print(f"{(progress.rows - begin_rows) / max(time.monotonic() - begin_s, 1e-9):.1f} rows/s on {device.type}")


def read_rows(source: Path) -> Iterator[Numbered]:
    """(row number in the file, row) of every row.

    Raises:
        UserError: the file or a row is malformed.
    """
    for block in read_blocks(0, source):
        for number, value in block_rows(block):
            if isinstance(value, BadRow):
                raise UserError(f"input {source}: row {number}: {value.problem}")
            if not isinstance(value, dict):
                raise UserError(
                    f"input {source}: row {number}: is {shorten(repr(value))}, expected an object with fields"
                )
            yield number, value


def check_rows(source: Path, config: AugmentConfig) -> int:
    """Number of rows. All are read before the first is rewritten: a bad row shall not show after hours.

    Raises:
        UserError: a row is malformed, lacks a field to rewrite, or is itself augmented.
    """
    rows = 0
    fields = [] if config.method == "hook" else config.fields
    for number, row in read_rows(source):
        rows += 1
        where = f"input {source}: row {number}"
        for field in fields:
            if not isinstance(row.get(field), str):
                problem = f"is {shorten(repr(row[field]))}, not text" if field in row else "is missing"
                found = shorten(", ".join(row) or "none")
                raise UserError(
                    f"{where}: field '{field}' {problem}; repair the row, or set --fields (it has: {found})"
                )
        if own := next((name for name in OWN_FIELDS if name in row), None):
            raise UserError(
                f"{where}: has a field '{own}', as augmented rows do; augment their originals, or rename it"
            )
        to_line(row, where)
    return rows


def vary_window(window: Sequence[Numbered], config: AugmentConfig, vary: Vary) -> list[list[Variant]]:
    """The variants of each row, in order. Batches hold rows of similar length, and each has a seed of its own."""
    fields = [] if config.method == "hook" else config.fields
    order = sorted(range(len(window)), key=lambda index: sum(len(window[index][1][field]) for field in fields))
    found: dict[int, list[Variant]] = {}
    for start in range(0, len(order), config.batch_size):
        batch = order[start : start + config.batch_size]
        _seed_generators(config.seed, window[batch[0]][0])
        found.update(zip(batch, vary([window[index] for index in batch]), strict=True))
    return [found[index] for index in range(len(window))]


def _write_window(
    window: Sequence[Numbered], found: Sequence[list[Variant]], label: str, file: BinaryIO, progress: Progress
) -> None:
    for (number, row), variants in zip(window, found, strict=True):
        for variant in written_variants(number, row, variants, label):
            if isinstance(variant, Dropped):
                progress.dropped[variant.reason] += 1
            else:
                file.write(to_line(variant, f"row {number}"))
                progress.variants += 1
    progress.rows += len(window)


def _seed_generators(seed: int, row: int) -> None:
    """From the seed and the batch's first row: a job that goes on draws what it would have drawn."""
    value = int.from_bytes(hashlib.sha256(f"{seed} {row}".encode()).digest()[:4], "little")
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


def _vary(config: AugmentConfig, device: torch.device) -> Vary:
    if config.hook is not None:
        name, hook = config.hook, load_hook(config.hook)
        return lambda batch: call_hook(hook, name, batch[0][0], [row for _, row in batch])
    models = [load_seq2seq(folder, device) for folder in config.models]
    return lambda batch: rewrite_rows(models, [row for _, row in batch], config)


def _one_file(path: str) -> Path:
    files = source_files(path)
    if len(files) != 1:
        raise UserError(f"--input {path}: is {len(files)} files; give one: row numbers are those of a file")
    return files[0]


def _label(config: AugmentConfig) -> str:
    """What `augmentation` says: the method and the names of the model folders, or of the hook."""
    return f"{config.method}:{config.hook or ','.join(Path(folder).resolve().name for folder in config.models)}"


def _identity(config: AugmentConfig, source: Path, device: torch.device) -> Identity:
    """What the output's bytes depend on. Where the files lie is no part of it."""
    identity = config.model_dump(mode="json", exclude={"input", "models", "out"})
    identity |= {"augmentation": _label(config), "input": file_digest(source), "sft": sft.__version__}
    if config.hook is not None:
        return identity | {"hook's module": hook_digest(load_hook(config.hook))}
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    identity |= {"device": gpu, "torch": torch.__version__, "transformers": version("transformers")}
    return identity | {"models": [folder_digest(folder) for folder in config.models]}


def _summarise(out: Path, progress: Progress) -> None:
    dropped = sum(progress.dropped.values())
    print(f"{out}: {progress.rows} rows in, {progress.variants} variants out, {dropped} dropped")
    for reason, count in progress.dropped.most_common():
        print(f"  {count:>8} {reason:<18} {MEANING[reason]}")


if __name__ == "__main__":
    sys.exit(run_command(main))
