"""Training steps of `stage: pt` and `stage: ddm`, by the trainers that users run."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import train_step
from llamafactory.hparams import TrainingArguments
from torch import Tensor

from llamafactory_ddm.data.collators import ResponseCollator

from .models import Shape, make_model

KINDS = ("full", "annealed", "mixed", "block", "sft, padded", "sft, packed")


def text_rows(shape: Shape, count: int, length: int) -> list[dict[str, Tensor]]:
    """Return rows of random ids without padding."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, shape.mask_id, (count, length), generator=generator)
    return [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in ids]


def response_rows(shape: Shape, count: int, length: int, *, is_packed: bool) -> list[dict[str, list[int]]]:
    """Return rows of prompts and responses: of different lengths, or two in each row of `length` tokens."""
    rows = []
    for number, row in enumerate(text_rows(shape, count, length)):
        ids, n = row["input_ids"].tolist(), length - 3 * (number % 4)
        if not is_packed:
            rows.append(
                {"input_ids": ids[:n], "labels": [-100] * (n // 3) + ids[n // 3 : n], "attention_mask": [1] * n}
            )
            continue
        first = length // 2 - number % 3
        labels = [-100] * 2 + ids[2:first] + [-100] * 3 + ids[first + 3 :]
        position = [*range(first), *range(length - first)]
        mask = [1] * first + [2] * (length - first)
        rows.append({"input_ids": ids, "labels": labels, "attention_mask": mask, "position_ids": position})
    return rows


def rows_of(kind: str, shape: Shape, count: int, length: int) -> tuple[Any, dict[str, Any]]:
    """Return the rows of a kind of step, and what the trainer needs for them."""
    if not kind.startswith("sft"):
        return text_rows(shape, count, length), {}
    rows = response_rows(shape, count, length, is_packed=kind.endswith("packed"))
    return rows, {"data_collator": ResponseCollator(pad_id=0, shift=True)}


@contextmanager
def trainer_of(
    kind: str, model: Any, rows: Any, *, device: str, mask_id: int, batch: int, training: Any = None, **rest: Any
) -> Iterator[Any]:
    """Within the block there is a trainer, with its folder.

    Args:
        kind: of `train_step`, or one of `KINDS`.
        model: causal.
        rows: its data.
        device: `cuda` or `cpu`.
        mask_id: of the model.
        batch: rows of a step.
        training: further training arguments.
        rest: further arguments of `train_step.make_trainer`.
    """
    with tempfile.TemporaryDirectory() as folder:
        arguments = {
            "output_dir": folder,
            "per_device_train_batch_size": batch,
            "max_steps": 10**6,
            "lr_scheduler_type": "constant",
            "logging_strategy": "no",
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": device == "cpu",
            "remove_unused_columns": False,
            "disable_tqdm": True,
            **(training or {}),
        }
        plain = "full" if kind.startswith("sft") else kind
        yield train_step.make_trainer(plain, model, rows, TrainingArguments(**arguments), mask_id=mask_id, **rest)


@dataclass
class Trained:
    """What some steps gave.

    Attributes:
        losses: of each step.
        gradients: by step, of all trained weights, [n] float64 on the CPU, before clipping. A step that loss scaling
            skips has none.
    """

    losses: list[float] = field(default_factory=list)
    gradients: dict[int, Tensor] = field(default_factory=dict)


def train(
    kind: str,
    shape: Shape,
    device: str,
    *,
    length: int,
    steps: int = 1,
    batch: int = 8,
    model: Any = None,
    training: Any = None,
    **rest: Any,
) -> Trained:
    """Train with a learning rate of 0 by the trainer's own loop, in float32 if `training` does not say otherwise."""
    model = make_model(shape) if model is None else model
    rows, collator = rows_of(kind, shape, batch * steps, length)
    result = Trained()
    keys = {"max_steps": steps, "learning_rate": 0.0, "max_grad_norm": 1e9, **(training or {})}
    annealed = {"anneal_steps": 2} if kind == "annealed" else {}
    options = {"device": device, "mask_id": shape.mask_id, "batch": batch, "training": keys}
    with trainer_of(kind, model, rows, **options, **collator, **annealed, **rest) as trainer:
        trainer.finetuning_args.disable_shuffling = True
        step = trainer.training_step

        def recorded(*args: Any, **kwargs: Any) -> Tensor:
            loss: Tensor = step(*args, **kwargs)
            result.losses.append(float(loss))
            return loss

        def keep(*args: Any, **kwargs: Any) -> None:
            parts = [
                p.grad.detach().double().cpu().flatten() for p in trainer.model.parameters() if p.grad is not None
            ]
            result.gradients[trainer.state.global_step] = torch.cat(parts)

        trainer.training_step = recorded
        trainer.create_optimizer_and_scheduler(num_training_steps=steps)
        trainer.optimizer.register_step_pre_hook(keep)
        trainer.train()
    return result


class Stepper:
    """Takes steps of a trainer one by one, as its loop does."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        trainer.create_optimizer_and_scheduler(num_training_steps=10**6)
        trainer.state.max_steps = 10**6
        self._model, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
        loader = trainer.get_train_dataloader()

        def batches() -> Iterator[Any]:
            while True:
                yield from loader

        self._batches = batches()

    def step(self) -> int:
        """Take an optimiser step; return the number of tokens whose logits it computes."""
        trainer = self.trainer
        samples, count = trainer.get_batch_samples(self._batches, 1, trainer.args.device)
        inputs = samples[0]
        scored = inputs["head_index"] if "head_index" in inputs else inputs["input_ids"]
        trainer.training_step(self._model, inputs, count)
        trainer.accelerator.clip_grad_norm_(self._model.parameters(), trainer.args.max_grad_norm)
        trainer.optimizer.step()
        self._model.zero_grad()
        trainer.state.global_step += 1
        return int(scored.numel())


def relative_error(value: Tensor, expected: Tensor) -> float:
    """Return |value - expected| / |expected| of two vectors."""
    return float((value - expected).norm() / expected.norm())


@contextmanager
def on_cpu(run: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> Iterator[list[Callable[[], Any]]]:
    """Within the block a fresh process without a GPU calls a function of a module; yield what waits for each result.

    So the CPU's results do not depend on what a run on the GPU sets, and both are computed at the same time.
    """
    pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
    with mock.patch.dict(os.environ, {"CUDA_VISIBLE_DEVICES": ""}):  # the process starts here
        waiting = [pool.submit(_pickled, run, *call) for call in calls]
    try:
        yield [lambda future=future: pickle.loads(future.result()) for future in waiting]
    finally:
        pool.shutdown(cancel_futures=True)


def _pickled(run: Callable[..., Any], *args: Any) -> bytes:
    return pickle.dumps(run(*args))  # tensors by value, not as memory that is shared with a process
