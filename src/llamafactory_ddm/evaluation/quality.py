"""Quality of generated texts: perplexity under an autoregressive judge, diversity, entropy, repetition.

All numbers are computed on the judge's tokens of the decoded text, so that models with different tokenizers compare.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..modeling.model_info import max_positions

# Limit on the logits of a forward pass, 1 GiB in float32.
_LOGITS_AT_ONCE = 2**28
_PAD = 0  # any id: the attention is causal, and padding is on the right


@dataclass(frozen=True)
class JudgedText:
    """A text under the judge.

    Attributes:
        ids: the judge's tokens of the text, without special tokens.
        nll: minus the log-likelihood of the scored tokens, in nats.
        n_scored: number of scored tokens: all, or all but the first if the judge has no bos token.
        n_bytes: UTF-8 bytes of the scored tokens.
    """

    ids: tuple[int, ...]
    nll: float
    n_scored: int
    n_bytes: int


class Judge:
    """An autoregressive model that scores texts."""

    def __init__(self, model: Any, tokenizer: Any, *, batch_size: int = 16) -> None:
        """Wrap a causal language model of transformers.

        Args:
            model: with causal attention.
            tokenizer: its tokenizer; its bos token, if it has one, is what the first token is conditioned on.
            batch_size: rows in a forward pass; it does not change the scores, up to rounding.
        """
        self.model, self.tokenizer, self.batch_size = model.eval(), tokenizer, batch_size
        self.bos_id: int | None = tokenizer.bos_token_id
        self.max_positions = max_positions(model.config)
        self._vocab = int(model.config.get_text_config().vocab_size)

    def encode(self, text: str) -> list[int]:
        """Return the judge's tokens of a text; where it spells a special token, the tokens of the spelling.

        Raises:
            ValueError: if the model has no embedding of a token.
        """
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        if ids and max(ids) >= self._vocab:
            raise ValueError(f"its tokenizer has the id {max(ids)}, but the model {self._vocab} ids; check both files")
        return ids

    def score(self, texts: Sequence[str]) -> list[JudgedText]:
        """Return the score of each text.

        Raises:
            ValueError: if the judge's logits are NaN or infinite, or the model has no embedding of a token.
        """
        rows = [self.encode(text) for text in texts]
        judged = []
        for text, ids, nll in zip(texts, rows, self.token_nll(rows), strict=True):
            n_bytes = len(text.encode("utf-8", errors="replace"))
            if self.bos_id is None and ids:
                n_bytes = max(0, n_bytes - self._n_bytes(ids[0]))
            judged.append(JudgedText(tuple(ids), math.fsum(nll.tolist()), len(nll), n_bytes))
        return judged

    def _n_bytes(self, token_id: int) -> int:
        """Return the UTF-8 bytes of a token, which may be a part of a character."""
        text = self.tokenizer.decode([token_id])
        if "\N{REPLACEMENT CHARACTER}" not in text:
            return len(text.encode("utf-8"))
        token = self.tokenizer.convert_ids_to_tokens(token_id)
        return 1 if token.startswith("<0x") else len(token)  # byte fallback, or a letter for each byte

    @torch.inference_mode()
    def token_nll(self, rows: Sequence[Sequence[int]]) -> list[Tensor]:
        """Return -log p(token | bos, tokens before it) of each token, in nats.

        Rows are padded on the right, where a causal model does not look. A row that exceeds the judge's positions is
        scored in windows that overlap by half: a token is scored once, with at least half the positions before it.

        Args:
            rows: ids of the judge's tokenizer, without bos.
        Returns:
            For each row [n] float64, or [n - 1], from the second token on, if the judge has no bos token.
        Raises:
            ValueError: if the judge's logits are NaN or infinite.
        """
        start = [] if self.bos_id is None else [self.bos_id]
        sequences = [[*start, *row] for row in rows]
        scores = [torch.zeros(max(0, len(sequence) - 1), dtype=torch.float64) for sequence in sequences]
        windows = [
            (number, *window)
            for number, sequence in enumerate(sequences)
            for window in _windows(len(sequence), self.max_positions)
        ]
        windows.sort(key=lambda window: window[2] - window[1])
        for batch in self._batches(windows):
            width = max(end - begin for _, begin, end, _ in batch)
            ids = torch.full((len(batch), width), _PAD)
            for row, (number, begin, end, _) in enumerate(batch):
                ids[row, : end - begin] = torch.tensor(sequences[number][begin:end])
            nll = self._nll(ids.to(self.model.device))
            for row, (number, begin, end, first) in enumerate(batch):
                scores[number][first - 1 : end - 1] = nll[row, first - begin - 1 : end - begin - 1]
        if not all(bool(score.isfinite().all()) for score in scores):
            raise ValueError("its logits are NaN or infinite; check its weights, or set another dtype")
        return scores

    def _nll(self, ids: Tensor) -> Tensor:
        """Return -log p of the tokens from the second on, [batch, length - 1] float64, on the CPU."""
        logits = self.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        rows = [  # one at a time, as float32 logits of a large vocabulary take much memory
            torch.nn.functional.cross_entropy(row[:-1].float(), targets[1:], reduction="none")
            for row, targets in zip(logits, ids, strict=True)
        ]
        return torch.stack(rows).double().cpu()

    def _batches(self, windows: Sequence[tuple[int, int, int, int]]) -> Iterator[Sequence[tuple[int, int, int, int]]]:
        """Yield windows, the shortest first, in batches of bounded memory."""
        batch: list[tuple[int, int, int, int]] = []
        for window in windows:
            width = window[2] - window[1]
            if len(batch) == self.batch_size or (batch and (len(batch) + 1) * width * self._vocab > _LOGITS_AT_ONCE):
                yield batch
                batch = []
            batch.append(window)
        if batch:
            yield batch


def _windows(length: int, limit: int | None) -> Iterator[tuple[int, int, int]]:
    """Yield (begin, end, first scored position) of the windows of a sequence; position 0 is never scored."""
    if length < 2:
        return
    limit = limit or length
    begin, first = 0, 1
    while True:
        end = min(begin + limit, length)
        yield begin, end, first
        if end == length:
            return
        begin, first = begin + max(1, limit // 2), end


@dataclass(frozen=True)
class Estimate:
    """A number over texts.

    Attributes:
        value: the number.
        error: its standard error over texts; None with fewer than two texts.
    """

    value: float
    error: float | None


def quality(texts: Sequence[JudgedText]) -> dict[str, Estimate | None]:
    """Return all numbers of a sample of texts by name; None where there is nothing to count."""
    rows = [text.ids for text in texts]
    return {
        "perplexity": perplexity(texts),
        "nats_per_byte": nats_per_byte(texts),
        "distinct_1": distinct(rows, 1),
        "distinct_2": distinct(rows, 2),
        "entropy": _mean([entropy(row) for row in rows if row]),
        "repetition_4": _mean([repetition(row, 4) for row in rows if len(row) >= 4]),
        "tokens": _mean([float(len(row)) for row in rows]),
    }


def perplexity(texts: Sequence[JudgedText]) -> Estimate | None:
    """Return the generative perplexity, exp(sum of nats / number of scored tokens) over all texts.

    The standard error is that of the ratio of two means, by the delta method: with r the ratio and n_i, m_i the nats
    and tokens of text i of N, var(r) = sum (n_i - r m_i)^2 / (N (N - 1) mean(m)^2), and exp(r) has the error
    exp(r) sd(r).

    Source: as in the evaluation of MDLM (arXiv 2406.07524) and DiffuLLaMA (arXiv 2410.17891); Cochran 1977, "Sampling
        techniques", chapter 6, for the ratio.
    """
    ratio = _ratio([text.nll for text in texts], [text.n_scored for text in texts])
    if ratio is None:
        return None
    value = math.exp(ratio.value) if ratio.value < 700 else math.inf
    return Estimate(value, None if ratio.error is None else value * ratio.error)


def nats_per_byte(texts: Sequence[JudgedText]) -> Estimate | None:
    """Return sum of nats / number of UTF-8 bytes over all texts, which compares judges of different tokenizers."""
    return _ratio([text.nll for text in texts], [text.n_bytes for text in texts])


def distinct(rows: Sequence[Sequence[int]], n: int) -> Estimate | None:
    """Return the number of different n-grams over the number of n-grams, both over all rows.

    No n-gram crosses rows. The ratio falls as the texts become more or longer, so compare equal numbers of tokens. The
    standard error is the jackknife's: the number is computed again without each row.

    Args:
        rows: tokens of each text.
        n: tokens in an n-gram.
    Source: Li et al. 2016 (arXiv 1510.03055), distinct-1 and distinct-2; Efron & Stein 1981 for the jackknife.
    Deviates: Li et al. divide by the number of tokens, which exceeds that of bigrams by one for each text.
    """
    of_rows = [Counter(_ngrams(row, n)) for row in rows]
    total = sum(of_rows, Counter())
    n_total, n_different = total.total(), len(total)
    if not n_total:
        return None
    without = []
    for row in of_rows:
        rest = n_total - row.total()
        only_here = sum(total[ngram] == count for ngram, count in row.items())
        if rest:
            without.append((n_different - only_here) / rest)
    count, mean = len(without), math.fsum(without) / max(1, len(without))
    error = None
    if count > 1:
        error = math.sqrt((count - 1) / count * math.fsum((value - mean) ** 2 for value in without))
    return Estimate(n_different / n_total, error)


def entropy(row: Sequence[int]) -> float:
    """Return the entropy of the tokens within a text in nats: -sum over tokens v of (c_v / n) log(c_v / n).

    It is at most log(n). A text of one repeated token has 0.

    Args:
        row: n tokens, at least one; v occurs c_v times.
    Source: Zheng et al. 2024 (arXiv 2409.02908), who report it beside the perplexity.
    """
    n = len(row)
    return -math.fsum(count / n * math.log(count / n) for count in Counter(row).values()) + 0.0


def repetition(row: Sequence[int], n: int) -> float:
    """Return the share of a text's n-grams that occurred in it before: 1 - different n-grams / n-grams.

    Args:
        row: at least n tokens.
        n: tokens in an n-gram.
    Source: Welleck et al. 2020 (arXiv 1908.04319), seq-rep-n.
    """
    ngrams = _ngrams(row, n)
    return 1.0 - len(set(ngrams)) / len(ngrams)


def _ngrams(row: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(row[at : at + n]) for at in range(len(row) - n + 1)]


def _mean(values: Sequence[float]) -> Estimate | None:
    return _ratio(values, [1] * len(values))


def _ratio(numerators: Sequence[float], denominators: Sequence[int]) -> Estimate | None:
    """Return sum(numerators) / sum(denominators), with the error of the delta method."""
    total, count = sum(denominators), len(denominators)
    if not total:
        return None
    value = math.fsum(numerators) / total
    if count < 2:
        return Estimate(value, None)
    pairs = zip(numerators, denominators, strict=True)
    squares = math.fsum((numerator - value * denominator) ** 2 for numerator, denominator in pairs)
    return Estimate(value, math.sqrt(squares / (count * (count - 1))) * count / total)
