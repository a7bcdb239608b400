"""Answers in generated texts: what is read from them, and when they are right."""

import pytest

pytest.importorskip("lm_eval")

from llamafactory_ddm.harness import answers


def one(read, text):
    ((found,),) = read([[text]], None)
    return found


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3 + 4 = 7. #### 1,234", "1234"),
        ("#### 5 #### 6 and 7", "6"),
        ("Then 12. The answer is $5.00. Not 9.", "5"),
        ("answer: -3", "-3"),
        ("I have 3 and 4", "4"),
        ("The answer is unknown, or 8", "8"),
        ("The answer is unknown. I had 8", "8"),
        ("####", ""),
        ("nothing", ""),
        (".5 of it", "0.5"),
        ("To answer this, we add 3 and 4 to get 7.", "7"),
        ("The answer is 12. Anna answered 3 questions", "12"),
        ("**Answer**: 5 of 9", "5"),
        ("The answer is 3 + 4 = 7, not 8", "7"),
        ("#### 10-3=7", "7"),
        ("10-3", "3"),
        ("1,2,3", "3"),
        ("1_200", "1200"),
        ("$1,234,567.89 in all", "1234567.89"),
        ("-$5.50", "-5.5"),
        ("x = \u22127", "-7"),
    ],
)
def test_numbers(text, number):
    assert one(answers.numbers, text) == number


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        (" B", "B"),
        ("(C)", "C"),
        ("A man has D. The answer is (B) 4.", "B"),
        ("Answer: D", "D"),
        ("B. The answer is", "B"),
        ("A train leaves, so (C)", "C"),
        ("To answer this, A man is counted: D", "D"),
        (" A because 3 > 2, not B", "A"),
        ("A man", "A"),
        ("Bad", ""),
        ("", ""),
    ],
)
def test_letters(text, letter):
    assert one(answers.letters, text) == letter


def test_lines_marks_and_boxes():
    assert one(answers.first_lines, "\n The Blue Whale!\nQuestion") == "blue whale"
    assert one(answers.first_lines, "") == ""
    assert one(answers.after_mark, "#### 1 #### 1,200 ") == "1200" and one(answers.after_mark, "12") == ""
    assert one(answers.boxed, r"\boxed{1} and \boxed{\frac{1}{2}}.") == r"\frac{1}{2}"
    assert one(answers.boxed, r"the answer is 5") == one(answers.boxed, r"the answer is $5$.") == "5"
    for text in (r"\boxed{1", r"\boxed(1) of {2}", r"\boxed"):
        assert one(answers.boxed, text) == ""
    assert one(answers.boxed, r"\boxed{1}, \boxed{2") == one(answers.boxed, r"\fbox{1}") == "1"
    assert one(answers.boxed, "\\boxed\n{5}") == one(answers.boxed, r"so $\boxed 5$.") == "5"
    assert answers.boxed_answer({"solution": r"so $\boxed{8}$."}) == "8"


def test_numbers_beyond_all_bounds():
    """They neither fill the memory nor raise an error."""
    for text in ("1e999999", "1e9999999", "1e99999999999999999999", "sNaN", "-inf"):
        assert len(answers.normalized(text)) < 30
    assert answers.normalized("0e5") == "0" and answers.normalized("1e3") == "1000"


@pytest.mark.parametrize(
    ("votes", "winner"),
    [
        (["3", "4", "4.0", ""], "4"),
        (["5", "6"], "5"),
        (["", "", "", "2"], "2"),
        (["", ""], ""),
        (["the cat", "Cat", "dog"], "cat"),
    ],
)
def test_the_majority(votes, winner):
    assert answers.majority([votes], None) == [[winner]]


@pytest.mark.parametrize(
    ("reference", "answer", "right"),
    [
        ("8", "8", 1),
        ("1200.5", "$1,200.50", 1),
        ("8", "9", 0),
        ("A", "", 0),
        ("A", "B", 0),
        ("A", "A", 1),
        ("The Beatles", "beatles", 1),
        ("3", ["1", "2", "3.0"], 1),
        ("3", ["1", "2"], 0),
        ("3", [], 0),
    ],
)
def test_accuracy(reference, answer, right):
    assert answers.accuracy([reference], [answer]) == right


def test_containment_and_equivalence():
    assert answers.contained(["The Nile"], ["it is the river nile, in egypt"]) == 1
    assert answers.contained(["Nile"], ["rhine"]) == answers.contained(["!"], ["rhine"]) == 0
    assert answers.contained(["Nile"], [["rhine", "nile"]]) == 1
    assert answers.equivalent([r"\frac{1}{2}"], ["0.5"]) == answers.equivalent([r"\frac12"], [r"\dfrac{1}{2}"]) == 1
    assert answers.equivalent(["2"], ["3"]) == answers.equivalent(["2"], [""]) == answers.equivalent([""], [""]) == 0


def test_rouge_by_hand():
    """Two of four words agree, in order, and one of three pairs: F1 of 1/2, 1/3 and 1/2."""
    scores = answers.story_rouge({"InputSentence3": "a b c d"}, ["a b x y"])
    expected = {"rouge-1": 50.0, "rouge-2": 100 / 3, "rouge-l": 50.0, "rouge-avg": (100 + 100 / 3) / 3}
    assert scores == pytest.approx(expected)
