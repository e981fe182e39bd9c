"""A block of raw rows to documents: parse, render, filter, encode, prove. The same wherever it runs.

Blocks do not depend on the number of workers or on the engine, so neither does anything that is made of them.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep import filters
from data_prep.chat import ChatTemplate, load_chat_template
from data_prep.decontaminate import Decontaminator, load_items
from data_prep.documents import Document, Encoded, keep_documents, replace_documents
from data_prep.encode import encode_examples, truncate
from data_prep.example import Example, Rejected, Turn
from data_prep.fast import FastTokens
from data_prep.formats import RowError, parse_row, shorten
from data_prep.mixture import keys_to_array, text_key
from data_prep.near import Signer
from data_prep.readers import BadRow, RawBlock, block_rows
from data_prep.template import render_alpaca, render_text
from sft.errors import UserError
from sft.prep_options import PrepConfig
from sft.tokenizer import Tokenizer

SEPARATOR = "\x1e"
"""Between the texts of a row: no white space to `text_key`, so that rows cut at other places differ."""


@dataclass(frozen=True)
class Overlap:
    """A row that shares text with an evaluation item."""

    row: int
    item: str
    text: str


@dataclass(frozen=True, eq=False)
class Block:
    """The documents of one raw block, and the fate of the rows that gave none. Rows are counted from 0 in the block."""

    source_id: int
    num_rows: int
    rows: NDArray[np.int32]
    """[documents]: the row each came from."""
    keys: NDArray[np.uint64]
    """[documents, 2]: equal where the normalised text is."""
    encoded: Encoded
    truncated: NDArray[np.bool_]
    """[documents]."""
    signatures: NDArray[np.uint32] | None
    """[documents, permutations] where near-duplicates are asked for."""
    groups: tuple[str, ...]
    """[documents]: the value of the source's balance_by, or ()."""
    dropped: tuple[tuple[int, str], ...]
    """(row, reason)."""
    overlaps: tuple[Overlap, ...]


@dataclass(frozen=True)
class Encoder:
    """What a worker needs to turn raw rows into documents."""

    config: PrepConfig
    tokenizer: Tokenizer
    fast: FastTokens | None
    chat: ChatTemplate | None
    """None: the Alpaca template."""
    text_reason: filters.TextFilter
    signer: Signer | None
    decontaminator: Decontaminator | None
    items_digest: str
    """Of the evaluation items."""

    def encode(self, raw: RawBlock) -> Block:
        """The documents of one block.

        Raises:
            UserError: a row is malformed where on_error is `raise`, or too long where overlong is `error`.
        """
        return _encode_block(self, raw)


class _Row(NamedTuple):
    """A row that has become text."""

    row: int
    content: str
    """The turns' own text, without the template."""
    similar: str
    """What near-duplicates are judged by: without system prompts, which whole sources share."""
    example: Example
    group: str


def make_encoder(config: PrepConfig, tokenizer: Tokenizer) -> Encoder:
    """Load everything that the options ask for; without `fast`, which the caller adds where it is proved.

    Raises:
        UserError: a template, a list of refusals or evaluation items cannot be read.
    """
    items = load_items(config.decontaminate) if config.decontaminate else []
    return Encoder(
        config=config,
        tokenizer=tokenizer,
        fast=None,
        chat=None if config.template == "alpaca" else load_chat_template(config.template, tokenizer),
        text_reason=filters.make_text_filter(config.filters),
        signer=Signer(config.near) if config.dedup == "near" else None,
        decontaminator=Decontaminator(items, config.decontaminate_ngram) if items else None,
        items_digest=hashlib.sha256(json.dumps(items).encode()).hexdigest() if items else "",
    )


def parse_examples(
    encoder: Encoder, raw: RawBlock, limit: int | None = None
) -> tuple[list[_Row], list[tuple[int, str]], list[Overlap]]:
    """(rows that have become text, dropped rows with reasons, rows that overlap with evaluation items) of the first
    `limit` rows.

    Raises:
        UserError: a row is malformed where on_error is `raise`.
    """
    source = encoder.config.sources[raw.source_id]
    kept: list[_Row] = []
    dropped: list[tuple[int, str]] = []
    overlaps: list[Overlap] = []
    render = encoder.chat.render if encoder.chat else render_alpaca
    find = encoder.decontaminator.find if encoder.decontaminator else None
    for row, (number, value) in enumerate(islice(block_rows(raw), limit)):
        try:
            if isinstance(value, BadRow):
                raise RowError(value.problem)
            turns = parse_row(value, source)
            group = _group(value, source.balance_by) if source.balance_by else ""
            example = render_text(turns) if isinstance(turns, str) else render(turns)
        except RowError as error:
            if encoder.config.on_error == "raise":
                raise UserError(f"source {raw.file}: row {number}: {error.problem}") from None
            dropped.append((row, filters.MALFORMED))
            continue
        except Rejected as error:
            dropped.append((row, error.reason))
            continue
        if reason := encoder.text_reason(example):
            dropped.append((row, reason))
            continue
        content = turns if isinstance(turns, str) else _content(turns)
        if find and (hit := find(content)):
            dropped.append((row, filters.CONTAMINATED))
            overlaps.append(Overlap(row, hit.item_name, hit.overlap_text))
            continue
        similar = content
        if encoder.signer and not isinstance(turns, str):
            similar = _content([turn for turn in turns if turn.role != "system"])
        kept.append(_Row(row, content, similar, example, group))
    return kept, dropped, overlaps


def _encode_block(encoder: Encoder, raw: RawBlock) -> Block:
    rows, dropped, overlaps = parse_examples(encoder, raw)
    num_rows = len(rows) + len(dropped)
    encoded, reasons = encode_examples(encoder.tokenizer, encoder.fast, [row.example for row in rows])
    encoded, truncated = _judge_lengths(encoder, raw, rows, encoded, reasons)
    if reasons:
        dropped += [(rows[position].row, reason) for position, reason in reasons.items()]
        keep = np.ones(len(rows), dtype=np.bool_)
        keep[list(reasons)] = False
        encoded, truncated = keep_documents(encoded, keep), truncated[keep]
        rows = [row for position, row in enumerate(rows) if position not in reasons]
    balanced = encoder.config.sources[raw.source_id].balance_by is not None
    return Block(
        source_id=raw.source_id,
        num_rows=num_rows,
        rows=np.array([row.row for row in rows], dtype=np.int32),
        keys=keys_to_array([text_key(row.content) for row in rows]),
        encoded=encoded,
        truncated=truncated,
        signatures=encoder.signer.signatures([row.similar for row in rows]) if encoder.signer else None,
        groups=tuple(row.group for row in rows) if balanced else (),
        dropped=tuple(sorted(dropped)),
        overlaps=tuple(overlaps),
    )


def _judge_lengths(
    encoder: Encoder, raw: RawBlock, rows: Sequence[_Row], encoded: Encoded, reasons: dict[int, str]
) -> tuple[Encoded, NDArray[np.bool_]]:
    """Apply the bounds of `filters` and `overlong`; adds to `reasons`, and returns documents and which were cut."""
    config = encoder.config
    truncated = np.zeros(len(rows), dtype=np.bool_)
    before = np.cumsum(np.append(0, encoded.runs[:, 1] - encoded.runs[:, 0]))
    run_ends = np.cumsum(encoded.num_runs)
    learned = before[run_ends] - before[run_ends - encoded.num_runs] - encoded.num_runs  # stop tokens do not count
    bounds = config.filters
    short = learned < bounds.min_response_tokens
    long = learned > bounds.max_response_tokens if bounds.max_response_tokens is not None else np.zeros_like(short)
    for position in np.flatnonzero(short | long).tolist():
        reasons.setdefault(position, filters.TOO_SHORT if short[position] else filters.TOO_LONG)
    cuts: dict[int, Document | None] = {}
    for position in np.flatnonzero(encoded.lengths > config.seq_len).tolist():
        if position in reasons:
            continue
        if config.overlong == "error":
            row = raw.first_row + rows[position].row
            raise UserError(
                f"source {raw.file}: row {row}: {int(encoded.lengths[position])} tokens, seq_len is {config.seq_len}; "
                "raise seq_len, or set overlong to drop or truncate"
            )
        if config.overlong == "drop":
            reasons[position] = filters.OVERLONG
            continue
        cut = truncate(encoder.tokenizer, rows[position].example, encoded.document(position), config.seq_len)
        if cut is None:
            reasons[position] = filters.OVERLONG_PROMPT
        else:
            cuts[position] = cut
            truncated[position] = True
    return replace_documents(encoded, cuts), truncated


def _content(turns: Sequence[Turn]) -> str:
    return SEPARATOR.join([f"{turn.text}{SEPARATOR}{turn.input}" if turn.input else turn.text for turn in turns])


def _group(row: Any, field: str) -> str:
    value = row.get(field)
    if not isinstance(value, str | int | bool) or value == "":
        found = "is missing" if field not in row else f"is {shorten(value)}"
        raise RowError(f"balance_by: field '{field}' {found}, expected a text or a whole number")
    return str(value)
