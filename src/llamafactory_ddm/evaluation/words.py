"""The words of a text, in any script."""

from __future__ import annotations

import bisect
import re
import unicodedata

# Scripts that write no space between words, as first and last code points, ascending: Thai and Lao, Myanmar, Khmer,
# radicals and kana with their marks, Han extension A, Han, Myanmar extended, compatible Han, halfwidth katakana, and
# the planes of rarer characters.
_UNSPACED = (
    (0x0E00, 0x0EFF),
    (0x1000, 0x109F),
    (0x1780, 0x17FF),
    (0x2E80, 0x312F),
    (0x31A0, 0x31BF),
    (0x31F0, 0x31FF),
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xA9E0, 0xA9FF),
    (0xAA60, 0xAA7F),
    (0xF900, 0xFAFF),
    (0xFF66, 0xFF9F),
    (0x17000, 0x18CFF),
    (0x1AFF0, 0x1B16F),
    (0x20000, 0x3FFFF),
)
_FIRST = [first for first, _ in _UNSPACED]
# Joiners shape the letters on either side, and variation selectors a sign: neither is part of a word nor ends one.
_INVISIBLE = frozenset("\u200c\u200d\ufe0e\ufe0f")


def words(text: str) -> list[str]:
    """Return the words of a text in lower case: runs of letters and decimal digits with their combining marks.

    Where a script writes no spaces, every character with its marks is a word: Han, kana, Thai, Lao, Khmer, Myanmar.
    Everything else ends a word. Of ASCII texts these are the words of rouge-score.
    """
    if text.isascii():
        return re.findall("[a-z0-9]+", text.lower())
    found: list[str] = []
    is_open = alone = False  # whether the last word goes on, and with marks only
    for char in unicodedata.normalize("NFC", text).lower():
        if char in _INVISIBLE:
            continue
        category = unicodedata.category(char)
        if category in ("Mn", "Mc"):
            if is_open:
                found[-1] += char
        elif category[0] != "L" and category != "Nd":
            is_open = False
        else:
            single = _is_unspaced(ord(char)) and category[0] == "L"
            if is_open and not single and not alone:
                found[-1] += char
            else:
                found.append(char)
            is_open, alone = True, single
    return found


def _is_unspaced(code: int) -> bool:
    place = bisect.bisect_right(_FIRST, code) - 1
    return place >= 0 and code <= _UNSPACED[place][1]
