"""A denoiser that keeps keys and values from one step to the next, and computes only the columns that it must.

Under full attention the states of a column depend on all tokens of its row, so those that are not computed again are
old: they belong to the tokens at the time of their computation. `fresh_columns` says which columns a pass computes.

Source: Fast-dLLM (arXiv 2505.22618), its prefix cache and dual cache; dKV-Cache (arXiv 2505.15781) for computing all
states again after a number of steps.
Deviates: with shift the column before a masked token is computed even where it is outside the block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..utils.devices import integers_on
from .bidirectional import full_attention_mask
from .denoiser import Answers, ModelDenoiser, marked, positions_in
from .kv_cache import ColumnCache
from .model_info import dtype_of, implementation, is_flash, rotary_limit, text_config
from .model_runner import ModelPass
from .quantization import evaluation_mode

CacheKind = Literal["prefix", "dual"]
_PROBE_LENGTH = 8


def fresh_columns(
    kind: CacheKind,
    refresh: int | None,
    *,
    computed_from: Tensor,
    passes: Tensor,
    old_scope: Tensor,
    z: Tensor,
    scope: Tensor,
    asked: Tensor,
) -> Tensor:
    """Return [batch, length] bool, the columns that a pass computes; each row's are a function of that row alone.

    They are all columns if the row is at another block than in its last pass, or if `refresh` passes went by since all
    were computed. Else with `prefix` those from the first of the block on, and with `dual` those of the block; in
    addition those that are asked, and those whose token has changed.

    Args:
        kind: `prefix` or `dual`.
        refresh: passes of a row from one computation of all columns to the next; None for once in each block.
        computed_from: [batch, length] int64, the id that each column was last computed from; -1 where it was not.
        passes: [batch] int64, passes of the row since all its columns were computed, that pass included.
        old_scope: [batch, length] bool, the row's block in its last pass.
        z: [batch, length] int64, the ids now.
        scope: [batch, length] bool, the row's block now.
        asked: [batch, length] bool, the columns whose hidden state the step reads.
    """
    refreshed = (scope != old_scope).any(dim=1)
    if refresh is not None:
        refreshed |= passes >= refresh
    block = scope if kind == "dual" else scope.cummax(dim=1).values
    return block | asked | (z != computed_from) | refreshed[:, None]


@dataclass
class _Branch:
    """What was computed of one kind of input: with the prompt, or with guidance without it.

    Attributes:
        cache: its keys and values.
        computed_from: see `fresh_columns`; so are `passes` and `scope`, the old one.
        passes: [batch] int64.
        scope: [batch, length] bool.
    """

    cache: ColumnCache
    computed_from: Tensor
    passes: Tensor
    scope: Tensor

    @classmethod
    def empty(cls, scope: Tensor) -> _Branch:
        """Return the branch before its first pass."""
        batch, length = scope.shape
        never = torch.full((batch, length), -1, dtype=torch.int64, device=scope.device)
        return cls(ColumnCache(batch, length), never, never.new_zeros(batch), torch.zeros_like(scope))


@dataclass(frozen=True)
class _Part:
    """Rows of a step that share a forward pass.

    Attributes:
        rows: [n_rows] int64, ascending, into the rows that the step computes.
        columns: [n_rows, n_fresh] int64, ascending, the last repeated in rows that have fewer; None for all.
    """

    rows: Tensor
    columns: Tensor | None


class CachedDenoiser(ModelDenoiser):
    """A `ModelDenoiser` that computes all columns of a row when its block changes, and otherwise only some of them."""

    def __init__(self, model: nn.Module, *, kind: CacheKind, refresh: int | None = None, **options: Any) -> None:
        """Wrap a bidirectional `model` for one call of the sampler, which calls `step`.

        Args:
            model: see `check_cacheable`.
            kind: see `fresh_columns`.
            refresh: see `fresh_columns`.
            options: those of `ModelDenoiser`.
        """
        super().__init__(model, **options)
        self._kind, self._refresh = kind, refresh
        self._branches: dict[int, _Branch] = {}

    def questions(self, z: Tensor, asked: Tensor, scope: Tensor, branch: int = 0) -> Tensor:
        """Return [batch, 2] int64: how many positions are asked for, and how many columns are computed for them."""
        fresh = self._fresh(self._branch(scope, branch), z, self._asked_heads(asked), scope, None)
        return torch.stack([asked.sum(dim=1), fresh.sum(dim=1)], dim=1)

    def _branch(self, scope: Tensor, branch: int) -> _Branch:
        if branch not in self._branches:
            self._branches[branch] = _Branch.empty(scope)
        return self._branches[branch]

    def _passes_of(
        self, z: Tensor, head_index: Tensor, scope: Tensor | None, branch: int, answers: Answers
    ) -> tuple[list[ModelPass], list[Tensor]]:
        if scope is None:
            raise RuntimeError("CachedDenoiser: call step(scope)(z, flat_index), not the denoiser itself")
        states, length = self._branch(scope, branch), z.shape[1]
        rows = torch.arange(len(scope), device=z.device) if self._rows is None else self._rows
        passes, order = [], []
        for members, one in self._plan(states, scope[rows], rows, z, head_index, [answer[1] for answer in answers]):
            index = torch.arange(len(head_index), device=z.device)
            if len(members) < len(z):
                n = sum(answers[row][0] for row in members)
                index = positions_in(one.rows, head_index, length, n)
            passes.append(self._pass(one, states, rows, z, head_index[index]))
            order.append(index)
        return passes, order

    def _fresh(self, branch: _Branch, z: Tensor, asked: Tensor, scope: Tensor, rows: Tensor | None) -> Tensor:
        """Return `fresh_columns` of some rows of the canvas, or of all; the other arguments are of these rows."""
        computed_from, passes, old_scope = (
            value if rows is None else value[rows] for value in (branch.computed_from, branch.passes, branch.scope)
        )
        return fresh_columns(
            self._kind,
            self._refresh,
            computed_from=computed_from,
            passes=passes,
            old_scope=old_scope,
            z=z,
            scope=scope,
            asked=asked,
        )

    def _plan(
        self, branch: _Branch, scope: Tensor, rows: Tensor, z: Tensor, head_index: Tensor, widths: list[int]
    ) -> Iterator[tuple[list[int], _Part]]:
        """Yield the passes of a step over `z`, the canvas's `rows`, and note in `branch` what they compute.

        Args:
            branch: what was computed before.
            scope: [n_rows, length] bool.
            rows: [n_rows] int64.
            z: [n_rows, length] int64.
            head_index: [n] int64 into `z`.
            widths: of each row, the number of its fresh columns.
        """
        length = z.shape[1]
        fresh = self._fresh(branch, z, marked(head_index, z), scope, rows)
        # Padding counts as computed, so that a row's passes are those that it has without padding.
        whole = fresh if self._is_padding is None else fresh | self._is_padding[rows]
        branch.passes[rows] = torch.where(whole.all(dim=1), 1, branch.passes[rows] + 1)
        branch.computed_from[rows] = torch.where(fresh, z, branch.computed_from[rows])
        branch.scope[rows] = scope
        for members, width in _of_like_width(widths, length):
            index = integers_on(z.device, members)
            self._count(rows[index], width)
            yield members, _Part(index, None if width == length else _columns(fresh[index], width))

    def _pass(self, one: _Part, branch: _Branch, rows: Tensor, z: Tensor, head_index: Tensor) -> ModelPass:
        """Return the forward pass of a part; `head_index` lies in its rows of `z`."""
        length, is_whole = z.shape[1], len(one.rows) == len(z)
        position_ids, is_padding = self._of_requested(self._position_ids), self._of_requested(self._is_padding)
        if not is_whole:
            row = torch.searchsorted(one.rows, head_index // length)
            head_index, rows, z = row * length + head_index % length, rows[one.rows], z[one.rows]
            position_ids, is_padding = (None if x is None else x[one.rows] for x in (position_ids, is_padding))
        if one.columns is None:
            mask = self._attention_mask(z) if is_whole else self._mask_of(z, is_padding)
        else:
            mask = self._mask_of(z, is_padding, one.columns)
            first = length * torch.arange(len(z), device=z.device)[:, None]
            head_index = torch.searchsorted((first + one.columns).flatten(), head_index)
            position_ids = one.columns if position_ids is None else position_ids.gather(1, one.columns)
            z = z.gather(1, one.columns)
        cache_rows = None if len(rows) == len(branch.scope) else rows
        return ModelPass(z, mask, position_ids, head_index, branch.cache, one.columns, cache_rows)


def _of_like_width(widths: list[int], length: int) -> list[tuple[list[int], int]]:
    """Return groups of rows, each with its largest width, so that no pass computes twice what a row needs.

    Rows that compute all columns are a group of their own.
    """
    groups: list[tuple[list[int], int]] = []
    for row in sorted(range(len(widths)), key=lambda row: -widths[row]):
        width = widths[row]
        if groups and (width == groups[-1][1] or (groups[-1][1] < length and 2 * width > groups[-1][1])):
            groups[-1][0].append(row)
        else:
            groups.append(([row], width))
    return [(sorted(members), width) for members, width in groups]


def _columns(fresh: Tensor, width: int) -> Tensor:
    """Return [n_rows, width] int64, the fresh columns of each row in order; the last is repeated in shorter rows."""
    columns = fresh.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, :width]
    last = fresh.sum(dim=1, keepdim=True) - 1
    return columns.gather(1, torch.arange(width, device=fresh.device).minimum(last))


def check_cacheable(model: nn.Module, kind: CacheKind, *, length: int = 0, reason: str | None = None) -> None:
    """Check that cached columns are seen as those of the same pass.

    Args:
        model: with bidirectional attention.
        kind: `prefix` or `dual`.
        length: columns of the longest canvas.
        reason: of an earlier `why_uncacheable`; None to call it.
    Raises:
        ValueError: naming kv_cache, if they are not, or position embeddings depend on which columns a pass computes.
    """
    name, limit = type(model).__name__, rotary_limit(model)
    if limit is not None and length > limit:
        raise ValueError(
            f"kv_cache: {kind} needs position embeddings that do not depend on the length, and those of {name} change "
            f"beyond {limit} tokens, while a text here has {length}; set kv_cache: none, or shorten the texts"
        )
    if is_flash(implementation(model)):
        raise ValueError(
            f"kv_cache: {kind} is not supported with flash attention (flash_attn: fa2, fa3), which takes the queries "
            "for the last columns; set flash_attn: sdpa, or kv_cache: none"
        )
    reason = why_uncacheable(model) if reason is None else reason
    if reason:
        raise ValueError(
            f"kv_cache: {kind} needs a model whose attention reads the cache of transformers, and "
            f"{name} does not ({reason}); set kv_cache: none"
        )


def why_uncacheable(model: nn.Module) -> str:
    """Return why a model does not see cached columns as those of the same pass, or "" if it does.

    It is tried with two short forward passes.
    """
    if is_flash(implementation(model)):
        return "it uses flash attention"
    try:
        with evaluation_mode(model):
            whole, part = _logits_of_two_columns(model)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    tolerance = max(1e-3, 8 * torch.finfo(whole.dtype).eps)
    return "" if bool((part - whole).norm() <= tolerance * whole.norm()) else "its logits differ"


@torch.inference_mode()
def _logits_of_two_columns(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Return the logits of two columns from a pass over all columns, and from one over these two, [2, vocab] each."""
    device = next(model.parameters()).device
    ids = torch.arange(_PROBE_LENGTH, device=device)[None] % int(text_config(model).vocab_size)
    cache, columns = ColumnCache(1, _PROBE_LENGTH), torch.tensor([[2, 5]], device=device)
    logits = []
    for fresh in (None, columns):
        mask = full_attention_mask(
            model,
            batch=1,
            length=_PROBE_LENGTH,
            is_padding=None,
            visible=None,
            columns=fresh,
            dtype=dtype_of(model),
            device=device,
        )
        position_ids = torch.arange(_PROBE_LENGTH, device=device)[None] if fresh is None else fresh
        with cache.writing(fresh):
            output = model(
                input_ids=ids.gather(1, position_ids),
                attention_mask=mask,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=True,
            )
        logits.append(output.logits[0])
    if not cache.layers:
        raise ValueError("it stored no keys")
    return logits[0][columns[0]], logits[1]
