"""`llamafactory-ddm prepare-data x.yaml`: a corpus to blocks, with the tokenizer that `stage: ddm` would use."""

from __future__ import annotations

from typing import Any

from datasets import load_from_disk
from llamafactory.hparams import get_train_args

from ..data.control_tokens import control_texts, reading_as_text
from ..data.corpus.encoder import Encoder
from ..data.corpus.keys import split_own
from ..data.corpus.prepare import begin, finish, make_blocks, plan, write_metadata
from ..utils.files import explain_disk_errors
from ..utils.run_lock import run_lock
from .data.tokenized_folder import write_row_settings
from .logs import get_logger, hide_harmless_messages
from .model.loader import load_diffusion_tokenizer
from .resolve.checks import check_inputs
from .resolve.model_names import resolve_model_names
from .resolve.plan import RunPlan, resolve_run

logger = get_logger(__name__)


def prepare_data(values: dict[str, Any]) -> dict[str, Any]:
    """Write the blocks of a corpus, or what is missing of them, and return the report.

    Args:
        values: the keys of the YAML.
    Raises:
        ValueError: for a mistake in the YAML or the files.
        OSError: if a file cannot be written.
    """
    keys, others = split_own(values)
    run = _resolve({**others, "cutoff_len": keys.cutoff_len, "output_dir": keys.tokenized_path})
    controls = control_texts(run.tokenizer, [run.vocabulary.mask.token, *run.vocabulary.pad_tokens])
    eos_token = "<|end_of_text|>" if others.get("template") == "llama3" else run.tokenizer.eos_token  # as upstream
    preparation = plan(keys, Encoder.of(reading_as_text(run.tokenizer, controls), eos_token))
    with run_lock(preparation.folder, key="tokenized_path"):
        report = begin(preparation)
        if report is not None:
            logger.info_rank0(f"{preparation.folder} is complete already.")
            return report
        with explain_disk_errors(preparation.folder, key="tokenized_path"):
            make_blocks(preparation)
            write_metadata(preparation)
            settings = {"packing": True, "variable_length": False}
            write_row_settings(str(preparation.folder), settings, _opened(preparation.folder), run.tokenizer)
            return finish(preparation)


def _opened(folder: Any) -> dict[str, Any]:
    return {"train_dataset": load_from_disk(str(folder))["train"]}


def _resolve(values: dict[str, Any]) -> RunPlan:
    """Return the plan of a run of `stage: ddm` with these keys, for its tokenizer.

    Raises:
        ValueError: for another stage, or a mistake in the keys.
    """
    stage = values.setdefault("stage", "ddm")
    if stage != "ddm":
        raise ValueError(f"stage: {stage} cannot be prepared by prepare-data, which packs text; set stage: ddm")
    if not values.get("model_name_or_path"):
        raise ValueError("model_name_or_path is missing; name the model whose tokenizer is used")
    model_args, data_args, training_args, finetuning_args, _ = get_train_args({"use_cpu": True, **values})
    for name, is_packed in (
        ("variable_length", finetuning_args.variable_length in (None, "none")),
        ("packing", data_args.packing),
    ):
        if not is_packed:
            raise ValueError(
                f"{name}: {values.get(name)} cannot be prepared by prepare-data, which packs text; remove {name}, or "
                "let llamafactory-cli train prepare the rows"
            )
    with hide_harmless_messages(on_cpu=True):
        resolve_model_names(model_args)
        check_inputs(model_args, training_args, finetuning_args, prepares=True)
        # The tokens are those of a run that trains the whole model, whatever the checkpoint has learnt.
        training_args.do_train, finetuning_args.finetuning_type = True, "full"
        tokenizer = load_diffusion_tokenizer(model_args, finetuning_args, training_args)
        return resolve_run(tokenizer, model_args, data_args, training_args, finetuning_args)


def as_table(report: dict[str, Any]) -> str:
    """Return the counts of a report as text, a line for each source."""
    head = f"{'source':<20} {'documents':>12} {'kept':>12} {'tokens':>15} {'blocks':>10}"
    lines = [head]
    for name, counts in report["sources"].items():
        n_blocks = report["train"][name]
        lines.append(
            f"{name[:20]:<20} {counts['documents']:>12,} {counts['kept']:>12,} {counts['tokens']:>15,} {n_blocks:>10,}"
        )
        lines += [f"  dropped by {reason}: {number:,}" for reason, number in counts["dropped"].items()]
    folder = report["settings"]
    n_validation = sum(counts["blocks"].get("validation", 0) for counts in report["sources"].values())
    if n_validation:
        lines.append(f"validation: {n_validation:,} blocks")
    lines.append(f"blocks of {folder['cutoff_len']} tokens")
    return "\n".join(lines)
