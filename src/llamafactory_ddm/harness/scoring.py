"""Likelihoods of answers: the evidence bound of each, with its standard error, batched over questions and choices.

Rows that are equal after masking are computed once. Choices of a question that have the same number of tokens are
masked at the same positions, so their rows are equal where every token that differs is masked.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..data.canvas import Canvas
from ..diffusion.answer_bound import (
    MaskSet,
    balanced_masks,
    bound_and_error,
    diffullama_masks,
    every_mask,
    llada_masks,
)
from ..generation.generator import TextGenerator
from ..modeling.diffusion_config import DiffusionConfig
from ..modeling.model_info import max_positions
from ..sampling.budget import split_by_position

# How answers are scored -> masks of an answer, unless the user sets another number.
SAMPLES = {"bound": 32, "llada": 128, "diffullama": 32}
_MASKS = {"bound": balanced_masks, "llada": llada_masks, "diffullama": diffullama_masks}
# Limit on the tokens of the masked rows that are built together. It bounds memory; equal rows are found among these.
_TOKENS_AT_ONCE = 2**19


@dataclass(frozen=True)
class Answer:
    """A text to score.

    Attributes:
        context: ids before it, the start token included.
        ids: its own ids, at least one.
        question: index of the question. Choices of one question share their noise.
        part: number of the part of an answer that is scored in parts, see `parts_of`.
        n_behind: masked positions behind it, which are not scored.
    """

    context: tuple[int, ...]
    ids: tuple[int, ...]
    question: int
    part: int = 0
    n_behind: int = 0


@dataclass(frozen=True)
class AnswerScore:
    """The likelihood of an answer.

    Attributes:
        log_likelihood: minus the evidence bound, in nats: a lower bound of log p(answer | context), up to the error.
        standard_error: of `log_likelihood`, in nats; 0 if every mask was computed.
        passes: number of masks; a row that is shared with other answers counts for each.
    """

    log_likelihood: float
    standard_error: float
    passes: int


def parts_of(answer: Answer, config: DiffusionConfig, limit: int | None) -> list[Answer]:
    """Return the parts of an answer whose bounds add up to that of the answer: its blocks, for a block model.

    A block is scored given the clean text before it, and with shift its first token before the others. Positions
    behind the answer are masked up to the end of its last block.

    Args:
        answer: the answer.
        config: of the model.
        limit: the model's positions; None for no limit.
    """
    if config.train_block_length is None:
        return [answer]
    whole, n_context = answer.context + answer.ids, len(answer.context)
    position = torch.arange(len(whole))[None]
    block = split_by_position(position >= n_context, position, config.train_block_length, shift=config.shift)[0]
    parts = []
    for number in range(int(block[-1]) + 1):
        low, high = (int(at) for at in (block == number).nonzero()[[0, -1], 0])
        end = -(-(high + 1) // config.train_block_length) * config.train_block_length
        is_first = config.shift and low % config.train_block_length == 0
        n_behind = 0 if is_first else max(min(end, limit or end) - high - 1, 0)
        parts.append(Answer(whole[:low], whole[low : high + 1], answer.question, number, n_behind))
    return parts


@dataclass
class _Rows:
    """Distinct masked rows, and which token of which answer each of their logits scores.

    Attributes:
        canvases: the rows; masked positions are editable.
        row_of_ids: number of each row, by the bytes of its ids and the number of masked positions behind it.
        targets: (row, position in the row, id, answer, pass, token) of each cross-entropy, [n, 6] for each answer.
    """

    canvases: list[Canvas] = field(default_factory=list)
    row_of_ids: dict[tuple[bytes, int], int] = field(default_factory=dict)
    targets: list[Tensor] = field(default_factory=list)

    def add(self, answer_index: int, answer: Answer, masks: MaskSet, mask_id: int) -> None:
        """Add the rows of an answer."""
        n_context, ids = len(answer.context), torch.tensor(answer.context + answer.ids)
        z = ids.repeat(len(masks.is_masked), 1)
        z[:, n_context:] = torch.where(masks.is_masked, mask_id, z[:, n_context:])
        fixed, behind = (False,) * n_context, answer.n_behind
        rows = []
        for row, is_masked in zip(z, masks.is_masked, strict=True):
            key = (row.numpy().tobytes(), behind)
            if key not in self.row_of_ids:
                self.row_of_ids[key] = len(self.canvases)
                ids_and_masks = (*row.tolist(), *[mask_id] * behind), (*fixed, *is_masked.tolist(), *[True] * behind)
                self.canvases.append(Canvas(*ids_and_masks))
            rows.append(self.row_of_ids[key])
        at, token = masks.is_masked.nonzero().unbind(dim=1)
        row = torch.tensor(rows)[at]
        columns = (row, token + n_context, ids[token + n_context], torch.full_like(at, answer_index), at, token)
        self.targets.append(torch.stack(columns, dim=1))


class AnswerScorer:
    """Scores answers with a diffusion model."""

    def __init__(
        self,
        generator: TextGenerator,
        *,
        scoring: str = "bound",
        samples: int | None = None,
        seed: int = 0,
        batch_size: int = 32,
    ) -> None:
        """Score with a model.

        Args:
            generator: the model.
            scoring: "bound" is the evidence bound; "llada" and "diffullama" draw and weigh masks as published.
            samples: masks of an answer; by default those of `SAMPLES`. For "bound", an answer with no more masks than
                that is scored by all of them.
            seed: of the masks.
            batch_size: rows in a forward pass.
        """
        self.generator = generator
        self.scoring, self.seed, self.batch_size = scoring, seed, batch_size
        self.samples = SAMPLES[scoring] if samples is None else samples
        self.forward_rows = 0

    def masks(self, answers: Sequence[Answer]) -> list[MaskSet]:
        """Return the masks of each answer."""
        sets: dict[tuple[int, int], MaskSet] = {}
        keys = [(len(answer.ids), self._sample_index(answer)) for answer in answers]
        for n in {n for n, _ in keys}:
            indices = sorted({index for length, index in keys if length == n})
            if self.scoring == "bound" and 2**n - 1 <= self.samples:
                drawn = [every_mask(n)] * len(indices)
            else:
                drawn = _MASKS[self.scoring](n, self.samples, seed=self.seed, sample_index=torch.tensor(indices))
            sets.update(zip(((n, index) for index in indices), drawn, strict=True))
        return [sets[key] for key in keys]

    def _sample_index(self, answer: Answer) -> int:
        """Return the index of an answer's random numbers; the published methods draw new ones for each choice."""
        if self.scoring == "bound" and not answer.part:
            return answer.question
        own = answer.ids if self.scoring != "bound" else ()
        return zlib.crc32(repr((answer.question, own, *[answer.part] * (answer.part > 0))).encode())

    def _in_parts(self, answers: Sequence[Answer]) -> list[list[Answer]]:
        limit = max_positions(self.generator.model.config)
        return [parts_of(answer, self.generator.config, limit) for answer in answers]

    def score(self, answers: Sequence[Answer]) -> Iterator[AnswerScore]:
        """Yield the score of each answer, in their order; answers of a question should follow each other."""
        in_parts = self._in_parts(answers)
        scored = self._score([part for parts in in_parts for part in parts])
        for parts in in_parts:
            scores = list(itertools.islice(scored, len(parts)))
            yield AnswerScore(
                sum(score.log_likelihood for score in scores),
                math.hypot(*(score.standard_error for score in scores)),
                sum(score.passes for score in scores),
            )

    def _score(self, answers: Sequence[Answer]) -> Iterator[AnswerScore]:
        """Yield the score of each answer, none of which has parts."""
        for part in self._parts(answers):
            rows, mask_sets = _Rows(), self.masks(part)
            for answer_index, (answer, masks) in enumerate(zip(part, mask_sets, strict=True)):
                rows.add(answer_index, answer, masks, self.generator.config.mask_token_id)
            cross_entropies = [torch.zeros(masks.is_masked.shape, dtype=torch.float64) for masks in mask_sets]
            for answer_indices, passes, tokens, nll in self._cross_entropies(rows):
                for answer_index in set(answer_indices.tolist()):
                    here = answer_indices == answer_index
                    cross_entropies[answer_index][passes[here], tokens[here]] = nll[here]
            for masks, found in zip(mask_sets, cross_entropies, strict=True):
                bound, error = bound_and_error(found, masks)
                yield AnswerScore(-bound, error, len(masks.is_masked))

    def are_greedy(self, answers: Sequence[Answer]) -> list[tuple[bool, int]]:
        """Tell for each answer whether greedy decoding generates it, given its length, and in how many forward passes.

        As `low_confidence` at temperature 0 does with one token a step, each pass commits the most probable token of
        all masked positions. It ends at the first that differs from the answer. A block model decodes blocks in turn.
        """
        in_parts = self._in_parts(answers)
        found = [(True, 0)] * len(answers)
        for number in range(max(map(len, in_parts), default=0)):
            rows = [row for row, parts in enumerate(in_parts) if number < len(parts) and found[row][0]]
            greedy = self._are_greedy([in_parts[row][number] for row in rows])
            for row, (is_right, passes) in zip(rows, greedy, strict=True):
                found[row] = (is_right, found[row][1] + passes)
        return found

    def _are_greedy(self, answers: Sequence[Answer]) -> list[tuple[bool, int]]:
        """Tell it of answers that have no parts."""
        masked = [set(range(len(answer.ids))) for answer in answers]
        passes = [0] * len(answers)
        is_right = [True] * len(answers)
        order = sorted(range(len(answers)), key=lambda row: len(answers[row].context + answers[row].ids))
        while order:
            for low in range(0, len(order), self.batch_size):
                rows = order[low : low + self.batch_size]
                found = self._most_probable([answers[row] for row in rows], [masked[row] for row in rows])
                for row, (token, token_id) in zip(rows, found, strict=True):
                    passes[row] += 1
                    masked[row].remove(token)
                    is_right[row] = token_id == answers[row].ids[token]
            order = [row for row in order if is_right[row] and masked[row]]
        return list(zip(is_right, passes, strict=True))

    def _most_probable(self, answers: Sequence[Answer], masked: Sequence[set[int]]) -> list[tuple[int, int]]:
        """Return, for each answer, the masked token with the most probable prediction, and the predicted id.

        Of equal probabilities the first token counts.
        """
        canvases = []
        for answer, tokens in zip(answers, masked, strict=True):
            n_context = len(answer.context)
            asked = (*[False] * n_context, *(token in tokens for token in range(len(answer.ids))))
            behind = answer.n_behind
            ids = (*answer.context, *answer.ids, *[self.generator.config.mask_token_id] * behind)
            canvases.append(Canvas(ids, (*asked, *[False] * behind)))
        self.forward_rows += len(canvases)
        tops, token_ids = [], []
        with self.generator.sizer.denoiser(canvases) as (batch, denoiser):
            z = batch.x.masked_fill(batch.editable, self.generator.config.mask_token_id)
            positions = batch.editable.flatten().nonzero()[:, 0]
            for logits in denoiser(z.to(self.generator.model.device), positions.to(self.generator.model.device)):
                values = logits.float()
                top, token_id = (values - values.logsumexp(dim=1, keepdim=True)).max(dim=1)
                tops.append(top.cpu())
                token_ids.append(token_id.cpu())
        top, token_id = torch.cat(tops), torch.cat(token_ids)
        _check_finite(top)
        results, first = [], 0
        for tokens in masked:
            best = int(top[first : first + len(tokens)].argmax())
            results.append((sorted(tokens)[best], int(token_id[first + best])))
            first += len(tokens)
        return results

    def _parts(self, answers: Sequence[Answer]) -> Iterator[Sequence[Answer]]:
        """Yield answers in parts of bounded size; a question is in one part."""
        begin, n_tokens = 0, 0
        for number, answer in enumerate(answers):
            is_new = number and answer.question != answers[number - 1].question
            if is_new and n_tokens >= _TOKENS_AT_ONCE:
                yield answers[begin:number]
                begin, n_tokens = number, 0
            n_tokens += min(self.samples, 2 ** len(answer.ids)) * (len(answer.context) + len(answer.ids))
        if answers:
            yield answers[begin:]

    def _cross_entropies(self, rows: _Rows) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Yield (answer, pass, token, nats), [n] each, of all cross-entropies, batch by batch."""
        targets = torch.cat(rows.targets)
        targets = targets[targets[:, 0].argsort(stable=True)]
        order = sorted(range(len(rows.canvases)), key=lambda row: len(rows.canvases[row]))
        first = torch.searchsorted(targets[:, 0].contiguous(), torch.arange(len(rows.canvases) + 1)).tolist()
        for low in range(0, len(order), self.batch_size):
            batch_rows = order[low : low + self.batch_size]
            part = torch.cat([targets[first[row] : first[row + 1]] for row in batch_rows])
            counts = torch.tensor([first[row + 1] - first[row] for row in batch_rows])
            canvases = [rows.canvases[row] for row in batch_rows]
            self.forward_rows += len(canvases)
            length = len(canvases[-1])
            begin = torch.tensor([length - len(canvas) for canvas in canvases])
            flat = (torch.arange(len(batch_rows)) * length + begin).repeat_interleave(counts) + part[:, 1]
            yield part[:, 3], part[:, 4], part[:, 5], self._nll(canvases, flat, part[:, 2])

    def _nll(self, canvases: Sequence[Canvas], flat_index: Tensor, targets: Tensor) -> Tensor:
        """Return -log p(target) at positions of a batch of rows, [n] float64, on the CPU."""
        device = self.generator.model.device
        positions, at = torch.unique(flat_index, return_inverse=True)
        with self.generator.sizer.denoiser(canvases) as (batch, denoiser):
            mask_id = self.generator.config.mask_token_id
            z = batch.x.masked_fill(batch.editable, mask_id).to(device)
            nll, offset = torch.empty(len(targets), dtype=torch.float64), 0
            for logits in denoiser(z, positions.to(device)):
                here = (at >= offset) & (at < offset + len(logits))
                index, target = (at[here] - offset).to(device), targets[here].to(device)
                values = logits.float()
                nll[here] = (values.logsumexp(dim=1)[index] - values[index, target]).cpu().double()
                offset += len(logits)
        _check_finite(nll)
        return nll


def _check_finite(values: Tensor) -> None:
    """Raise ValueError if a log-probability is NaN or infinite."""
    if not bool(values.isfinite().all()):
        raise ValueError(
            "the model's logits are NaN or infinite; check its weights, or set infer_dtype: bfloat16 or float32"
        )
