"""Metrics of generated texts, worked out by hand."""

import sys

import pytest

from llamafactory_ddm.evaluation.text import exact_match, gsm8k_accuracy, gsm8k_answer, rouge


def test_exact_match_ignores_white_space_at_both_ends_only():
    assert exact_match([" 12 ", "a  b", "x"], ["12", "a b", "y"]) == pytest.approx(100 / 3)
    assert exact_match([], []) == 0.0


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("3 + 4 = 7\n#### 7", "7"),
        ("#### 1\nno, #### 1,234 ", "1234"),
        ("#### $5,000.50", "$5000.50"),
        ("the answer is 7", None),
        ("####", ""),
    ],
)
def test_the_answer_follows_the_last_mark(text, answer):
    assert gsm8k_answer(text) == answer


def test_gsm8k_accuracy():
    labels = ["so #### 1,000", "#### 5"]
    assert gsm8k_accuracy(["#### 1000", "5"], labels) == 50.0
    assert gsm8k_accuracy(["#### 1000", "thus #### 5"], labels) == 100.0
    assert gsm8k_accuracy(["#### 5", "x"], ["#### 5", "no mark"]) is None
    assert gsm8k_accuracy([], []) is None


def test_rouge_by_hand():
    """Prediction "the cat sat", label "the cat ate fish": 2 of 3 and 2 of 4 words; 1 of 2 and 1 of 3 pairs."""
    scores = rouge(["the cat sat"], ["the cat ate fish"])
    assert scores == pytest.approx({"rouge-1": 100 * 4 / 7, "rouge-2": 100 * 2 / 5, "rouge-l": 100 * 4 / 7})


def test_without_rouge_score_there_is_no_rouge(monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert rouge(["a"], ["a"]) is None
