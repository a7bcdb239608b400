"""Generation from YAML without a prompt: `do_predict: true`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from llamafactory.extras import logging
from torch import Tensor
from tqdm.auto import tqdm

from ..data.collators import start_token_id
from ..diffusion.schedules import get_schedule
from ..modeling.bidirectional import full_attention_mask, probe_bidirectional
from ..modeling.denoiser import ModelDenoiser
from ..modeling.diffusion_config import DiffusionConfig
from ..sampling.logits import LogitsConfig
from ..sampling.loop import sample
from ..sampling.strategies import get_strategy
from .saving import explained

logger = logging.get_logger(f"llamafactory.{__name__}")

FILE = "generated_predictions.jsonl"
_SHOWN = 3


def generate_unconditionally(
    model: Any,
    tokenizer: Any,
    config: DiffusionConfig,
    *,
    length: int,
    training_args: Any,
    finetuning_args: Any,
    has_data: bool,
) -> Path:
    """Write `num_samples` generated texts to generated_predictions.jsonl in output_dir, and log the first few.

    A text depends on `seed` and its own number only, not on the batch size or the number of processes.

    Returns:
        The file, complete once it has this name.
    """
    if has_data:
        logger.info_rank0("Generation starts from nothing but noise: the data set given is not used.")
    if config.attention_ratio < 1.0:
        logger.warning_rank0(
            f"This model's attention was annealed to a ratio of {config.attention_ratio:.3f} only; "
            "it generates with full attention."
        )
    rank, world = training_args.process_index, training_args.world_size
    model = model.to(training_args.device).eval()
    probe_bidirectional(model)
    ordinals = torch.arange(finetuning_args.num_samples)[rank::world]
    per_forward = training_args.per_device_eval_batch_size
    batches = ordinals.split(per_forward) if len(ordinals) else ()
    texts: dict[int, str] = {}
    bar = tqdm(
        total=len(batches) * finetuning_args.diffusion_steps,
        desc="Denoising",
        disable=bool(training_args.disable_tqdm or rank),
    )
    with bar:
        for rows in batches:
            output = _sample(
                model, tokenizer, config, length, rows.to(training_args.device), training_args, finetuning_args, bar
            )
            for row, ids in zip(rows.tolist(), output.tolist(), strict=True):
                texts[row] = tokenizer.decode(ids, skip_special_tokens=True)
    gathered = _gather(texts, world)
    path = Path(training_args.output_dir) / FILE
    if rank == 0:
        write_predictions(path, [gathered[row] for row in sorted(gathered)])
        for row in sorted(gathered)[:_SHOWN]:
            logger.info_rank0(f"sample {row}:\n{gathered[row]}")
        logger.info_rank0(f"{len(gathered)} generated texts are saved at {path}")
    return path


def _sample(
    model: Any,
    tokenizer: Any,
    config: DiffusionConfig,
    length: int,
    rows: Tensor,
    training_args: Any,
    finetuning_args: Any,
    bar: Any,
) -> Tensor:
    """Return [rows, length or length - 1] ids; with shift the first position is a given start token, left out."""
    device = rows.device
    x = torch.full((len(rows), length), config.mask_token_id, dtype=torch.int64, device=device)
    editable = torch.ones_like(x, dtype=torch.bool)
    if config.shift:
        x[:, 0] = start_token_id(tokenizer)
        editable[:, 0] = False
    mask = full_attention_mask(
        model, batch=len(rows), length=length, is_padding=None, visible=None, dtype=model.dtype, device=device
    )
    denoiser = ModelDenoiser(model, shift=config.shift, attention_mask=mask)
    try:
        output = sample(
            denoiser,
            x,
            editable=editable,
            mask_id=config.mask_token_id,
            steps=finetuning_args.diffusion_steps,
            strategy=get_strategy(finetuning_args.denoising_strategy),
            logits=LogitsConfig(temperature=finetuning_args.logits_temp, top_p=finetuning_args.topp_temp),
            seed=training_args.seed % 2**64,
            rows=rows,
            schedule=get_schedule(config.noise_schedule),
            callback=lambda *_: bar.update(1),
        )
    finally:
        denoiser.close()
    return output.sequences[:, int(config.shift) :]


def _gather(texts: dict[int, str], world: int) -> dict[int, str]:
    if world == 1:
        return texts
    parts: list[Any] = [None] * world
    torch.distributed.all_gather_object(parts, texts)
    return {row: text for part in parts for row, text in part.items()}


def write_predictions(path: Path, texts: list[str]) -> None:
    """Write one {"predict": text} a line, so that `path` is either the old file or the complete new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".jsonl.tmp")
    try:
        with explained(path.parent), open(scratch, "w", encoding="utf-8") as file:
            for text in texts:
                file.write(json.dumps({"predict": text}, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
