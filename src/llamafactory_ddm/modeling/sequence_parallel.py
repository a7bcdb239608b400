"""Sequence parallelism: the processes of a group share each row, by DeepSpeed's Ulysses attention.

Each process computes its part of a row's columns. Attention exchanges them for its part of the heads of whole rows,
and back. Source: Jacobs et al. 2023, DeepSpeed Ulysses (arXiv 2309.14509).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn import functional
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .model_info import implementation, text_config

_HEADS, _COLUMNS = 2, 1  # dimensions of [batch, columns, heads, width]


def check_shares_rows(model: nn.Module, size: int, world_size: int) -> None:
    """Check that groups of `size` processes can share the rows of a model.

    Raises:
        ValueError: if they cannot, naming the reason.
    """
    key = f"sequence_parallel_size: {size}"
    if world_size % size:
        raise ValueError(f"{key} does not divide the number of processes, {world_size}; set a divisor of it")
    config = text_config(model)
    heads = config.num_attention_heads
    for name, count in (("heads", heads), ("key-value heads", getattr(config, "num_key_value_heads", None) or heads)):
        if count % size:
            raise ValueError(f"{key} does not divide the model's {count} {name}; set a divisor of {count}")
    if implementation(model) != "sdpa":
        # transformers' flash attention would look for a package of the name that is registered below.
        raise ValueError(
            f"{key} needs flash_attn: sdpa (PyTorch's own flash kernel runs where no mask is needed); this run has "
            f"{implementation(model)}"
        )
    try:
        import deepspeed.sequence.layer  # noqa: F401
    except ImportError as error:
        raise ValueError(f'{key} needs DeepSpeed: pip install "llamafactory-ddm[deepspeed]" ({error})') from error


class SequenceParallel:
    """The groups of processes that share rows; consecutive ranks form one.

    Attributes:
        mesh: of all processes, [groups, size], with the names under which accelerate gives a group the same rows.
        rank: of this process in its group.
        name: of the attention implementation, for transformers.
    """

    def __init__(self, model: nn.Module, size: int, world_size: int, device_type: str) -> None:
        """Form the groups and register the attention; every process must call it, with the process group set up.

        Args:
            model: whose attention implementation computes the heads.
            size: processes of a group.
            world_size: number of all processes.
            device_type: of the mesh, such as cuda or cpu.
        Raises:
            ValueError: as `check_shares_rows`.
        """
        check_shares_rows(model, size, world_size)
        import deepspeed.comm
        from deepspeed.sequence.layer import DistributedAttention

        deepspeed.comm.init_distributed(dist_backend=torch.distributed.get_backend(), auto_mpi_discovery=False)
        names = ("dp_replicate", "tp")
        self.mesh: DeviceMesh = init_device_mesh(device_type, (world_size // size, size), mesh_dim_names=names)
        self.size, self.rank = size, self.mesh["tp"].get_local_rank()
        base = implementation(model)
        self.name = f"ulysses_{base}"
        inner = ALL_ATTENTION_FUNCTIONS[base]

        def of_whole_rows(q: Tensor, k: Tensor, v: Tensor, module: nn.Module, mask: Any, **rest: Any) -> Tensor:
            out: Tensor = inner(module, *(value.transpose(1, 2) for value in (q, k, v)), mask, **rest)[0]
            return out

        exchange = DistributedAttention(of_whole_rows, self.mesh["tp"].get_group(), _HEADS, _COLUMNS)

        def attention(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **rest: Any
        ) -> tuple[Tensor, None]:
            parts = (part.transpose(1, 2).contiguous() for part in (query, key, value))
            return exchange(*parts, 0, None, module, attention_mask, **rest), None

        AttentionInterface.register(self.name, attention)

    def padded(
        self, z_t: Tensor, head_index: Tensor, placement: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return a step's input with padding behind its rows, so that the processes can share the columns evenly.

        Args:
            z_t: [batch, columns] int64.
            head_index: [n] int64, into [batch * columns].
            placement: as `TrainingBatch.placement`, or `CleanBatch.placement`.
        """
        columns = z_t.shape[1]
        extra = -columns % self.size
        if not extra:
            return z_t, head_index, dict(placement)
        values = {"block": -1, "is_padding": True}  # others: 0
        if "block" not in placement:
            placement = {"is_padding": torch.zeros(z_t.shape, dtype=torch.bool), **placement}
        padded = {key: functional.pad(value, (0, extra), value=values.get(key, 0)) for key, value in placement.items()}
        return functional.pad(z_t, (0, extra)), head_index + head_index // columns * extra, padded

    def columns(self, count: int) -> slice:
        """Return this process's part of `count` columns, a multiple of `size`."""
        width = count // self.size
        return slice(self.rank * width, (self.rank + 1) * width)

    def scored(
        self, shape: tuple[int, ...], head_index: Tensor, scored: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the scored tokens that this process predicts.

        Args:
            shape: of the model's input, (batch, columns).
            head_index: [n] int64, into [batch * columns].
            scored: [n, ...] each.
        Returns:
            Their indices, into [batch * own columns], and their part of `scored`.
        """
        own = self.columns(shape[1])
        row, column = head_index // shape[1], head_index % shape[1]
        is_own = (column >= own.start) & (column < own.stop)
        index = row * (own.stop - own.start) + column - own.start
        return index[is_own], {name: value[is_own] for name, value in scored.items()}

    def inputs(self, ids: Tensor, attention: Mapping[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Return this process's part of a forward's input and the arguments of its attention.

        Args:
            ids: [batch, columns] int64.
            attention: `attention_mask`, of whole rows, which stays; and `position_ids`, [batch, columns] or None.
        """
        own = self.columns(ids.shape[1])
        positions = attention.get("position_ids")
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
        return ids[:, own], {**attention, "position_ids": positions[:, own]}
