"""Words of many scripts, and of English as rouge-score has them."""

# ruff: noqa: RUF001
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score import rouge_scorer, tokenize

from llamafactory_ddm.evaluation.text import rouge, words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Don't stop_it: 3.5 km", ["don", "t", "stop", "it", "3", "5", "km"]),
        ("Größe, café — naïve", ["größe", "café", "naïve"]),
        ("cafe\u0301 = caf\u00e9", ["caf\u00e9", "caf\u00e9"]),
        ("Сегодня хорошая погода!", ["сегодня", "хорошая", "погода"]),
        ("αγαπώ τη ΘΆΛΑΣΣΑ", ["αγαπώ", "τη", "θάλασσα"]),
        ("今天天气很好。", ["今", "天", "天", "气", "很", "好"]),
        ("我用Python3写", ["我", "用", "python3", "写"]),
        ("コーヒーは 2杯", ["コ", "ー", "ヒ", "ー", "は", "2", "杯"]),
        ("오늘 날씨가 좋다", ["오늘", "날씨가", "좋다"]),
        ("आज मौसम अच्छा है", ["आज", "मौसम", "अच्छा", "है"]),
        ("मौसम १२", ["मौसम", "१२"]),
        ("இன்று நல்ல நாள்", ["இன்று", "நல்ல", "நாள்"]),
        ("الطقس جميلٌ اليوم", ["الطقس", "جميلٌ", "اليوم"]),
        ("می\u200cخواهم بروم", ["میخواهم", "بروم"]),
        ("מזג האוויר יפה", ["מזג", "האוויר", "יפה"]),
        ("วันนี้ ๑๒", ["วั", "น", "นี้", "๑๒"]),
        ("ምን አለ፣ ሰላም", ["ምን", "አለ", "ሰላም"]),
        ("x² ½ ❤️ 🙂", ["x"]),
        ("", []),
        ("…!?", []),
        ("\u0301", []),
    ],
)
def test_words(text, expected):
    assert words(text) == expected


@given(st.text(string.printable))
def test_english_words_are_those_of_rouge_score(text):
    assert words(text) == tokenize.tokenize(text, None)


ENGLISH = [
    ("Tom saw a small dog; it didn't bark.", "A small dog saw Tom, and it did not bark!"),
    ("#### 1,234.50 dollars", "the answer: #### 1234.5 dollars"),
    ("“Well,” said Anna — “it’s 7 o’clock…”", "“Well,” said Finn – “it’s 8 o’clock…”"),
    ("", "nothing"),
]


@pytest.mark.parametrize(("prediction", "label"), ENGLISH)
def test_english_figures_are_those_of_rouge_score(prediction, label):
    kinds = ["rouge1", "rouge2", "rougeL"]
    theirs = rouge_scorer.RougeScorer(kinds, use_stemmer=False).score(label, prediction)
    expected = [100 * theirs[kind].fmeasure for kind in kinds]
    assert list(rouge([prediction], [label]).values()) == expected


@pytest.mark.parametrize(
    ("label", "nearly"),
    [
        ("今天天气很好", "今天天气不好"),
        ("сегодня хорошая погода", "сегодня плохая погода"),
        ("आज मौसम अच्छा है", "आज मौसम खराब है"),
        ("αγαπώ τη θάλασσα", "αγαπώ τη μουσική"),
        ("오늘 날씨가 좋다", "오늘 날씨가 나쁘다"),
        ("الطقس جميل اليوم", "الطقس سيء اليوم"),
        ("วันนี้อากาศดี", "วันนี้อากาศร้อน"),
        ("今日はいい天気です", "今日は悪い天気です"),
    ],
)
def test_rouge_of_other_scripts(label, nearly):
    assert rouge([label], [label]) == pytest.approx({"rouge-1": 100.0, "rouge-2": 100.0, "rouge-l": 100.0})
    close, far = rouge([nearly], [label]), rouge(["xyz"], [label])
    assert 0 < close["rouge-l"] < 100 and 0 < close["rouge-1"] < 100
    assert set(far.values()) == {0.0}


def test_combining_marks_distinguish_words():
    """Without marks these words would be equal."""
    assert rouge(["की"], ["कि"])["rouge-1"] == 0.0
