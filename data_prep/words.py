"""Texts as words that can be compared: what differs only in case, white space, width or accents' encoding is equal."""

import re
from unicodedata import normalize

_HAN_AND_KANA = (
    "\u3005-\u3007\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff"
)
_SOUTH_EAST_ASIAN = "\u0e01-\u0e4e\u0e81-\u0ecd\u0f40-\u0fbc\u1000-\u1049\u1780-\u17d3"
# \w leaves out the marks that spell vowels in these scripts, and would cut their words at each of them.
_MARKS = (
    "\u0300-\u036f\u0591-\u05bd\u0610-\u061a\u064b-\u065f\u0670\u06d6-\u06dc\u0900-\u0963\u0971-\u0dff"
    + _SOUTH_EAST_ASIAN
)
WORD = re.compile(f"[{_HAN_AND_KANA}]|(?:[^\\W_{_HAN_AND_KANA}]|[{_MARKS}])+")
"""A word of normalised text: letters and digits; a Han character or kana is a word of its own. No underscores: tests
draw blanks with them."""
_WITHOUT_SPACES = _HAN_AND_KANA + _SOUTH_EAST_ASIAN
_PIECE = re.compile(f"[{_WITHOUT_SPACES}]|[^\\s{_WITHOUT_SPACES}]+")
_ASCII_WORDS = bytes(ord(chr(code).lower()) if code < 128 and chr(code).isalnum() else 32 for code in range(256))


def fold(text: str) -> str:
    """NFKC, then case folding: the form in which texts are compared."""
    return normalize("NFKC", text).casefold()


def words(text: str) -> list[str]:
    """The words of a text, folded, without punctuation."""
    if text.isascii():
        return text.encode().translate(_ASCII_WORDS).decode().split()
    return WORD.findall(fold(text))


def pieces(text: str) -> list[str]:
    """What stands between white space, folded, with punctuation; in scripts without spaces, each character."""
    if text.isascii():
        return text.lower().split()
    return _PIECE.findall(fold(text))
