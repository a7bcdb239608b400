"""`llamafactory-ddm fit-length x.yaml`: train and calibrate the length predictors of a trained model."""

from __future__ import annotations

import itertools
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

from ...checkpoints.hub import repository_of
from ...data.canvas import Canvas
from ...data.collators import VariableLengthCollator, response_start
from ...diffusion.noise import Stream
from ...diffusion.rng import keyed_uniform
from ...evaluation.lengths import FOLDS, length_metrics, min_thresholds
from ...generation.canvas_size import CanvasSizer
from ...generation.generator import TextGenerator
from ...modeling.length_heads import REPORT_NAME, Examples, LengthPredictors, fit_heads, mean_hidden
from ...sampling.length_predictors import FirstStep
from ...utils.files import replacing
from ...utils.run_lock import run_lock
from ..logs import get_logger
from ..model.loader import load_diffusion_model, load_diffusion_tokenizer, sources
from ..resolve.checks import check_checkpoint_folders
from ..resolve.datasets import load_datasets
from ..resolve.model_names import resolve_model_names
from ..resolve.plan import resolve_run

logger = get_logger(__name__)
_EPOCHS, _LEARNING_RATE = 50, 1e-3
# The training data of the heads is kept in memory, so both are limited.
_MAX_TEXTS, _POSITIONS_PER_TEXT = 10_000, 32
_USED_KEYS = ("learning_rate", "num_train_epochs", "seed", "per_device_eval_batch_size", "length_coverage")
# Keys of training that fit-length does not use, by name and by prefix.
_IGNORED_KEYS = ("per_device_train_batch_size", "gradient_accumulation_steps", "max_steps", "weight_decay", "optim")
_IGNORED_PREFIXES = (
    "lr_",
    "warmup_",
    "adam_",
    "save_",
    "eval_st",
    "eval_task",
    "sample_",
    "logging_",
    "eos_window_",
    "pad_mask_",
    "pad_anneal",
)


@dataclass(frozen=True)
class LengthExample:
    """The start of a text, and the length of its rest.

    Attributes:
        canvas: first tokens of the text, fixed, and positions for the rest.
        needed: positions that the rest takes, EOS included.
    """

    canvas: Canvas
    needed: int


def fit_from_command_line(argv: list[str]) -> tuple[Path, dict[str, dict[str, float]]]:
    """Call `fit` with the arguments of a YAML and its overrides.

    Args:
        argv: the path of the YAML, then `key=value` overrides.
    """
    # length_coverage is read with early_stop: predict only.
    sys.argv = ["llamafactory-ddm fit-length", argv[0], "early_stop=predict", *argv[1:]]
    return fit(*get_train_args()[:4])


def fit(
    model_args: Any, data_args: Any, training_args: Any, finetuning_args: Any
) -> tuple[Path, dict[str, dict[str, float]]]:
    """Fit, calibrate, evaluate and save the length predictors; return their file and the metrics of each.

    Args:
        model_args: LLaMA-Factory's, from `get_train_args`.
        data_args: LLaMA-Factory's, with a data set to train on and one to calibrate on.
        training_args: LLaMA-Factory's, without do_train, do_eval and do_predict.
        finetuning_args: LLaMA-Factory's, with this package's keys.
    Raises:
        ValueError: naming the key that is missing or not allowed, and what to do; or if another run uses the folder.
        OSError: if the file cannot be written.
    """
    resolve_model_names(model_args)
    check_checkpoint_folders(model_args, finetuning_args, training_args)
    _check_keys(data_args, training_args, finetuning_args)
    folder = Path(sources(model_args, finetuning_args.checkpoint_dir)[0])
    if not folder.is_dir() or repository_of(folder) is not None:
        raise ValueError(
            f"{repository_of(folder) or folder} is not a local folder, and the length predictors are saved beside the "
            "weights; download it, and set model_name_or_path (checkpoint_dir, adapter_name_or_path) to its folder"
        )
    with run_lock(folder):
        return _fit(folder, model_args, data_args, training_args, finetuning_args)


def _fit(
    folder: Path, model_args: Any, data_args: Any, training_args: Any, finetuning_args: Any
) -> tuple[Path, dict[str, dict[str, float]]]:
    """Fit and save as `fit` does; the caller holds the lock of `folder`."""
    data_args.train_on_prompt = False  # the length of the last answer is predicted
    tokenizer = load_diffusion_tokenizer(model_args, finetuning_args, training_args)
    plan = resolve_run(tokenizer, model_args, data_args, training_args, finetuning_args)
    if plan.config.attention == "block":
        raise ValueError(
            "attention: block: length predictors look at a whole masked canvas, which a block model never sees; it "
            "needs none, as it computes nothing behind the block that it decodes"
        )
    data = load_datasets(plan, model_args, data_args, training_args, finetuning_args)
    collator = plan.collator
    if not isinstance(collator, VariableLengthCollator):
        raise ValueError(
            "variable_length: the model was trained without it, so it has not learnt where a text ends; train it with "
            "variable_length first"
        )
    held_out = _check_held_out(data.module.get("eval_dataset"))
    model = load_diffusion_model(plan.tokenizer, plan.vocabulary, model_args, finetuning_args, training_args)
    sizer = TextGenerator(model.to(training_args.device), plan.tokenizer, plan.config).sizer
    batch_size, seed = training_args.per_device_eval_batch_size, training_args.seed
    train = data.module["train_dataset"]
    if len(train) > _MAX_TEXTS:
        logger.info_rank0(f"dataset: the heads are fitted to the first {_MAX_TEXTS} of {len(train)} texts.")
        train = train.select(range(_MAX_TEXTS))
    heads = fit_heads(
        _compute_head_inputs(sizer, length_examples(train, collator, seed, 0), batch_size, seed, len(train)),
        epochs=max(1, round(training_args.num_train_epochs)) if "num_train_epochs" in plan.user_keys else _EPOCHS,
        learning_rate=training_args.learning_rate if "learning_rate" in plan.user_keys else _LEARNING_RATE,
        seed=seed,
        device=training_args.device,
    )
    sizer.lengths = LengthPredictors(heads, {}, collator.canvas)
    steps, needed, fixed = _compute_first_steps(
        sizer, length_examples(held_out, collator, seed, 1), batch_size, len(held_out)
    )
    metrics = length_metrics(steps, needed, finetuning_args.length_coverage, n_fixed=fixed, block=sizer.block)
    path = LengthPredictors(heads, min_thresholds(steps, needed), collator.canvas).save(folder)
    report = {"length_coverage": finetuning_args.length_coverage, "held_out": sum(map(len, needed)), **metrics}
    with replacing(folder / REPORT_NAME) as file:
        file.write(json.dumps(report, indent=2) + "\n")
    return path, metrics


def _check_keys(data_args: Any, training_args: Any, finetuning_args: Any) -> None:
    if getattr(finetuning_args, "diffusion_stage", None) is None:
        raise ValueError(f"stage must be ddm or ddm-sft, got {finetuning_args.stage!r}; set the model's stage")
    for key in ("do_train", "do_eval", "do_predict"):
        if getattr(training_args, key):
            raise ValueError(
                f"{key}: true does not work with fit-length, which leaves the model unchanged; remove it, and set "
                "model_name_or_path to the trained model"
            )
    if not data_args.dataset:
        raise ValueError("dataset: is missing; set it to the texts that the length predictors are trained on")
    if not data_args.eval_dataset and not data_args.val_size:
        raise ValueError("eval_dataset: is missing; the length predictors are calibrated on it; set it, or val_size")
    ignored = sorted(
        key for key in finetuning_args.parsed.user_keys if key in _IGNORED_KEYS or key.startswith(_IGNORED_PREFIXES)
    )
    if ignored:
        logger.info_rank0(f"fit-length does not use {', '.join(ignored)}; it uses {', '.join(_USED_KEYS)}.")
    if data_args.streaming:
        raise ValueError("streaming: true does not work with fit-length; remove it, and set max_samples")


def _check_held_out(eval_dataset: Any) -> Any:
    """Return the rows of the held-out data set or data sets.

    Raises:
        ValueError: if there are too few.
    """
    held_out = eval_dataset
    if isinstance(eval_dataset, dict):
        held_out = [row for dataset in eval_dataset.values() for row in dataset]
    if len(held_out) < FOLDS:
        raise ValueError(
            f"eval_dataset: {len(held_out)} texts are too few to calibrate and measure predicted lengths; at least "
            f"{FOLDS} are needed, with length_coverage: 0.95 at least 24; add texts, or raise val_size or max_samples"
        )
    return held_out


def length_examples(
    rows: Iterable[Any], collator: VariableLengthCollator, seed: int, dataset_index: int
) -> Iterator[LengthExample]:
    """Yield an example of each row: its last answer after the prompt, or a document after a random position.

    Args:
        rows: rows of a prepared data set.
        collator: finds EOS of a row.
        seed: seed of the random positions.
        dataset_index: 0 for training, 1 for held-out rows; they draw different random positions.
    """
    for index, row in enumerate(rows):
        ids, maskable, end = collator.row(row)
        first = 0 if collator.start_id is None else 1
        if "labels" in row:
            begin = int(response_start(torch.tensor(maskable), torch.tensor(end)))
        else:
            sample_index, steps = torch.tensor([index]), torch.tensor([dataset_index])
            u = keyed_uniform(seed % 2**64, Stream.LENGTH_FIT, sample_index, 1, steps=steps)
            begin = first + int(float(u) * (end - first))
        num_editable = collator.canvas - begin
        editable = (False,) * begin + (True,) * num_editable
        input_ids = (*collator.shown(row, ids)[:begin], *[0] * num_editable)
        yield LengthExample(Canvas(input_ids, editable, first), end - begin + 1)


def _batches(
    examples: Iterable[LengthExample], batch_size: int, description: str, total: int
) -> Iterator[list[LengthExample]]:
    progress = iter(tqdm(examples, desc=description, unit="text", total=total))
    while batch := list(itertools.islice(progress, batch_size)):
        yield batch


def _compute_head_inputs(
    sizer: CanvasSizer, examples: Iterable[LengthExample], batch_size: int, seed: int, total: int
) -> Examples:
    """Return the training data of the heads, on the CPU."""
    generator = torch.Generator().manual_seed(seed % 2**63)
    means, lengths, states, is_after_end = [], [], [], []
    for batch in _batches(examples, batch_size, "Hidden states", total):
        step, hidden = sizer.first_step([example.canvas for example in batch], keep_hidden=True)
        if hidden is None:
            raise RuntimeError("the model's hidden states were not kept")
        needed = torch.tensor([example.needed for example in batch], device=hidden.device)
        means.append(mean_hidden(hidden, step.editable).cpu())
        lengths.append(needed.cpu())
        # All three are [n_editable]: the row, the index among its editable positions, and a random sort key.
        row_index, _ = step.editable.nonzero().unbind(dim=1)
        editable_index = (step.editable.cumsum(dim=1) - 1)[step.editable]
        sort_key = torch.rand(len(row_index), generator=generator).to(row_index.device)
        sampled = torch.cat([_select_lowest(sort_key, row_index == row) for row in range(len(batch))])
        states.append(hidden[sampled].cpu())
        is_after_end.append((editable_index[sampled] >= needed[row_index[sampled]] - 1).cpu())
    return Examples(torch.cat(means), torch.cat(lengths), torch.cat(states), torch.cat(is_after_end))


def _compute_first_steps(
    sizer: CanvasSizer, examples: Iterable[LengthExample], batch_size: int, total: int
) -> tuple[list[FirstStep], list[Tensor], list[Tensor]]:
    """Return the first step of each batch on the CPU, and [batch] int64 the needed positions and the fixed tokens."""
    steps, needed, fixed = [], [], []
    for batch in _batches(examples, batch_size, "Calibrating", total):
        steps.append(sizer.first_step([example.canvas for example in batch])[0].cpu())
        needed.append(torch.tensor([example.needed for example in batch]))
        fixed.append(torch.tensor([len(example.canvas) - example.canvas.n_editable for example in batch]))
    return steps, needed, fixed


def _select_lowest(sort_key: Tensor, candidates: Tensor) -> Tensor:
    """Return the indices of the `_POSITIONS_PER_TEXT` lowest keys among the candidates.

    Args:
        sort_key: [n_editable] in [0, 1).
        candidates: [n_editable] bool.
    """
    n = min(int(candidates.sum()), _POSITIONS_PER_TEXT)
    return sort_key.masked_fill(~candidates, 2.0).argsort()[:n]
