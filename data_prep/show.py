"""`sft show`: packed rows as text, with supervised tokens marked and document boundaries drawn."""

import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.text import Text

from data_prep.report import escape_unprintable
from data_prep.shards import IGNORE, MANIFEST, Pack, Shards, open_shards
from sft.config import ShowConfig
from sft.errors import UserError, run_command
from sft.settings import load
from sft.tokenizer import Tokenizer, load_tokenizer

OPEN, CLOSE = "⟦", "⟧"


def main(argv: Sequence[str]) -> None:
    """Entry of `sft show` and `python -m data_prep.show`.

    Raises:
        UserError: bad options, no complete shard set, no such pack, or another tokenizer than the shards'.
    """
    config = load(ShowConfig, argv, prog="sft show", positional="shards")
    escape_unprintable(sys.stdout)
    folder = Path(config.shards)
    if not (folder / MANIFEST).is_file() and (folder / "train").is_dir():
        folder = folder / "train"
    shards = open_shards(folder)
    if config.start >= len(shards):
        raise UserError(
            f"--start {config.start}: {folder} has {len(shards)} packs, numbered from 0; give a smaller number"
        )
    written_by = shards.manifest["tokenizer"]
    tokenizer = load_tokenizer(config.tokenizer or written_by["path"])
    if tokenizer.digest != written_by["digest"]:
        raise UserError(
            f"tokenizer {tokenizer.path}: not the one these shards were made with ({written_by['path']}); "
            "give that one as --tokenizer"
        )
    console = Console()
    for index in range(config.start, min(config.start + config.rows, len(shards))):
        for line in render_pack(shards, index, tokenizer, coloured=console.is_terminal):
            console.print(line, soft_wrap=True)


def render_pack(shards: Shards, index: int, tokenizer: Tokenizer, coloured: bool) -> Iterator[Text]:
    """Header lines and documents of one pack; supervised text is green, or stands in ⟦…⟧ where not `coloured`."""
    pack = shards.pack(index)
    seq_len = shards.manifest["seq_len"]
    yield Text(
        f"━━ pack {index} · {len(pack.input_ids)}/{seq_len} tokens · {len(pack.seq_lens)} documents · "
        f"{pack.num_labels} targets",
        style="bold",
    )
    ends = np.cumsum(pack.seq_lens)
    for number, end in enumerate(ends.tolist()):
        tokens = slice(end - int(pack.seq_lens[number]), end)
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
            yield mark, "".join(tokenizer.hf.convert_ids_to_tokens(run))
            continue
        context += run
        text = tokenizer.decode(context)
        # A run that begins inside a character changes the text before it; then it is shown on its own.
        yield mark, text[len(shown) :] if text.startswith(shown) else tokenizer.decode(run)
        shown = text


if __name__ == "__main__":
    raise SystemExit(run_command(main))
