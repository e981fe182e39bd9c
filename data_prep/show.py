"""`sft show`: packed rows as text or as a page, with supervised tokens marked and document boundaries drawn."""

import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.text import Text

from data_prep.console import Output
from data_prep.page import write_page
from data_prep.report import escape_unprintable
from data_prep.shards import IGNORE, MANIFEST, Pack, Shards, open_shards
from sft.errors import UserError, run_command
from sft.prep_options import ShowConfig
from sft.settings import load
from sft.tokenizer import Tokenizer, load_tokenizer

OPEN, CLOSE = "⟦", "⟧"


def main(argv: Sequence[str]) -> None:
    """Entry of `sft show` and `python -m data_prep.show`.

    Raises:
        UserError: bad options, no complete shard set, no such pack or document, or another tokenizer than the shards'.
    """
    config = load(ShowConfig, argv, prog="sft show", positional="shards")
    escape_unprintable(sys.stdout)
    console = Output()
    if config.doc is None:
        shards = open_shards(_splits(Path(config.shards))[0])
        chosen = choose_packs(shards, config.start, config.rows)
    else:
        shards, chosen, told = find_document(_splits(Path(config.shards)), config.doc)
        console.print(told, soft_wrap=True, markup=False, highlight=False)
    tokenizer = _tokenizer_of(shards, config.tokenizer)
    if config.html is not None:
        write_page(Path(config.html), shards, chosen, tokenizer)
        print(f"wrote {config.html}: {len(chosen)} of {len(shards)} packs")
        return
    for index, numbers in chosen:
        for line in render_pack(shards, index, numbers, tokenizer, coloured=console.is_terminal):
            console.print(line, soft_wrap=True)


def choose_packs(shards: Shards, start: int, rows: int) -> list[tuple[int, list[int]]]:
    """(pack index, numbers of all its documents) of up to `rows` packs.

    Raises:
        UserError: there is no pack `start`.
    """
    if start >= len(shards):
        raise UserError(
            f"--start {start}: {shards.folder} has {len(shards)} packs, numbered from 0; give a smaller number"
        )
    indices = range(start, min(start + rows, len(shards)))
    return [(index, list(range(len(shards.pack(index).seq_lens)))) for index in indices]


def find_document(folders: Sequence[Path], doc_id: int) -> tuple[Shards, list[tuple[int, list[int]]], str]:
    """The first place of a document in the first folder that has it, and a line that says how often it is there.

    Raises:
        UserError: a folder cannot be opened, or no pack holds the document.
    """
    for folder in folders:
        shards = open_shards(folder)
        places = [
            (index, number)
            for index in range(len(shards))
            for number in np.flatnonzero(shards.pack(index).doc_ids == doc_id).tolist()
        ]
        if places:
            packs = sorted({index for index, _ in places})
            told = f"document {doc_id}: in pack {packs[0]} of {folder}"
            if len(places) > 1:
                word = "packs" if len(packs) > 1 else "pack"
                told = f"document {doc_id}: {len(places)} times in {len(packs)} {word} of {folder}, shown once"
            return shards, [(places[0][0], [places[0][1]])], told
    names = " or ".join(map(str, folders))
    raise UserError(f"--doc {doc_id}: no pack of {names} holds it; documents are numbered by input row, from 0")


def _splits(folder: Path) -> list[Path]:
    """The shard folder itself, or the splits below it, training first."""
    if not (folder / MANIFEST).is_file() and (folder / "train").is_dir():
        return [folder / "train", *([folder / "heldout"] if (folder / "heldout").is_dir() else [])]
    return [folder]


def _tokenizer_of(shards: Shards, folder: str | None) -> Tokenizer:
    written_by = shards.manifest["tokenizer"]
    tokenizer = load_tokenizer(folder or written_by["path"])
    if tokenizer.digest != written_by["digest"]:
        raise UserError(
            f"tokenizer {tokenizer.path}: not the one these shards were made with ({written_by['path']}); "
            "give that one as --tokenizer"
        )
    return tokenizer


def render_pack(
    shards: Shards, index: int, numbers: Sequence[int], tokenizer: Tokenizer, coloured: bool
) -> Iterator[Text]:
    """Header lines and documents `numbers` of a pack; supervised text is green, or in ⟦…⟧ where not `coloured`."""
    pack = shards.pack(index)
    seq_len = shards.manifest["seq_len"]
    yield Text(
        f"━━ pack {index} · {len(pack.input_ids)}/{seq_len} tokens · {len(pack.seq_lens)} documents · "
        f"{pack.num_labels} targets",
        style="bold",
    )
    ends = np.cumsum(pack.seq_lens)
    for number in numbers:
        tokens = slice(int(ends[number] - pack.seq_lens[number]), int(ends[number]))
        yield Text(_document_header(shards, pack, number, pack.labels[tokens]), style="cyan")
        yield _render_document(pack.input_ids[tokens], pack.labels[tokens], tokenizer, coloured)


def _document_header(shards: Shards, pack: Pack, number: int, labels: NDArray[np.int32]) -> str:
    source = shards.manifest["sources"][int(pack.source_ids[number])]["name"]
    targets = int((labels[1:] != IGNORE).sum())
    return f"── doc {int(pack.doc_ids[number])} · {source} · {len(labels)} tokens · {targets} targets"


def _render_document(ids: NDArray[np.int32], labels: NDArray[np.int32], tokenizer: Tokenizer, coloured: bool) -> Text:
    rendered = Text()
    supervised_before = False
    for supervised, text in _runs(ids.tolist(), (labels != IGNORE).tolist(), tokenizer):
        if not coloured and supervised != supervised_before:
            rendered.append(OPEN if supervised else CLOSE)
        rendered.append(text, style="bold green" if supervised else "dim")
        supervised_before = supervised
    if not coloured and supervised_before:
        rendered.append(CLOSE)
    return rendered


def _runs(ids: list[int], supervised: list[bool], tokenizer: Tokenizer) -> Iterator[tuple[bool, str]]:
    """(supervised, text) of maximal runs; special tokens are named, the rest is decoded in the context before it."""
    context: list[int] = []
    shown = ""
    kinds = [(mark, token in tokenizer.special_ids) for mark, token in zip(supervised, ids, strict=True)]
    for (mark, special), group in groupby(range(len(ids)), key=kinds.__getitem__):
        run = [ids[position] for position in group]
        if special:
            yield mark, "".join(map(tokenizer.token, run))
            continue
        context += run
        text = tokenizer.decode(context)
        # A run that begins inside a character changes the text before it; then it is shown on its own.
        yield mark, text[len(shown) :] if text.startswith(shown) else tokenizer.decode(run)
        shown = text


if __name__ == "__main__":
    raise SystemExit(run_command(main))
