"""Held-out evaluation inside upstream's trainer: the evidence bound, and the likelihood by quarter of the noise."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ...diffusion.likelihood import evaluation_times
from ...modeling.quantization import evaluation_mode
from ...objectives.shift import head_rows

if TYPE_CHECKING:
    from .trainer import DiffusionTrainer
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ...evaluation.end_metrics import EndRows, columns, last_text, metrics, statistics
from ...objectives.base import CleanBatch

if TYPE_CHECKING:
    from .trainer import DiffusionTrainer

# Evaluation draws the same noise whatever seed trained the model, so that runs compare.
EVALUATION_SEED = 0
_QUARTERS = 4


@torch.no_grad()
def evaluate_bound(
    trainer: DiffusionTrainer, dataloader: DataLoader, *, description: str, prefix: str
) -> tuple[dict[str, float], int]:
    """Return the metrics of a data set and the number of its rows.

    `{prefix}_loss` is the evidence bound in nats per token, `{prefix}_perplexity_bound` its exponential,
    `{prefix}_nll` the cross-entropy in nats per masked token, and `{prefix}_nll_q1` to `q4` the same by quarter of the
    noise level; under mixed noise `{prefix}_kl` the divergence per token in place of it.

    Raises:
        ValueError: if the data set holds no token to predict.
    """
    # Columns: bound, tokens that it is of, then summed terms and scored tokens of each quarter.
    total = torch.zeros(2 + 2 * _QUARTERS, dtype=torch.float64)
    n_rows = 0
    for model, batch, rows in prepared_batches(trainer, dataloader, description):
        statistics = _row_statistics(trainer, model, batch, rows)
        gathered: Tensor = trainer.accelerator.gather_for_metrics(statistics.to(trainer.args.device))
        total += gathered.cpu().double().sum(dim=0)
        n_rows += len(gathered)
    if total[1] == 0:
        raise ValueError(
            "the evaluation data set holds no token to predict; check eval_dataset, val_size and cutoff_len"
        )
    return _metrics(total.tolist(), prefix, trainer.objective.term), n_rows


def prepared_batches(
    trainer: DiffusionTrainer, dataloader: DataLoader, description: str
) -> Iterator[tuple[Any, dict[str, Tensor], Tensor]]:
    """Give the model, as it evaluates, with each batch and the ordinals of its rows within the data set."""
    model = _prepared(trainer, dataloader)
    trainer.probe(model)
    args = trainer.args
    progress = tqdm(dataloader, desc=description, disable=args.disable_tqdm or not trainer.is_world_process_zero())
    with evaluation_mode(model):
        for ordinal, batch in enumerate(progress):
            first = (ordinal * args.world_size + args.process_index) * args.eval_batch_size
            yield model, batch, torch.arange(first, first + len(batch["input_ids"]))


def _prepared(trainer: DiffusionTrainer, dataloader: DataLoader) -> Any:
    model = trainer._wrap_model(trainer.model, training=False, dataloader=dataloader)
    if not trainer.accelerator._models and model is trainer.model:
        if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
            model = trainer.accelerator.prepare(model)
        else:
            model = trainer.accelerator.prepare_model(model, evaluation_mode=True)
        if trainer.is_fsdp_enabled:
            trainer.model = model
    if not trainer.is_in_train:
        if trainer.args.fp16_full_eval:
            model = model.to(dtype=torch.float16, device=trainer.args.device)
        elif trainer.args.bf16_full_eval:
            model = model.to(dtype=torch.bfloat16, device=trainer.args.device)
    return model


def _row_statistics(trainer: DiffusionTrainer, model: Any, batch: dict[str, Tensor], rows: Tensor) -> Tensor:
    """Return [batch, 10] float32 on the CPU: see `evaluate_bound` for the columns."""
    objective, samples = trainer.objective, trainer.eval_time_samples
    clean = objective.clean(batch)
    statistics = torch.zeros(len(clean.x_0), 2 + 2 * _QUARTERS, dtype=torch.float64)
    levels = evaluation_times(rows, samples)
    device = trainer.args.device
    placement = {name: value.to(device) for name, value in clean.placement().items()}
    for sample in range(samples):
        level = levels[:, sample]
        noised = objective.evaluation(clean, level, seed=EVALUATION_SEED, rows=rows * samples + sample)
        wanted = head_rows(noised.is_scored, objective.shift).to(device)
        logits = trainer.bound_logits(model, clean.displayed(noised.z).to(device), wanted, placement)
        terms, bound = objective.evaluate(logits, clean, noised)
        statistics[:, 0] += bound / samples
        statistics[:, 1] = noised.n_counted
        quarter = (noised.level * _QUARTERS).long()
        row = noised.is_scored.nonzero()[:, 0]
        statistics.index_put_((row, 2 + 2 * quarter[row]), terms * noised.weight[row], accumulate=True)
        scored = noised.is_scored.sum(dim=1) * noised.weight
        statistics.index_put_((torch.arange(len(clean.x_0)), 3 + 2 * quarter), scored, accumulate=True)
    return statistics.float()


def _metrics(total: list[float], prefix: str, term: str) -> dict[str, float]:
    loss = total[0] / total[1]
    terms, scored = sum(total[2::2]), sum(total[3::2])
    metrics = {
        f"{prefix}_loss": loss,
        f"{prefix}_perplexity_bound": math.exp(min(loss, 700.0)),
        f"{prefix}_{term}": terms / scored,
    }
    for quarter in range(_QUARTERS):
        if total[3 + 2 * quarter]:
            metrics[f"{prefix}_{term}_q{quarter + 1}"] = total[2 + 2 * quarter] / total[3 + 2 * quarter]
    return metrics


JSON, PLOT = "eos_metrics.json", "eos_metrics.png"


@torch.no_grad()
def evaluate_ends(trainer: DiffusionTrainer, dataset: Any, *, end_ids: Sequence[int]) -> dict[str, dict[str, float]]:
    """Return the metrics of a data set whose rows have ends: the same for any batch size or number of ranks.

    Raises:
        ValueError: if the model was not trained with variable_length.
    """
    ends = trainer.diffusion_config.variable_length
    if ends is None:
        raise ValueError("eval_eos: true needs variable_length, which says what stands behind the end of a text")
    dataloader = trainer.get_eval_dataloader(dataset)
    total = torch.zeros(columns(), dtype=torch.float64)
    device = trainer.args.device
    for model, batch, rows in prepared_batches(trainer, dataloader, "End-of-text metrics"):
        clean = trainer.objective.clean(batch)
        placement = {name: value.to(device) for name, value in clean.placement().items()}

        def logits(
            masked: Tensor, model: Any = model, clean: CleanBatch = clean, placement: Any = placement
        ) -> Tensor:
            z = clean.displayed(clean.x_0.masked_fill(masked, trainer.objective.mask_id)).to(device)
            found = trainer.bound_logits(model, z, head_rows(masked, trainer.objective.shift).to(device), placement)
            return found.float().index_fill(1, torch.tensor([trainer.objective.mask_id], device=device), float("-inf"))

        padding = torch.zeros_like(clean.maskable) if clean.is_padding is None else clean.is_padding
        end = clean.end if clean.end is not None else torch.full((len(rows),), -1)
        # A [MASK] within an answer is given, but the answer does not begin behind it.
        labelled = batch["maskable"].to("cpu")
        found = statistics(
            EndRows(clean.maskable & last_text(labelled, end), padding, end, EVALUATION_SEED, rows),
            logits,
            end_ids=end_ids,
            pad_ids=ends.pad_token_ids,
        )
        gathered: Tensor = trainer.accelerator.gather_for_metrics(found.float().to(device))
        total += gathered.cpu().double().sum(dim=0)
    return metrics(total)


def save_end_metrics(found: dict[str, dict[str, float]], folder: str | Path) -> None:
    """Write the metrics as JSON, and a plot of them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    path = Path(folder)
    (path / JSON).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4))
    shares = [name for name in found if name.startswith("revealed")]
    for key in ("p_eos", "top1", "mrr"):
        left.plot([float(name.split()[1]) for name in shares], [found[name][key] for name in shares], "o-", label=key)
    left.set(xlabel="share of the text that is given", ylim=(0, 1), title="the end, at its place, in one step")
    quarters = [name for name in found if name.startswith("quarter")]
    for key in ("precision", "recall", "f1"):
        right.plot(
            [int(name.split()[1]) for name in quarters], [found[name][key] for name in quarters], "o-", label=key
        )
    right.set(xlabel="quarter of the canvas that is cut in", ylim=(0, 1), title="what is no text, in one step")
    right.set_xticks([1, 2, 3, 4])
    left.legend()
    right.legend()
    figure.tight_layout()
    figure.savefig(path / PLOT, dpi=120)
    pyplot.close(figure)
