"""Quality of texts: against the model's own loss, brute force and examples by hand."""

import math
import random
import statistics

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from llamafactory_ddm.evaluation import quality as q
from support.tiny import tiny_tokenizer

TEXTS = ["cat dog", "a", "", "dog dog dog dog cat", "the cat saw a dog, and the dog saw the cat"]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tiny_tokenizer()), n_positions=48, n_embd=32, n_layer=2, n_head=2, initializer_range=0.4
    )
    return GPT2LMHeadModel(config).eval()


def loss_of(model, ids):
    """The sum of -log p of the tokens from the second on, by the loss of transformers, one row at a time."""
    if len(ids) < 2:
        return 0.0
    row = torch.tensor([ids])
    with torch.no_grad():
        return float(model(input_ids=row, labels=row).loss) * (len(ids) - 1)


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("has_bos", [True, False])
def test_perplexity_is_that_of_a_plain_loop(model, padding_side, batch_size, has_bos):
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = padding_side
    if not has_bos:
        tokenizer.bos_token = None
    judged = q.Judge(model, tokenizer, batch_size=batch_size).score(TEXTS)
    start = [0] if has_bos else []
    rows = [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS]
    nats = [loss_of(model, [*start, *row]) for row in rows]
    counts = [max(0, len(row) - (not has_bos)) for row in rows]
    assert [text.nll for text in judged] == pytest.approx(nats, rel=1e-4, abs=1e-6)
    assert [text.n_scored for text in judged] == counts
    assert [list(text.ids) for text in judged] == rows
    assert q.perplexity(judged).value == pytest.approx(math.exp(sum(nats) / sum(counts)), rel=1e-4)
    first = [len(tokenizer.decode(row[:1])) if row and not has_bos else 0 for row in rows]
    n_bytes = sum(map(len, TEXTS)) - sum(first)
    assert q.nats_per_byte(judged).value == pytest.approx(sum(nats) / n_bytes, rel=1e-4)


def test_bytes_are_those_of_utf_8(model):
    (text,) = q.Judge(model, tiny_tokenizer()).score(["ü猫"])
    assert text.n_bytes == 5 and len(text.ids) == 5


@pytest.mark.parametrize(
    ("text", "scored"), [("ü猫", 4), ("猫", 2), ("\N{REPLACEMENT CHARACTER}a", 3), ("cat dog", 4), ("a", 0), ("", 0)]
)
def test_bytes_without_bos_leave_out_the_first_token_alone(model, text, scored):
    """It may be a part of a character: here a token is a byte, but for words."""
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = None
    (found,) = q.Judge(model, tokenizer).score([text])
    assert found.n_bytes == scored


def test_a_special_token_that_a_text_spells_is_text(model):
    ids = q.Judge(model, tiny_tokenizer()).encode("cat<|endoftext|>dog")
    assert 0 not in ids and tiny_tokenizer().decode(ids) == "cat<|endoftext|>dog"


def test_a_token_without_an_embedding(model):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["zebra"])
    with pytest.raises(ValueError, match=rf"the id {len(tokenizer) - 1}, but the model {len(tokenizer) - 1} ids"):
        q.Judge(model, tokenizer).score(["a zebra"])


@pytest.mark.parametrize("length", [1, 2, 47, 48, 49, 95, 150])
def test_a_long_text_is_scored_in_windows(model, length):
    """Each token once, with all tokens before it or at least half the positions."""
    generator = torch.Generator().manual_seed(length)
    row = torch.randint(1, len(tiny_tokenizer()), (length,), generator=generator).tolist()
    (found,) = q.Judge(model, tiny_tokenizer()).token_nll([row])
    sequence = [0, *row]
    log_probs = {}
    for at in range(1, len(sequence)):
        begin = 0 if at < 48 else 24 * ((at - 48) // 24 + 1)  # windows of 48 positions, 24 apart
        assert at - begin >= min(at, 24)
        if begin not in log_probs:
            with torch.no_grad():
                window = torch.tensor([sequence[begin : begin + 48]])
                log_probs[begin] = model(input_ids=window).logits[0].log_softmax(dim=1)
        expected = -log_probs[begin][at - begin - 1, sequence[at]]
        assert float(found[at - 1]) == pytest.approx(float(expected), abs=1e-4)


def test_a_large_vocabulary_makes_batches_smaller(model, monkeypatch):
    judge = q.Judge(model, tiny_tokenizer(), batch_size=4)
    whole = [text.nll for text in judge.score(TEXTS)]
    rows = []
    inner = model.forward
    monkeypatch.setattr(model, "forward", lambda **words: rows.append(len(words["input_ids"])) or inner(**words))
    monkeypatch.setattr(q, "_LOGITS_AT_ONCE", 1)
    assert [text.nll for text in judge.score(TEXTS)] == pytest.approx(whole, rel=1e-5)
    assert rows == [1, 1, 1, 1]


def test_a_judge_with_nan_weights(model):
    broken = GPT2LMHeadModel(model.config)
    broken.transformer.ln_f.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="its logits are NaN"):
        q.Judge(broken, tiny_tokenizer()).score(["cat"])


def test_examples_by_hand():
    rows = [[1, 2, 1, 2], [1, 2, 3]]
    assert q.distinct(rows, 1).value == 3 / 7
    assert q.distinct(rows, 2).value == 3 / 5  # 12 21 12 | 12 23
    assert q.distinct([[1], []], 2) is None
    assert q.entropy([5, 5, 5]) == 0.0
    assert q.entropy([1, 2, 1, 2]) == pytest.approx(math.log(2))
    assert q.entropy([1, 1, 1, 2]) == pytest.approx(0.75 * math.log(4 / 3) + 0.25 * math.log(4))
    assert q.repetition([1, 2, 3, 4, 5], 4) == 0.0
    assert q.repetition([7] * 8, 4) == pytest.approx(4 / 5)  # five 4-grams, one different
    assert q.repetition([1, 2, 1, 2, 1, 2], 4) == pytest.approx(1 / 3)  # 1212 2121 1212


def test_counts_against_brute_force():
    rng = random.Random(0)
    for _ in range(50):
        rows = [[rng.randrange(4) for _ in range(rng.randrange(5, 12))] for _ in range(rng.randrange(2, 6))]
        for n in (1, 2, 3):
            grams = [" ".join(map(str, row[at : at + n])) for row in rows for at in range(len(row) - n + 1)]
            assert q.distinct(rows, n).value == pytest.approx(len(set(grams)) / len(grams))
            for row in rows:
                own = [row[at : at + n] for at in range(len(row) - n + 1)]
                repeated = sum(gram in own[:at] for at, gram in enumerate(own))
                assert q.repetition(row, n) == pytest.approx(repeated / len(own))
        for row in rows:
            shares = torch.bincount(torch.tensor(row)).double() / len(row)
            assert q.entropy(row) == pytest.approx(float(torch.distributions.Categorical(shares).entropy()))


def test_the_error_of_distinct_is_the_jackknifes():
    rng = random.Random(1)
    rows = [[rng.randrange(6) for _ in range(rng.randrange(3, 9))] for _ in range(7)]
    without = [q.distinct(rows[:at] + rows[at + 1 :], 2).value for at in range(len(rows))]
    mean = statistics.fmean(without)
    expected = math.sqrt(6 / 7 * sum((value - mean) ** 2 for value in without))
    assert q.distinct(rows, 2).error == pytest.approx(expected)


def judged(nll, n_scored):
    return q.JudgedText(tuple(range(n_scored)), nll, n_scored, 3 * n_scored)


def test_the_error_of_the_perplexity_is_that_of_the_bootstrap():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(20, 60, (200,), generator=generator)
    nll = lengths * (2.0 + 0.3 * torch.randn(200, generator=generator))
    found = q.perplexity([judged(float(a), int(b)) for a, b in zip(nll, lengths, strict=True)])
    assert found.value == pytest.approx(math.exp(float(nll.sum() / lengths.sum())), rel=1e-5)
    picks = torch.randint(0, 200, (2000, 200), generator=generator)
    resampled = (nll[picks].sum(1) / lengths[picks].sum(1)).exp()
    assert found.error == pytest.approx(float(resampled.std()), rel=0.08)


def test_without_texts_or_tokens_there_is_no_number():
    nothing = q.JudgedText((), 0.0, 0, 0)
    numbers = q.quality([nothing, nothing])
    assert numbers["perplexity"] is None and numbers["entropy"] is None and numbers["distinct_1"] is None
    assert numbers["tokens"].value == 0.0
    one = q.quality([judged(3.0, 6), nothing])
    assert one["perplexity"].value == pytest.approx(math.exp(0.5)) and one["entropy"].value == pytest.approx(
        math.log(6)
    )
    assert one["entropy"].error is None and one["tokens"].value == 3.0
    assert q.perplexity([judged(1e6, 1)]).value == math.inf
