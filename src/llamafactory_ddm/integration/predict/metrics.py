"""What is measured of generated texts."""

from __future__ import annotations

from ...evaluation.metrics import exact_match, gsm8k_accuracy, rouge
from ..logs import get_logger
from .progress import Collected

logger = get_logger(__name__)


def metrics_of(records: Collected) -> dict[str, float]:
    """Return metrics of the records of generated_predictions.jsonl, with the prefix `predict_`.

    They are gone through once, and nothing is kept of those without a label.
    """
    total = dict.fromkeys(("tokens", "forwards", "computed", "edits"), 0)
    predictions: list[str] = []
    labels: list[str] = []
    edited = False
    for record in records:
        for key in total:
            total[key] += record.get(key, 0)
        edited = edited or "edits" in record
        if "label" in record:
            predictions.append(record["predict"])
            labels.append(record["label"])
    metrics: dict[str, float] = {
        "predict_samples": len(records),
        "predict_tokens_per_forward": total["tokens"] / total["forwards"],
        "predict_computed_tokens": total["computed"] / len(records),
    }
    if edited:
        metrics["predict_edits_per_sample"] = total["edits"] / len(records)
    if not labels:
        return metrics
    if len(labels) < len(records):
        metrics["predict_labelled_samples"] = len(labels)
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
