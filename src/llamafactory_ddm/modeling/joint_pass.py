"""One forward pass for several denoisers, each with its own rows, columns, attention mask and cache.

The passes are stacked along the rows. Those with fewer columns or keys than others are padded on the right, and no
token attends to padding. Each pass's cache stores and returns its own keys and values.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.cache_utils import Cache

from .model_info import dtype_of, implementation, is_flash, rotary_limit
from .model_runner import ModelPass, ModelRunner, PassOutput
from .pass_widths import columns_of_a_pass, grouped


def together(model: nn.Module, passes: Sequence[ModelPass]) -> list[list[int]]:
    """Group passes of similar width, each group to be run as one pass; return the numbers of its passes.

    A pass longer than `rotary_limit` stays alone, because longrope embeddings depend on the longest row of a pass.

    Args:
        model: the unwrapped model.
        passes: on one device.
    """
    limit = rotary_limit(model)
    is_alone = [limit is not None and one.n_keys > limit for one in passes]
    numbers = [number for number, alone in enumerate(is_alone) if not alone]
    groups = [[number] for number, alone in enumerate(is_alone) if alone]
    if numbers:
        widths = [passes[number].n_columns for number in numbers]
        cost = columns_of_a_pass(passes[numbers[0]].ids.device)
        groups += [[numbers[index] for index in group] for group in grouped(widths, cost)]
    return groups


def run_joint(runner: ModelRunner, parts: Sequence[ModelPass]) -> list[PassOutput]:
    """Run several passes as one forward pass.

    Args:
        runner: of the model.
        parts: at least one, on one device.
    Returns:
        What `runner.run` returns for each.
    """
    if len(parts) == 1:
        return [runner.run(parts[0])]
    n_columns, n_keys = max(part.n_columns for part in parts), max(part.n_keys for part in parts)
    joint = ModelPass(
        ids=torch.cat([_padded(part.ids, n_columns) for part in parts]),
        mask=joint_mask(runner.model, parts, n_columns, n_keys),
        position_ids=torch.cat([_padded(_positions(part), n_columns) for part in parts]),
        head_index=torch.cat(list(_head_indices(parts, n_columns))),
    )
    with ExitStack() as stack:
        for part in parts:
            stack.enter_context(part.writing())
        cache = _JointCache(parts, n_keys) if any(part.cache is not None for part in parts) else None
        hidden, logits = runner.forward(joint, cache)
    sizes = [len(part.head_index) for part in parts]
    values: Sequence[Tensor | None] = [None] * len(parts) if logits is None else logits.split(sizes)
    return list(zip(hidden.split(sizes), values, strict=True))


def joint_mask(model: nn.Module, parts: Sequence[ModelPass], n_columns: int, n_keys: int) -> Any:
    """Return the `attention_mask` argument of the pass that joins `parts`.

    Args:
        model: the unwrapped model.
        parts: the passes.
        n_columns: columns of the joint pass.
        n_keys: keys that its queries see.
    Returns:
        None if every query of every part sees every key; else what `full_attention_mask` returns.
    """
    if is_flash(implementation(model)):
        masks = [part.ids.new_ones(part.ids.shape) if part.mask is None else part.mask for part in parts]
        return torch.cat([_padded(mask, n_columns) for mask in masks])
    by_layer = [part.mask for part in parts if isinstance(part.mask, dict)]
    if not by_layer:
        return _joint_additive(parts, [part.mask for part in parts], n_columns, n_keys, dtype_of(model))
    # A mask of blocks lacks the type of layer that its model has none of.
    names = [name for name in by_layer[0] if all(name in mask for mask in by_layer)]
    return {
        name: _joint_additive(
            parts,
            [None if part.mask is None else part.mask[name] for part in parts],
            n_columns,
            n_keys,
            dtype_of(model),
        )
        for name in names
    }


def _joint_additive(
    parts: Sequence[ModelPass], masks: Sequence[Tensor | None], n_columns: int, n_keys: int, dtype: torch.dtype
) -> Tensor | None:
    """Return the additive mask of all parts, [rows, 1, n_columns or 1, n_keys]; None if nothing is masked."""
    if all(mask is None for mask in masks) and all(part.n_keys == n_keys for part in parts):
        return None
    per_query = any(mask is not None and mask.shape[2] > 1 for mask in masks)
    rows, device = sum(part.n_rows for part in parts), parts[0].ids.device
    joint = torch.full(
        (rows, 1, n_columns if per_query else 1, n_keys), torch.finfo(dtype).min, dtype=dtype, device=device
    )
    first = 0
    for part, mask in zip(parts, masks, strict=True):
        own = joint[first : first + part.n_rows]
        first += part.n_rows
        if part.n_columns < n_columns:
            own[:, :, part.n_columns :] = 0.0  # what these queries see is never read
        own[:, :, : part.n_columns, : part.n_keys] = 0.0 if mask is None else mask
    return joint


def _padded(value: Tensor, n_columns: int) -> Tensor:
    """Return [n_rows, n_columns], padded with zeros on the right."""
    if value.shape[1] == n_columns:
        return value
    return functional.pad(value, (0, n_columns - value.shape[1]))


def _positions(part: ModelPass) -> Tensor:
    if part.position_ids is not None:
        return part.position_ids
    return torch.arange(part.n_columns, device=part.ids.device).expand(part.ids.shape)


def _head_indices(parts: Sequence[ModelPass], n_columns: int) -> Iterator[Tensor]:
    first = 0
    for part in parts:
        index = part.head_index + first * n_columns
        if part.n_rows > 1 and part.n_columns < n_columns:
            row = torch.div(part.head_index, part.n_columns, rounding_mode="floor")
            index = index + row * (n_columns - part.n_columns)
        yield index
        first += part.n_rows


class _JointCache(Cache):
    """The caches of several parts as one `past_key_values`."""

    def __init__(self, parts: Sequence[ModelPass], n_keys: int) -> None:
        self._parts, self._n_keys = parts, n_keys
        super().__init__(layers=[])

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Give each part's cache its own states.

        Args:
            key_states: [rows, heads, n_columns, width].
            value_states: the same.
            layer_idx: number of the layer.
            args: of transformers; unused.
            kwargs: of transformers; unused.
        Returns:
            Keys and values that the queries see, [rows, heads, n_keys, width] each.
        """
        sizes = [part.n_rows for part in self._parts]
        seen: list[tuple[Tensor, Tensor]] = []
        for part, *own in zip(self._parts, key_states.split(sizes), value_states.split(sizes), strict=True):
            keys, values = (states[:, :, : part.n_columns] for states in own)
            if part.cache is not None:
                keys, values = part.cache.update(keys, values, layer_idx)
            seen.append((self._padded(keys), self._padded(values)))
        all_keys, all_values = zip(*seen, strict=True)
        return torch.cat(all_keys), torch.cat(all_values)

    def _padded(self, states: Tensor) -> Tensor:
        """Return [n_rows, heads, n_keys, width], padded with zeros."""
        missing = self._n_keys - states.shape[2]
        return functional.pad(states, (0, 0, 0, missing)) if missing else states

    def get_mask_sizes(self, query_length: int | Tensor, layer_idx: int = 0) -> tuple[int, int]:
        """Return the number of keys and the first key's column."""
        return self._n_keys, 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return 0, as no column precedes the canvas."""
        return 0
