"""`llamafactory-ddm fit-length x.yaml`: train and calibrate predictors of a text's length."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from llamafactory.hparams import get_train_args
from torch import Tensor
from tqdm.auto import tqdm

from ...checkpoints.plain_copy import repository_of
from ...data.canvas import Canvas
from ...data.collators import VariableLengthCollator, response_start
from ...diffusion.noise import Stream
from ...diffusion.rng import keyed_uniform
from ...evaluation.lengths import FOLDS, length_metrics, min_thresholds
from ...generation.canvas_size import CanvasSizer
from ...generation.generator import TextGenerator
from ...modeling.length_heads import REPORT_NAME, Examples, LengthPredictors, fit_heads, mean_hidden
from ...sampling.length_predictors import FirstStep
from ..logs import get_logger
from ..model.loader import load_diffusion_model, load_diffusion_tokenizer, sources
from ..model.plain_copy import resolve_model_names
from ..resolve.checks import check_checkpoint_folders
from ..resolve.datasets import load_datasets
from ..resolve.plan import resolve_run

logger = get_logger(__name__)
_EPOCHS, _LEARNING_RATE = 50, 1e-3
# What the heads are fitted to is kept in memory: places of a row that the classifier sees, and rows.
_PLACES_OF_A_ROW, _MOST_ROWS = 32, 10_000
_KEYS = ("learning_rate", "num_train_epochs", "seed", "per_device_eval_batch_size", "length_coverage")
# Of training, without a meaning here.
_IGNORED = ("per_device_train_batch_size", "gradient_accumulation_steps", "max_steps", "weight_decay", "optim")
_IGNORED_BEGINNINGS = (
    "lr_",
    "warmup_",
    "adam_",
    "save_",
    "eval_st",
    "logging_",
    "eos_window_",
    "pad_mask_",
    "pad_anneal",
)


@dataclass(frozen=True)
class Text:
    """A text whose length is known.

    Attributes:
        canvas: fixed tokens of the text, and positions for the rest.
        needed: length of the rest, EOS included.
    """

    canvas: Canvas
    needed: int


def fit_from_words(words: list[str]) -> tuple[Path, dict[str, dict[str, float]]]:
    """Call `fit` with a YAML and its overrides.

    Args:
        words: the path of the YAML, then `key=value`.
    """
    # length_coverage is read with early_stop: predict only.
    sys.argv = ["llamafactory-ddm fit-length", words[0], "early_stop=predict", *words[1:]]
    return fit(*get_train_args()[:4])


def fit(
    model_args: Any, data_args: Any, training_args: Any, finetuning_args: Any
) -> tuple[Path, dict[str, dict[str, float]]]:
    """Fit, calibrate, evaluate and save the predictors; return the file and the metrics of each predictor.

    Args:
        model_args: LLaMA-Factory's, from `get_train_args`.
        data_args: LLaMA-Factory's, with a data set to train on and one to calibrate on.
        training_args: LLaMA-Factory's, without do_train, do_eval and do_predict.
        finetuning_args: LLaMA-Factory's, with this package's keys.
    Raises:
        ValueError: naming the key that is missing or not allowed, and what to do.
        OSError: if the file cannot be written.
    """
    resolve_model_names(model_args)
    check_checkpoint_folders(model_args, finetuning_args, training_args)
    _check(data_args, training_args, finetuning_args)
    folder = Path(sources(model_args, finetuning_args.checkpoint_dir)[0])
    if not folder.is_dir() or repository_of(folder) is not None:
        raise ValueError(
            f"{repository_of(folder) or folder} is not a folder of yours, so nothing can be saved beside its weights; "
            "download it to one, and name that"
        )
    data_args.train_on_prompt = False  # the predicted length is that of the last answer
    tokenizer = load_diffusion_tokenizer(model_args, finetuning_args, training_args)
    plan = resolve_run(tokenizer, model_args, data_args, training_args, finetuning_args)
    data = load_datasets(plan, model_args, data_args, training_args, finetuning_args)
    collator = plan.collator
    if not isinstance(collator, VariableLengthCollator):
        raise ValueError(
            "the model was not trained with variable_length, so it has not learnt where a text ends; train it so first"
        )
    held_out: Any = data.module.get("eval_dataset")
    if isinstance(held_out, dict):
        held_out = [row for part in held_out.values() for row in part]
    if len(held_out) < FOLDS:
        raise ValueError(
            f"eval_dataset: {len(held_out)} held-out texts are too few to measure predicted lengths on; give at least "
            f"{FOLDS}, and for a coverage of 0.95 at least 24"
        )
    model = load_diffusion_model(plan.tokenizer, plan.vocabulary, model_args, finetuning_args, training_args)
    sizer = TextGenerator(model.to(training_args.device), plan.tokenizer, plan.config).sizer
    size, seed = training_args.per_device_eval_batch_size, training_args.seed
    train = data.module["train_dataset"]
    if len(train) > _MOST_ROWS:
        logger.info_rank0(f"dataset: the heads are fitted to the first {_MOST_ROWS} of {len(train)} texts.")
        train = train.select(range(_MOST_ROWS))
    heads = fit_heads(
        _examples(sizer, texts(train, collator, seed, 0), size, seed, len(train)),
        epochs=max(1, round(training_args.num_train_epochs)) if "num_train_epochs" in plan.user_keys else _EPOCHS,
        learning_rate=training_args.learning_rate if "learning_rate" in plan.user_keys else _LEARNING_RATE,
        seed=seed,
        device=training_args.device,
    )
    sizer.lengths = LengthPredictors(heads, {}, collator.canvas)
    steps: list[FirstStep] = []
    needed: list[Tensor] = []
    before: list[Tensor] = []
    for batch in _batches(texts(held_out, collator, seed, 1), size, "Calibrating", len(held_out)):
        steps.append(sizer.first_step([text.canvas for text in batch])[0].cpu())
        needed.append(torch.tensor([text.needed for text in batch]))
        before.append(torch.tensor([len(text.canvas) - text.canvas.n_editable for text in batch]))
    found = length_metrics(steps, needed, finetuning_args.length_coverage, n_fixed=before, block=sizer.block)
    path = LengthPredictors(heads, min_thresholds(steps, needed), collator.canvas).save(folder)
    report = {"length_coverage": finetuning_args.length_coverage, "held_out": sum(map(len, needed)), **found}
    (folder / REPORT_NAME).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return path, found


def _check(data_args: Any, training_args: Any, finetuning_args: Any) -> None:
    if getattr(finetuning_args, "diffusion_stage", None) is None:
        raise ValueError("stage: must be ddm or ddm-sft, the one that the model was trained in")
    for key in ("do_train", "do_eval", "do_predict"):
        if getattr(training_args, key):
            raise ValueError(
                f"{key}: true has no place here, the model stays as it is; remove it, and let model_name_or_path name "
                "the model whose lengths are to be predicted"
            )
    if not data_args.dataset:
        raise ValueError("dataset: is missing; the length predictors are trained on it")
    if not data_args.eval_dataset and not data_args.val_size:
        raise ValueError("eval_dataset: is missing; the length predictors are calibrated on it; set it, or val_size")
    ignored = sorted(
        key for key in finetuning_args.parsed.user_keys if key in _IGNORED or key.startswith(_IGNORED_BEGINNINGS)
    )
    if ignored:
        logger.info_rank0(f"{', '.join(ignored)}: of training, and of no meaning here; {', '.join(_KEYS)} count.")
    if data_args.streaming:
        raise ValueError("streaming: true does not go with fit-length; remove it, and set max_samples")


def texts(rows: Iterable[Any], collator: VariableLengthCollator, seed: int, part: int) -> Iterator[Text]:
    """Yield the last answer of each row with its prompt, or the rest of a document after a random position.

    Args:
        rows: rows of a prepared data set.
        collator: finds their EOS.
        seed: seed of the random positions.
        part: index of the data set; each draws positions of its own.
    """
    for number, row in enumerate(rows):
        ids, maskable, end = collator.row(row)
        first = 0 if collator.start_id is None else 1
        if "labels" in row:
            begin = int(response_start(torch.tensor(maskable), torch.tensor(end)))
        else:
            ordinal, which = torch.tensor([number]), torch.tensor([part])
            u = keyed_uniform(seed % 2**64, Stream.LENGTH_FIT, ordinal, 1, steps=which)
            begin = first + int(float(u) * (end - first))
        room = collator.canvas - begin
        given = [False] * begin + [True] * room
        shown = collator.shown(row, ids)
        yield Text(Canvas((*shown[:begin], *[0] * room), tuple(given), first), end - begin + 1)


def _batches(rows: Iterable[Text], size: int, said: str, total: int) -> Iterator[list[Text]]:
    batch: list[Text] = []
    for text in tqdm(rows, desc=said, unit="text", total=total):
        batch.append(text)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _examples(sizer: CanvasSizer, rows: Iterable[Text], size: int, seed: int, total: int) -> Examples:
    """Return the training data of the heads, on the CPU."""
    generator = torch.Generator().manual_seed(seed % 2**63)
    mean, places, states, behind = [], [], [], []
    for batch in _batches(rows, size, "Hidden states", total):
        step, hidden = sizer.first_step([text.canvas for text in batch], keep_hidden=True)
        if hidden is None:
            raise RuntimeError("the model's hidden states were not kept")
        needed = torch.tensor([text.needed for text in batch], device=hidden.device)
        mean.append(mean_hidden(hidden, step.editable).cpu())
        places.append(needed.cpu())
        row, _ = step.editable.nonzero().unbind(dim=1)
        nth = (step.editable.cumsum(dim=1) - 1)[step.editable]
        order = torch.rand(len(row), generator=generator).to(row.device)
        chosen = torch.cat([_lowest(order, row == number) for number in range(len(batch))])
        states.append(hidden[chosen].cpu())
        behind.append((nth[chosen] >= needed[row[chosen]] - 1).cpu())
    return Examples(torch.cat(mean), torch.cat(places), torch.cat(states), torch.cat(behind))


def _lowest(order: Tensor, among: Tensor) -> Tensor:
    """Return the indices of the `_PLACES_OF_A_ROW` lowest numbers where `among` is True."""
    n = min(int(among.sum()), _PLACES_OF_A_ROW)
    return order.masked_fill(~among, 2.0).argsort()[:n]
