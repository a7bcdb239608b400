"""End-of-text metrics against what one counts by hand."""

import pytest
import torch

from llamafactory_ddm.evaluation.eos import (
    REVEALED,
    EosRows,
    columns,
    hidden_after_revealing,
    last_text,
    metrics,
    statistics,
)

EOS, PAD, WORD, VOCAB = 1, 2, 5, 8
# 0 given, 1 text, 2 the end, 3 a pad, 4 outside of the canvas
KINDS = torch.tensor([[0, 0, 1, 1, 1, 1, 2, 3, 3, 3], [0, 1, 1, 2, 3, 3, 3, 3, 4, 4], [0, 0, 0, 0, 0, 0, 0, 1, 1, 2]])
END = torch.tensor([6, 3, 9])


def rows(kinds=KINDS, end=END, first=0):
    maskable = (kinds > 0) & (kinds < 4)
    return EosRows(maskable, kinds == 4, end, seed=0, sample_index=torch.arange(first, first + len(kinds)))


def table(kinds=KINDS, *, shift_end=0):
    """The ids that a model predicts; with `shift_end` it predicts EOS that many tokens later."""
    position = torch.arange(kinds.shape[1])
    end = END[: len(kinds), None] + shift_end
    return torch.where(position < end, WORD, torch.where(position == end, EOS, PAD))


def one_hot(ids, height=30.0):
    return lambda masked: torch.nn.functional.one_hot(ids[masked], VOCAB).float() * height


def measured(logits, **batch):
    return metrics(statistics(rows(**batch), logits, eos_ids=[EOS], pad_ids=[PAD]).sum(dim=0))


def test_metrics_of_a_perfect_model():
    found = measured(one_hot(table()))
    for share in REVEALED:
        assert found[f"revealed {share:g}"] == pytest.approx(
            {"p_eos": 1.0, "top1": 1.0, "mrr": 1.0, "length_mae": 0.0, "length_rmse": 0.0}
        )
    for quarter in range(1, 5):
        assert found[f"quarter {quarter}"]["f1"] == found[f"quarter {quarter}"]["accuracy"] == 1.0


def test_metrics_of_a_uniform_model():
    """Ties go to the first id, which is a word; so EOS is never predicted, and texts fill the canvas."""
    found = measured(lambda masked: torch.zeros(int(masked.sum()), VOCAB))
    first = found["revealed 0"]
    assert first["p_eos"] == pytest.approx(1 / VOCAB)
    assert first["length_mae"] == pytest.approx(((10 - 6) + (8 - 3) + (10 - 9)) / 3)
    assert first["length_rmse"] == pytest.approx(((4**2 + 5**2 + 1) / 3) ** 0.5)
    assert found["quarter 1"]["recall"] == found["quarter 1"]["precision"] == 0.0


def test_the_rank_of_eos_among_all_tokens():
    logits = torch.zeros(VOCAB)
    logits[[3, 4]], logits[EOS] = 2.0, 1.0  # third
    found = measured(lambda masked: logits.expand(int(masked.sum()), VOCAB))
    assert found["revealed 1"]["mrr"] == pytest.approx(1 / 3)
    assert found["revealed 1"]["top1"] == 0.0
    assert found["revealed 1"]["p_eos"] == pytest.approx(float(logits.softmax(dim=0)[EOS]))


def test_metrics_of_a_model_that_ends_one_token_late():
    found = measured(one_hot(table(shift_end=1)))
    last = found["revealed 1"]  # at the true end it would write a word
    assert last["top1"] == 0.0 and last["length_mae"] == 1.0
    for quarter in range(1, 5):
        assert found[f"quarter {quarter}"]["precision"] in (0.0, 1.0)  # what it calls no text is none
        assert found[f"quarter {quarter}"]["recall"] < 1.0


def test_counts_by_quarter():
    seen = []

    def logits(masked):
        seen.append(masked)
        return one_hot(table(shift_end=-1))(masked)

    total = statistics(rows(), logits, eos_ids=[EOS], pad_ids=[PAD]).sum(dim=0)
    for number, masked in enumerate(seen[len(REVEALED) :]):
        counts = [0, 0, 0, 0]
        for row, column in masked.nonzero().tolist():
            true, said = column >= int(END[row]), column >= int(END[row]) - 1
            counts[[(True, True), (False, True), (True, False), (False, False)].index((true, said))] += 1
            length = int((KINDS[row] < 4).sum())
            assert column >= int(number * length / 4)
        assert total[len(REVEALED) * 6 + 4 * number :][:4].tolist() == counts


@pytest.mark.parametrize("share", REVEALED)
def test_the_revealed_fraction_never_includes_eos(share):
    hidden = hidden_after_revealing(rows(), share)
    text = KINDS == 1
    for row in range(3):
        n = int(text[row].sum())
        assert int((hidden[row] & text[row]).sum()) == n - int(n * share)
    assert torch.equal(hidden & ~text, (KINDS == 2) | (KINDS == 3))


def test_any_batch_size_gives_the_same():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(3, 10, VOCAB, generator=generator)
    whole = statistics(rows(), lambda masked: scores[masked], eos_ids=[EOS], pad_ids=[PAD])
    for row in range(3):
        part = statistics(
            rows(KINDS[row : row + 1], END[row : row + 1], first=row),
            lambda masked, row=row: scores[row : row + 1][masked],
            eos_ids=[EOS],
            pad_ids=[PAD],
        )
        torch.testing.assert_close(part[0], whole[row])


def test_rows_without_eos_do_not_count():
    nothing = statistics(rows(end=torch.full((3,), -1)), one_hot(table()), eos_ids=[EOS], pad_ids=[PAD])
    assert nothing.shape == (3, columns()) and int(nothing.count_nonzero()) == 0
    with pytest.raises(ValueError, match=r"eval_dataset.*variable_length|variable_length.*eval_dataset"):
        metrics(nothing.sum(dim=0))


def test_earlier_answers_of_a_chat_stay_fixed():
    """Of two answers only the last one's EOS counts."""
    maskable = torch.tensor([[0, 1, 1, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1]]).bool()
    found = last_text(maskable, torch.tensor([6, 3, 5])).int().tolist()
    assert found == [[0, 0, 0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1, 1], [1] * 8]
