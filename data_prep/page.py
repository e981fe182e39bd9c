"""Packed rows as one HTML page to send to somebody: every token with its id, supervised tokens highlighted.

The page is complete in itself: no script, no network, no other file; a content policy in its head forbids them, so
that text from the data could not bring any even if it were not escaped. It follows the reader's light or dark scheme.
"""

import os
import re
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.shards import IGNORE, Pack, Shards
from sft.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
WINDOW_TOKENS = 8
"""A character takes at most four byte tokens; with that many undecided ones the text really holds U+FFFD."""

STYLE = """
:root { color-scheme: light dark; --line: #d5d9df; --faint: #8a929e; --learn: #bdebc8; --special: #6d3fc4;
  --doc: #2266bb; --odd: #7da7d9; --even: #3f72af; --note: #22272e; --note-text: #fff }
@media (prefers-color-scheme: dark) { :root { --line: #3a414b; --faint: #77808c; --learn: #1d5130; --special: #c3a6ff;
  --doc: #7fb4ff; --odd: #35567d; --even: #5a8cc4; --note: #e6e9ee; --note-text: #14181d } }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 76rem; padding: 1rem 1.5rem 4rem }
h1 { font-size: 1.25rem; margin: .2rem 0 }
h2 { font-size: 1rem; margin: 2rem 0 .3rem }
h3 { font: 600 .8rem system-ui, sans-serif; color: var(--doc); margin: 0 }
table { border-collapse: collapse; margin: .6rem 0 } td { padding: 0 1.4rem 0 0; overflow-wrap: anywhere }
td:first-child { white-space: nowrap; vertical-align: top }
td:first-child, p, u, h2 small { color: var(--faint) } h2 small { font-weight: normal }
section { content-visibility: auto; contain-intrinsic-size: auto 60rem }
.bar { display: flex; gap: 1px; height: 6px; background: var(--line); margin-bottom: .5rem }
.bar div { background: var(--even) } .bar div:nth-child(odd) { background: var(--odd) }
.doc { position: relative; border-left: 3px solid var(--even); padding: .1rem 0 .3rem .8rem; margin: .35rem 0 }
.doc:nth-of-type(even) { border-color: var(--odd) }
pre { font: 13px/1.6 ui-monospace, "DejaVu Sans Mono", monospace; margin: 0; white-space: pre-wrap;
  overflow-wrap: anywhere }
i, b { font-style: normal; font-weight: normal } b { background: var(--learn) }
.legend s { white-space: pre }
.legend i:not(.x), .legend b { color: CanvasText }
u { text-decoration: none; opacity: .8; user-select: none } .x { color: var(--special); font-weight: 600 }
s { text-decoration: none;
  background: radial-gradient(circle at .5ch 50%, var(--faint) 1px, transparent 1.3px) 0/1ch 100% }
i:hover, b:hover { outline: 1px solid var(--note) }
i:hover::after, b:hover::after { content: "token " attr(data-t) var(--d); position: absolute; right: 0;
  background: var(--note); color: var(--note-text); padding: 0 .5rem; font: 12px/1.7 system-ui, sans-serif;
  pointer-events: none; white-space: nowrap }
.legend i:hover::after, .legend b:hover::after { content: none }
@media (min-width: 60rem) { pre { margin-right: 16rem } }
"""


def write_page(path: Path, shards: Shards, chosen: Sequence[tuple[int, Sequence[int]]], tokenizer: Tokenizer) -> None:
    """Write the page of `chosen` (pack index, numbers of its documents to show); the file appears whole or not at all.

    Raises:
        OSError: the file cannot be written.
    """
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with open(temporary, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(render_page(shards, chosen, tokenizer))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def render_page(shards: Shards, chosen: Sequence[tuple[int, Sequence[int]]], tokenizer: Tokenizer) -> Iterator[str]:
    """The page, piece by piece."""
    title = escape(f"Packed rows of {shards.folder}")
    yield (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style></head>\n<body>\n<h1>{title}</h1>\n"
    )
    yield _overview(shards, chosen)
    for index, numbers in chosen:
        yield from _render_pack(shards, index, numbers, tokenizer)
    yield "</body></html>\n"


def _overview(shards: Shards, chosen: Sequence[tuple[int, Sequence[int]]]) -> str:
    manifest, totals = shards.manifest, shards.manifest["totals"]
    fill = totals["tokens"] / (totals["packs"] * manifest["seq_len"])
    rows = {
        "all packs": f"{totals['packs']:,} of {manifest['seq_len']:,} tokens at most, {fill:.2%} full",
        "documents": f"{totals['documents']:,}",
        "tokens": f"{totals['tokens']:,}, of which {totals['labels']:,} are targets of the loss "
        f"({totals['labels'] / totals['tokens']:.1%})",
        "sources": ", ".join(source["name"] for source in manifest["sources"]),
        "tokenizer": manifest["tokenizer"]["path"],
        "content key": manifest["content_key"],
        "on this page": f"packs: {len(chosen):,}, documents: {sum(len(numbers) for _, numbers in chosen):,}",
    }
    cells = "".join(f"<tr><td>{name}</td><td>{escape(value)}</td></tr>\n" for name, value in rows.items())
    return (
        f"<table>\n{cells}</table>\n"
        '<p class="legend"><b>supervised</b> <i>not supervised</i> <i class="x">&lt;special&gt;</i> <u>↵</u> line break'
        " <u>→</u> tab <s>   </s> space on its own or beside others <u>▪</u> further token of the"
        " character before it. Point at a token"
        " for its id. A bar shows the documents of a pack, and in grey the room they leave.</p>\n"
    )


def _render_pack(shards: Shards, index: int, numbers: Sequence[int], tokenizer: Tokenizer) -> Iterator[str]:
    pack = shards.pack(index)
    seq_len, tokens = shards.manifest["seq_len"], len(pack.input_ids)
    segments = "".join(f'<div style="flex:{length}"></div>' for length in pack.seq_lens.tolist())
    yield (
        f"<section>\n<h2>pack {index} <small>{tokens:,} of {seq_len:,} tokens ({tokens / seq_len:.1%}), "
        f"{len(pack.seq_lens)} documents, {pack.num_labels:,} targets</small></h2>\n"
        f'<div class="bar">{segments}<span style="flex:{seq_len - tokens}"></span></div>\n'
    )
    ends = np.cumsum(pack.seq_lens)
    for number in numbers:
        cut = slice(int(ends[number] - pack.seq_lens[number]), int(ends[number]))
        yield _render_document(shards, pack, number, cut, tokenizer)
    yield "</section>\n"


def _render_document(shards: Shards, pack: Pack, number: int, cut: slice, tokenizer: Tokenizer) -> str:
    doc_id = int(pack.doc_ids[number])
    source = shards.manifest["sources"][int(pack.source_ids[number])]["name"]
    ids, labels = pack.input_ids[cut], pack.labels[cut]
    targets = int((labels[1:] != IGNORE).sum())
    note = _css_text(f" · {source} · doc {doc_id}")
    return (
        f'<div class="doc" style=\'--d:"{note}"\'>'
        f"<h3>doc {doc_id} · {escape(source)} · {len(ids):,} tokens · {targets:,} targets</h3>"
        f"<pre>{''.join(_render_tokens(ids, labels, tokenizer))}</pre></div>\n"
    )


def _render_tokens(ids: NDArray[np.int32], labels: NDArray[np.int32], tokenizer: Tokenizer) -> Iterator[str]:
    texts = token_texts(ids.tolist(), tokenizer)
    for token, text, supervised in zip(ids.tolist(), texts, (labels != IGNORE).tolist(), strict=True):
        tag = "b" if supervised else "i"
        if text is None:
            kind, shown = "", "<u>▪</u>"
        elif token in tokenizer.special_ids:
            kind, shown = ' class="x"', escape(text)
        else:
            kind, shown = "", _visible(text)
        yield f'<{tag}{kind} data-t="{token}">{shown}</{tag}>'


def token_texts(ids: Sequence[int], tokenizer: Tokenizer) -> list[str | None]:
    """The text that each token adds to the text before it; special tokens are named.

    A character that takes several tokens stands at the first of them, and the others are None. Joined, the texts of
    neighbours that are not special are their decoded text.
    """
    texts: list[str | None] = [None] * len(ids)
    before: list[int] = []  # tokens whose text is known: the context that the next ones are decoded in
    pending: list[int] = []  # positions whose text is not complete yet

    def settle(text: str) -> None:
        nonlocal before
        texts[pending[0]] = text
        before = [ids[position] for position in pending]
        pending.clear()

    for position, token in enumerate(ids):
        if token in tokenizer.special_ids:
            if pending:
                settle(_added(before, [ids[each] for each in pending], tokenizer))
            texts[position] = tokenizer.token(token)
            continue
        pending.append(position)
        text = _added(before, [ids[each] for each in pending], tokenizer)
        if not text.endswith(REPLACEMENT) or len(pending) == WINDOW_TOKENS:
            settle(text)
    if pending:
        settle(_added(before, [ids[each] for each in pending], tokenizer))
    return texts


def _added(before: list[int], tokens: list[int], tokenizer: Tokenizer) -> str:
    if not before:
        return tokenizer.decode(tokens)
    return tokenizer.decode(before + tokens)[len(tokenizer.decode(before)) :]


def _visible(text: str) -> str:
    """HTML of a token's text in which a reader sees line breaks, tabs, odd spaces and what has no glyph.

    What stands in <u> is not part of the text, and is not copied with it.
    """

    def mark(found: re.Match[str]) -> str:
        char = found[0]
        if char == "\n":
            return "<u>↵</u>\n"
        if char == "\t":
            return "<u>→</u>\t"
        if char.startswith(" "):
            return f"<s>{char}</s>"
        return escape(char, quote=False) if char.isprintable() else f"<u>U+{ord(char):04X}</u>"

    if text.isprintable() and "  " not in text and text != " ":
        return escape(text, quote=False)
    return re.sub(r"\A +\Z|  +|[^ ]", mark, text)


def _css_text(text: str) -> str:
    """`text` for a CSS string inside an HTML attribute: nothing in it can end either."""
    return "".join(char if char.isalnum() or char in " -_.·" else f"\\{ord(char):x} " for char in text)
