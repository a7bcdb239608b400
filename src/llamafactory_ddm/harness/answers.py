"""Answers in generated texts, and whether they are right: filters and metrics that the YAML of a task names.

A filter takes the responses of each document, and a metric one reference and one response. A task names them as
`!function llamafactory_ddm.harness.answers.NAME`.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any

from lm_eval.tasks.hendrycks_math.utils import is_equiv

from ..evaluation.text import ANSWER_MARK, gsm8k_answer, rouge

_Responses = Iterable[Sequence[str]]
# A minus after a digit, a letter or a bracket subtracts or joins; commas and underscores stand between thousands.
_NUMBER = re.compile(r"(?:(?<![\w)])-)?\$?(?:(?:\d{1,3}(?:[,_]\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)")
_LEFT_SIDES = re.compile(r"(?:[\s\d.,$+*/x\u00d7()-]*=)*")
_ANNOUNCED = re.compile(r"\banswer\**(?:\s+is\b|\s*[:=])\s*:?\s*", re.IGNORECASE)
# A before a word is the article, but for these.
_LETTER = re.compile(r"\b(?:[B-E]\b|A\b(?!\s+(?!(?:is|because|since|as)\b)[a-z]))")
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{|\\boxed ")


def numbers(responses: _Responses, documents: Any) -> list[list[str]]:
    """Return the number that answers in each response, "" if there is none.

    It is the first number after the last "####", else the first after the last "answer is" or "answer:", else the last
    number. Where an equation of numbers stands first, the number after its "=" counts.
    """
    return [[_number(text) for text in texts] for texts in responses]


def letters(responses: _Responses, documents: Any) -> list[list[str]]:
    """Return the choice A to E in each response, "" if there is none.

    It is the first capital letter that stands alone, as in (B), after the last "answer is" or "answer:", else in the
    response. The article A, before a word, is no choice.
    """
    return [[_letter(text) for text in texts] for texts in responses]


def first_lines(responses: _Responses, documents: Any) -> list[list[str]]:
    """Return the first line of each response that is not empty, normalised for comparison."""
    return [[normalized((text.strip().splitlines() or [""])[0]) for text in texts] for texts in responses]


def after_mark(responses: _Responses, documents: Any) -> list[list[str]]:
    """Return the text after the last "####" of each response, without commas, as DiffuLLaMA compares it; else ""."""
    return [[gsm8k_answer(text) or "" for text in texts] for texts in responses]


def boxed(responses: _Responses, documents: Any) -> list[list[str]]:
    """Return the content of the last \\boxed of each response, else what follows the last "answer is", else ""."""
    return [[_boxed(text) or (_after_announcement(text) or "").strip(" $.") for text in texts] for texts in responses]


def majority(responses: _Responses, documents: Any) -> list[list[str]]:
    """Return the most frequent answer of each document; of equally frequent ones the first, and no empty one.

    Source: Wang et al. 2022, self-consistency (arXiv 2203.11171), the unweighted sum.
    """
    votes = (Counter(map(normalized, filter(None, answers))).most_common(1) for answers in responses)
    return [[vote[0][0] if vote else ""] for vote in votes]


def accuracy(references: Sequence[str], predictions: Sequence[str | Sequence[str]]) -> float:
    """Return 1.0 if the answer equals the reference, both normalised; of several answers one suffices (hit@k)."""
    return float(normalized(references[0]) in [normalized(answer) for answer in _answers(predictions[0]) if answer])


def contained(references: Sequence[str], predictions: Sequence[str | Sequence[str]]) -> float:
    """Return 1.0 if an answer contains the reference, both normalised, as DiffuLLaMA judges TriviaQA."""
    reference = normalized(references[0])
    return float(reference != "" and any(reference in normalized(answer) for answer in _answers(predictions[0])))


def equivalent(references: Sequence[str], predictions: Sequence[str | Sequence[str]]) -> float:
    """Return 1.0 if an answer is the reference as LaTeX, after the string normalisation of Hendrycks et al. 2021."""
    return float(any(answer != "" and bool(is_equiv(answer, references[0])) for answer in _answers(predictions[0])))


def story_rouge(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Return the F1 of ROUGE-1, ROUGE-2 and ROUGE-L, in percent, and their mean, of a story's third sentence.

    Raises:
        ValueError: if rouge-score is not installed.
    """
    scores = rouge([results[0]], [document["InputSentence3"]])
    if scores is None:
        raise ValueError("rouge-score is not installed: pip install rouge-score")
    return {**scores, "rouge-avg": sum(scores.values()) / len(scores)}


def boxed_answer(document: Mapping[str, Any]) -> str:
    """Return the boxed answer of a solution of MATH."""
    return _boxed(document["solution"]) or ""


def normalized(text: str) -> str:
    """Return a text as it is compared.

    A number has one spelling: 1,200.50, $1200.5 and 1200.5 are the same. Other text is in lower case without
    punctuation and, unless it has no other words, the articles a, an and the.

    Source: Rajpurkar et al. 2016, SQuAD, and Joshi et al. 2017, TriviaQA, for the words.
    """
    plain = text.strip().rstrip(".").replace(",", "").replace("$", "")
    try:
        value = Decimal(plain).normalize()
    except ArithmeticError:  # no number, or one beyond the range of Decimal
        words = "".join(char for char in text.lower() if char not in string.punctuation).split()
        return " ".join([word for word in words if word not in ("a", "an", "the")] or words)
    if not value.is_finite() or abs(value.adjusted()) > 99:  # of the latter, the digits would fill the memory
        return str(value).lower()
    return f"{value + 0:f}"


def _answers(prediction: str | Sequence[str]) -> Sequence[str]:
    return [prediction] if isinstance(prediction, str) else prediction


def _number(text: str) -> str:
    text = text.replace("\u2212", "-")
    tail = text.rpartition(ANSWER_MARK)[2] if ANSWER_MARK in text else _after_announcement(text) or ""
    left = _LEFT_SIDES.match(tail)
    for part, index in ((tail[left.end() if left else 0 :], 0), (text, -1)):
        found = _NUMBER.findall(part)
        if found:
            return normalized(found[index])
    return ""


def _letter(text: str) -> str:
    tail = _after_announcement(text) or ""
    found = _LETTER.search(tail) or _LETTER.search(text) or re.search(r"\bA\b", text)
    return found[0] if found else ""


def _after_announcement(text: str) -> str | None:
    """Return what follows the last "answer is" or "answer:" on its line."""
    announced = list(_ANNOUNCED.finditer(text))
    return text[announced[-1].end() :].partition("\n")[0].strip() if announced else None


def _boxed(text: str) -> str | None:
    """Return the content of the last \\boxed or \\fbox that is closed, None if there is none.

    Without braces it is what follows up to the next $ or the end of the line, as Hendrycks et al. 2021 read it.
    """
    for begin in reversed(list(_BOX.finditer(text))):
        rest, depth = text[begin.end() :], 1
        if not begin[0].endswith("{"):
            return re.split(r"[$\n]", rest)[0].strip()
        for at, char in enumerate(rest):
            depth += (char == "{") - (char == "}")
            if depth == 0:
                return rest[:at]
    return None
