"""Generated texts against their labels: exact match, GSM8K's answers, ROUGE."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from .words import words

ANSWER_MARK = "####"


def exact_match(predictions: Sequence[str], labels: Sequence[str]) -> float:
    """Return the share of predictions, in percent, that equal their label but for white space at either end."""
    return _percent([p.strip() == label.strip() for p, label in zip(predictions, labels, strict=True)])


def gsm8k_answer(text: str) -> str | None:
    """Return what stands behind the last `####`, without commas and white space; None if there is no such mark.

    Source: Cobbe et al. 2021 (arXiv 2110.14168), whose solutions end in `#### answer`; DiffuLLaMA (arXiv 2410.17891)
        for the commas.
    """
    _, mark, answer = text.rpartition(ANSWER_MARK)
    return answer.strip().replace(",", "") if mark else None


def gsm8k_accuracy(predictions: Sequence[str], labels: Sequence[str]) -> float | None:
    """Return the share of answers, in percent, that are right, or None if not every label holds one.

    A prediction without the mark is wrong.
    """
    wanted = [gsm8k_answer(label) for label in labels]
    if not wanted or any(answer is None for answer in wanted):
        return None
    return _percent([gsm8k_answer(p) == answer for p, answer in zip(predictions, wanted, strict=True)])


def rouge(predictions: Sequence[str], labels: Sequence[str]) -> dict[str, float] | None:
    """Return the mean F1 of ROUGE-1, ROUGE-2 and ROUGE-L, in percent, or None where rouge-score is not installed.

    Source: Lin 2004, as rouge-score computes it, without stemming.
    Deviates: rouge-score knows the letters a to z and the digits alone, so that texts of other scripts would have no
        words; here they have, see `words`. Of English texts the figures are the same.
    """
    if importlib.util.find_spec("rouge_score") is None:
        return None
    from rouge_score import rouge_scorer

    names = {"rouge1": "rouge-1", "rouge2": "rouge-2", "rougeL": "rouge-l"}
    scorer = rouge_scorer.RougeScorer(list(names), tokenizer=_Words())
    scores = [scorer.score(label, p) for p, label in zip(predictions, labels, strict=True)]
    return {ours: _mean([100.0 * score[theirs].fmeasure for score in scores]) for theirs, ours in names.items()}


class _Words:
    """What rouge-score splits texts with."""

    def tokenize(self, text: str) -> list[str]:
        """Return the words of a text."""
        return words(text)


def _percent(hits: Sequence[bool]) -> float:
    return _mean([100.0 * hit for hit in hits])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
