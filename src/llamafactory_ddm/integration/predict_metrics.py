"""What is measured of generated texts."""

from __future__ import annotations

from typing import Any

from ..evaluation.metrics import exact_match, gsm8k_accuracy, rouge
from .logs import get_logger

logger = get_logger(__name__)


def metrics_of(records: list[dict[str, Any]]) -> dict[str, float]:
    """Return metrics of the records of generated_predictions.jsonl, with the prefix `predict_`."""
    tokens, forwards, computed = (sum(record[key] for record in records) for key in ("tokens", "forwards", "computed"))
    metrics: dict[str, float] = {
        "predict_samples": len(records),
        "predict_tokens_per_forward": tokens / forwards,
        "predict_computed_tokens": computed / len(records),
    }
    if "edits" in records[0]:
        metrics["predict_edits_per_sample"] = sum(record["edits"] for record in records) / len(records)
    labelled = [record for record in records if "label" in record]
    if not labelled:
        return metrics
    if len(labelled) < len(records):
        metrics["predict_labelled_samples"] = len(labelled)
    predictions, labels = ([record[key] for record in labelled] for key in ("predict", "label"))
    metrics["predict_exact_match"] = exact_match(predictions, labels)
    accuracy = gsm8k_accuracy(predictions, labels)
    if accuracy is not None:
        metrics["predict_gsm8k_accuracy"] = accuracy
    scores = rouge(predictions, labels)
    if scores is None:
        logger.warning_rank0(
            'ROUGE is left out, as rouge-score is not installed: pip install "llamafactory-ddm[eval]"'
        )
    for name, value in (scores or {}).items():
        metrics[f"predict_{name}"] = value
    return metrics
