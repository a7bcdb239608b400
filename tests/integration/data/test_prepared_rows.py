"""Rows made by hand: what is counted, warned of and refused."""

import re
from types import SimpleNamespace

import pytest
from datasets import Dataset

from llamafactory_ddm.integration.data import row_counts
from llamafactory_ddm.integration.data.prepared_rows import RowRules, check_columns, check_rows
from llamafactory_ddm.integration.data.truncated_answers import AnswerMarks
from llamafactory_ddm.modeling.special_tokens import ResolvedMaskToken
from support.tiny import tiny_tokenizer

EOS, A, CAT, DOG, MASK = 0, 40, 258, 260, 262  # of the tiny tokenizer; the last is new
TRAINS = SimpleNamespace(do_train=True, do_eval=False, do_predict=False)
ANSWERS = AnswerMarks(full_length=4, n_added=0, closing_id=EOS, n_after_closing=0, n_besides_prompt=None)


def rules(**changes):
    settings = {
        "source": "dataset: x",
        "stage": "ddm",
        "is_prepared": False,
        "packing": False,
        "variable_length": False,
        "cutoff_len": 4,
        "max_positions": 32,
        "tokenizer": tiny_tokenizer(),
        "mask": ResolvedMaskToken("<|mask|>", MASK, True),
        "control_tokens": [],
        "allow_common_mask": False,
        "answer_marks": None,
    }
    return RowRules(**{**settings, **changes})


def check(rows, training_args=TRAINS, columns=False, **changes):
    if isinstance(rows, list):
        rows = Dataset.from_dict({key: [row[key] for row in rows] for key in rows[0]})
    module = {"train_dataset": rows}
    if columns:
        check_columns(module, rules(**changes), training_args)
    check_rows(module, rules(**changes), SimpleNamespace(dataset=["x"], eval_dataset=None), training_args)


def texts(*ids):
    return [{"input_ids": list(row)} for row in ids]


def answers(*rows):
    """Return a row for each pair of ids and number of prompt tokens."""
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
    words = r"dataset: x \(train\): .*3 rows .*every text"
    refused(words, kind(texts([EOS], [EOS, EOS], [blank, MASK, EOS])), allow_common_mask=True)
    words = "2 rows .* every response"
    refused(words, kind(answers(([CAT, EOS], 1), ([CAT, DOG], 2))), stage="ddm-sft")
    refused(words, kind(answers(([CAT, EOS], 1), ([CAT, DOG], 2))), stage="ddm-sft", variable_length=True)


def test_every_row_of_a_large_data_set_is_checked_before_it_is_refused(monkeypatch):
    monkeypatch.setattr(row_counts, "_MAX_ROWS", 4)
    monkeypatch.setattr(row_counts, "_ROWS_PER_TABLE", 2)
    check(texts(*[[EOS]] * 9, [CAT, EOS]))
    refused(r"dataset: x \(train\): .* 10 rows", texts(*[[EOS]] * 10))


def test_truncated_answers_are_counted(caplog):
    whole, short, cut = ([A, CAT, DOG, EOS], 2), ([A, DOG, EOS], 1), ([A, CAT, DOG, DOG], 2)
    gone = ([A, A, A, A], 4)
    keys = {"stage": "ddm-sft", "answer_marks": ANSWERS}
    check(answers(whole, short), **keys)
    assert "cutoff_len" not in caplog.text
    check(answers(whole, short, cut, gone), **keys)
    assert re.search("cutoff_len: 4 .* 2 of 4 .* 1 of them", caplog.text)
    refused("cutoff_len: 4 .* 2 of 2 ", answers(cut, gone), **keys)
    refused("cutoff_len: 4 .* 1 of 1 ", answers(gone), stage="ddm-sft", answer_marks=ANSWERS)
    evaluates = SimpleNamespace(do_train=False, do_eval=True, do_predict=False)
    check(answers(cut), evaluates, **keys)  # a warning only


def test_truncated_answers_in_packed_rows():
    """The padding token of each row is no text."""
    row = {"input_ids": [A, CAT, DOG, DOG, EOS], "labels": [-100, CAT, DOG, DOG, -100]}
    row["position_ids"] = [0, 1, 2, 3, 0]
    keys = {"stage": "ddm-sft", "answer_marks": ANSWERS, "packing": True}
    refused("cutoff_len: 5 .* 2 of 2 ", [row, row], **keys)
    fine = {**row, "input_ids": [A, CAT, A, DOG, EOS], "labels": [-100, CAT, -100, DOG, -100]}
    check([row, {**fine, "position_ids": [0, 1, 0, 1, 0]}], **keys)


def test_truncated_answers_of_templates_that_end_with_the_next_turn_or_truncate_prompts_first():
    """EOS follows a truncated answer, too."""
    ends = AnswerMarks(full_length=4, n_added=1, closing_id=DOG, n_after_closing=1, n_besides_prompt=None)
    cut, whole = ([A, CAT, CAT, EOS], 1), ([A, CAT, DOG, EOS], 1)
    refused("cutoff_len: 4 .* 1 of 1 ", answers(cut), stage="ddm-sft", answer_marks=ends)
    check(answers(cut, whole), stage="ddm-sft", answer_marks=ends)
    refused("1 of 1 .* 1 of them", answers(([A, A, A, EOS], 3)), stage="ddm-sft", answer_marks=ends)
    left = AnswerMarks(full_length=4, n_added=1, closing_id=None, n_after_closing=0, n_besides_prompt=2)
    refused("cutoff_len: 4 .* 1 of 1 ", answers(([EOS, A, CAT, EOS], 2)), stage="ddm-sft", answer_marks=left)
    check(answers(([EOS, A, CAT, EOS], 2), ([EOS, A, A, CAT, EOS], 3)), stage="ddm-sft", answer_marks=left)


def test_what_tells_whole_answers_from_truncated_ones():
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
        assert (marks.n_added, marks.closing_id, marks.n_after_closing, marks.n_besides_prompt) == expected, name
        assert marks.full_length == (8 if name == "diffullama" else 9)


def test_a_mask_token_that_texts_use(caplog):
    mask = {"mask": ResolvedMaskToken("dog", DOG, False)}
    rare = [texts([CAT] * 30)[0]] * 400 + texts([CAT, DOG] + [CAT] * 28)
    check(rare, cutoff_len=30, **mask)
    assert re.search(r"mask_token: 'dog' \(id 260\) .*1 times .* 12030 tokens, .*1 of 401", caplog.text)
    often = texts([CAT, DOG, EOS], [DOG, DOG])
    words = r"mask_token: 'dog' .*3 times .* 5 tokens, .*2 of 2"
    refused(words + ".*allow_common_mask_token", often, **mask)
    check(often, allow_common_mask=True, **mask)
    check(often, mask=ResolvedMaskToken("dog", DOG, False, is_trained=True))  # of a checkpoint
    assert re.search(words, caplog.text)


OPENED = {"is_prepared": True, "source": "tokenized_path: p", "columns": True}


@pytest.mark.parametrize(
    ("rows", "changes", "words"),
    [
        (texts([CAT, 900]), {}, "id 900, .* 262"),
        (texts([CAT, -7]), {}, "id -7, .* 262"),
        (answers(([CAT, 5], 1), ([CAT, 901], 1)), {"stage": "ddm-sft"}, "id 901, "),
        (texts([CAT]), {"stage": "ddm-sft"}, "labels.* stage: ddm, .*stage is ddm-sft"),
        (answers(([CAT, DOG], 1)), {}, "labels.* stage: ddm-sft, .*stage is ddm"),
        (answers(([CAT, DOG], 1)), {"stage": "ddm-sft", "packing": True}, "packing: false, .*packing is true"),
        (
            [{"input_ids": [CAT, DOG], "labels": [-100, DOG], "position_ids": [0, 1]}],
            {"stage": "ddm-sft"},
            "packing: true, .*packing is false",
        ),
        (
            texts([CAT], [CAT] * 2, [CAT] * 3),
            {"packing": True},
            "1 to 3 tokens, .*packing is true",
        ),
        (texts([CAT] * 5), {}, "5 tokens, .*cutoff_len: 4"),
        (texts([CAT] * 5), {"max_positions": 4, "cutoff_len": 9}, "5 tokens, .* 4 positions"),
        ([{"text": "A cat."}], {}, "text .*input_ids"),
        ([{"input_ids": "A cat."}], {}, "input_ids of type string"),
        ([{"input_ids": [0.5]}], {}, "input_ids of type list<.*double"),
        ([{"input_ids": None}, {"input_ids": [5]}], {}, "input_ids of type list"),
        ([{"input_ids": [5, 6], "labels": [5]}], {"stage": "ddm-sft"}, "2 input_ids .*1 labels"),
        (texts([EOS]), {}, r"\(train\): .* 1 rows"),
    ],
)
def test_rows_that_were_prepared_for_something_else(rows, changes, words):
    refused("^tokenized_path: p .*" + words, rows, **OPENED, **changes)


def test_rows_that_fit_and_splits_that_are_missing():
    row = {"input_ids": [A, CAT, EOS, A, CAT], "labels": [-100, CAT, -100, -100, CAT]}
    packed = {**row, "position_ids": [0, 1, 2, 0, 1]}
    check([packed], **OPENED, stage="ddm-sft", packing=True, max_positions=4)  # packed answers: one more token
    check(texts([CAT] * 9), **OPENED, variable_length=True)  # rows that are too long are dropped later
    with pytest.raises(ValueError, match=r"tokenized_path: p .*validation.*eval_dataset or val_size"):
        evaluates = SimpleNamespace(do_train=False, do_eval=True, do_predict=False)
        check_columns({"train_dataset": None}, rules(is_prepared=True, source="tokenized_path: p"), evaluates)
