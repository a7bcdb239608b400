"""What prepared rows hold, by hand."""

import re
from types import SimpleNamespace

import pytest
from datasets import Dataset

from llamafactory_ddm.integration.data import prepared_rows
from llamafactory_ddm.integration.data.prepared_rows import AnswerMarks, RowRules, check_columns, check_prepared
from llamafactory_ddm.modeling.special_tokens import ResolvedMaskToken
from support.tiny import tiny_tokenizer

EOS, A, CAT, DOG, MASK = 0, 40, 258, 260, 262  # of the tiny tokenizer; the last is new
TRAINS = SimpleNamespace(do_train=True, do_eval=False, do_predict=False)
ANSWERS = AnswerMarks(added=0, closing=EOS, behind=0, before=None, longest=4)


def rules(**changes):
    settings = {
        "source": "dataset: x",
        "stage": "ddm",
        "is_opened": False,
        "packed": False,
        "variable": False,
        "cutoff_len": 4,
        "positions": 32,
        "tokenizer": tiny_tokenizer(),
        "mask": ResolvedMaskToken("<|mask|>", MASK, True),
        "controls": [],
        "allow_common_mask": False,
        "answers": None,
    }
    return RowRules(**{**settings, **changes})


def check(rows, training_args=TRAINS, columns=False, **changes):
    given = Dataset.from_dict({key: [row[key] for row in rows] for key in rows[0]}) if isinstance(rows, list) else rows
    module = {"train_dataset": given}
    if columns:
        check_columns(module, rules(**changes), training_args)
    check_prepared(module, rules(**changes), SimpleNamespace(dataset=["x"], eval_dataset=None), training_args)


def texts(*ids):
    return [{"input_ids": list(row)} for row in ids]


def answers(*rows):
    """Rows of ids and of how many of them are the prompt."""
    return [{"input_ids": list(ids), "labels": [-100] * n + list(ids[n:])} for ids, n in rows]


def streamed(rows):
    return Dataset.from_list(rows).to_iterable_dataset()


def refused(words, *args, **keys):
    with pytest.raises(ValueError, match=words):
        check(*args, **keys)


@pytest.mark.parametrize("kind", [list, streamed])
def test_texts_without_a_token_to_learn(kind):
    check(kind(texts([EOS], [CAT, EOS])))
    blank = tiny_tokenizer().encode(" ")[0]
    words = r"dataset: x \(train\): none of its (first )?3 rows holds a token to learn, as every text is empty"
    refused(words, kind(texts([EOS], [EOS, EOS], [blank, MASK, EOS])), allow_common_mask=True)
    words = "none of its (first )?2 rows .* every response is empty"
    refused(words, kind(answers(([CAT, EOS], 1), ([CAT, DOG], 2))), stage="ddm-sft")
    refused(words, kind(answers(([CAT, EOS], 1), ([CAT, DOG], 2))), stage="ddm-sft", variable=True)


def test_a_large_data_set_is_looked_at_as_a_whole_before_it_is_refused(monkeypatch):
    monkeypatch.setattr(prepared_rows, "_MOST", 4)
    monkeypatch.setattr(prepared_rows, "_AT_ONCE", 2)
    check(texts(*[[EOS]] * 9, [CAT, EOS]))
    refused("none of its 10 rows", texts(*[[EOS]] * 10))


def test_answers_that_are_cut_are_counted(caplog):
    whole, short, cut = ([A, CAT, DOG, EOS], 2), ([A, DOG, EOS], 1), ([A, CAT, DOG, DOG], 2)
    gone = ([A, A, A, A], 4)
    keys = {"stage": "ddm-sft", "answers": ANSWERS}
    check(answers(whole, short), **keys)
    assert "cutoff_len" not in caplog.text
    check(answers(whole, short, cut, gone), **keys)
    assert "cutoff_len: 4 cuts the answers of 2 of 4 examples short, 1 of them to the last token" in caplog.text
    refused("cutoff_len: 4 cuts the answers of 2 of 2 examples short", answers(cut, gone), **keys)
    refused("cutoff_len: 4 cuts the answers of 1 of 1 examples", answers(gone), stage="ddm-sft", answers=ANSWERS)
    evaluates = SimpleNamespace(do_train=False, do_eval=True, do_predict=False)
    check(answers(cut), evaluates, **keys)  # trains nothing


def test_answers_that_are_cut_in_packed_rows():
    """Of two texts of 4 tokens in rows of 5 the padding is none."""
    row = {"input_ids": [A, CAT, DOG, DOG, EOS], "labels": [-100, CAT, DOG, DOG, -100]}
    row["position_ids"] = [0, 1, 2, 3, 0]
    keys = {"stage": "ddm-sft", "answers": ANSWERS, "packed": True}
    refused("answers of 2 of 2 examples", [row, row], **keys)
    fine = {**row, "input_ids": [A, CAT, A, DOG, EOS], "labels": [-100, CAT, -100, DOG, -100]}
    check([row, {**fine, "position_ids": [0, 1, 0, 1, 0]}], **keys)


def test_answers_of_templates_that_end_with_the_next_turn_or_cut_prompts_first():
    """The end-of-text token stands behind an answer that was cut, too."""
    ends = AnswerMarks(added=1, closing=DOG, behind=1, before=None, longest=4)
    cut, whole = ([A, CAT, CAT, EOS], 1), ([A, CAT, DOG, EOS], 1)
    refused("answers of 1 of 1", answers(cut), stage="ddm-sft", answers=ends)
    check(answers(cut, whole), stage="ddm-sft", answers=ends)
    refused("to the last token", answers(([A, A, A, EOS], 3)), stage="ddm-sft", answers=ends)
    left = AnswerMarks(added=1, closing=None, behind=0, before=2, longest=4)
    refused("answers of 1 of 1", answers(([EOS, A, CAT, EOS], 2)), stage="ddm-sft", answers=left)
    check(answers(([EOS, A, CAT, EOS], 2), ([EOS, A, A, CAT, EOS], 3)), stage="ddm-sft", answers=left)


def test_what_tells_whole_answers_from_cut_ones():
    from llamafactory.data.template import TEMPLATES

    from llamafactory_ddm.integration.data.templates import register_templates

    register_templates()
    tokenizer = tiny_tokenizer()
    newline = tokenizer.encode("\n")[-1]
    for name, expected in (
        ("default", (0, newline, 0, None)),
        ("breeze", (1, None, 1, None)),
        ("falcon", (1, newline, 1, None)),
        ("diffullama", (1, None, 0, 2)),
    ):
        marks = AnswerMarks.of(TEMPLATES[name], tokenizer, cutoff_len=9, packed=True)
        assert (marks.added, marks.closing, marks.behind, marks.before) == expected, name
        assert marks.longest == (8 if name == "diffullama" else 9)


def test_a_mask_token_that_texts_use(caplog):
    mask = {"mask": ResolvedMaskToken("dog", DOG, False)}
    rare = [texts([CAT] * 30)[0]] * 400 + texts([CAT, DOG] + [CAT] * 28)
    check(rare, cutoff_len=30, **mask)
    said = r"mask_token: 'dog' \(id 260\) occurs 1 times among 12030 tokens, in 1 of 401 rows"
    assert re.search(said, caplog.text)
    often = texts([CAT, DOG, EOS], [DOG, DOG])
    words = r"occurs 3 times among 5 tokens, in 2 of 2 rows .*allow_common_mask_token: true"
    refused(words, often, **mask)
    check(often, allow_common_mask=True, **mask)
    check(often, mask=ResolvedMaskToken("dog", DOG, False, is_trained=True))  # a checkpoint has the one it has
    assert re.search(words.partition(" .*allow")[0], caplog.text)


OPENED = {"is_opened": True, "source": "tokenized_path: p", "columns": True}


@pytest.mark.parametrize(
    ("rows", "changes", "words"),
    [
        (texts([CAT, 900]), {}, "holds the id 900, but the ids of the tokenizer are 0 to 262"),
        (texts([CAT, -7]), {}, "holds the id -7"),
        (answers(([CAT, 5], 1), ([CAT, 901], 1)), {"stage": "ddm-sft"}, "holds the id 901"),
        (texts([CAT]), {"stage": "ddm-sft"}, "has no labels, .*: it was made for stage: ddm, and stage is ddm-sft"),
        (answers(([CAT, DOG], 1)), {}, "has labels, .*: it was made for stage: ddm-sft, and stage is ddm"),
        (answers(([CAT, DOG], 1)), {"stage": "ddm-sft", "packed": True}, "with packing: false, and packing is true"),
        (
            [{"input_ids": [CAT, DOG], "labels": [-100, DOG], "position_ids": [0, 1]}],
            {"stage": "ddm-sft"},
            "with packing: true, and packing is false",
        ),
        (
            texts([CAT], [CAT] * 2, [CAT] * 3),
            {"packed": True},
            "rows of 1 to 3 tokens, so it was made with packing: f",
        ),
        (texts([CAT] * 5), {}, "a row of 5 tokens, more than cutoff_len: 4"),
        (texts([CAT] * 5), {"positions": 4, "cutoff_len": 9}, "a row of 5 tokens, more than the model's 4 positions"),
        ([{"text": "A cat."}], {}, "has no input_ids but text, so it is not tokenised"),
        ([{"input_ids": "A cat."}], {}, "holds input_ids of type string, where a list of integers"),
        ([{"input_ids": [0.5]}], {}, "holds input_ids of type list<.*double.*>, where a list of integers"),
        ([{"input_ids": None}, {"input_ids": [5]}], {}, "where a list of integers is expected for each row"),
        ([{"input_ids": [5, 6], "labels": [5]}], {"stage": "ddm-sft"}, "rows with 2 ids and 1 labels in all"),
        (texts([EOS]), {}, r"p \(train\): none of its 1 rows"),
    ],
)
def test_rows_that_were_prepared_for_something_else(rows, changes, words):
    refused("^tokenized_path: p .*" + words if "none" not in words else words, rows, **OPENED, **changes)


def test_rows_that_fit_and_splits_that_are_missing():
    row = {"input_ids": [A, CAT, EOS, A, CAT], "labels": [-100, CAT, -100, -100, CAT]}
    packed = {**row, "position_ids": [0, 1, 2, 0, 1]}
    check([packed], **OPENED, stage="ddm-sft", packed=True, positions=4)  # rows of packed answers are a token longer
    check(texts([CAT] * 9), **OPENED, variable=True)  # what is too long is left out later
    with pytest.raises(ValueError, match=r"tokenized_path: p has no split for evaluation; .*eval_dataset or val_size"):
        evaluates = SimpleNamespace(do_train=False, do_eval=True, do_predict=False)
        check_columns({"train_dataset": None}, rules(is_opened=True, source="tokenized_path: p"), evaluates)
