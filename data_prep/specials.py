"""Texts in which names of special tokens mean those tokens, as chat templates write them.

`transformers` reads and writes them so by itself. sentencepiece takes the names for text and decodes the tokens to
nothing, so a text is cut at them.
"""

import re
from collections.abc import Sequence

from sft.tokenizer import Tokenizer


def encode_with_specials(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a text, each name of a special token as that token; no BOS, no EOS."""
    if tokenizer.sentencepiece is None:
        return tokenizer.encode(text)
    by_name = {tokenizer.token(token): token for token in tokenizer.special_ids}
    if not any(name in text for name in by_name):
        return tokenizer.encode(text)
    ids: list[int] = []
    for part in re.split("(" + "|".join(map(re.escape, by_name)) + ")", text):
        ids += [by_name[part]] if part in by_name else tokenizer.encode(part)
    return ids


def decode_with_specials(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of ids, special tokens by their names."""
    if tokenizer.sentencepiece is None:
        return tokenizer.decode(ids)
    text = ""
    part: list[int] = []
    for token in ids:
        if token in tokenizer.special_ids:
            text, part = text + tokenizer.decode(part) + tokenizer.token(token), []
        else:
            part.append(token)
    return text + tokenizer.decode(part)
