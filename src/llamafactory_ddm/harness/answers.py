"""Answers in generated texts, and whether they are right: filters and metrics that the YAML of a task names.

A filter takes the responses of each document, and a metric one reference and one response. A task names them as
`!function llamafactory_ddm.harness.answers.NAME`.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

from lm_eval.tasks.hendrycks_math.utils import is_equiv, last_boxed_only_string, remove_boxed

from ..evaluation.text import ANSWER_MARK, gsm8k_answer, rouge

_Responses = Iterable[Sequence[str]]
_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?|-?\.\d+")
_ANNOUNCED = re.compile(r"answer(?:\s+is)?\s*:?\s*", re.IGNORECASE)


def numbers(responses: _Responses, documents: Any) -> list[list[str]]:
    """Return the number that answers in each response, "" if there is none.

    It is the first number after the last "####", else the first after the last "answer is", else the last number.
    """
    return [[_number(text) for text in texts] for texts in responses]


def letters(responses: _Responses, documents: Any) -> list[list[str]]:
    """Return the choice A to E in each response, "" if there is none.

    It is the first capital letter that stands alone, as in (B), after the last "answer is", else in the response.
    """
    found = []
    for texts in responses:
        tails = ((_after_announcement(text) or text, text) for text in texts)
        matches = [re.search(r"\b[A-E]\b", tail) or re.search(r"\b[A-E]\b", text) for tail, text in tails]
        found.append([match[0] if match else "" for match in matches])
    return found


def first_lines(responses: _Responses, documents: Any) -> list[list[str]]:
    """Return the first line of each response that is not empty, normalised for comparison."""
    return [[normalized((text.strip().splitlines() or [""])[0]) for text in texts] for texts in responses]


def after_mark(responses: _Responses, documents: Any) -> list[list[str]]:
    """Return the text after the last "####" of each response, without commas, as DiffuLLaMA compares it; else ""."""
    return [[gsm8k_answer(text) or "" for text in texts] for texts in responses]


def boxed(responses: _Responses, documents: Any) -> list[list[str]]:
    """Return the content of the last \\boxed of each response, else what follows the last "answer is", else ""."""
    return [[_boxed(text) or _after_announcement(text) or "" for text in texts] for texts in responses]


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
    return float(any(bool(is_equiv(answer, references[0])) for answer in _answers(predictions[0])))


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
        value = Decimal(plain)
    except InvalidOperation:
        words = "".join(char for char in text.lower() if char not in string.punctuation).split()
        return " ".join([word for word in words if word not in ("a", "an", "the")] or words)
    return f"{value.normalize() + 0:f}" if value.is_finite() else plain.lower()


def _answers(prediction: str | Sequence[str]) -> Sequence[str]:
    return [prediction] if isinstance(prediction, str) else prediction


def _number(text: str) -> str:
    tail = text.rpartition(ANSWER_MARK)[2] if ANSWER_MARK in text else _after_announcement(text)
    for part, index in ((tail, 0), (text, -1)):
        found = _NUMBER.findall(part or "")
        if found:
            return normalized(found[index])
    return ""


def _after_announcement(text: str) -> str | None:
    """Return what follows the last "answer" or "answer is" on its line."""
    announced = list(_ANNOUNCED.finditer(text))
    return text[announced[-1].end() :].partition("\n")[0].strip() if announced else None


def _boxed(text: str) -> str | None:
    """Return the content of the last \\boxed of a text that is closed."""
    expression = last_boxed_only_string(text)
    return None if expression is None or "\\fbox" in expression else str(remove_boxed(expression))
