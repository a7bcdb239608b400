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
    ends = trainer.diffusion_config.variable_length
    if ends is None:
        raise ValueError("eval_eos: true needs variable_length, which says what stands behind the end of a text")
    dataloader = trainer.get_eval_dataloader(dataset)
    total = torch.zeros(columns(), dtype=torch.float64)
    device = trainer.args.device
    for model, batch, sample_index in trainer.prepared_batches(dataloader, "End-of-text metrics"):
        clean = trainer.objective.clean(batch)

        def logits(masked: Tensor, model: Any = model, clean: CleanBatch = clean) -> Tensor:
            z = clean.displayed(clean.x_0.masked_fill(masked, trainer.objective.mask_id))
            wanted = head_index(masked, trainer.objective.shift)
            found = trainer.bound_logits(model, z, wanted, clean.placement())
            return found.float().index_fill(1, torch.tensor([trainer.objective.mask_id], device=device), float("-inf"))

        padding = torch.zeros_like(clean.maskable) if clean.is_padding is None else clean.is_padding
        end = clean.end if clean.end is not None else torch.full((len(sample_index),), -1)
        # A [MASK] within an answer is fixed, but it does not separate two answers.
        labelled = batch["maskable"].to("cpu")
        found = statistics(
            EosRows(clean.maskable & last_text(labelled, end), padding, end, EVALUATION_SEED, sample_index),
            logits,
            eos_ids=eos_ids,
            pad_ids=ends.pad_token_ids,
        )
        gathered: Tensor = trainer.accelerator.gather_for_metrics(found.float().to(device))
        total += gathered.cpu().double().sum(dim=0)
    return metrics(total)


def save_eos_metrics(found: dict[str, dict[str, float]], folder: str | Path) -> None:
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
