"""Metrics of generated texts and their labels: exact match, GSM8K accuracy, ROUGE."""

from __future__ import annotations

import bisect
import importlib.util
import re
import unicodedata
from collections.abc import Sequence

ANSWER_MARK = "####"


def exact_match(predictions: Sequence[str], labels: Sequence[str]) -> float:
    """Return the percentage of predictions that equal their label, ignoring white space at both ends."""
    return _percent([p.strip() == label.strip() for p, label in zip(predictions, labels, strict=True)])


def gsm8k_answer(text: str) -> str | None:
    """Return the text after the last `####`, without commas and surrounding white space; None if there is no `####`.

    Source: Cobbe et al. 2021 (arXiv 2110.14168), whose solutions end in `#### answer`; DiffuLLaMA (arXiv 2410.17891)
        for the commas.
    """
    _, mark, answer = text.rpartition(ANSWER_MARK)
    return answer.strip().replace(",", "") if mark else None


def gsm8k_accuracy(predictions: Sequence[str], labels: Sequence[str]) -> float | None:
    """Return the percentage of right answers, or None if a label has no `####`.

    A prediction without `####` is wrong.
    """
    answers = [gsm8k_answer(label) for label in labels]
    if not answers or any(answer is None for answer in answers):
        return None
    return _percent([gsm8k_answer(p) == answer for p, answer in zip(predictions, answers, strict=True)])


def rouge(predictions: Sequence[str], labels: Sequence[str]) -> dict[str, float] | None:
    """Return the mean F1 of ROUGE-1, ROUGE-2 and ROUGE-L in percent, or None if rouge-score is not installed.

    Source: Lin 2004, as rouge-score computes it, without stemming.
    Deviates: rouge-score's words consist of a to z and digits only; `words` covers all scripts. English texts score
        the same.
    """
    if importlib.util.find_spec("rouge_score") is None:
        return None
    from rouge_score import rouge_scorer

    names = {"rouge1": "rouge-1", "rouge2": "rouge-2", "rougeL": "rouge-l"}
    scorer = rouge_scorer.RougeScorer(list(names), tokenizer=_Words())
    scores = [scorer.score(label, p) for p, label in zip(predictions, labels, strict=True)]
    return {ours: _mean([100.0 * score[theirs].fmeasure for score in scores]) for theirs, ours in names.items()}


class _Words:
    """The tokenizer that rouge-score calls."""

    def tokenize(self, text: str) -> list[str]:
        """Return the words of a text."""
        return words(text)


def _percent(hits: Sequence[bool]) -> float:
    return _mean([100.0 * hit for hit in hits])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


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


# Joiners and variation selectors change how their neighbours are drawn; they are no part of a word and do not end one.
_INVISIBLE = frozenset("\u200c\u200d\ufe0e\ufe0f")


def words(text: str) -> list[str]:
    """Return the words of a text in lower case: runs of letters and decimal digits with their combining marks.

    Where a script writes no spaces, every character with its marks is a word: Han, kana, Thai, Lao, Khmer, Myanmar.
    Everything else ends a word. Of ASCII texts these are the words of rouge-score.
    """
    if text.isascii():
        return re.findall("[a-z0-9]+", text.lower())
    result: list[str] = []
    is_open = marks_only = False  # whether the last word continues, and whether only with marks
    for char in unicodedata.normalize("NFC", text).lower():
        if char in _INVISIBLE:
            continue
        category = unicodedata.category(char)
        if category in ("Mn", "Mc"):
            if is_open:
                result[-1] += char
        elif category[0] != "L" and category != "Nd":
            is_open = False
        else:
            single = _is_unspaced(ord(char)) and category[0] == "L"
            if is_open and not single and not marks_only:
                result[-1] += char
            else:
                result.append(char)
            is_open, marks_only = True, single
    return result


def _is_unspaced(code: int) -> bool:
    index = bisect.bisect_right(_FIRST, code) - 1
    return index >= 0 and code <= _UNSPACED[index][1]
