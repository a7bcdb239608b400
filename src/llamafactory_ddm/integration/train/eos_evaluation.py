"""`eval_eos: true`: how well the model predicts EOS, saved as JSON and as a plot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...evaluation.bound import EVALUATION_SEED
from ...evaluation.eos import EosRows, columns, last_text, metrics, statistics
from ...objectives.base import CleanBatch
from ...objectives.shift import head_index
from .trainer import DiffusionTrainer

JSON, PLOT = "eos_metrics.json", "eos_metrics.png"


@torch.no_grad()
def evaluate_eos(trainer: DiffusionTrainer, dataset: Any, *, eos_ids: Sequence[int]) -> dict[str, dict[str, float]]:
    """Return the EOS metrics of a data set; they are the same for any batch size and number of ranks.

    Raises:
        ValueError: if the model was not trained with variable_length.
    """
    variable_length = trainer.diffusion_config.variable_length
    if variable_length is None:
        raise ValueError(
            "eval_eos: true needs a model that was trained with variable_length; remove eval_eos, or train with it"
        )
    dataloader = trainer.get_eval_dataloader(dataset)
    total = torch.zeros(columns(), dtype=torch.float64)
    device = trainer.args.device
    for model, batch, sample_index in trainer.evaluation_batches(dataloader, "EOS metrics"):
        clean = trainer.objective.clean(batch)

        def masked_logits(masked: Tensor, model: Any = model, clean: CleanBatch = clean) -> Tensor:
            z = clean.displayed(clean.x_0.masked_fill(masked, trainer.objective.mask_id))
            index = head_index(masked, trainer.objective.shift)
            logits = trainer.bound_logits(model, z, index, clean.placement()).float()
            return logits.index_fill(1, torch.tensor([trainer.objective.mask_id], device=device), float("-inf"))

        padding = torch.zeros_like(clean.maskable) if clean.is_padding is None else clean.is_padding
        end = clean.end if clean.end is not None else torch.full((len(sample_index),), -1)
        # A [MASK] within an answer stays fixed, but does not separate two answers.
        labelled = batch["maskable"].to("cpu")
        row_statistics = statistics(
            EosRows(clean.maskable & last_text(labelled, end), padding, end, EVALUATION_SEED, sample_index),
            masked_logits,
            eos_ids=eos_ids,
            pad_ids=variable_length.pad_token_ids,
        )
        gathered: Tensor = trainer.accelerator.gather_for_metrics(row_statistics.float().to(device))
        total += gathered.cpu().double().sum(dim=0)
    return metrics(total)


def write_eos_metrics(eos_metrics: dict[str, dict[str, float]], folder: str | Path) -> None:
    """Write the metrics as JSON, and a plot of them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    path = Path(folder)
    (path / JSON).write_text(json.dumps(eos_metrics, indent=2) + "\n", encoding="utf-8")
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4))
    for axes, group, keys in (
        (left, "revealed", ("p_eos", "top1", "mrr")),
        (right, "quarter", ("precision", "recall", "f1")),
    ):
        names = [name for name in eos_metrics if name.startswith(group)]
        for key in keys:
            x, y = [float(name.split()[1]) for name in names], [eos_metrics[name][key] for name in names]
            axes.plot(x, y, "o-", label=key)
    left.set(xlabel="revealed fraction of the text", ylim=(0, 1), title="EOS at its position, in one step")
    right.set(xlabel="quarter of the canvas where masking starts", ylim=(0, 1), title="EOS or padding, in one step")
    right.set_xticks([1, 2, 3, 4])
    left.legend()
    right.legend()
    figure.tight_layout()
    figure.savefig(path / PLOT, dpi=120)
    pyplot.close(figure)
