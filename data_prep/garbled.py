"""Text that is damaged: replacement and control characters, and UTF-8 that was read in another encoding (mojibake).

A false alarm costs a good row and a miss only leaves a bad one in, so each form of mojibake is one that decodes back
to valid UTF-8 and that no language writes. Where a single pair can be text ("CAFÉ…" are also the bytes of one
character), a run of them is needed. The forms follow from the bytes: a lead byte C2-F4, then bytes 80-BF, as
Windows-1252 shows them; of rarer encodings (Mac Roman, Windows-1251, GBK) only the forms that are beyond doubt.
"""

import re

ASCII_CONTROLS = bytes([*range(9), 11, 12, *range(14, 32), 127])
"""All but tab, line feed and carriage return."""

_DAMAGED = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffd]")
_LATER = "\xa0-¿€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ"
"""Bytes 80-BF in Windows-1252; the five that it leaves out become control characters, which _DAMAGED finds."""
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


def is_garbled(text: str) -> bool:
    """Whether the text holds U+FFFD, a control character other than tab and line ends, or mojibake."""
    if _DAMAGED.search(text):
        return True
    return not text.isascii() and _HINT.search(text) is not None and _MOJIBAKE.search(text) is not None
