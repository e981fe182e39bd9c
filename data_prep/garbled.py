"""Text that is damaged: replacement and control characters, and UTF-8 that was read in another encoding (mojibake).

A false alarm costs a good row and a miss only leaves a bad one in, so each form of mojibake is one that decodes back
to valid UTF-8 and that no language writes. Where a single pair can be text ("CAFÉ…" are also the bytes of one
character), a run of them is needed. The forms follow from the bytes: a lead byte C2-F4, then bytes 80-BF, as
Windows-1252 shows them; of rarer encodings (Mac Roman, Windows-1251, GBK) only the forms that are beyond doubt.
"""

import re

ASCII_CONTROLS = bytes([*range(9), 11, 12, *range(14, 32), 127])
"""All but tab, line feed and carriage return."""

_REPLACEMENT = "\ufffd".encode()
_LATER_CONTROLS = re.compile(b"\xc2[\x80-\x9f]")
"""U+0080 to U+009F in UTF-8."""
_LATER = "\xa0-¿€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ"
"""Bytes 80-BF in Windows-1252; the five that it leaves out become control characters, which are found as such."""
_LATER_1251 = "ЂЃ‚ѓ„…†‡€‰Љ‹ЊЌЋЏђ‘’“”•–—™љ›њќћџ\xa0ЎўЈ¤Ґ¦§Ё©Є«¬\xad®Ї°±Ііґµ¶·ё№є»јЅѕї"
_MOJIBAKE = re.compile(
    "|".join(
        (
            "Ã[¡-ª¬-º¼-¿‚ƒ„†‡ˆ‰Š‹ŒŽšœžŸ]",  # à-ÿ and most of À-Þ; without the quotes and dashes that may follow MANHÃ
            "Ã[–“](?=[a-z])",
            "Â[¡-±´-¸º-¿]",
            r"(?<=\w)Â[²³¹]",
            "(?<=[a-z0-9.,;:!?)])Â\xa0",
            f"â[€‚„†‡ˆ‰˜™šœž][{_LATER}]",  # quotes, dashes, the euro, arrows, signs
            f"ðŸ[{_LATER}]{{2}}",  # emoji
            "ï»¿|ï¿½",  # the byte order mark, U+FFFD
            "(?<=[a-z])(?:Å[‚›ºŸžˆ¼¾¡„‡™]|Ä[…™‡±Ÿ›])",  # Polish, Czech, Turkish
            f"(?:[Â-ß][{_LATER}]){{3}}",  # Cyrillic, Greek, Hebrew, Arabic
            f"(?:[à-ï][{_LATER}]{{2}}){{2}}",  # Chinese, Japanese, Korean, Indic
            "‚Ä[ôúùìî¶ò¢]",
            "вЂ[™ќњўљ“”¦]",
            f"(?:[РС][{_LATER_1251}]){{4}}",
            "锟斤拷",
        )
    )
)
_HINT = re.compile(f"[Â-ïð][{_LATER}]|[РС][{_LATER_1251}]|‚Ä|вЂ|锟斤")
"""Found in all mojibake and seldom elsewhere; ten times as fast to look for."""


_SIGNS = (b"\xc3", b"\xd0", "‚Ä".encode(), "锟斤".encode())
"""One of these is in the UTF-8 of whatever holds a hint: most Chinese or Japanese rows end here."""


def is_garbled(text: str, data: bytes) -> bool:
    """Whether the text, whose UTF-8 is `data`, holds U+FFFD, mojibake, or a control character but tab and line ends."""
    # bytes.translate and `in`: a search by regular expression would take five times as long on a plain row
    if len(data.translate(None, ASCII_CONTROLS)) != len(data):
        return True
    if text.isascii():
        return False
    if _REPLACEMENT in data:
        return True
    if b"\xc2" in data and _LATER_CONTROLS.search(data):
        return True
    return any(sign in data for sign in _SIGNS) and bool(_HINT.search(text) and _MOJIBAKE.search(text))
