"""Kernels of attention against the dense mask: FlashAttention 2 and 3, and FlexAttention for blocks."""

from __future__ import annotations

import statistics
from typing import Any

import torch
import transformers
from torch import Tensor

from llamafactory_ddm.modeling.bidirectional import full_attention_mask, make_bidirectional, probe_bidirectional
from llamafactory_ddm.modeling.flash_attention import segment_arguments, segments
from llamafactory_ddm.modeling.sparse_attention import FLEX, attention_implementation

from .machine import Machine
from .models import SMALL_LLAMA, Shape, make_model
from .report import Report
from .steps import Stepper, relative_error, rows_of, train, trainer_of

# By name: transformers' implementation, and its function that tells whether it is installed.
FLASH = {
    "FA2": ("flash_attention_2", "is_flash_attn_2_available"),
    "FA3": ("flash_attention_3", "is_flash_attn_3_available"),
}
FLASH_LIMIT, FLEX_LIMIT = 0.02, 1e-3  # of a bfloat16, and of a float32 result
BLOCK_LLAMA = Shape(12, 1024, 16, 32064, 2048, inner=2816, is_tied=False)  # to time block attention


def flash(machine: Machine, report: Report) -> None:
    """Compare logits of FlashAttention with sdpa's, with padding; and with packed documents."""
    for name, (implementation, tells) in FLASH.items():
        available = getattr(transformers.utils, tells, None)
        if not machine.is_cuda or available is None or not available():
            report.leave_out(name, "needs a GPU" if not machine.is_cuda else "not installed")
            continue
        try:
            _flash(machine, report, name, implementation)
        except Exception as error:  # noqa: BLE001 - the other version is measured
            report.fail(name, error)


def _flash(machine: Machine, report: Report, name: str, implementation: str) -> None:
    shape = SMALL_LLAMA  # the kernels take no heads as small as a toy's
    # Made in bfloat16: casting a Llama would round the frequencies of its positions too.
    dense = make_model(shape, machine.device, torch.bfloat16).eval()
    make_bidirectional(dense)
    fast = make_model(shape, machine.device, torch.bfloat16, attn_implementation=implementation).eval()
    fast.load_state_dict(dense.state_dict())
    make_bidirectional(fast)
    probe_bidirectional(fast)
    ids = torch.stack([row["input_ids"] for row in rows_of("full", shape, 4, 128)[0]]).to(machine.device)
    is_padding = torch.arange(128, device=ids.device) >= torch.tensor([[128], [100], [65], [7]], device=ids.device)

    def logits(model: Any, x: Tensor) -> Tensor:
        mask = full_attention_mask(
            model,
            batch=4,
            length=128,
            is_padding=is_padding,
            visible=None,
            dtype=torch.bfloat16,
            device=ids.device,
        )
        with torch.inference_mode():
            result: Tensor = model(input_ids=x, attention_mask=mask, use_cache=False).logits[~is_padding].double()
        return result

    got = logits(fast, ids)
    error = relative_error(got, logits(dense, ids))
    report.add(f"{name} / sdpa, padded rows, bfloat16: relative error of the logits", error, at_most=FLASH_LIMIT)
    changed = logits(fast, ids.masked_fill(is_padding, 1))
    report.add(f"{name}: relative error of logits when padding changes", relative_error(changed, got), at_most=0.0)
    position = torch.arange(128, device=ids.device)
    document = (position // 48).expand(4, -1)  # of 48, 48 and 32 tokens
    places = segments((4, 128), None, document)
    bounds = segment_arguments(places | {"cu_seq_lens": places["cu_seq_lens"].to(ids.device)})
    options = {"is_padding": None, "visible": None, "dtype": torch.bfloat16, "device": ids.device}
    mask = full_attention_mask(dense, batch=4, length=128, document=document, **options)

    def packed(model: Any, x: Tensor, **arguments: Any) -> Tensor:
        positions = (position % 48).expand(4, -1)
        with torch.inference_mode():
            result: Tensor = model(input_ids=x, position_ids=positions, use_cache=False, **arguments).logits.double()
        return result

    got = packed(fast, ids, **bounds)
    error = relative_error(got, packed(dense, ids, attention_mask=mask))
    report.add(f"{name} / sdpa, packed rows, bfloat16: relative error of the logits", error, at_most=FLASH_LIMIT)
    changed = packed(fast, torch.where(document == 1, ids.flip(1), ids), **bounds)
    error = relative_error(changed[document != 1], got[document != 1])
    report.add(f"{name}: relative error of logits when another document changes", error, at_most=0.0)


def flex(machine: Machine, report: Report) -> None:
    """Compare steps of block diffusion with FlexAttention with those under the dense mask, in results and speed."""
    what = "FlexAttention / dense mask"
    if not machine.is_cuda:
        report.leave_out(what, "on a CPU its kernel takes no input that requires a gradient")
        return
    shape = SMALL_LLAMA
    expected = train("block", shape, machine.device, length=128)
    got = train("block", shape, machine.device, length=128, sparse_attention=True)
    error = abs(got.losses[0] / expected.losses[0] - 1)
    report.add(f"{what}, float32: relative error of the loss", error, at_most=FLEX_LIMIT)
    error = relative_error(got.gradients[0], expected.gradients[0])
    report.add(f"{what}, float32: relative error of the gradient", error, at_most=FLEX_LIMIT)
    if not machine.is_toy:
        _flex_speed(machine, report, what)


def _flex_speed(machine: Machine, report: Report, what: str) -> None:
    shape, length, batch = BLOCK_LLAMA, 2048, 4
    rows, _ = rows_of("block", shape, 8 * batch, length)
    options = {"device": machine.device, "mask_id": shape.mask_id, "batch": batch, "training": {"bf16": True}}
    rates: dict[str, float] = {}
    for name in ("dense", "flex"):
        model = make_model(shape, machine.device)
        with trainer_of("block", model, rows, sparse_attention=name == "flex", **options) as trainer:
            stepper = Stepper(trainer)
            with attention_implementation(model, FLEX if name == "flex" else "sdpa"):
                for _ in range(2):
                    stepper.step()
                memory = machine.peak_memory(stepper.step)
                seconds = [machine.seconds(stepper.step) for _ in range(8)]
        rates[name] = batch * length / statistics.median(seconds)
        report.add(f"block step, {batch} x {length}, bfloat16, {name}: tokens/s", rates[name])
        report.add(f"block step, {batch} x {length}, bfloat16, {name}: peak memory", memory / 1e9, "GB")
        del model, stepper, trainer
        machine.release()
    report.add(f"{what}: tokens/s", rates["flex"] / rates["dense"])
