"""The memory of full training on each process, from the shape of a model: parameters, their states, activations.

Parameters are counted on a model without storage. What a layer keeps for its backward pass is counted too, in its own
forward on tensors without storage; attention is taken to keep queries, keys, values, outputs and one float32 for each
query, as flash attention does. The sum leaves out what CUDA, NCCL and the allocator take beside it.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM

from ..diffusion.chunked_head import chunk_rows
from .activations import fuse_gelu
from .model_info import text_config

Sharding = Literal["none", "zero1", "zero2", "zero3", "fsdp2"]
_LIVE = 10**9  # parameters that ZeRO-3 keeps gathered at most: DeepSpeed's default of stage3_max_live_parameters
_COUNTED = "counted_attention"


@dataclass(frozen=True)
class Shape:
    """What the memory of a model depends on.

    Attributes:
        parameters: number of parameters.
        layers: number of layers.
        layer_parameters: parameters of the largest layer.
        width: of hidden states.
        vocabulary: rows of the output embedding.
        layer_bytes: that a layer keeps for its backward pass, of one row.
        other_bytes: that embeddings and the last norm keep, of one row.
        row: tokens of a row.
        item: bytes of a hidden state's element.
    """

    parameters: int
    layers: int
    layer_parameters: int
    width: int
    vocabulary: int
    layer_bytes: int
    other_bytes: int
    row: int
    item: int


class _Attention(torch.autograd.Function):
    """Keeps what flash attention keeps, and computes nothing."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return a tensor of the shape of the outputs; the arguments are [batch, heads, length, head width]."""
        batch, heads, length, _ = query.shape
        out = value.new_empty((batch, length, heads, value.shape[-1])).transpose(1, 2)
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, sums)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Never called: nothing is propagated back."""
        raise NotImplementedError


def _counted_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **_: Any
) -> tuple[Tensor, None]:
    out: Tensor = _Attention.apply(query, key, value)  # type: ignore[no-untyped-call]
    return out.transpose(1, 2).contiguous(), None


def kept_bytes(model: Any, ids: Tensor) -> int:
    """Return the bytes that a model's decoder keeps for its backward pass, beside parameters and buffers.

    Args:
        model: a causal language model, in training mode.
        ids: [batch, length] int64.
    """
    own = {value.untyped_storage()._cdata for value in (*model.parameters(), *model.buffers())}
    kept: dict[int, Any] = {}

    def keep(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        out = model.base_model(input_ids=ids, use_cache=False)
        del out
    return sum(storage.nbytes() for storage in kept.values())


def shape_of(config: Any, *, row: int, half: bool) -> Shape:
    """Return the shape of a model with this config.

    Args:
        config: of a causal language model.
        row: tokens of a row.
        half: whether hidden states are bfloat16, else float32.
    """
    dtype = torch.bfloat16 if half else torch.float32
    AttentionInterface.register(_COUNTED, _counted_attention)
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(config, dtype=dtype)
    ids = torch.zeros((1, row), dtype=torch.int64, device="meta")
    kept = [kept_bytes(_of_depth(config, depth, dtype), ids) for depth in (1, 2)]
    lists = [module for module in whole.base_model.modules() if isinstance(module, nn.ModuleList)]
    layers = max(lists, key=len)
    decoder = text_config(whole)
    return Shape(
        parameters=sum(value.numel() for value in whole.parameters()),
        layers=len(layers),
        layer_parameters=max(sum(value.numel() for value in layer.parameters()) for layer in layers),
        width=decoder.hidden_size,
        vocabulary=whole.get_output_embeddings().weight.shape[0],
        layer_bytes=kept[1] - kept[0],
        other_bytes=2 * kept[0] - kept[1],
        row=row,
        item=dtype.itemsize,
    )


@dataclass(frozen=True)
class Run:
    """How a model is trained.

    Attributes:
        sharding: what the processes share.
        processes: number of processes.
        rows: of a micro-batch, on a process or on those that share rows.
        half: bf16 training.
        checkpointing: gradient checkpointing.
        offload: letters of what lies in the memory of the host: w(eights), g(radients), o(ptimizer state).
        logits: rows of logits at once; None for the automatic number, 0 for all.
        sequence: processes that share a row.
    """

    sharding: Sharding = "none"
    processes: int = 1
    rows: int = 1
    half: bool = True
    checkpointing: bool = True
    offload: str = ""
    logits: int | None = None
    sequence: int = 1


def parts(shape: Shape, run: Run) -> dict[str, int]:
    """Return the bytes of each part of a process's memory; those that start with "host: " are the host's.

    With P parameters, N processes, b rows of length L, n layers, width h, vocabulary V and e bytes an element:

        weights, gradients     DDP, FSDP 2: 4P each; ZeRO: eP. Divided by N where they are sharded
        optimizer state        8P for Adam, and 4P for ZeRO's weights in float32; divided by N except under DDP
        weights in use         ZeRO-3: eP, at most 10^9 e; FSDP 2: twice eP_layer, and eP outside layers;
                               DDP in bf16: autocast's copies, 2P
        activations            with checkpointing n b L h e and what one layer keeps, else what all layers keep
        logits                 r V (2e + 8) for r rows at once, and the gradient of the output embedding

    Args:
        shape: of the model.
        run: how it is trained.
    """
    count, item = shape.parameters, 2 if run.half else 4
    is_zero = run.sharding.startswith("zero")
    shared = {"none": "", "zero1": "o", "zero2": "go", "zero3": "wgo", "fsdp2": "wgo"}[run.sharding]

    def share(part: str, size: int) -> int:
        return -(-size // run.processes) if part in shared else size

    held = {
        "weights": share("w", (item if is_zero else 4) * count),
        "gradients": share("g", (item if is_zero else 4) * count),
        "optimizer state": share("o", (12 if is_zero else 8) * count),
    }
    held = {f"host: {name}" if name[0] in run.offload else name: size for name, size in held.items()}
    outside = count - shape.layers * shape.layer_parameters
    in_use = {
        "none": 2 * count if run.half else 0,
        "zero3": item * min(count, _LIVE),
        "fsdp2": item * (2 * shape.layer_parameters + outside),
    }.get(run.sharding, 0)
    inputs = shape.row * shape.width * shape.item
    kept = shape.layers * inputs + shape.layer_bytes if run.checkpointing else shape.layers * shape.layer_bytes
    scored = run.rows * shape.row // run.sequence
    rows = chunk_rows(shape.vocabulary, "cuda") if run.logits is None else run.logits
    rows = min(rows or scored, scored)
    head = shape.vocabulary * shape.width * (item if is_zero or run.sharding == "fsdp2" else 4)
    return held | {
        "weights in use": in_use,
        "activations": run.rows * (kept + shape.other_bytes) // run.sequence,
        "logits": rows * shape.vocabulary * (2 * item + 8) + head,
    }


def _of_depth(config: Any, depth: int, dtype: torch.dtype) -> Any:
    config = copy.deepcopy(config)
    inner = config.get_text_config()
    inner.num_hidden_layers = depth
    if getattr(inner, "layer_types", None):
        inner.layer_types = inner.layer_types[:depth]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=_COUNTED).train()
    fuse_gelu(model)
    return model
